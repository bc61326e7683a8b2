"""Attention on one device by formula: one call of a kernel, whole or as a block of a ring. `kernels.attention`.

A fused kernel keeps q, k, v, out and one float32 a head and row, never a score matrix. Its backward makes the scores
again: five products of the size of the score matrix against two forward. torch's kernels are counted with the masked
half; ours and FlexAttention by the tiles that they visit, backward as two kernels of seven products (`schemes.flash`).
Which kernel it is, and what it takes, says `config.attention`; what goes without a fused kernel is `schemes.naive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.config.attention import Kernel as Kernel
from meshwright.schemes.flash import FlashTile, Mask, backward_flops, flash_tile, forward_flops
from meshwright.schemes.naive import NaiveAttention
from meshwright.schemes.tape import BOOL, FLOAT32, INT64, Sizes, Tape

SHARES_HEADS: tuple[Kernel, ...] = ("sdpa_flash", "flash", "flex")
"""Kernels in which query heads share keys and values."""

FLEX_TILE = FlashTile(128, 128, 128, 128, 128, 128)
"""The blocks of FlexAttention's mask: what lies in an empty one is left out. It, too, has two kernels in backward."""

QUERY_TILE = 128
"""Queries for which the mask of separate documents exists at a time."""

EFFICIENT_ROWS = 32
"""The efficient kernel fills the rows of its log-sum-exp up to a multiple of this."""

RANDOM_BYTES: dict[Kernel, int] = {"sdpa_flash": 24, "sdpa_efficient": 16}
"""Of the seed and offset of dropout, which torch's kernels keep without dropout, too."""


