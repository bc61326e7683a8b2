"""ZeRO-2 and ZeRO-3 by formula: what torch's `fully_shard` gathers, sums and holds, unit by unit (Zhao et al. 2023).

States are divided over shard × ring × ulysses, N ranks; `replicate` holds copies of the shards (HSDP). Units are the
blocks, and the root with everything else. Every parameter is cut along dim 0 into N parts of ceil(dim0/N) rows, the
last of them padded: padding is stored and sent. With P elements of a unit, padding included, c bytes in the compute
dtype and r in the reduce dtype:

    gather    before a unit's forward, and again before its backward where it was freed in between (zero 3; the root
              never is): all-gather of P·c bytes
    reduce    after its backward, in every micro-batch: reduce-scatter of P·r bytes; in the last micro-batch, if there
              are replicas, an all-reduce of P·r/N bytes over them
    memory    float32 masters 4P/N, gradients 4P/N (from the first micro-batch's backward on), optimiser states 8P/N;
              gathered P·c; for a while the wire's formats of both, and the unsharded gradients of one unit, P·c

`prefetch` = 1 is what fully_shard does by itself. Forward: a unit is gathered as it begins; on a GPU under the compute
of the one before, because the host runs ahead; the wire's buffer is freed when the next unit is there. Backward: as a
unit begins, the next one is put on the wire. Above 1, that many units are on the wire ahead of the one that computes,
in both directions.

On a CPU fully_shard waits for each collective at once. On a GPU a gather is waited for where its unit begins, and a
reduction where the next one does: what is put on the wire runs under the compute in between. There the gather of the
next unit of forward enters the trace as a unit begins, as early as the host, which runs ahead, may put it on the wire
(the buffer of the gather before must have been copied out of), and the sum over the replicas where the reduction
before it is known to be done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from meshwright.account import Repeat
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.tape import FLOAT32, Group, Tape
from meshwright.schemes.units import Run, Units

ROOT = "root"
"""Site of the root unit's collectives."""
_GATHERS, _REDUCTIONS, _REPLICA_SUMS = "gathers", "reductions", "sums over replicas"
"""Queues of collectives that are waited for in the order of their issue."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    numel: int
    """Elements of all ranks, padding included."""
    last_numel: int
    """Of its last parameter, whose gradient fully_shard holds until the reduction is done; without padding."""
    last_category: str
    """Where that gradient was made."""

    @classmethod
    def of(cls, specs: Sequence[ParamSpec], ranks: int, *, loss_chunk: int = 0) -> Unit:
        """The unit of some parameters, or of none. A module registers its bias before its weight.

        In chunks, the loss makes the gradient of the head.
        """
        if not specs:
            return cls(0, 0, "temporaries")
        last = next(spec for spec in reversed(specs) if spec.name.endswith(".weight"))
        category = "logits" if loss_chunk and last.name == "head.weight" else "temporaries"
        return cls(sum(padded_numel(spec, ranks) for spec in specs), last.local_numel, category)


@dataclass(frozen=True)
class FullyShardedUnits(Units):
    """One micro-batch of a model whose every unit is fully sharded."""

    layer: Unit
    root: Unit
    num_layers: int
    group: Group
    replicas: Group
    reshards: bool
    """Whether layers are freed between forward and backward (zero 3)."""
    prefetch: int
    dtype: str
    """Name of the compute dtype."""
    p: int
    """Bytes of a gathered number, and of its gradient."""
    reduce_dtype: str
    r: int
    """Bytes of a number that is reduced."""
    is_first: bool
    """Of the step's micro-batches."""
    is_last: bool
    is_async: bool = False
    """Whether collectives run beside compute: on a GPU."""

    def forward_runs(self, layers: int) -> Iterator[Run]:
        ahead = self.prefetch if self.prefetch > 1 or self.is_async else layers
        return _runs(range(layers), lambda index: index + ahead < layers)

    def backward_runs(self, layers: int) -> Iterator[Run]:
        return _runs(range(layers - 1, -1, -1), lambda index: self.reshards and index - self.prefetch >= 0)

    def enter_model(self, tape: Tape) -> None:
        with tape.at(ROOT, "forward"):
            self.gather(tape, self.root)
            self._arrived(tape, self.root)
            tape.alloc(self.root.numel * self.p, "gathered_parameters")
        if self.prefetch > 1:
            self._gather_layers(tape, "forward", first=0, step=1)
        elif self.is_async:
            with tape.at("layers.0", "forward"):
                self._put_on_the_wire(tape, self.layer)

    def leave_model(self, tape: Tape) -> None:
        with tape.at(ROOT, "forward"):
            tape.free(self.layer.numel * self.p, "communication_buffers")

    def enter_layer(self, tape: Tape, run: Run) -> None:
        before = self.root if run.is_first else self.layer
        with tape.at("layers.*"):
            if self.prefetch == 1:
                self.gather(tape, self.layer, is_on_the_wire=self.is_async)
            self._arrived(tape, self.layer)
            tape.alloc(self.layer.numel * self.p, "gathered_parameters")
            tape.free(before.numel * self.p, "communication_buffers")
        if run.puts_ahead:
            with tape.at(f"layers.*+{self.prefetch}"):
                if self.prefetch > 1:
                    self.gather(tape, self.layer)
                else:
                    self._put_on_the_wire(tape, self.layer)

    def leave_layer(self, tape: Tape) -> None:
        if self.reshards:
            with tape.at("layers.*"):
                tape.free(self.layer.numel * self.p, "gathered_parameters")

    def reenter_model(self, tape: Tape) -> None:
        tape.hold_gradients()
        if self.reshards:
            self._gather_layers(tape, "backward", first=self.num_layers - 1, step=-1)

    def reenter_layer(self, tape: Tape, run: Run) -> None:
        tape.hold_gradients()
        if not self.reshards:
            return
        with tape.at("layers.*"):
            self._arrived(tape, self.layer)
            tape.alloc(self.layer.numel * self.p, "gathered_parameters")
            tape.free(self.layer.numel * self.p, "communication_buffers")
        if run.puts_ahead:
            with tape.at(f"layers.*-{self.prefetch}"):
                self.gather(tape, self.layer)

    def reduce_layer(self, tape: Tape, run: Run) -> None:
        with tape.at("layers.*"):
            tape.free(self.layer.numel * self.p, "gathered_parameters")
            if not run.is_first:
                tape.free(self.layer.numel * self.r)  # what the reduction before has sent
                self._reduced(tape, self.layer, "layers.*+1")
            self._reduce(tape, self.layer)

    def reduce_model(self, tape: Tape) -> None:
        with tape.at(ROOT, "backward"):
            tape.free(self.root.numel * self.p, "gathered_parameters")
            tape.free(self.layer.numel * self.r)
            self._reduced(tape, self.layer, "layers.0")
            self._reduce(tape, self.root)
            self._reduced(tape, self.root, ROOT)
            if self.is_async and self.is_last and self.replicas.size > 1:
                units = self.num_layers * bool(self.layer.numel) + bool(self.root.numel)
                with tape.apart() as waits:
                    tape.wait(tape.queue(_REPLICA_SUMS))
                tape.put(Repeat(units, tuple(waits)))
            tape.free(self.root.numel * self.r)

    def _gather_layers(self, tape: Tape, phase: str, first: int, step: int) -> None:
        with tape.repeat(min(self.prefetch, self.num_layers), first=first, step=step), tape.at("layers.*", phase):
            self.gather(tape, self.layer)

    def gather(self, tape: Tape, unit: Unit, *, is_on_the_wire: bool = False) -> None:
        """All-gather; where the dtype differs from the masters', of a cast copy of this rank's part."""
        if not unit.numel:
            return
        with tape.holding(unit.numel // self.group.size * self.p if self.p != FLOAT32 else 0):
            tape.alloc(unit.numel * self.p, "communication_buffers")
            if not is_on_the_wire:
                self._put_on_the_wire(tape, unit)
        tape.elementwise(4 * unit.numel * self.p)

    def _put_on_the_wire(self, tape: Tape, unit: Unit) -> None:
        """The gather itself, waited for at once where nothing runs beside it."""
        if unit.numel:
            tape.issue("all_gather", self.group, self.dtype, unit.numel * self.p, tape.queue(_GATHERS))
            if not self.is_async:
                tape.wait(tape.queue(_GATHERS))

    def _arrived(self, tape: Tape, unit: Unit) -> None:
        """The unit is needed."""
        if self.is_async and unit.numel:
            tape.wait(tape.queue(_GATHERS))

    def _reduce(self, tape: Tape, unit: Unit) -> None:
        """From the unsharded gradients to the sharded ones; what is sent stays until the next reduction."""
        if not unit.numel:
            tape.take_gradients()
            return
        tape.alloc(unit.numel * self.r)
        held = unit.last_numel * self.p
        for category, nbytes in tape.take_gradients().items():
            tape.free(nbytes - held if category == unit.last_category else nbytes, category)
        own, gradients = unit.numel // self.group.size, unit.numel // self.group.size * FLOAT32
        category = "gradients" if self._adopts else "communication_buffers"
        casts = self.r != FLOAT32
        tape.alloc(own * self.r, "communication_buffers" if casts else category)
        tape.issue("reduce_scatter", self.group, self.reduce_dtype, unit.numel * self.r, tape.queue(_REDUCTIONS))
        if not self.is_async:
            tape.wait(tape.queue(_REDUCTIONS))
            if self.is_last:
                tape.wait(tape.all_reduce(self.replicas, self.reduce_dtype, own * self.r))
        if casts:
            tape.alloc(gradients, "gradients" if self._adopts else "temporaries")
            tape.free(own * self.r, "communication_buffers")
        if not self.is_first:
            if self._adopts:
                tape.free(gradients, "gradients")
            else:
                tape.free(gradients, "temporaries" if casts else category)
        tape.elementwise(2 * unit.numel * (self.p + self.r))
        tape.free(held, unit.last_category)

    def _reduced(self, tape: Tape, unit: Unit, site: str) -> None:
        """The reduction before must be done; in the last micro-batch its sum over the replicas follows."""
        if self.is_async and unit.numel:
            tape.wait(tape.queue(_REDUCTIONS))
            if self.is_last:
                own = unit.numel // self.group.size * self.r
                with tape.at(site):
                    tape.issue("all_reduce", self.replicas, self.reduce_dtype, own, tape.queue(_REPLICA_SUMS))

    @property
    def _adopts(self) -> bool:
        """Whether what was reduced is the gradient from now on, rather than added to the one that is there."""
        return self.is_first or (self.is_last and self.replicas.size > 1)


def _runs(order: Sequence[int], puts_ahead: Callable[[int], bool]) -> Iterator[Run]:
    def kind(index: int) -> tuple[bool, bool, bool]:
        return index == order[0], puts_ahead(index), index == 0

    for (is_first, ahead, _), group in itertools.groupby(order, kind):
        indices = list(group)
        yield Run(indices[0], len(indices), is_first, ahead)


def padded_numel(spec: ParamSpec, ranks: int) -> int:
    """Elements of all ranks' parts of a parameter, as long as the longest."""
    rows, *rest = spec.local_shape
    return ranks * -(-rows // ranks) * math.prod(rest)


def own_rows(spec: ParamSpec, ranks: int, coordinate: int) -> tuple[int, int]:
    """First and past-the-last row of the tensor-parallel part that a rank holds; the last may have fewer, or none."""
    rows = spec.local_shape[0]
    part = -(-rows // ranks)
    return min(rows, coordinate * part), min(rows, (coordinate + 1) * part)


def own_numel(spec: ParamSpec, ranks: int, coordinate: int) -> int:
    """Elements of those rows."""
    start, stop = own_rows(spec, ranks, coordinate)
    return (stop - start) * math.prod(spec.local_shape[1:])
