"""The command line: `entry` finds the command, `options` come in, `commands` do it, `show` prints.

torch is imported only by those commands that run it, and there inside the function.
"""

from meshwright.cli.entry import main

__all__ = ["main"]
