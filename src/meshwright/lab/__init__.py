"""An emulated cluster on one Linux machine: network namespaces as hosts, rate-limited links between and inside them.

rates.py    a rate, and the token bucket that keeps to it
system.py   what the machine must have; calling ip and tc; which processes are in a namespace
names.py    what a lab's namespaces are called, whose they are, and removing those that nobody owns any more
running.py  what runs on the hosts: arguments, environment, and ending all when one fails
cluster.py  `Lab`: made, limited, counted, closed
program.py  `meshwright lab`: signals in, exit code out
"""

from meshwright.lab.cluster import Counter, Lab, obstacle
from meshwright.lab.names import clean
from meshwright.lab.rates import Rate, rate_bytes_per_second

__all__ = ["Counter", "Lab", "Rate", "clean", "obstacle", "rate_bytes_per_second"]
