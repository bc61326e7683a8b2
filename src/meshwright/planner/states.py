"""Parameters, gradients and optimiser states of a rank by formula: `training.states`, as a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from meshwright.config.tree import Job
from meshwright.planner.buckets import buckets_of
from meshwright.schemes import hierarchical
from meshwright.schemes.fsdp import FullyShardedUnits, Unit, own_numel, padded_numel
from meshwright.schemes.hierarchical import HierarchicalSums, TierGroups, tier_groups
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import PARTIAL_SITE, Bucket, Strategy, is_overlapped, sum_partial, synchronise
from meshwright.schemes.sending import BucketUnits, OneCollective, Sending, Sums, needed_by
from meshwright.schemes.shard import gather_parameters, pieces, scatter_gradients, sum_parts
from meshwright.schemes.tape import DTYPE_NAMES, FLOAT32, ITEMSIZES, Group, Tape
from meshwright.schemes.units import Units


class States(Protocol):
    """What a step needs to know of the states."""

    @property
    def group(self) -> Group:
        """The ranks that divide the states."""
        ...

    @property
    def owned_numel(self) -> int:
        """Elements that this rank steps."""
        ...

    def persist(self, tape: Tape) -> None:
        """What is there before the step."""

    def micro_batches(self, count: int) -> Iterator[tuple[int, Units]]:
        """How often a micro-batch does what to its units; the first is one of its own."""
        ...

    def begin(self, tape: Tape) -> None:
        """Gradients are forgotten."""

    def finish(self, tape: Tape) -> None:
        """Backward is over: gradients are summed."""

    def publish(self, tape: Tape) -> None:
        """The optimiser has stepped."""


def states_of(job: Job, specs: Sequence[ParamSpec], rank: int) -> States:
    """The states of one rank of a legal job."""
    layout = job.layout
    group = Group(layout.state_axis or "shard", layout.state_group_size)
    if layout.zero_stage >= 2:
        return FullySharded(job, tuple(specs), group, Group("replicate", layout.replicate), rank)
    parts = buckets_of(job, specs)
    if not layout.state_axes:
        gradient_group = Group(layout.gradient_axis or "replicate", layout.gradient_group_size)
        tiers = tier_groups(layout, job.cluster.devices_per_host)
        sums_on = partial(_sums, gradient_group, tiers)
        sending = _sending(job, parts, specs, sums_on)
        return Replicated(parts, gradient_group, layout.gradients, tiers, sending)
    names = tuple(spec.name for spec in specs)
    sending = _sending(job, parts, specs, lambda tape: OneCollective(tape, "reduce_scatter", group))
    replicas = Group("replicate", layout.replicate)
    return Sharded(parts, names, group, replicas, layout.state_coordinate(rank), sending)


def _sums(group: Group, tiers: TierGroups | None, tape: Tape) -> Sums:
    return OneCollective(tape, "all_reduce", group) if tiers is None else HierarchicalSums(tape, tiers)


def _sending(
    job: Job, parts: Sequence[Bucket], specs: Sequence[ParamSpec], sums_on: Callable[[Tape], Sums]
) -> Sending | None:
    """None where gradients are summed after backward, or not at all."""
    if not is_overlapped(job.layout.gradients) or job.layout.gradient_group_size == 1:
        return None
    return Sending(parts, specs, sums_on, ("head", "loss") if job.model.tied else ())


def _micro_batches(count: int, first: Units, last: Units, only: Units) -> Iterator[tuple[int, Units]]:
    """Of a step whose parameters are there."""
    if count == 1:
        yield 1, only
        return
    yield 1, first
    if count > 2:
        yield count - 2, Units()
    yield 1, last


@dataclass(frozen=True)
class Replicated:
    """Zero 0: float32 masters, gradients and two moments; a step counter for each parameter."""

    parts: Sequence[Bucket]
    gradient_group: Group
    strategy: Strategy
    tiers: TierGroups | None
    """Where gradients are summed by tiers."""
    sending: Sending | None
    """Where they are sent under backward."""

    @property
    def group(self) -> Group:
        """Nothing is divided."""
        return Group("shard", 1)

    @property
    def owned_numel(self) -> int:
        """All."""
        return sum(spec.local_numel for bucket in self.parts for spec in bucket.members)

    def persist(self, tape: Tape) -> None:
        """16 bytes a parameter; gradients are padded to what they are cut into."""
        nbytes = self.owned_numel * FLOAT32
        tape.alloc(nbytes, "parameters")
        tape.alloc(sum(bucket.numel for bucket in self.parts) * FLOAT32, "gradients")
        tape.alloc(2 * nbytes + FLOAT32 * sum(len(bucket.members) for bucket in self.parts), "optimiser_states")

    def micro_batches(self, count: int) -> Iterator[tuple[int, Units]]:
        """Gradients are sent in the last one."""
        last = BucketUnits(self.sending)
        yield from _micro_batches(count, Units(), last, last)

    def begin(self, tape: Tape) -> None:
        """Zeroes them."""
        tape.elementwise(self.owned_numel * FLOAT32)

    def finish(self, tape: Tape) -> None:
        """All-reduces, at once or by tiers."""
        if self.sending is not None:
            self.sending.finish()
            sum_partial(tape, self.parts, whole=True)
        elif self.tiers is None:
            synchronise(tape, self.parts, self.gradient_group)
        else:
            hierarchical.synchronise(tape, self.parts, self.strategy, self.tiers)

    def publish(self, tape: Tape) -> None:
        """Every rank has stepped everything."""


@dataclass(frozen=True)
class Sharded:
    """Zero 1: the same, but of the moments only this rank's pieces."""

    parts: Sequence[Bucket]
    names: Sequence[str]
    """All parameters in order of registration."""
    group: Group
    replicas: Group
    coordinate: int
    sending: Sending | None
    """Where gradients are sent under backward."""

    @property
    def owned_numel(self) -> int:
        """Those of its pieces."""
        return sum(piece.stop - piece.start for bucket in self.parts for piece in pieces(bucket, self.coordinate))

    def persist(self, tape: Tape) -> None:
        """8 bytes a parameter, and 8 a parameter that it owns."""
        nbytes = sum(bucket.numel for bucket in self.parts) * FLOAT32
        num_pieces = sum(1 for bucket in self.parts for _ in pieces(bucket, self.coordinate))
        tape.alloc(nbytes, "parameters")
        tape.alloc(nbytes, "gradients")
        tape.alloc((2 * self.owned_numel + num_pieces) * FLOAT32, "optimiser_states")

    def micro_batches(self, count: int) -> Iterator[tuple[int, Units]]:
        """The parameters of the step before arrive in the first one, gradients are sent in the last."""
        arriving = needed_by(self.parts, self.names)
        first, last, only = BucketUnits(None, arriving), BucketUnits(self.sending), BucketUnits(self.sending, arriving)
        yield from _micro_batches(count, first, last, only)

    def begin(self, tape: Tape) -> None:
        """Zeroes all gradients."""
        tape.elementwise(sum(bucket.numel for bucket in self.parts) * FLOAT32)

    def finish(self, tape: Tape) -> None:
        """Reduce-scatters."""
        if self.sending is None:
            scatter_gradients(tape, self.parts, self.group, self.replicas)
        else:
            self.sending.finish()
            sum_parts(tape, self.parts, self.replicas)

    def publish(self, tape: Tape) -> None:
        """All-gathers the parameters."""
        gather_parameters(tape, self.parts, self.names, self.group)


