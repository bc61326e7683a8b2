"""A rate as `tc` writes it (`400mbit`), and the token bucket that keeps to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshwright.errors import UserError

MTU = 9000
"""Bytes of a packet in the lab, on every link: at 1500, headers alone would be more than 3 % of what is sent."""

_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)([kmgt]i?|)(bit|bps)", re.ASCII | re.IGNORECASE)
_SMALLEST_BITS, _LARGEST_BITS = 8_000, 10**12

_SMALLEST_BURST_BYTES = 20_000
"""Two packets: a bucket smaller than a packet drops it, and so stops the link for ever."""
_BURST_SECONDS = 0.001
"""What may pass at once after a pause, in time. Small, so that short messages also take as long as the rate says."""
_SEGMENT_BYTES, _SEGMENT_SECONDS = 70_000, 0.003
"""The kernel hands over segments of 64 KiB and headers. A bucket that is smaller makes it cut them to packets, at twice
the CPU: cores on which ranks compute. So it is as large, unless that would be more than so long."""
_SMALLEST_QUEUE_BYTES = 256 * 1024
_QUEUE_SECONDS = 0.1
"""How long a packet may wait in a link's queue before the queue is full and packets are dropped."""


@dataclass(frozen=True)
class Rate:
    """Bits in a second, and the settings of `tc tbf` for them."""

    text: str
    """As the user wrote it."""
    bits_per_second: int

    @classmethod
    def parse(cls, text: str, name: str = "rate") -> Rate:
        """The rate of a text such as `400mbit`, `1.5gbit` or `50mbps` (bytes, as `tc` has it).

        Raises UserError, with `name` as what the user set.
        """
        found = _PATTERN.fullmatch(text.strip())
        if found is None:
            rule = "a number and its unit, kbit, mbit or gbit; kbps, mbps and gbps are bytes, as tc has it"
            raise UserError(f"{name} = {text!r} is not a rate ({rule}): write it like 400mbit")
        number, prefix, unit = found.groups()
        bits = float(number) * _PREFIX[prefix.lower()] * (8 if unit.lower() == "bps" else 1)
        if not _SMALLEST_BITS <= bits <= _LARGEST_BITS:
            raise UserError(f"{name} = {text!r} is out of range (a link has 8kbit to 1tbit): choose a rate in it")
        return cls(text.strip(), round(bits))

    @property
    def bytes_per_second(self) -> float:
        """Everything counts: payload, headers of TCP and IP, Ethernet frames."""
        return self.bits_per_second / 8

    @property
    def burst_bytes(self) -> int:
        """Size of the bucket."""
        segment = min(_SEGMENT_BYTES, round(_SEGMENT_SECONDS * self.bytes_per_second))
        return max(_SMALLEST_BURST_BYTES, segment, round(_BURST_SECONDS * self.bytes_per_second))

    @property
    def queue_bytes(self) -> int:
        """Size of the queue before the bucket."""
        return self.burst_bytes + max(_SMALLEST_QUEUE_BYTES, round(_QUEUE_SECONDS * self.bytes_per_second))

    def qdisc(self) -> str:
        """What `tc qdisc replace dev DEV root` takes."""
        return f"tbf rate {self.bits_per_second}bit burst {self.burst_bytes} limit {self.queue_bytes}"


def rate_bytes_per_second(text: str, name: str = "rate") -> float:
    """Bytes a second of a rate such as `400mbit`. Raises UserError, in which `name` is what was set."""
    return Rate.parse(text, name).bytes_per_second
