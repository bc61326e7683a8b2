"""What each scheme splits, sends, keeps and overlaps, side by side, for one block of a transformer.

Every figure is a fold over what the scheme's own page writes on a tape; there is no second formula here. The block is
GPT's (LayerNorm, GELU MLP of 4 · hidden, no biases) in bf16 with float32 gradients. A row is what the busiest rank does
in a step of one micro-batch of `batch` sequences of `seq` tokens, which all ranks share but for data parallelism's:

    calls     collectives a block issues, by phase; a message to a neighbour is one
    elements  numbers that the rank sends under the ring algorithm, by phase; bytes (and wire_bytes): the same in bytes
    payload   bytes of the full tensors of all those calls
    saved     bytes that autograd keeps of the block between forward and backward
    when ...  how `bytes` grows where the sequence, the degree or both double and the model stays
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.account import Ledger, LedgerKey, Memory, Trace, wire_bytes
from meshwright.config.legality import divisors
from meshwright.config.tree import Cluster, Layout, Model, Training
from meshwright.errors import UserError
from meshwright.schemes.decoder import Block
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.replicate import sum_naive
from meshwright.schemes.tape import DTYPE_NAMES, ITEMSIZES, Group, Sizes, Tape

ITEMSIZES_BY_DTYPE = {DTYPE_NAMES[precision]: itemsize for precision, itemsize in ITEMSIZES.items()}
LARGEST, LARGEST_DEGREE = 2**40, 2**10

NOTES = (
    "One block on the busiest rank; bf16, gradients float32. Sent: by that rank, under the ring algorithm.",
    "Data parallelism computes on sequences of each rank's own; under the other schemes ranks share them.",
    "Not in these rows: sums of weight gradients, once a step. Under Ulysses and rings they are those of",
    "all weights, as in data parallelism's row; under Megatron sequence parallelism those of the norms.",
    "Ulysses × ring: ulysses is the largest divisor up to the root of the degree; for a prime, a ring.",
)


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


# --- the schemes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """What a row needs to know beside the tape."""

    name: str
    layout: Callable[[int], Layout]
    """How it lays out so many ranks."""
    splits: str
    overlaps: str
    gradients: Callable[[Tape, tuple[ParamSpec, ...], Group], None] | None = None

    def splits_of(self, question: Question) -> str:
        """What is split, the degrees filled in."""
        return self.splits.format(layout=self.layout(question.degree))

    def can_split(self, question: Question) -> bool:
        """Whether the sizes are legal."""
        layout = self.layout(question.degree)
        return not layout.violations(question.model, Cluster(), question.training(layout))

    def trace(self, question: Question) -> Trace:
        """Forward and backward of the block on the last rank of the ring, which sees every key; then its gradients."""
        layout, model = self.layout(question.degree), question.model
        sizes = Sizes.of(model, layout, question.training(layout), (layout.ring - 1) * layout.stride("ring"))
        block, tape = Block(model, sizes), Tape()
        with tape.at(phase="forward"):
            block.forward(tape, "layers.0")
        with tape.at(phase="backward"):
            block.backward(tape, "layers.0")
        if self.gradients is not None:
            specs = param_specs(model, layout, question.seq)
            own = tuple(spec for spec in specs if spec.name.startswith("layers.0."))
            self.gradients(tape, own, Group(layout.gradient_axis, layout.gradient_group_size))
        return tape.trace()


def hybrid(degree: int) -> Layout:
    """Ulysses × ring, the degrees as even as they come: ulysses is the largest divisor up to the root of the degree."""
    ulysses = max(divisor for divisor in divisors(degree) if divisor * divisor <= degree)
    return Layout(ulysses=ulysses, ring=degree // ulysses)


_HOPS = "each hop under a step's attention, but dK and dV's last"

SCHEMES = (
    Scheme(
        "Megatron tensor parallelism",
        lambda degree: Layout(tensor=degree),
        "weights: heads, hidden features",
        "column layers' backward, under weight gradients",
    ),
    Scheme(
        "Megatron sequence parallelism",
        lambda degree: Layout(tensor=degree, sequence_parallel=True),
        "weights; between them, the sequence",
        "column layers' backward, under both gradients",
    ),
    Scheme("Ulysses", lambda degree: Layout(ulysses=degree), "sequence; heads inside attention", "nothing"),
    Scheme(
        "ring attention, contiguous",
        lambda degree: Layout(ring=degree, ring_order="contiguous"),
        "sequence, in order: uneven work",
        _HOPS,
    ),
    Scheme(
        "ring attention, zigzag",
        lambda degree: Layout(ring=degree, ring_order="zigzag"),
        "sequence, from both ends: even work",
        _HOPS,
    ),
    Scheme(
        "Ulysses × ring, zigzag",
        hybrid,
        "sequence; heads: ulysses {layout.ulysses} × ring {layout.ring}",
        "hops as in a ring; exchanges under nothing",
    ),
    Scheme("data parallelism, naive", lambda degree: Layout(replicate=degree), "batch", "nothing", sum_naive),
)


# --- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One scheme. Ratios are such as `x2`; None where nothing is sent or a size that doubles cannot be split."""

    scheme: str
    splits: str
    operation: str
    calls_forward: int
    calls_backward: int
    elements: int
    elements_forward: int
    elements_backward: int
    bytes: int
    wire_bytes: int
    payload_bytes: int
    saved_bytes: int
    overlaps: str
    when_seq_grows: str | None
    when_degree_grows: str | None
    when_both_grow: str | None


