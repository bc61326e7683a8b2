"""Steps with our attention kernel in Triton's interpreter: a program, as TRITON_INTERPRET is read when it is imported.

TRITON_INTERPRET=1 PYTHONPATH=tests python -m ranked_flash
"""

from __future__ import annotations

from jobs import tiny_job

from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Layout, Model
from meshwright.training.device import check_attention
from meshwright.verify.agreement import check
from meshwright.verify.matrix import AttentionCase
from meshwright.verify.verify import verify_on

MODEL = Model(layers=1, d_model=32, d_ff=32, heads=2, kv_heads=1, head_dim=16, vocab_size=16)


def main() -> None:
    """Formula, rehearsal and run in bf16; then the right numbers, over tensor parallelism and a ring."""
    with Ranks(2, timeout_seconds=200) as pool:
        agreement = check(AttentionCase("flash", "grouped_query", "ring 2", "none", "bf16"), pool)
        assert agreement.agrees, agreement.differences[:3]
        for layout in (Layout(tensor=2), Layout(ring=2, recompute="selective")):
            job = tiny_job(MODEL, layout, attention="flash", batch=2)
            check_attention(job, planning=False)
            report = verify_on(job, pool)
            assert report.agree, report.text()


if __name__ == "__main__":
    main()
