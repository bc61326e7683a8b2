"""Attention over a sequence that ranks divide, by formula: Ulysses × ring, composed from the two (Fang and Zhao 2024).

Ulysses exchanges the sequence for heads first; inside, each rank has H/U heads of the U·S tokens of a ring chunk, and
there is one ring for each of the U sets of heads. Selective recomputation (Korthikanti et al. 2022, section 5) keeps q,
k and v and computes what lies inside the exchange again in backward, hops of the ring included.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.attention import AttentionCore
from meshwright.schemes.ring import RingCore
from meshwright.schemes.tape import Sizes, Tape
from meshwright.schemes.ulysses import Exchange

SAVED = "saved_activations"


@dataclass(frozen=True)
class ContextAttention:
    """Attention from q, k, v [B, S, heads, D] of this rank to out [B, S, H, D]."""

    sizes: Sizes

    @property
    def core(self) -> AttentionCore | RingCore:
        """What lies inside the exchange."""
        inner = self.sizes.exchanged
        return RingCore(inner) if inner.R > 1 else AttentionCore(inner)

    @property
    def exchanges(self) -> bool:
        """Whether sequence and heads are exchanged."""
        return self.sizes.U > 1

    @property
    def input_category(self) -> str:
        """Category of q, k and v: saved, unless it is the exchanged ones that are."""
        return "temporaries" if self.exchanges else SAVED

    @property
    def reruns(self) -> bool:
        """Whether backward computes the core again."""
        return self.sizes.recompute == "selective"

    @property
    def shares_out(self) -> bool:
        """Whether attention keeps the very output that the layer after it reads and keeps."""
        return not self.exchanges and not self.reruns and self.core.keeps_out

    @property
    def dkv_category(self) -> str:
        """Category of dk and dv, as they leave."""
        return "temporaries" if self.exchanges else self.core.dkv_category

    @property
    def _qkv_bytes(self) -> int:
        return self.core.whole.q_bytes + 2 * self.core.whole.kv_bytes

    def forward(self, tape: Tape) -> None:
        """Frees q, k and v if it exchanges them; makes out, saved by the layer that reads it."""
        s, core = self.sizes, self.core
        arrived = Exchange(s, ()).arriving_category if self.exchanges else "temporaries"
        if self.exchanges:
            Exchange(s, (s.H, s.K, s.K)).to_heads(tape, SAVED if tape.keeps else None)
            tape.free(s.N * (s.H + 2 * s.K) * s.D * s.c)
        keeps_out = not self.exchanges or (not self.reruns and core.keeps_out)
        core.forward(tape, SAVED if keeps_out else "temporaries", "temporaries" if self.reruns else SAVED)
        if self.reruns:
            tape.free(core.statistics_bytes)
        else:
            tape.drop(core.statistics_bytes)
        tape.drop(self._qkv_bytes, arrived)
        if self.exchanges:
            Exchange(s, (s.H,)).to_sequence(tape, SAVED)
            if keeps_out:
                tape.drop(core.whole.q_bytes)
            else:
                tape.free(core.whole.q_bytes)

    def backward(self, tape: Tape) -> None:
        """Frees dout, releases q, k, v, and what else attention keeps; makes dq, dk, dv."""
        s, core, out_bytes = self.sizes, self.core, self.core.whole.q_bytes
        dout_category = "temporaries"
        if self.exchanges:
            exchange = Exchange(s, (s.H,))
            exchange.to_heads(tape)
            tape.free(s.N * s.H * s.D * s.c)
            dout_category = exchange.arriving_category
        if self.reruns:
            with tape.at(phase="recompute"):
                core.forward(tape, SAVED if core.keeps_out else "temporaries", SAVED)
                tape.free(0 if core.keeps_out else out_bytes)
        core.backward(tape)
        tape.free(out_bytes, dout_category)
        tape.release(self._qkv_bytes + (out_bytes if core.keeps_out else 0) + core.statistics_bytes)
        if self.exchanges:
            Exchange(s, (s.H, s.K, s.K)).to_sequence(tape)
            tape.free(out_bytes)
            tape.free(2 * core.whole.kv_bytes, core.dkv_category)
