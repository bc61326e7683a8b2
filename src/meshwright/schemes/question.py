"""The question that `schemes.table` answers: a block, its batch, and the ranks that divide it; and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.config.legality import divisors
from meshwright.config.tree import Layout, Model, Training
from meshwright.errors import UserError

LARGEST, LARGEST_DEGREE = 2**40, 2**10


@dataclass(frozen=True)
class Question:
    """A block, its batch, and the ranks that divide it. `of` checks that every scheme can."""

    seq: int
    hidden: int
    degree: int
    batch: int
    heads: int
    kv_heads: int

    @classmethod
    def of(
        cls,
        seq: int,
        hidden: int,
        degree: int,
        batch: int = 1,
        heads: int | None = None,
        kv_heads: int | None = None,
    ) -> Question:
        """Heads of 128 where the sizes allow, and as many key-value heads, unless given.

        Raises UserError with a line for each mistake.
        """
        given = {"seq": seq, "hidden": hidden, "degree": degree, "batch": batch, "heads": heads, "kv-heads": kv_heads}
        if mistakes := _mistakes({name: value for name, value in given.items() if value is not None}):
            raise UserError("\n".join(mistakes))
        heads = heads or _default_heads(hidden, degree)
        return cls(seq, hidden, degree, batch, heads, kv_heads or heads)

    @property
    def model(self) -> Model:
        """A model of one block."""
        return Model(
            block="decoder",
            layers=1,
            d_model=self.hidden,
            d_ff=4 * self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            norm="layernorm",
            positions="learned",
            mlp="gelu",
        )

    def training(self, layout: Layout) -> Training:
        """One micro-batch a step."""
        return Training(batch=self.batch * layout.batch_ranks, seq_len=self.seq, precision="bf16", device="cuda")


def _default_heads(hidden: int, degree: int) -> int:
    return hidden // math.gcd(hidden // degree, 128)  # so that each rank has whole heads


def hybrid(degree: int) -> Layout:
    """Ulysses × ring, the degrees as even as they come: ulysses is the largest divisor up to the root of the degree."""
    ulysses = max(divisor for divisor in divisors(degree) if divisor * divisor <= degree)
    return Layout(ulysses=ulysses, ring=degree // ulysses)


def _mistakes(given: dict[str, int]) -> list[str]:
    """Every broken rule of the sizes that were given; one between two numbers is asked only where both are in range."""
    limits = dict.fromkeys(given, LARGEST) | {"degree": LARGEST_DEGREE}
    beyond = {name: value for name, value in given.items() if not 1 <= value <= limits[name]}
    known = {name: value for name, value in given.items() if name not in beyond}
    return [
        *(
            f"--{name} {value} must be between 1 and {limits[name]}: use {1 if value < 1 else limits[name]}"
            for name, value in beyond.items()
        ),
        *_mistakes_of_heads(known, chosen="heads" in given),
        *_mistakes_of_kv_heads(known, chosen="heads" in given),
        *_mistakes_of_seq(known),
    ]


def _mistakes_of_heads(known: dict[str, int], *, chosen: bool) -> list[str]:
    hidden, degree, heads = (known.get(name, 0) for name in ("hidden", "degree", "heads"))
    found = []
    if not chosen and hidden and degree and hidden % degree:
        found.append(
            f"--degree {degree} does not divide --hidden {hidden} (each rank holds as many heads): "
            f"use a degree of {_around(_degrees(known), degree)}, or a hidden of {_multiples(degree, hidden)}"
        )
    if heads and hidden and hidden % heads:
        found.append(
            f"--heads {heads} does not divide --hidden {hidden} (each head is an equal part of the width): "
            f"use {_around(divisors(hidden), heads)}"
        )
    if heads and degree and heads % degree:
        found.append(
            f"--degree {degree} {'is above' if degree > heads else 'does not divide'} --heads {heads} (tensor "
            f"parallelism and Ulysses give each rank as many whole heads): use {_around(_degrees(known), degree)}"
        )
    return found


def _mistakes_of_kv_heads(known: dict[str, int], *, chosen: bool) -> list[str]:
    hidden, degree, heads, kv_heads = (known.get(name, 0) for name in ("hidden", "degree", "heads", "kv-heads"))
    if not chosen and hidden and degree and hidden % degree == 0:
        heads = _default_heads(hidden, degree)
    found = []
    if kv_heads and heads and heads % kv_heads:
        found.append(
            f"--kv-heads {kv_heads} does not divide {'--' if chosen else 'the '}heads {heads} (each KV head serves as "
            f"many query heads): use {_around(divisors(heads), kv_heads)}"
        )
    if kv_heads and degree and not _divides_kv_heads(degree, kv_heads):
        layout = hybrid(degree)
        who = f"--degree {degree}"
        if kv_heads % degree == 0 or degree % kv_heads == 0:
            who += f" = ulysses {layout.ulysses} × ring {layout.ring}, whose ulysses"
        found.append(
            f"{who} neither divides --kv-heads {kv_heads} nor is a multiple of it (ranks split the KV heads evenly or "
            f"replicate them): use {_around(_degrees(known), degree)}"
        )
    return found


def _divides_kv_heads(degree: int, kv_heads: int) -> bool:
    """For tensor parallelism and Ulysses, and for the ulysses of the hybrid."""
    return all(kv_heads % ranks == 0 or ranks % kv_heads == 0 for ranks in (degree, hybrid(degree).ulysses))


def _mistakes_of_seq(known: dict[str, int]) -> list[str]:
    seq, degree = known.get("seq", 0), known.get("degree", 0)
    if not seq or _divides_sequence(degree, seq):
        return []
    return [
        f"--seq {seq} is not divisible by 2 × --degree = {2 * degree} (a zigzag ring gives each rank two chunks of as "
        f"many tokens): use {_multiples(2 * degree, seq)}"
    ]


def _divides_sequence(degree: int, seq: int) -> bool:
    return degree <= 1 or seq % (2 * degree) == 0


def _degrees(known: dict[str, int]) -> list[int]:
    """Legal degrees by all the sizes that are in range: there is always 1."""
    kv_heads, seq = known.get("kv-heads", 1), known.get("seq", 0)
    return [
        degree
        for degree in divisors(known.get("heads") or known.get("hidden", 1))
        if degree <= LARGEST_DEGREE and _divides_kv_heads(degree, kv_heads) and _divides_sequence(degree, seq)
    ]


def _around(legal: list[int], value: int) -> str:
    """The legal numbers next below and next above."""
    below = [number for number in legal if number < value][-1:]
    return " or ".join(map(str, below + [number for number in legal if number > value][:1]))


def _multiples(step: int, value: int) -> str:
    """The multiples next below and next above."""
    return " or ".join(str(multiple) for multiple in (value // step * step, (value // step + 1) * step) if multiple)
