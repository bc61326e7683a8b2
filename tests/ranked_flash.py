"""Steps with our attention kernel in Triton's interpreter: a program, as TRITON_INTERPRET is read when it is imported.

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m ranked_flash [EVERY]

The numbers of a ring of two are verified; with EVERY, those of tensor parallelism too, and one of so many cases of the
agreement matrix.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from jobs import tiny_job
from reference.interpreter import mend_loops

from meshwright.account import StepAccount
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout, Model
from meshwright.training.device import check_attention
from meshwright.verify import agreement
from meshwright.verify.agreement import run_case
from meshwright.verify.matrix import all_attention_cases
from meshwright.verify.verify import verify_on

MODEL = Model(layers=1, d_model=32, d_ff=32, heads=2, kv_heads=1, head_dim=16, vocab_size=16)


def run_collecting(job: Job, profiled: bool) -> tuple[StepAccount, int | None]:
    """`run_case` on a rank. The interpreter's closures hold the storages of a launch until the collector comes; a
    kernel lets go of them at once, so here it comes after each launch."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def collected(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(self, *args, **kwargs)
        gc.collect()

    gc.freeze()
    with mock.patch.object(GridExecutor, "__call__", collected):
        return run_case(job, profiled)


@contextmanager
def collecting() -> Iterator[None]:
    """Cases that are checked inside run so. Ranks know this file by its name, not as a program."""
    from ranked_flash import run_collecting as by_name

    with mock.patch.object(agreement, "run_case", by_name):
        yield


def main(every: int | None) -> None:
    """Formula, rehearsal and run; then the right numbers."""
    cases = [case for case in all_attention_cases() if case.attention == "flash" and case.job.layout.world <= 3]
    for case in cases[::every] if every else ():
        with Ranks(case.job.layout.world, timeout_seconds=200) as pool, collecting():
            pool.run(mend_loops)
            found = agreement.check(case, pool)
        assert found.agrees, (str(case), found.differences[:3], found.profiler_peaks, found.run_peaks)
    with Ranks(2, timeout_seconds=200) as pool:
        pool.run(mend_loops)
        for layout in (Layout(ring=2, recompute="selective"), *([Layout(tensor=2)] if every else [])):
            job = tiny_job(MODEL, layout, attention="flash", batch=2)
            check_attention(job)
            report = verify_on(job, pool)
            assert report.agree, report.text()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
