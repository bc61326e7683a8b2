"""`audit`: the account of any PyTorch training step, real, on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from meshwright.account import Source, StepAccount
from meshwright.audit.recorder import Recorder


class Audit:
    """A recording in progress; `account` may be read inside the block and after it."""

    def __init__(self, recorder: Recorder, source: Source, rank: int, world: int) -> None:
        self._recorder, self._source, self._rank, self._world = recorder, source, rank, world

    @property
    def account(self) -> StepAccount:
        """What was done since the block was entered, or since `restart`."""
        return StepAccount.of(self._recorder.trace(), source=self._source, rank=self._rank, world=self._world)

    def restart(self) -> None:
        """Forget what was done so far: the account begins here. What is in memory stays in it.

        Call it after a first step, so that the account is of a step that finds its optimiser states.
        """
        self._recorder.restart()


@contextmanager
def audit() -> Iterator[Audit]:
    """Record what runs inside: communication, FLOPs and memory of this rank.

    Works with plain modules, DistributedDataParallel, fully_shard and DTensor. Axis names are those of the DeviceMesh
    that made a group; a group that no mesh made is `?`. Storages of a model that exists already count from the first
    forward.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with Recorder() as recorder:
        yield Audit(recorder, "run", rank, world)