@dataclass(frozen=True)
class FullySharded:
    """Zero 2 and 3: masters, gradients and moments of this rank's rows of every parameter."""

    job: Job
    specs: tuple[ParamSpec, ...]
    group: Group
    replicas: Group
    rank: int

    @property
    def owned_numel(self) -> int:
        """Those of its rows, without padding."""
        return sum(map(self._own, self.specs))

    def _own(self, spec: ParamSpec) -> int:
        return own_numel(spec, self.group.size, self.job.layout.state_coordinate(self.rank))

    def persist(self, tape: Tape) -> None:
        """Gradients come and go."""
        ranks = self.group.size
        tape.alloc(sum(padded_numel(spec, ranks) for spec in self.specs) // ranks * FLOAT32, "parameters")
        tape.alloc((2 * self.owned_numel + len(self.specs)) * FLOAT32, "optimiser_states")

    def micro_batches(self, count: int) -> Iterator[tuple[int, Units]]:
        """The first makes the gradients, the others add to them, the last sums them over the replicas."""
        if count == 1:
            yield 1, self._units(is_first=True, is_last=True)
            return
        yield 1, self._units(is_first=True, is_last=False)
        if count > 2:
            yield count - 2, self._units(is_first=False, is_last=False)
        yield 1, self._units(is_first=False, is_last=True)

    def _units(self, *, is_first: bool, is_last: bool) -> Units:
        layout, training = self.job.layout, self.job.training
        layer = [spec for spec in self.specs if spec.name.startswith("layers.0.")]
        root = [spec for spec in self.specs if not spec.name.startswith("layers.")]
        return FullyShardedUnits(
            layer=Unit.of(layer, self.group.size),
            root=Unit.of(root, self.group.size, loss_chunk=training.loss_chunk),
            num_layers=self.job.model.layers,
            group=self.group,
            replicas=self.replicas,
            reshards=layout.zero_stage == 3,
            prefetch=layout.prefetch,
            dtype=DTYPE_NAMES[training.precision],
            p=ITEMSIZES[training.precision],
            reduce_dtype=DTYPE_NAMES[training.reduce_precision],
            r=ITEMSIZES[training.reduce_precision],
            is_first=is_first,
            is_last=is_last,
            is_async=training.device == "cuda",
        )

    def begin(self, tape: Tape) -> None:
        """Frees the gradients of the step before: nothing is held yet."""

    def finish(self, tape: Tape) -> None:
        """Sums what is partial on its rows, through a copy."""
        partial: dict[tuple[str, int], list[int]] = {}
        for spec in self.specs:
            if spec.partial_over is not None:
                partial.setdefault(spec.partial_over, []).append(self._own(spec))
        for (axis, size), numels in partial.items():
            nbytes = sum(numels) * FLOAT32
            with tape.at(PARTIAL_SITE, "backward"), tape.holding(nbytes, "communication_buffers"):
                tape.elementwise(4 * nbytes)
                tape.wait(tape.all_reduce(Group(axis, size), "float32", nbytes))

    def publish(self, tape: Tape) -> None:
        """The next forward gathers."""
