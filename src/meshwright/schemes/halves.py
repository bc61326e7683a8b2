"""Half-batches (Wang et al. 2024, "Domino"; a workload partition at layer level in Centauri, Chen et al. 2024).

A block takes its micro-batch in two halves of B/2 sequences, which need nothing of each other. While one half is on the
wire, the other computes: attention of one against MLP of the other, and so on. Each half enters and leaves the two
tensor-parallel regions of the block in four stages:

    enter     norm; under sequence parallelism, its output is put on the wire (all-gather)
    compute   what was gathered is waited for; column-parallel product, and what follows it on the same rank
    leave     row-parallel product; its sum is put on the wire (all-reduce, or reduce-scatter)
    add       the sum is waited for and added to the residual stream

`SCHEDULE` interleaves them; backward runs it in reverse, where each stage waits for what the stage after it has sent:
add gathers the gradient, leave waits for that, compute scatters (or sums) the input's gradient, enter waits for it.

A half's leave and its next enter lie between two stages of the other half, so of the four calls that enter a region
and the four that leave one, in forward and in backward alike, three each are on the wire while the other half
multiplies. Exposed are the first that enters and the last that leaves, because a block ends with no call open; in
backward the last runs under its own weight gradients, as without halves.

On the wire go the same bytes in twice as many calls of half the payload. Every weight is read twice, and cast twice;
its gradient is the sum of two, added up as the second is made, and given to autograd once. Beside the activations of
the unsplit block, a block joins its halves at its end, and their gradients at its beginning: a copy each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from meshwright.config.tree import Model
from meshwright.schemes.context import SAVED, ContextAttention
from meshwright.schemes.local import Activation, Norm, Rope
from meshwright.schemes.sequence import Region
from meshwright.schemes.tape import Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, RowLinear

Name = Literal["enter", "compute", "leave", "add"]
ATTENTION, MLP = 0, 1


class Stage(NamedTuple):
    """What one half does in one of the two branches of a block."""

    half: int
    branch: int
    name: Name


SCHEDULE = (
    Stage(0, ATTENTION, "enter"),
    Stage(1, ATTENTION, "enter"),
    Stage(0, ATTENTION, "compute"),
    Stage(0, ATTENTION, "leave"),
    Stage(1, ATTENTION, "compute"),
    Stage(0, ATTENTION, "add"),
    Stage(0, MLP, "enter"),
    Stage(1, ATTENTION, "leave"),
    Stage(0, MLP, "compute"),
    Stage(1, ATTENTION, "add"),
    Stage(1, MLP, "enter"),
    Stage(0, MLP, "leave"),
    Stage(1, MLP, "compute"),
    Stage(1, MLP, "leave"),
    Stage(0, MLP, "add"),
    Stage(1, MLP, "add"),
)
"""What has left runs under the other half's compute, what enters under its leave."""


class Whole(Protocol):
    """The parts of a block: `schemes.decoder.Block`."""

    @property
    def model(self) -> Model: ...
    @property
    def sizes(self) -> Sizes: ...
    @property
    def stream_bytes(self) -> int: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def qkv(self) -> ColumnLinear: ...
    @property
    def output(self) -> RowLinear: ...
    @property
    def up(self) -> ColumnLinear: ...
    @property
    def down(self) -> RowLinear: ...


@dataclass(frozen=True)
class HalvedBlock:
    """A block in two halves."""

    half: Whole
    """The block of half as many sequences."""

    @property
    def stream_bytes(self) -> int:
        """Bytes of the residual stream of both halves."""
        return 2 * self.half.stream_bytes

    def forward(self, tape: Tape, site: str, *, out_category: str = SAVED) -> None:
        """Makes the next residual stream; the present one stays, saved by the first norms of both halves."""
        branches = _Branches(self.half, site)
        for stage in SCHEDULE:
            branches.forward(tape, stage)
        with tape.at(site):
            tape.alloc(self.stream_bytes, out_category)
            tape.elementwise(2 * self.stream_bytes)
            tape.free(self.stream_bytes)  # the halves that were joined

    def backward(self, tape: Tape, site: str, *, rotary_bytes: int = 0, holds_gradient: bool = False) -> None:
        """Turns the gradient of the next residual stream into that of the present one; as of `Block.backward`."""
        branches = _Branches(self.half, site, rotary_bytes)
        for stage in reversed(SCHEDULE):
            branches.backward(tape, stage)
            if stage == Stage(0, MLP, "enter") and not holds_gradient:
                tape.free(self.stream_bytes)  # of the next stream: each half's norm has added its part
        with tape.at(site):
            tape.alloc(self.stream_bytes)
            tape.elementwise(2 * self.stream_bytes)
            tape.free(self.stream_bytes)
        tape.release(self.stream_bytes)


