"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509), by formula.

P ranks each hold 1/P of the sequence and all heads. Before attention three all-to-alls give each rank the whole
sequence of 1/P of the heads, for q, k and v; after it one all-to-all brings the output back. Backward is the same,
mirrored. With N tokens in the sequence and h = heads · head_dim, every rank sends, of its own N·h/P elements each time,
the (P-1)/P that are not its own:

    forward    4·N·h·(P-1)/P² elements (multi-head), in 4 calls       backward    as much again

With K key-value heads of H, k and v are K/H of q. Where K < P each KV head is sent to P/K ranks: k and v are P/H of
q, and the P/K gradients that come back are summed. All activations outside attention, and q, k, v and out inside, are
1/P of one device's; out is kept twice, as the kernel made it and as the layer after it reads it. P is bounded by the
number of query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.tape import Sizes, Tape


@dataclass(frozen=True)
class Exchange:
    """The all-to-alls of tensors of some numbers of heads on this rank."""

    sizes: Sizes
    heads: tuple[int, ...]

    def _exchanged_bytes(self, heads: int) -> int:
        """Bytes of one tensor on the wire: KV heads below the degree are copied first."""
        s = self.sizes
        return s.N * max(heads, s.U) * s.D * s.c

    def _own_bytes(self, heads: int) -> int:
        return self.sizes.N * heads * self.sizes.D * self.sizes.c

    @property
    def arriving_category(self) -> str:
        """Category of the exchanged tensors, where nobody saves them."""
        return "temporaries" if self.sizes.B > 1 else "communication_buffers"

    def to_heads(self, tape: Tape, category: str | None = None) -> None:
        """[B, S, H, D] -> [B, U·S, H/U, D], in the category of what holds them later; the inputs stay."""
        s = self.sizes
        tickets = []
        for nbytes in map(self._exchanged_bytes, self.heads):
            tape.alloc(nbytes)
            tape.elementwise(2 * nbytes)
            tape.alloc(nbytes, "communication_buffers" if s.B > 1 else category or self.arriving_category)
            tickets.append(tape.issue("all_to_all", s.ulysses, s.dtype, nbytes))
        for ticket, nbytes in zip(tickets, map(self._exchanged_bytes, self.heads), strict=True):
            tape.wait(ticket)
            tape.free(nbytes)
            if s.B > 1:
                tape.alloc(nbytes, category or self.arriving_category)
                tape.free(nbytes, "communication_buffers")
                tape.elementwise(2 * nbytes)

    def to_sequence(self, tape: Tape, category: str = "temporaries") -> None:
        """[B, U·S, H/U, D] -> [B, S, H, D], copies of a head summed; the inputs stay."""
        s = self.sizes
        packed = s.B > 1
        tickets = []
        for nbytes in map(self._exchanged_bytes, self.heads):
            if packed:
                tape.alloc(nbytes)
                tape.elementwise(2 * nbytes)
            tape.alloc(nbytes, "communication_buffers")
            tickets.append(tape.issue("all_to_all", s.ulysses, s.dtype, nbytes))
        for ticket, heads in zip(tickets, self.heads, strict=True):
            tape.wait(ticket)
            if packed:
                tape.free(self._exchanged_bytes(heads))
            summed = heads < s.U
            own = self._own_bytes(heads)
            if summed and heads > 1:
                tape.alloc(own)
            tape.alloc(own, category)
            if summed and heads > 1:
                tape.free(own)
            tape.free(self._exchanged_bytes(heads), "communication_buffers")
            tape.elementwise(self._exchanged_bytes(heads) + own)
