"""Which executor holds a job's parameters, gradients and optimiser states, and what it is given."""

from __future__ import annotations

from torch import nn

from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import Tiers, World
from meshwright.config.tree import Job
from meshwright.model.build import DTYPES
from meshwright.model.decoder import Decoder, units
from meshwright.parallel.fsdp import FullyShardedStates
from meshwright.parallel.replicate import Replicated, States
from meshwright.parallel.shard import ShardedStates
from meshwright.planner.buckets import buckets_of
from meshwright.schemes.params import ParamSpec


def states_of(job: Job, model: Decoder, specs: tuple[ParamSpec, ...], world: World) -> States:
    """Take over a model whose parameters have their values. Collective."""
    layout = job.layout
    for spec in specs:
        if spec.partial_over is not None:
            world.neighbours(*spec.partial_over)  # make the groups now: inside a step it would be too late
    if layout.zero_stage >= 2:
        layers = {name: module for name, module in units(model).items() if name.startswith("layers.")}
        dtypes = DTYPES[job.training.precision], DTYPES[job.training.reduce_precision]
        return FullyShardedStates(model, layers, specs, layout, world, param_dtype=dtypes[0], reduce_dtype=dtypes[1])
    parameters = {spec.name: model.get_parameter(spec.name) for spec in specs}
    parts = buckets_of(job, specs)
    handed = ("embedding.weight",) if job.model.tied else ()
    if not layout.state_axes:
        axis: Axis | Tiers = world.gradient_axis
        if layout.hierarchical:
            axis = world.tiers(layout.gradient_axis, job.cluster.devices_per_host)
        return Replicated(parameters, parts, layout.gradients, axis, world.neighbours, handed)
    sharded = ShardedStates(
        parameters, parts, layout.gradients, world.state_axis, world.replica_axis, world.neighbours, handed
    )
    for name, module in units(model).items():
        sharded.waited_for_by(module, _names(name, module, parameters))
    return sharded


def _names(name: str, module: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """The parameters that a unit needs; the last of the model needs whatever is left."""
    if name == "loss":
        return list(parameters)
    return [own for own in parameters if own.startswith(f"{name}.")]