@dataclass
class _Branches:
    """Both branches of a block, and what is on the wire: at most one call a half."""

    half: Whole
    site: str
    rotary_bytes: int = 0
    """Of tables that are used here for the last time."""
    tickets: dict[int, int] = field(default_factory=dict)

    def forward(self, tape: Tape, stage: Stage) -> None:
        b, s, mlp = self.half, self.half.sizes, stage.branch == MLP
        region, row = Region(s), b.down if mlp else b.output
        if stage.name == "enter":
            with tape.at(f"{self._site(stage)}_norm"):
                b.norm.forward(tape)
            with tape.at(self._site(stage)):
                self.tickets[stage.half] = region.enter(tape)
            return
        with tape.at(self._site(stage)):
            if stage.name == "compute":
                region.entered(tape, self.tickets.pop(stage.half))
                self._mlp_forward(tape) if mlp else self._attention_forward(tape)
            elif stage.name == "leave":
                self.tickets[stage.half] = row.send(tape)
                region.let_go(tape)
                tape.drop(s.N * row.F * s.c)
            else:
                region.left(tape, self.tickets.pop(stage.half))
        if stage.name == "add":
            with tape.at(self.site):
                tape.alloc(b.stream_bytes, "temporaries" if mlp else SAVED)
                tape.elementwise(3 * b.stream_bytes)
                tape.free(b.stream_bytes, s.wire_category)
                if mlp:
                    tape.drop(b.stream_bytes)  # the stream between

    def _attention_forward(self, tape: Tape) -> None:
        b, s, attention = self.half, self.half.sizes, ContextAttention(self.half.sizes)
        rotated = attention.input_category if b.model.positions == "learned" else "temporaries"
        b.qkv.multiply(tape, (rotated, rotated, attention.input_category))
        tape.drop(b.stream_bytes)  # the norm's output
        if b.model.positions == "rope":
            Rope(s, s.H).forward(tape, attention.input_category)
            Rope(s, s.K).forward(tape, attention.input_category)
        attention.forward(tape)

    def _mlp_forward(self, tape: Tape) -> None:
        b, activation = self.half, Activation(self.half.sizes, self.half.model.mlp)
        b.up.multiply(tape, (SAVED,) * len(b.up.features))
        tape.drop(b.stream_bytes)
        activation.forward(tape)
        tape.drop(activation.num_inputs * activation.nbytes)

    def backward(self, tape: Tape, stage: Stage) -> None:
        """The gradients of parameters wait for the second half, which comes first, to be joined by the first's."""
        b, s, mlp = self.half, self.half.sizes, stage.branch == MLP
        region, row, column = Region(s), b.down if mlp else b.output, b.up if mlp else b.qkv
        site = self._site(stage)
        with tape.at(site):
            if stage.name == "add":
                if row.biased:
                    tape.alloc(s.E * s.p)
                    self._join(tape, stage, s.E * s.p)
                self.tickets[stage.half] = region.enter(tape)
            elif stage.name == "leave":
                region.entered(tape, self.tickets.pop(stage.half))
                row.multiply_gradient(tape)
                if mlp or not ContextAttention(s).shares_out:
                    tape.release(s.N * row.F * s.c)
                self._join(tape, stage, s.E * row.F * s.p)
            elif stage.name == "compute":
                self.tickets[stage.half] = self._mlp_backward(tape) if mlp else self._attention_backward(tape, stage)
                self._join(tape, stage, column.gradient_bytes)
            else:
                region.left(tape, self.tickets.pop(stage.half))
        if stage.name == "enter":
            with tape.at(f"{site}_norm"):
                b.norm.differentiate(tape, dh_category=s.wire_category, residual=not mlp)
                if mlp:
                    tape.release(b.stream_bytes)
                self._join(tape, stage, b.norm.gradient_bytes)

    def _attention_backward(self, tape: Tape, stage: Stage) -> int:
        b, s, attention = self.half, self.half.sizes, ContextAttention(self.half.sizes)
        dkv, learned = attention.dkv_category, self.half.model.positions == "learned"
        attention.backward(tape)
        if not learned:
            Rope(s, s.K).backward(tape, dkv)
            Rope(s, s.H).backward(tape)
            tape.release(0 if stage.half else self.rotary_bytes)
        return b.qkv.send_gradient(tape, ("temporaries", dkv if learned else "temporaries", dkv))

    def _mlp_backward(self, tape: Tape) -> int:
        Activation(self.half.sizes, self.half.model.mlp).backward(tape)
        return self.half.up.send_gradient(tape)

    def _join(self, tape: Tape, stage: Stage, nbytes: int) -> None:
        """Gradients of parameters: the first half's are added to those of the second."""
        if stage.half == 0:
            tape.free(nbytes)
            tape.accumulate(nbytes)

    def _site(self, stage: Stage) -> str:
        return f"{self.site}.{'mlp' if stage.branch == MLP else 'attention'}"
