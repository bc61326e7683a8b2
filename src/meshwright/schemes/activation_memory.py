"""What one GPT layer keeps for backward, tensor by tensor, and what the six ways of keeping less leave of it.

    b batch   s sequence   h hidden   a heads   t tensor        16-bit activations (2 bytes), dropout masks of 1 byte

Korthikanti et al. 2022 (arXiv:2205.05198), sections 4 and 5, for an MLP of width 4h. `LAYER` is the paper's list: the
input of each operation whose backward needs it. Every tensor is split over t ranks by exactly one of two schemes:

    tensor      what lies between a column and a row linear: it has features or heads of its own on each rank
    sequence    the rest (layer norms, dropouts, inputs of column linears): whole on each rank under tensor parallelism
                alone, s/t tokens each where sequence parallelism is added

Selective recomputation drops the attention core, which is what grows with s²; full recomputation keeps the layer's
input only, whole on each rank. Bytes and formulas are folds over the list: table 2 is not written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from meshwright.config.legality import divisors, listed, near_multiples
from meshwright.errors import UserError
from meshwright.units import format_bytes

NAME = "activation-memory"

HALF, MASK = 2, 1
LARGEST = 2**40


class Kept(NamedTuple):
    """A tensor that the layer keeps for backward: `times` s·b·h elements, or `times` a·s²·b if it is the core's."""

    of: str
    name: str
    times: int
    itemsize: int
    split: Literal["tensor", "sequence"]
    core: bool = False
    """Part of the attention core: QKᵀ, softmax, its dropout, attention over V."""

    @property
    def factor(self) -> int:
        """Bytes per s·b·h, or per a·s²·b."""
        return self.times * self.itemsize


LAYER = (
    Kept("layer norm 1", "input", 1, HALF, "sequence"),
    Kept("attention", "input of Q, K and V", 1, HALF, "sequence"),
    Kept("attention", "Q", 1, HALF, "tensor"),
    Kept("attention", "K", 1, HALF, "tensor"),
    Kept("attention", "softmax output", 1, HALF, "tensor", core=True),
    Kept("attention", "softmax dropout mask", 1, MASK, "tensor", core=True),
    Kept("attention", "softmax dropout output", 1, HALF, "tensor", core=True),
    Kept("attention", "V", 1, HALF, "tensor"),
    Kept("attention", "input of the projection", 1, HALF, "tensor"),
    Kept("attention", "dropout mask", 1, MASK, "sequence"),
    Kept("layer norm 2", "input", 1, HALF, "sequence"),
    Kept("MLP", "input of linear 1", 1, HALF, "sequence"),
    Kept("MLP", "input of GeLU", 4, HALF, "tensor"),
    Kept("MLP", "input of linear 2", 4, HALF, "tensor"),
    Kept("MLP", "dropout mask", 1, MASK, "sequence"),
)

_LAYER_INPUT = LAYER[0]


class Variant(NamedTuple):
    """A row of table 2: which schemes split the layer, and what backward computes again."""

    name: str
    splits: tuple[str, ...]
    recompute: Literal["none", "selective", "full"] = "none"

    def keeps(self, kept: Kept) -> bool:
        return {"none": True, "selective": not kept.core, "full": kept == _LAYER_INPUT}[self.recompute]

    def degree(self, kept: Kept, tensor: int) -> int:
        """Ranks that share one copy of a tensor."""
        return tensor if kept.split in self.splits else 1


VARIANTS = (
    Variant("none", ()),
    Variant("tensor", ("tensor",)),
    Variant("tensor_sequence", ("tensor", "sequence")),
    Variant("tensor_selective", ("tensor",), "selective"),
    Variant("tensor_sequence_selective", ("tensor", "sequence"), "selective"),
    Variant("full", ("tensor",), "full"),
)

_BASELINE = "tensor"
"""What the paper compares with."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of the worksheet, checked. Raises UserError with a line for each mistake."""

    seq: int
    batch: int
    hidden: int
    heads: int
    tensor: int

    def __post_init__(self) -> None:
        if mistakes := _mistakes(**vars(self)):
            raise UserError("\n".join(mistakes))

    @property
    def sbh(self) -> int:
        return self.seq * self.batch * self.hidden

    def bytes_of(self, kept: Kept) -> int:
        """The whole tensor, over all ranks."""
        return kept.factor * (self.heads * self.seq * self.seq * self.batch if kept.core else self.sbh)


def _mistakes(**sizes: int) -> list[str]:
    """Every broken rule; one between two numbers is asked only where both are in range."""
    beyond = {name: value for name, value in sizes.items() if not 1 <= value <= LARGEST}
    found = [
        f"--{name} {value} must be between 1 and 2**40: use {1 if value < 1 else LARGEST}"
        for name, value in beyond.items()
    ]
    seq, hidden, heads, tensor = (sizes[name] for name in ("seq", "hidden", "heads", "tensor"))

    def divides(divisor: str, number: str) -> bool:
        return bool({divisor, number} & beyond.keys()) or sizes[number] % sizes[divisor] == 0

    if not divides("heads", "hidden"):
        found.append(
            f"--heads {heads} does not divide --hidden {hidden} (each head is an equal part of the width): "
            f"use {_around(divisors(hidden), heads)}"
        )
    if not divides("tensor", "heads"):
        legal = divisors(heads if "seq" in beyond else math.gcd(heads, seq))
        found.append(
            f"--tensor {tensor} does not divide --heads {heads} (each tensor-parallel rank holds as many whole heads): "
            f"use {_around(legal, tensor)}"
        )
    if not divides("tensor", "seq"):
        found.append(
            f"--seq {seq} is not divisible by --tensor {tensor} (sequence parallelism gives each rank as many tokens): "
            f"use {listed(near_multiples(tensor, seq))}"
        )
    return found


