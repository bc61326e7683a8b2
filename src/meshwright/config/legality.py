"""Which layouts are legal for a model and a batch, and why the others are not.

Every broken rule is returned at once, with its numbers and the nearest legal values. A model that does not fit in
memory, an axis that crosses hosts, or more devices than the cluster has are not violations: commands report them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from meshwright.config.attention import AttentionCall
from meshwright.config.tiers import is_tiered, shares, tiers
from meshwright.config.tree import AXES, TOKEN_AXES, Cluster, Job, Layout, Model, Training
from meshwright.errors import UserError


@dataclass(frozen=True)
class Violation:
    """One broken rule; `rule` is stable, `message` is for people."""

    rule: str
    message: str


def violations(layout: Layout, model: Model, cluster: Cluster, training: Training) -> list[Violation]:
    """All rules that a layout breaks. `cluster` breaks none by itself; an option may need to know of it."""
    found = [*_unavailable(layout), *_split_of_mlp(layout, model), *_split_of_tokens(layout, training)]
    found += [*_sharding_of_states(layout, training), *_size_of_buckets(layout, cluster)]
    found += [*_sums_by_tiers(layout, cluster), *_half_batches(layout, model, training)]
    if model.block == "decoder":
        found += [*_shape_of_attention(model), *_split_of_attention(layout, model), *_kernel_of(model, training)]
    return found


def require_legal(job: Job) -> None:
    """Raise `UserError` with a line for each violation of a job."""
    if found := violations(job.layout, job.model, job.cluster, job.training):
        raise UserError("\n".join(violation.message for violation in found))


def require_decoder(job: Job, command: str) -> None:
    """Raise UserError if there is no step that `command` could execute."""
    if job.model.block != "decoder":
        raise UserError(
            f"{command} cannot take {job.name}: model.block = {job.model.block} is linear layers only, with no "
            f"vocabulary and no loss to train (it is for planning and worksheets): use plan, or a model whose block is "
            f"decoder"
        )


def complete_world(layout: Layout, world: int, typed: set[str]) -> Layout:
    """The layout for `--world N`: `replicate` takes what the other degrees leave, unless it was `typed` itself."""
    others = layout.world // layout.replicate
    if world >= 1 and world % others == 0 and "replicate" not in typed:
        return replace(layout, replicate=world // others)
    if layout.world == world:
        return layout
    if "replicate" in typed:
        raise UserError(
            f"--world {world} is not the product of the degrees, {_product(layout)} = {layout.world}: "
            f"use --world {layout.world}, or leave out layout.replicate"
        )
    raise UserError(
        f"--world {world} is not divisible by {_product(replace(layout, replicate=1))} = {others}, the product of the "
        f"degrees other than replicate: use {listed(near_multiples(others, world))}"
    )


def check_processes(layout: Layout, processes: int) -> None:
    """`--processes N` must be the product of the degrees."""
    if processes != layout.world:
        raise UserError(
            f"--processes {processes} is not the product of the degrees, {_product(layout)} = {layout.world}: "
            f"use --processes {layout.world}, or change a degree"
        )


def _unavailable(layout: Layout) -> Iterator[Violation]:
    if layout.pipeline > 1:
        yield Violation(
            "available",
            f"layout.pipeline = {layout.pipeline} is not available yet (all other axes are): set it to 1",
        )


def _shape_of_attention(model: Model) -> Iterator[Violation]:
    if model.heads % model.kv_heads:
        legal = _nearest(divisors(model.heads), model.kv_heads)
        yield Violation(
            "grouped_heads",
            f"model.heads = {model.heads} is not a multiple of model.kv_heads = {model.kv_heads} "
            f"(each KV head serves the same number of query heads): use kv_heads {listed(legal)}",
        )
    if model.positions == "rope" and model.head_dim % 2:
        yield Violation(
            "head_dim",
            f"model.head_dim = {model.head_dim} is odd (rotary embedding turns pairs of features): "
            f"use {listed(near_multiples(2, model.head_dim))}",
        )


def _kernel_of(model: Model, training: Training) -> Iterator[Violation]:
    """Of `training.attention` and the mask; where the device is open, the rules that are broken on every device."""
    call = AttentionCall.of(model, training)
    kinds = ("cpu", "cuda") if training.device == "auto" else (training.device,)
    everywhere = [dict(replace(call, device_kind=kind).refusals(training.attention)) for kind in kinds]
    for rule, message in everywhere[-1].items():
        if all(rule in broken for broken in everywhere):
            yield Violation(rule, message)


def _split_of_attention(layout: Layout, model: Model) -> Iterator[Violation]:
    degree, use = layout.tensor * layout.ulysses, _head_advice(layout, model)
    who = _degrees(layout, ("tensor", "ulysses"))
    if model.heads % degree:
        yield Violation(
            "heads",
            f"{who} does not divide model.heads = {model.heads} (tensor × ulysses must divide the query heads): {use}",
        )
    if not _splits(model.kv_heads, layout.tensor):
        yield Violation(
            "kv_heads",
            f"layout.tensor = {layout.tensor} neither divides model.kv_heads = {model.kv_heads} nor is a multiple of "
            f"it (tensor must split the KV heads evenly or replicate them): {use}",
        )
    elif not _splits(model.kv_heads, degree):
        yield Violation(
            "kv_heads",
            f"{who} neither divides model.kv_heads = {model.kv_heads} nor is a multiple of it "
            f"(tensor × ulysses must split the KV heads evenly or replicate them): {use}",
        )


def _head_advice(layout: Layout, model: Model) -> str:
    """The nearest legal values of ulysses beside this tensor, or of tensor beside this ulysses."""
    tensors = _nearest(_tensor_degrees(layout, model), layout.tensor)
    if layout.ulysses == 1:
        return f"use {listed(tensors)}"
    beside = [degree for degree in divisors(model.heads) if _legal_for_heads(model, layout.tensor, degree)]
    if beside:
        return f"use layout.ulysses {listed(_nearest(beside, layout.ulysses))}"
    if tensors:
        return f"use layout.tensor {listed(tensors)}"
    alone = _nearest(_tensor_degrees(replace(layout, ulysses=1), model), layout.tensor)
    return f"use layout.tensor {listed(alone)} with layout.ulysses 1"


def _legal_for_heads(model: Model, tensor: int, ulysses: int) -> bool:
    degrees = (tensor, tensor * ulysses)
    return model.heads % degrees[1] == 0 and all(_splits(model.kv_heads, degree) for degree in degrees)


def _splits(kv_heads: int, degree: int) -> bool:
    """Whether each of `degree` ranks has as many KV heads, or each KV head as many ranks."""
    return kv_heads % degree == 0 or degree % kv_heads == 0


def _split_of_mlp(layout: Layout, model: Model) -> Iterator[Violation]:
    if model.d_ff % layout.tensor:
        degrees = _tensor_degrees(layout, model) or _tensor_degrees(replace(layout, ulysses=1), model)
        legal = _nearest(degrees, layout.tensor)
        yield Violation(
            "d_ff",
            f"layout.tensor = {layout.tensor} does not divide model.d_ff = {model.d_ff} "
            f"(each tensor-parallel rank holds an equal part of the MLP): use {listed(legal)}",
        )


def _split_of_tokens(layout: Layout, training: Training) -> Iterator[Violation]:
    parts = layout.batch_ranks * training.accumulation
    if training.batch % parts:
        legal = near_multiples(parts, training.batch)
        by = _degrees(layout, ("replicate", "shard"), {"training.accumulation": training.accumulation})
        yield Violation(
            "batch",
            f"training.batch = {training.batch} is not divisible by {by} (replicate × shard × accumulation: each rank "
            f"takes as many sequences in each micro-batch): use a batch of {listed(legal)}",
        )
    parts = layout.sequence_parts
    if training.seq_len % parts and not training.pad:
        axes = ("ring", "ulysses", "tensor") if layout.sequence_parallel else ("ring", "ulysses")
        zigzag = {"2 for zigzag": 2} if layout.ring > 1 and layout.ring_order == "zigzag" else {}
        legal = near_multiples(parts, training.seq_len)
        yield Violation(
            "sequence",
            f"training.seq_len = {training.seq_len} is not divisible by {_degrees(layout, axes, zigzag)} "
            f"(each rank holds as many tokens): use {listed(legal)}, or training.pad true",
        )


def _sharding_of_states(layout: Layout, training: Training) -> Iterator[Violation]:
    stage = layout.zero_stage
    if layout.shard > 1 and stage == 0:
        yield Violation(
            "zero",
            f"layout.shard = {layout.shard} with layout.zero = 0 shards nothing (ranks that hold copies of all states "
            f"are replicas): use layout.zero 1, 2 or 3, or layout.replicate {layout.replicate * layout.shard}",
        )
    if stage and not layout.state_axes:
        yield Violation(
            "zero",
            f"layout.zero = {stage} has no ranks to shard over (shard × ring × ulysses = 1; replicate holds copies): "
            f"use layout.shard {max(2, layout.replicate)}, or layout.zero 0",
        )
    if training.reduce_precision != "float32" and stage < 2:
        yield Violation(
            "reduce_precision",
            f"training.reduce_precision = {training.reduce_precision} needs layout.zero 2 or 3, not {stage} (the "
            f"others sum the float32 gradients where they are): use float32, or shard the states",
        )


def _size_of_buckets(layout: Layout, cluster: Cluster) -> Iterator[Violation]:
    sized = layout.gradients == "bucketed" and layout.zero_stage < 2 and layout.gradient_group_size > 1
    if layout.bucket_mib != "auto" or not sized:
        return
    uses = {"intra": cluster.devices_per_host > 1, "inter": layout.world > cluster.devices_per_host}
    unknown = [f"cluster.{tier}.bandwidth" for tier, used in uses.items() if used]
    unknown = [path for path in unknown if not getattr(cluster, path.split(".")[1]).bandwidth]
    if unknown:
        yield Violation(
            "bucket",
            f"layout.bucket_mib = auto needs {listed(unknown, 'and')}, not known of this cluster (the best size "
            f"follows from the links): give a cluster of meshwright bench calibrate, or a number such as 25",
        )


def _sums_by_tiers(layout: Layout, cluster: Cluster) -> Iterator[Violation]:
    if not layout.hierarchical:
        return
    if layout.zero_stage:
        or_zero_0 = "" if layout.shard > 1 else " or layout.zero 0"
        yield Violation(
            "hierarchical",
            f"layout.hierarchical = true with layout.zero = {layout.zero_stage} sums no gradients whole (sharded "
            f"states are reduce-scattered): use layout.hierarchical false{or_zero_0}",
        )
    per_host = cluster.devices_per_host
    uneven = [share for share in shares(layout, layout.token_axes, per_host) if not is_tiered(share)]
    if uneven:
        legal = [d for d in divisors(layout.world) if tiers(layout, layout.token_axes, d) is not None]
        or_hosts = f" or cluster.devices_per_host {listed(_nearest(legal, per_host))}" if legal else ""
        yield Violation(
            "tiers",
            f"layout.hierarchical = true needs as many ranks, 2 or more, of each gradient group on each of several "
            f"hosts, but {_degrees(layout, TOKEN_AXES)} has {_share(uneven[0])} of cluster.devices_per_host = "
            f"{per_host} (a host's ranks divide what goes to other hosts): use layout.hierarchical false{or_hosts}",
        )


def _share(ranks: tuple[int, ...]) -> str:
    """`3 and 1 ranks on its hosts`."""
    if len(set(ranks)) > 1:
        return f"{listed(ranks, 'and')} ranks on its hosts"
    return f"{ranks[0]} rank{'s' * (ranks[0] > 1)} on {f'each of {len(ranks)} hosts' if len(ranks) > 1 else 'one host'}"


def _half_batches(layout: Layout, model: Model, training: Training) -> Iterator[Violation]:
    if not layout.halves:
        return
    if model.block != "decoder":
        yield Violation(
            "half_batches",
            f"layout.half_batches = true needs attention and an MLP to run beside each other, and model.block = "
            f"{model.block} has linear layers only: use layout.half_batches false",
        )
        return
    if layout.overlap == "pipelined":
        yield Violation(
            "half_batches_overlap",
            "layout.half_batches = true with layout.overlap = pipelined would hide the same communication twice (a "
            "product that is cut waits for all of its own pieces, so that nothing is left to run under the other "
            "half): use layout.overlap none, or layout.half_batches false",
        )
    parts = layout.batch_ranks * training.accumulation
    if training.batch % parts == 0 and training.batch // parts % 2:
        divided = _degrees(layout, ("replicate", "shard"), {"training.accumulation": training.accumulation})
        by = f", divided by {divided}," if parts > 1 else ""
        yield Violation(
            "half_batches",
            f"training.batch = {training.batch}{by} leaves a rank a micro-batch of {training.batch // parts} "
            f"(layout.half_batches = true halves it): use a batch of "
            f"{listed(near_multiples(2 * parts, training.batch))}, or layout.half_batches false",
        )


def _tensor_degrees(layout: Layout, model: Model) -> list[int]:
    """Legal values of tensor beside this ulysses."""
    degrees = divisors(model.d_ff)
    if model.block == "ffn":
        return degrees
    return [degree for degree in degrees if _legal_for_heads(model, degree, layout.ulysses)]


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, in rising order."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return low + [number // divisor for divisor in reversed(low) if divisor * divisor != number]


def _nearest(legal: list[int], value: int, keep: int = 4) -> list[int]:
    """The few values next to `value` (by ratio, as degrees go), in rising order."""
    return sorted(sorted(legal, key=lambda degree: (max(degree / value, value / degree), degree))[:keep])


def near_multiples(step: int, value: int) -> list[int]:
    """The multiples of `step` around `value`."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def _degrees(layout: Layout, axes: Iterable[str], others: dict[str, int] | None = None) -> str:
    """`layout.replicate × training.accumulation = 3 × 2 = 6`; factors of 1 are left out, unless all are 1."""
    factors = {f"layout.{axis}": layout.degree(axis) for axis in axes} | (others or {})
    shown = {name: degree for name, degree in factors.items() if degree > 1} or dict(list(factors.items())[:1])
    if len(shown) == 1:
        return " = ".join(str(part) for part in next(iter(shown.items())))
    return f"{' × '.join(shown)} = {' × '.join(map(str, shown.values()))} = {math.prod(shown.values())}"


def _product(layout: Layout) -> str:
    """`replicate 2 × tensor 2`."""
    return " × ".join(f"{axis} {layout.degree(axis)}" for axis in AXES if layout.degree(axis) > 1) or "1"


def listed(values: Iterable[object], last: str = "or") -> str:
    """`1, 2, 4 or 8`."""
    *head, tail = [str(value) for value in values]
    return f"{', '.join(head)} {last} {tail}" if head else tail