def table(
    seq: int, hidden: int, degree: int, batch: int = 1, heads: int | None = None, kv_heads: int | None = None
) -> tuple[Row, ...]:
    """A row for each scheme. Raises UserError for sizes that a scheme cannot split, all at once."""
    return rows(Question.of(seq, hidden, degree, batch, heads, kv_heads))


def rows(question: Question) -> tuple[Row, ...]:
    """A row for each scheme."""
    return tuple(_row(scheme, question) for scheme in SCHEMES)


def _row(scheme: Scheme, question: Question) -> Row:
    trace = scheme.trace(question)
    ledger = Ledger.of(trace)
    calls = {phase: sum(n for key, n in ledger.rows.items() if key.phase == phase) for phase in ("forward", "backward")}
    elements = {
        phase: sum(n * _sent_elements(key) for key, n in ledger.rows.items() if key.phase == phase) for phase in calls
    }
    sent = ledger.wire_bytes()
    return Row(
        scheme=scheme.name,
        splits=scheme.splits_of(question),
        operation=", ".join(sorted({key.operation for key in ledger.rows})) or "none",
        calls_forward=calls["forward"],
        calls_backward=calls["backward"],
        elements=sum(elements.values()),
        elements_forward=elements["forward"],
        elements_backward=elements["backward"],
        bytes=sent,
        wire_bytes=sent,
        payload_bytes=sum(n * key.payload_bytes for key, n in ledger.rows.items()),
        saved_bytes=saved_bytes(trace),
        overlaps=scheme.overlaps,
        when_seq_grows=_growth(scheme, question, sent, seq=2),
        when_degree_grows=_growth(scheme, question, sent, degree=2),
        when_both_grow=_growth(scheme, question, sent, seq=2, degree=2),
    )


def _sent_elements(key: LedgerKey) -> int:
    """The account's convention, in numbers instead of bytes."""
    return wire_bytes(key.operation, key.group_size, key.payload_bytes // ITEMSIZES_BY_DTYPE[key.dtype])


def _growth(scheme: Scheme, question: Question, sent: int, *, seq: int = 1, degree: int = 1) -> str | None:
    """Bytes sent at the larger sizes over those at the present ones."""
    larger = replace(question, seq=seq * question.seq, degree=degree * question.degree)
    if not sent or not scheme.can_split(larger):
        return None
    return f"x{Ledger.of(scheme.trace(larger)).wire_bytes() / sent:.3g}"


def saved_bytes(trace: Trace) -> int:
    """Saved activations that forward adds: the input of the next block stands for that of this one."""
    return sum(
        event.delta_bytes
        for event in trace.events
        if isinstance(event, Memory) and event.category == "saved_activations" and event.phase == "forward"
    )


# --- what is refused --------------------------------------------------------------------------------------------------


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
