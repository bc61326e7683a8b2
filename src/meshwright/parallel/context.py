"""Attention over a sequence that ranks divide: Ulysses × ring, composed from the two (Fang and Zhao 2024, "USP").

    q_BSHD  [B, S, H, D]    S = sequence / (R·U): this rank's part of the ring's chunk
    k_BSKD  [B, S, K, D]    v likewise
    ->
    out_BSHD [B, S, H, D]

Ulysses exchanges first: inside, each rank has H/U heads of U·S tokens, one ring of R for each of the U sets of heads.
Selective recomputation wraps what lies inside the exchange, so that nothing is exchanged twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshwright.comm.collectives import Axis
from meshwright.config.attention import Kernel
from meshwright.kernels.attention import causal_attention
from meshwright.parallel.recompute import rerun
from meshwright.parallel.ring import ring_attention
from meshwright.parallel.ulysses import to_heads, to_sequence
from meshwright.schemes.ring import Order, schedule


@dataclass(frozen=True)
class ContextAttention:
    """How every layer of a model attends."""

    ulysses: Axis
    ring: Axis
    order: Order
    kernel: Kernel
    recompute: bool = False
    """Whether backward computes the core again (selective recomputation)."""

    def __call__(self, qkv: list[torch.Tensor], site: str, first_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of [q, k, v]. The list is emptied, so that no caller keeps alive what is only exchanged.

        `first_BS` [B, U·S]: the position of the first key that each query of the exchanged sequence sees, where
        documents are separate.
        """
        if self.ulysses.size > 1:
            qkv[:] = to_heads(qkv, self.ulysses, site)
        q, k, v = qkv
        qkv.clear()

        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.ring.size == 1:
                return causal_attention(q, k, v, self.kernel, first_BS)[0]
            plan = schedule(self.ring.rank, self.ring.size, self.order)
            return ring_attention(q, k, v, plan, self.ring, self.kernel, site, first_BS)

        out = rerun(core, q, k, v) if self.recompute else core(q, k, v)
        del q, k, v
        return to_sequence(out, self.ulysses, site) if self.ulysses.size > 1 else out