def lse_rows(kernel: Kernel, queries: int) -> int:
    """Rows that a kernel's log-sum-exp has for each head."""
    rows = EFFICIENT_ROWS if kernel == "sdpa_efficient" else 1
    return -(-queries // rows) * rows


def expands_heads(kernel: Kernel, heads: int, kv_heads: int) -> bool:
    """Whether a kernel needs keys and values repeated for each query head."""
    return kernel not in SHARES_HEADS and heads != kv_heads


@dataclass(frozen=True)
class AttentionKernel:
    """One call of a kernel: `queries` rows of q [B, S, H, D] against `keys` rows of k and v [B, S, K, D]."""

    sizes: Sizes
    queries: int
    keys: int
    causal: bool = True

    @property
    def kernel(self) -> Kernel:
        """Which kernel runs."""
        return self.sizes.kernel

    @property
    def unfused(self) -> NaiveAttention:
        """The same without a fused kernel."""
        return NaiveAttention(self.sizes, self.queries, self.keys, self.causal)

    @property
    def expands(self) -> bool:
        """Whether keys and values are repeated for each query head."""
        return expands_heads(self.kernel, self.sizes.H, self.sizes.K)

    @property
    def q_bytes(self) -> int:
        """Bytes of q, and of out."""
        return self.sizes.B * self.queries * self.sizes.H * self.sizes.D * self.sizes.c

    @property
    def kv_bytes(self) -> int:
        """Bytes of k, and of v."""
        return self.sizes.B * self.keys * self.sizes.K * self.sizes.D * self.sizes.c

    @property
    def read_kv_bytes(self) -> int:
        """Bytes of k, and of v, as the kernel reads them."""
        return self.kv_bytes * (self.sizes.H // self.sizes.K if self.expands else 1)

    @property
    def expanded_bytes(self) -> int:
        """Bytes of an expanded k, and of v; one head is repeated by its stride alone, without a copy."""
        return self.read_kv_bytes if self.expands and self.sizes.K > 1 else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one float32 a query and head."""
        return self.sizes.B * self.queries * self.sizes.H * FLOAT32

    @property
    def lse_bytes(self) -> int:
        """Bytes of the log-sum-exp; the efficient kernel fills its rows up."""
        return self.row_bytes // self.queries * lse_rows(self.kernel, self.queries)

    @property
    def random_bytes(self) -> int:
        """Bytes of the kernel's random state."""
        return RANDOM_BYTES.get(self.kernel, 0)

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs forward and backward."""
        s = self.sizes
        if self.kernel in ("flash", "flex"):
            tile = FLEX_TILE if self.kernel == "flex" else flash_tile(s.D, s.c)
            call = s.B, s.H, self.queries, self.keys, s.D, tile, Mask(self.causal)
            return forward_flops(*call), backward_flops(*call)
        product = 2 * s.B * s.H * self.queries * self.keys * s.D
        return 2 * product, 5 * product

    def forward(self, tape: Tape, out_category: str, statistics_category: str) -> None:
        """Makes out, and log-sum-exp and random state."""
        if self.kernel == "naive":
            self.unfused.forward(tape, out_category, statistics_category, "temporaries")
            tape.free(self.unfused.probability_bytes)
            return
        with tape.holding(2 * self.expanded_bytes):
            tape.alloc(self.q_bytes, out_category)
            tape.alloc(self.lse_bytes + self.random_bytes, statistics_category)
            if self.sizes.documents:
                self._by_tiles(tape, _Tile.forward)
                return
            tape.attention(self.flops[0], 2 * self.q_bytes + 2 * self.read_kv_bytes + self.lse_bytes)

    def backward(self, tape: Tape, copied_bytes: int = 0) -> None:
        """Makes dq, dk, dv; `copied_bytes` of log-sum-exp are laid out anew for the kernel."""
        if self.sizes.documents:
            self._backward_by_tiles(tape)
            return
        if self.kernel == "naive":
            self.unfused.backward_of_block(tape)
            return
        delta_bytes = self.row_bytes if self.kernel == "flash" else 0
        with tape.holding(2 * self.expanded_bytes):
            with tape.holding(copied_bytes + delta_bytes):
                tape.alloc(self.q_bytes + 2 * self.read_kv_bytes)
            tape.elementwise(3 * delta_bytes)
            tape.attention(self.flops[1], 4 * self.q_bytes + 4 * self.read_kv_bytes + self.lse_bytes)
            if self.expands:
                tape.alloc(2 * self.kv_bytes)
                tape.free(2 * self.read_kv_bytes)

    # --- with a mask of documents: `kernels.visible` ---

    def _by_tiles(self, tape: Tape, write: Callable[[_Tile, Tape], None]) -> None:
        tiles, rest = divmod(self.queries, QUERY_TILE)
        with tape.repeat(tiles):
            write(_Tile(replace(self, queries=QUERY_TILE)), tape)
        if rest:
            write(_Tile(replace(self, queries=rest)), tape)

    def _backward_by_tiles(self, tape: Tape) -> None:
        s = self.sizes
        kv = s.B * self.keys * s.H * s.D * FLOAT32
        with tape.holding(2 * self.expanded_bytes):
            tape.alloc(self.q_bytes + 2 * kv)
            self._by_tiles(tape, _Tile.backward)
            for _ in range(2):
                if s.H != s.K:
                    tape.alloc(kv // s.H * s.K)
                if s.casts:
                    tape.alloc(self.kv_bytes)
                    if s.H != s.K:
                        tape.free(kv // s.H * s.K)
            tape.free(2 * kv if s.casts or s.H != s.K else 0)


@dataclass(frozen=True)
class _Tile:
    """Some queries against all keys of a block, under a mask of their own."""

    kernel: AttentionKernel

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask, in the compute dtype."""
        return self._num_scores * self.kernel.sizes.c

    @property
    def _num_scores(self) -> int:
        return self.kernel.sizes.B * self.kernel.queries * self.kernel.keys

    def _mask(self, tape: Tape) -> None:
        """Makes the mask, and which rows are empty."""
        k = self.kernel
        with tape.holding(self._num_scores * BOOL):
            with tape.holding(k.queries * k.keys * BOOL):
                pass
            tape.alloc(self.mask_bytes)
            with tape.holding(self._num_scores * BOOL):
                tape.elementwise(2 * self.mask_bytes)
            tape.alloc(k.sizes.B * k.queries * BOOL)

    def forward(self, tape: Tape) -> None:
        """Makes the tile's output and log-sum-exp, and copies them into the whole."""
        k = self.kernel
        self._mask(tape)
        with tape.holding(k.q_bytes + k.row_bytes):
            tape.attention(k.flops[0], 2 * k.q_bytes + 2 * k.read_kv_bytes + k.row_bytes)
        tape.free(self.mask_bytes + k.sizes.B * k.queries * BOOL)

    def backward(self, tape: Tape) -> None:
        """Makes the tile's gradients, and adds them to the whole."""
        k = self.kernel
        self._mask(tape)
        tape.free(k.sizes.B * k.queries * BOOL)
        with tape.holding(k.q_bytes + 2 * k.read_kv_bytes):
            tape.attention(k.flops[1], 4 * k.q_bytes + 4 * k.read_kv_bytes + k.row_bytes)
        tape.free(self.mask_bytes)


@dataclass(frozen=True)
class AttentionCore:
    """softmax(q kᵀ/√D) v by one kernel call."""

    sizes: Sizes

    @property
    def whole(self) -> AttentionKernel:
        """Its one kernel call."""
        return AttentionKernel(self.sizes, self.sizes.S, self.sizes.S)

    @property
    def keeps_out(self) -> bool:
        """Whether its own backward reads out: all but the naive one do."""
        return self.sizes.kernel != "naive"

    @property
    def statistics_bytes(self) -> int:
        """What it keeps beside q, k, v and out."""
        if self.sizes.kernel == "naive":
            return self.whole.unfused.probability_bytes
        return self.whole.lse_bytes + self.whole.random_bytes

    @property
    def dkv_category(self) -> str:
        """Category of dk and dv."""
        return "temporaries"

    def forward(self, tape: Tape, out_category: str, statistics_category: str) -> None:
        """Makes out and the statistics, from q, k and v."""
        if self.sizes.kernel == "naive":
            self.whole.unfused.forward(tape, out_category, "temporaries", statistics_category)
            tape.free(self.whole.row_bytes)
            return
        with tape.holding(self._positions_bytes):
            self.whole.forward(tape, out_category, statistics_category)

    def backward(self, tape: Tape) -> None:
        """Makes dq, dk, dv."""
        if self.sizes.kernel == "naive":
            self.whole.unfused.backward(tape)
            return
        with tape.holding(self._positions_bytes):
            self.whole.backward(tape)

    @property
    def _positions_bytes(self) -> int:
        """Positions, of which the mask of documents is made."""
        return self.sizes.S * INT64 if self.sizes.documents else 0