def _around(legal: list[int], value: int) -> str:
    """The legal numbers next below and next above."""
    below = [number for number in legal if number < value][-1:]
    return " or ".join(map(str, below + [number for number in legal if number > value][:1]))


# --- folds over the list ----------------------------------------------------------------------------------------------


def layer_bytes(variant: Variant, sizes: Sizes) -> int:
    """Bytes that one rank keeps of one layer; t divides every tensor that it splits, so nothing is rounded."""
    return sum(_on_rank(variant, kept, sizes) for kept in LAYER)


def formula(variant: Variant) -> str:
    """The same in letters, such as `sbh(10 + 24/t + 5as/(ht))`."""
    terms: dict[str, int] = {}
    for kept in filter(variant.keeps, LAYER):
        split = kept.split in variant.splits
        term = ("as/(ht)" if split else "as/h") if kept.core else ("/t" if split else "")
        terms[term] = terms.get(term, 0) + kept.factor
    return f"sbh({' + '.join(f'{terms[term]}{term}' for term in sorted(terms))})"


def flops(sizes: Sizes) -> dict[str, int]:
    """FLOPs of a layer's matrix products over all ranks (appendix A): the model's (equation 7), and those executed.

    Selective recomputation executes the core's two products, 2bs²h each, once more. Equation 8 adds three times as
    many: its s/(3h) should be 2s/(9h), as an author confirmed (github.com/NVIDIA/Megatron-LM/issues/523). The paper's
    2.7 % and 1.6 % follow from equation 8 as printed, so both are given.
    """
    core = 2 * 2 * sizes.sbh * sizes.seq
    linears = 2 * sizes.sbh * sizes.hidden * (3 + 1 + 4 + 4)  # Q, K, V; projection; both of the MLP
    model = 3 * (linears + core)  # backward is twice forward
    return {"model": model, "selective": model + core, "selective_as_printed": model + 3 * core}


def worksheet(seq: int, batch: int, hidden: int, heads: int, tensor: int) -> dict[str, Any]:
    """Bytes that one rank keeps of one layer, by tensor and in all, for each variant; and what selective costs."""
    sizes = Sizes(seq, batch, hidden, heads, tensor)
    total = {variant.name: layer_bytes(variant, sizes) for variant in VARIANTS}
    core = sum(sizes.bytes_of(kept) for kept in LAYER if kept.core)
    work = flops(sizes)
    figures = {
        "tensors": [
            {"of": kept.of, "name": kept.name}
            | {"bytes": {variant.name: _on_rank(variant, kept, sizes) for variant in VARIANTS}}
            for kept in LAYER
        ],
        "formulas": {variant.name: formula(variant) for variant in VARIANTS},
        "bytes_per_layer": total,
        "per_cent_of_tensor": {name: 100 * nbytes / total[_BASELINE] for name, nbytes in total.items()},
        "core_bytes_per_sbh": core / sizes.sbh,
        "selective_saves": core / total["none"],
        "flops_per_layer": work,
        "flops_overhead": {name: (work[name] - work["model"]) / work["model"] for name in work if name != "model"},
    }
    return {"name": NAME, "inputs": vars(sizes).copy(), "figures": figures}


def _on_rank(variant: Variant, kept: Kept, sizes: Sizes) -> int:
    return sizes.bytes_of(kept) // variant.degree(kept, sizes.tensor) if variant.keeps(kept) else 0


# --- for people -------------------------------------------------------------------------------------------------------


def text(seq: int, batch: int, hidden: int, heads: int, tensor: int) -> str:
    """The derivation: the list, its sum in each variant, and what selective recomputation saves and costs."""
    sizes = Sizes(seq, batch, hidden, heads, tensor)
    figures = worksheet(**vars(sizes))["figures"]
    scores, saves = figures["core_bytes_per_sbh"], figures["selective_saves"]
    exact, printed = figures["flops_overhead"].values()
    return "\n".join(
        [
            "What one GPT layer keeps for backward: 16-bit activations, dropout masks of one byte.",
            f"s {seq}   b {batch}   h {hidden}   a {heads}   t {tensor}",
            "",
            *_list_lines(sizes),
            "",
            *_variant_lines(figures),
            "",
            f"5as/h = {scores:.4g}: of what one device keeps, selective recomputation saves {saves:.1%}.",
            f"It executes {exact:.1%} more FLOPs: QKᵀ and attention over V, forward once more.",
            f"(The paper's equation 8 counts them three times: {printed:.1%}.)",
        ]
    )


def _list_lines(sizes: Sizes) -> list[str]:
    line = "  {:<14}{:<26}{:>6}{:>22}   {:<11}{}".format
    rows = [line("", "", "", "bytes", "split by", "selective")]
    for kept in LAYER:
        letters = f"{kept.factor if kept.factor > 1 else ''}{'as²b' if kept.core else 'sbh'}"
        core = "drops" if kept.core else "keeps"
        rows.append(line(kept.of, kept.name, letters, f"{sizes.bytes_of(kept):,}", kept.split, core))
    return rows


def _variant_lines(figures: dict[str, Any]) -> list[str]:
    line = "  {:<31}{:<27}{:>16}{:>10}{:>11}".format
    rows = [line("", "", "bytes per rank", "", "of tensor")]
    for name, nbytes in figures["bytes_per_layer"].items():
        share = f"{figures['per_cent_of_tensor'][name]:.1f} %"
        title = {"none": "no parallelism", "full": "full recomputation"}.get(name, name.replace("_", " + "))
        rows.append(line(title, figures["formulas"][name], f"{nbytes:,}", format_bytes(nbytes), share))
    return rows
