"""`rehearse`: the account of any PyTorch training step on one rank of a world that does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meshwright.audit.context import Audit
from meshwright.audit.recorder import Recorder
from meshwright.rehearsal.fake_world import fake_group, fake_tensors


@contextmanager
def rehearse(world: int = 1, rank: int = 0) -> Iterator[Audit]:
    """Run what is inside on fake tensors, as `rank` of `world`, and record it.

    A default process group exists inside; model, DeviceMesh and optimiser may be made there. Nothing is sent and
    nothing computed, so values must not be read (`.item()` raises). Works with fully_shard and DTensor;
    DistributedDataParallel is refused. Raises UserError if this process has a process group already.

        with meshwright.rehearse(world=1024, rank=0) as r:
            model, optimiser = build()
            step(model, optimiser)
            r.restart()
            step(model, optimiser)
        print(r.account.footprint.peak)
    """
    with fake_group(world, rank), fake_tensors(), Recorder() as recorder:
        yield Audit(recorder, "rehearsed", rank, world)
