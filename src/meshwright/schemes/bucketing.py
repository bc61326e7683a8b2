"""How large a bucket of gradients should be: data parallelism with overlap, as a model of four numbers.

    s      bytes of all gradients           w      bytes of gradient that an all-reduce gets through in a second
    o      seconds per call                 t_bwd  seconds of backward
    n      buckets of s/n bytes, each ready after another t_bwd/n of backward

exposed(n) is what a step takes longer than its backward. Transfers run beside backward, calls beside nothing:

    hidden   a bucket's transfer fits under its backward, s/(n·w) ≤ t_bwd/n, which is s/w ≤ t_bwd whatever n is.
             Only the last bucket has no backward to hide under:
                 exposed = n·o + s/(n·w)                        n* = sqrt(s/(w·o))       bucket = sqrt(s·w·o)
    wire     it does not. The wire is busy from the first bucket to the last, under t_bwd·(n-1)/n of backward:
                 exposed = n·o + s/w - t_bwd·(n-1)/n            n* = sqrt(t_bwd/o)       bucket = s·sqrt(o/t_bwd)

The two are one formula, with h = min(s/w, t_bwd) the most that could be hidden:

                 exposed = n·o + s/w - h·(n-1)/n                n* = sqrt(h/o)           bucket = s/n*

so they meet at the crossover s/w = t_bwd. At n* the calls cost as much as the part of h that stays exposed,
n*·o = h/n*. More buckets pay for calls, fewer leave a longer last transfer.

Each line is exact for one schedule (tests/schemes/test_bucketing.py plays both): `hidden` where a call holds up
backward and its transfer does not, `wire` where a call holds up the wire. Between the two lies what a machine does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.schemes.limits import RATE, SECONDS, SIZE, require
from meshwright.units import MIB, format_bandwidth, format_bytes, format_seconds

NAME = "bucket"


@dataclass(frozen=True)
class Gradients:
    """What the model knows of a step."""

    gradient_bytes: int
    """s, all gradients of this rank; at least 1."""
    seconds_per_call: float
    """o: launching one collective, and its latency; at least 0."""
    bandwidth: float
    """w: bytes of gradient, not of wire, that an all-reduce of any size gets through in a second; above 0."""
    backward_seconds: float
    """t_bwd; 0 where nothing can be hidden."""

    @property
    def transfer_seconds(self) -> float:
        """s/w: every gradient on the wire, calls not counted."""
        return self.gradient_bytes / self.bandwidth

    @property
    def regime(self) -> Literal["hidden", "wire"]:
        """Whether a bucket's transfer fits under its backward; the same for every number of buckets."""
        return "hidden" if self.transfer_seconds <= self.backward_seconds else "wire"

    @property
    def hideable_seconds(self) -> float:
        """h: what infinitely many buckets would hide."""
        return min(self.transfer_seconds, self.backward_seconds)

    def exposed_transfer_seconds(self, num_buckets: float) -> float:
        """What backward does not hide of the transfers."""
        if self.regime == "hidden":
            return self.transfer_seconds / num_buckets
        return self.transfer_seconds - self.backward_seconds * (num_buckets - 1) / num_buckets

    def exposed_seconds(self, num_buckets: float) -> float:
        """What a step of so many buckets takes longer than its backward."""
        return num_buckets * self.seconds_per_call + self.exposed_transfer_seconds(num_buckets)

    def ideal_num_buckets(self) -> float | None:
        """n*, not rounded; below 1 where no second bucket pays. None where calls cost nothing: the more the better."""
        if self.hideable_seconds == 0:
            return 0.0
        o = self.seconds_per_call
        return math.sqrt(self.hideable_seconds) / math.sqrt(o) if o else None

    def best_num_buckets(self) -> int:
        """The whole number of buckets that exposes least; the fewest of those that tie.

        exposed() is convex in n, so it is next to n*. At least 1, at most a byte each.
        """
        ideal, most = self.ideal_num_buckets(), self.gradient_bytes
        if ideal is None or ideal >= most:
            return most
        below = max(1, math.floor(ideal))
        return min((below, min(below + 1, most)), key=self.exposed_seconds)


