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

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.account import Ledger, LedgerKey, Memory, Trace, wire_bytes
from meshwright.config.tree import Cluster, Layout
from meshwright.schemes.decoder import Block
from meshwright.schemes.fsdp import FullyShardedUnits, Unit
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.question import Question, hybrid
from meshwright.schemes.replicate import Strategy, buckets, synchronise
from meshwright.schemes.shard import gather_parameters, scatter_gradients
from meshwright.schemes.tape import DTYPE_NAMES, ITEMSIZES, Group, Sizes, Tape
from meshwright.schemes.units import Run, Units

ITEMSIZES_BY_DTYPE = {DTYPE_NAMES[precision]: itemsize for precision, itemsize in ITEMSIZES.items()}
BUCKET_BYTES = 25 * 2**20

NOTES = (
    "One block on the busiest rank; bf16, gradients float32. Sent: by that rank, under the ring algorithm.",
    "Data parallelism computes on sequences of each rank's own; under the other schemes ranks share them.",
    "Not in these rows: sums of weight gradients, once a step. Under Ulysses and rings they are those of",
    "all weights, as in data parallelism's row; under Megatron sequence parallelism those of the norms.",
    "Ulysses × ring: ulysses is the largest divisor up to the root of the degree; for a prime, a ring.",
)


@dataclass(frozen=True)
class StatesOfBlock:
    """What a layout does with the parameters of one block and their gradients."""

    layout: Layout
    specs: tuple[ParamSpec, ...]

    @property
    def group(self) -> Group:
        """The ranks that divide the states."""
        return Group(self.layout.state_axis or "shard", self.layout.state_group_size)

    @property
    def units(self) -> Units:
        """One unit, if it is fully sharded."""
        if self.layout.zero_stage < 2 or not self.layout.state_axes:
            return Units()
        return FullyShardedUnits(
            layer=Unit.of(self.specs, self.group.size),
            root=Unit.of((), self.group.size),
            num_layers=0,
            group=self.group,
            replicas=Group("replicate", self.layout.replicate),
            reshards=self.layout.zero_stage == 3,
            prefetch=1,
            dtype="bfloat16",
            p=2,
            reduce_dtype="float32",
            r=4,
            is_first=True,
            is_last=True,
        )

    def sum(self, tape: Tape) -> None:
        """Gradients that live in buckets."""
        layout = self.layout
        if layout.zero_stage >= 2:
            return
        parts = buckets(self.specs, layout.gradients, BUCKET_BYTES, self.group.size)
        if not layout.state_axes:
            synchronise(tape, parts, Group(layout.gradient_axis, layout.gradient_group_size))
            return
        scatter_gradients(tape, parts, self.group, Group("replicate", layout.replicate))
        gather_parameters(tape, parts, (spec.name for spec in self.specs), self.group)


# --- the schemes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """What a row needs to know beside the tape."""

    name: str
    layout: Callable[[int], Layout]
    """How it lays out so many ranks."""
    splits: str
    overlaps: str
    of_states: bool = False
    """Whether the row is what states cost: gradients and parameters, not activations, are sent."""

    def splits_of(self, question: Question) -> str:
        """What is split, the degrees filled in."""
        return self.splits.format(layout=self.layout(question.degree))

    def can_split(self, question: Question) -> bool:
        """Whether the sizes are legal for it; which of them an attention kernel takes is another question."""
        layout = self.layout(question.degree)
        broken = layout.violations(question.model, Cluster(), question.training(layout))
        return all(violation.rule == "attention_head_dim" for violation in broken)

    def trace(self, question: Question) -> Trace:
        """Forward and backward of the block on the last rank of the ring, which sees every key; then its gradients."""
        layout, model = self.layout(question.degree), question.model
        sizes = Sizes.of(model, layout, question.training(layout), (layout.ring - 1) * layout.stride("ring"))
        block, tape = Block(model, sizes), Tape()
        specs = param_specs(model, layout, question.seq)
        states = StatesOfBlock(layout, tuple(spec for spec in specs if spec.name.startswith("layers.0.")))
        units = states.units if self.of_states else Units()
        with tape.at(phase="forward"), tape.repeat(1):
            units.enter_layer(tape, Run(0, 1))
            block.forward(tape, "layers.*")
            units.leave_layer(tape)
        with tape.at(phase="backward"), tape.repeat(1):
            if isinstance(units, FullyShardedUnits) and units.reshards:
                units.gather(tape, units.layer)  # in a model, the layer after it does
            units.reenter_layer(tape, Run(0, 1))
            block.backward(tape, "layers.*")
            units.reduce_layer(tape, Run(0, 1))
        if self.of_states:
            states.sum(tape)
        return tape.trace()


_HOPS = "each hop under a step's attention, but dK and dV's last"

_FSDP = "gathers under the unit before, sums under the next"
_STAGES = {
    1: ("ZeRO-1", "batch; optimiser states", "as bucketed; parameters under the next forward"),
    2: ("ZeRO-2 (fully_shard)", "batch; all states", _FSDP),
    3: ("ZeRO-3 (fully_shard)", "batch; all states", _FSDP),
}
_STRATEGIES: dict[Strategy, str] = {
    "naive": "nothing",
    "flat": "nothing",
    "per_parameter": "each gradient under backward",
    "bucketed": "each bucket under backward",
}


def _replicas(degree: int, *, gradients: Strategy) -> Layout:
    return Layout(replicate=degree, gradients=gradients)


def _sharded(degree: int, *, zero: int) -> Layout:
    return Layout(shard=degree, zero=zero if degree > 1 else 0)


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
    Scheme(
        "tensor parallelism, pipelined",
        lambda degree: Layout(tensor=degree, overlap="pipelined"),
        "weights: heads, hidden features",
        "each slice's sum under the next slice's product",
    ),
    Scheme(
        "sequence parallelism, pipelined",
        lambda degree: Layout(tensor=degree, sequence_parallel=True, overlap="pipelined"),
        "weights; between them, the sequence",
        "each piece of a hop under products",
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
    *(
        Scheme(
            f"data parallelism, {gradients.replace('_', ' ')}",
            functools.partial(_replicas, gradients=gradients),
            "batch",
            overlaps,
            of_states=True,
        )
        for gradients, overlaps in _STRATEGIES.items()
    ),
    *(
        Scheme(name, functools.partial(_sharded, zero=zero), splits, overlaps, of_states=True)
        for zero, (name, splits, overlaps) in _STAGES.items()
    ),
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
    calls_optimiser: int
    elements: int
    elements_forward: int
    elements_backward: int
    elements_optimiser: int
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
    phases = ("forward", "backward", "optimiser")
    calls = {phase: sum(n for key, n in ledger.rows.items() if key.phase == phase) for phase in phases}
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
        calls_optimiser=calls["optimiser"],
        elements=sum(elements.values()),
        elements_forward=elements["forward"],
        elements_backward=elements["backward"],
        elements_optimiser=elements["optimiser"],
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
        for event in trace.expanded()
        if isinstance(event, Memory) and event.category == "saved_activations" and event.phase == "forward"
    )