def bucket_bytes(
    gradient_bytes: int, seconds_per_call: float, bandwidth: float, backward_seconds: float = math.inf
) -> int:
    """The size at which to close a bucket, for `bucket_mib = "auto"`: s over the best number of buckets, rounded up.

    The four numbers are those of `Gradients`. Without `backward_seconds` each transfer fits under its backward.
    1 where calls cost nothing (a bucket for each gradient), all bytes where there is no backward to hide under.
    """
    step = Gradients(gradient_bytes, seconds_per_call, bandwidth, backward_seconds)
    return -(-gradient_bytes // step.best_num_buckets())


# --- for people -------------------------------------------------------------------------------------------------------


def worksheet(
    gradient_bytes: int, bandwidth: float, seconds_per_call: float, backward_seconds: float
) -> dict[str, Any]:
    """n* and the bucket, as the formula has them and in whole numbers, and what each number of buckets exposes."""
    step, best = _checked(gradient_bytes, bandwidth, seconds_per_call, backward_seconds)
    ideal = step.ideal_num_buckets()
    nbytes = -(-gradient_bytes // best)
    figures = {
        "regime": step.regime,
        "transfer_seconds": step.transfer_seconds,
        "ideal_num_buckets": ideal,
        "ideal_bucket_bytes": gradient_bytes / max(ideal, 1) if ideal is not None else None,
        "num_buckets": best,
        "bucket_bytes": nbytes,
        "bucket_mib": nbytes / MIB,
        "calls_seconds": best * seconds_per_call,
        "exposed_seconds": step.exposed_seconds(best),
        "by_num_buckets": [_row(step, n) for n in _around(best, gradient_bytes)],
    }
    return {"name": NAME, "inputs": vars(step).copy(), "figures": figures}


def _checked(
    gradient_bytes: int, bandwidth: float, seconds_per_call: float, backward_seconds: float
) -> tuple[Gradients, int]:
    require(
        {
            "gradient_bytes": (gradient_bytes, SIZE),
            "bandwidth": (bandwidth, RATE),
            "seconds_per_call": (seconds_per_call, SECONDS),
            "backward_seconds": (backward_seconds, SECONDS),
        }
    )
    step = Gradients(gradient_bytes, seconds_per_call, bandwidth, backward_seconds)
    return step, step.best_num_buckets()


def _around(best: int, most: int) -> list[int]:
    """One bucket, the best number, and some on either side of it."""
    chosen = {1, best // 4, best // 2, best - 1, best, best + 1, 2 * best, 4 * best}
    return sorted(n for n in chosen if 1 <= n <= most)


def _row(step: Gradients, n: int) -> dict[str, Any]:
    return {
        "num_buckets": n,
        "bucket_bytes": -(-step.gradient_bytes // n),
        "calls_seconds": n * step.seconds_per_call,
        "exposed_transfer_seconds": step.exposed_transfer_seconds(n),
        "exposed_seconds": step.exposed_seconds(n),
    }


def text(gradient_bytes: int, bandwidth: float, seconds_per_call: float, backward_seconds: float) -> str:
    """The derivation with these numbers, and the table around the best number of buckets."""
    step, best = _checked(gradient_bytes, bandwidth, seconds_per_call, backward_seconds)
    figures = worksheet(gradient_bytes, bandwidth, seconds_per_call, backward_seconds)["figures"]
    return "\n".join(
        [
            "Gradients in n buckets, each all-reduced under the backward of the next: how many?",
            f"s {gradient_bytes:,} B   w {format_bandwidth(bandwidth)} of gradient   "
            f"o {format_seconds(seconds_per_call)} per call   t_bwd {format_seconds(backward_seconds)}",
            "",
            *_regime_lines(step),
            *_best_lines(step, figures),
            "",
            *_table(figures["by_num_buckets"], best),
        ]
    )


def _regime_lines(step: Gradients) -> list[str]:
    transfer, backward = format_seconds(step.transfer_seconds), format_seconds(step.backward_seconds)
    if step.regime == "hidden":
        return [
            f"s/w = {transfer} ≤ t_bwd = {backward}: a bucket's transfer fits under its backward, whatever n is.",
            "Exposed are the calls and the last bucket's transfer: n·o + s/(n·w).",
        ]
    return [
        f"s/w = {transfer} > t_bwd = {backward}: a bucket's transfer does not fit under its backward, whatever n is.",
        "Exposed are the calls and what backward leaves of the transfers: n·o + s/w - t_bwd·(n-1)/n.",
    ]


def _best_lines(step: Gradients, figures: dict[str, Any]) -> list[str]:
    formula = "sqrt(s/(w·o))" if step.regime == "hidden" else "sqrt(t_bwd/o)"
    size = "sqrt(s·w·o)" if step.regime == "hidden" else "s·sqrt(o/t_bwd)"
    ideal, found = figures["ideal_num_buckets"], f"{format_bytes(figures['bucket_bytes'])}"
    if ideal is None:
        return ["Calls cost nothing: the more buckets the better, one for each gradient."]
    if ideal <= 1:
        return [f"n* = {formula} = {ideal:.4g}: one bucket, {found}: a second would hide no more than it costs."]
    return [
        f"Its slope is 0 at n* = {formula} = {ideal:.4g}, bucket = {size} = {figures['ideal_bucket_bytes']:,.0f} B.",
        f"In whole numbers n = {figures['num_buckets']:,}, {found} each; exposed "
        f"{format_seconds(figures['exposed_seconds'])}.",
    ]


_TIMES = ("calls_seconds", "exposed_transfer_seconds", "exposed_seconds")


def _table(rows: list[dict[str, Any]], best: int) -> list[str]:
    line = "  {:>13}{:>13}{:>13}{:>15}{:>13}".format
    lines = [line("n", "bucket", "calls n·o", "transfers", "exposed, ms")]
    for row in rows:
        times = (f"{1e3 * row[name]:,.6g}" for name in _TIMES)
        mark = "   least" if row["num_buckets"] == best else ""
        lines.append(line(f"{row['num_buckets']:,}", format_bytes(row["bucket_bytes"]), *times) + mark)
    return lines
