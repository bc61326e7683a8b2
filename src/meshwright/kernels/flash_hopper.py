"""FlashAttention-2 for Hopper, in Gluon (Triton's lower level): 16-bit dtypes, head dimensions 64 and 128.

The arithmetic is that of `flash_triton`, the division of labour that of FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608): a warp that only asks the copy engine for tiles, and two warpgroups that compute, each half of the
program's rows. What they share are slots of shared memory, a ring of STAGES of them, and barriers:

    a_full, b_full   a tile has arrived in a slot       (the copy engine signals; consumers wait)
    a_free, b_free   both warpgroups have read a slot   (they signal; the producer waits)
    held_full        the tiles that stay for the whole program have arrived

`a` and `b` are k and v where a block of queries walks its keys, q and dout where a block of keys walks its queries.
Matrix products are asynchronous: in `forward` the product with v runs under the softmax of the next block of keys.

B batch   S queries   Z keys   H query heads   K key heads   G = H/K   D head_dim   q, k: a block of queries, of keys
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Formatted, every argument of a kernel would have a line of its own.
# fmt: off

SIZES = ("H", "S", "Z", "offset", "num_heads", "at_once")
"""Arguments for whose values nothing is compiled anew."""
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
HELD: gl.constexpr = gl.constexpr(0)
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


# --- what all kernels share -------------------------------------------------------------------------------------------


@gluon.jit
def _a_full(bars, slot, STAGES: gl.constexpr):
    return bars.index(1 + slot)


@gluon.jit
def _b_full(bars, slot, STAGES: gl.constexpr):
    return bars.index(1 + STAGES + slot)


@gluon.jit
def _a_free(bars, slot, STAGES: gl.constexpr):
    return bars.index(1 + 2 * STAGES + slot)


@gluon.jit
def _b_free(bars, slot, STAGES: gl.constexpr):
    return bars.index(1 + 3 * STAGES + slot)


@gluon.jit
def _statistics_full(bars, slot, STAGES: gl.constexpr):
    return bars.index(1 + 4 * STAGES + slot)


@gluon.jit
def _barriers(STAGES: gl.constexpr, STATISTICS: gl.constexpr):
    """All barriers of a program. Each warpgroup frees a slot once, so a free slot has heard two."""
    kinds: gl.constexpr = 5 if STATISTICS else 4
    bars = gl.allocate_shared_memory(gl.int64, [1 + kinds * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(HELD), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(_a_full(bars, slot, STAGES), count=1)
        mbarrier.init(_b_full(bars, slot, STAGES), count=1)
        mbarrier.init(_a_free(bars, slot, STAGES), count=2)
        mbarrier.init(_b_free(bars, slot, STAGES), count=2)
        if STATISTICS:
            mbarrier.init(_statistics_full(bars, slot, STAGES), count=1)
    fence_async_shared()
    return bars


@gluon.jit
def _fetch(descriptor, b, h, first, slot, full, nbytes: gl.constexpr):
    """Ask for a tile; `full` hears when it is there."""
    mbarrier.expect(full, nbytes)
    tma.async_copy_global_to_shared(descriptor, [b, h, first, 0], full, slot)


@gluon.jit
def _place(program, num_blocks, num_heads, at_once):
    """As in `flash_triton`: `at_once` heads side by side."""
    per_group = num_blocks * at_once
    group = program // per_group
    within = program - group * per_group
    size = gl.minimum(at_once, num_heads - group * at_once)
    return within // size, group * at_once + within % size


@gluon.jit
def _keys_of(first, offset, S, Z, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr):
    """As in `flash_triton`: key blocks that a block of queries sees whole, and the end of those it sees at all."""
    if CAUSAL:
        whole = gl.maximum(gl.minimum(first + offset + 1, Z), 0) // BLOCK_K
        end = gl.cdiv(gl.maximum(gl.minimum(gl.minimum(first + BLOCK_Q, S) + offset, Z), 0), BLOCK_K)
    else:
        whole = Z // BLOCK_K
        end = gl.cdiv(Z, BLOCK_K)
    return whole, end


@gluon.jit
def _store(out_ptr, x_rD, b, h, first, length, heads, ROWS: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of a head of a contiguous [B, length, heads, D]."""
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    at = ((b.to(gl.int64) * length + rows.to(gl.int64)) * heads + h)[:, None] * D
    at += gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(out_ptr + at, x_rD.to(out_ptr.dtype.element_ty), mask=(rows < length)[:, None])


# --- forward ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _forward_producer(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, bars, b, h, G, first, end, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):
    """Keys and values from the last block to the first: the masked ones come first."""
    nbytes: gl.constexpr = BLOCK_K * D * 2
    _fetch(q_desc, b, h, first, q_s, bars.index(HELD), BLOCK_Q * D * 2)
    for i in range(end):
        slot = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        key = (end - 1 - i) * BLOCK_K
        mbarrier.wait(_a_free(bars, slot, STAGES), free)
        _fetch(k_desc, b, h // G, key, k_s.index(slot), _a_full(bars, slot, STAGES), nbytes)
        mbarrier.wait(_b_free(bars, slot, STAGES), free)
        _fetch(v_desc, b, h // G, key, v_s.index(slot), _b_full(bars, slot, STAGES), nbytes)


@gluon.jit
def _softmax(
    s_qk, max_q, sum_q, last_q, first_key, scale, BLOCK_K: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr
):
    """Probabilities of a block of scores, the statistics with it, and by what the earlier sums shrink."""
    if MASKED:
        keys = first_key + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S_LAYOUT))
        s_qk = gl.where(keys[None, :] <= last_q[:, None], s_qk, float("-inf"))
    new_max_q = gl.maximum(max_q, gl.max(s_qk, 1) * scale)
    safe_q = new_max_q
    if MASKED:
        safe_q = gl.where(new_max_q == float("-inf"), 0.0, new_max_q)
    p_qk = gl.exp2(s_qk * scale - safe_q[:, None])
    shrink_q = gl.exp2(max_q - safe_q)
    return p_qk, new_max_q, sum_q * shrink_q + gl.sum(p_qk, 1), shrink_q


@gluon.jit
def _forward_step(
    i, acc_qD, max_q, sum_q, p_qk, q, k_s, v_s, bars, last_q, first_key, scale, BLOCK_K: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):
    """Scores of block i; under their softmax, the product of block i-1's probabilities with its values."""
    slot, before = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(_a_full(bars, slot, STAGES), (i // STAGES) & 1)
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S_LAYOUT)
    s_qk = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(_b_full(bars, before, STAGES), ((i - 1) // STAGES) & 1)
    sum_qD = warpgroup_mma(p_qk, v_s.index(before), acc_qD, is_async=True)
    s_qk = warpgroup_mma_wait(1, deps=[s_qk])
    mbarrier.arrive(_a_free(bars, slot, STAGES))
    new_p_qk, max_q, sum_q, shrink_q = _softmax(s_qk, max_q, sum_q, last_q, first_key, scale, BLOCK_K, MASKED, S_LAYOUT)
    acc_qD, _ = warpgroup_mma_wait(0, deps=[sum_qD, p_qk])
    mbarrier.arrive(_b_free(bars, before, STAGES))
    acc_qD = acc_qD * gl.convert_layout(shrink_q, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc_qD, max_q, sum_q, gl.convert_layout(new_p_qk.to(v_s.dtype), P_LAYOUT)


@gluon.jit
def _forward_consumer(
    q_s, k_s, v_s, bars, out_ptr, lse_ptr, b, h, first, whole, end, S, Z, H, offset, scale, HALF: gl.constexpr,
    BLOCK_K: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    first += HALF * ROWS
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    last_q = gl.minimum(rows + offset, Z - 1) if CAUSAL else rows * 0 + (Z - 1)
    max_q = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    sum_q = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    acc_qD = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    q = q_s.slice(HALF * ROWS, ROWS)
    mbarrier.wait(bars.index(HELD), 0)
    if end > 0:
        mbarrier.wait(_a_full(bars, 0, STAGES), 0)
        zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S_LAYOUT)
        s_qk = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s_qk = warpgroup_mma_wait(0, deps=[s_qk])
        mbarrier.arrive(_a_free(bars, 0, STAGES))
        p_qk, max_q, sum_q, _ = _softmax(
            s_qk, max_q, sum_q, last_q, (end - 1) * BLOCK_K, scale, BLOCK_K, True, S_LAYOUT
        )
        p_qk = gl.convert_layout(p_qk.to(v_s.dtype), P_LAYOUT)
        for i in range(1, end - whole):
            acc_qD, max_q, sum_q, p_qk = _forward_step(
                i, acc_qD, max_q, sum_q, p_qk, q, k_s, v_s, bars, last_q, (end - 1 - i) * BLOCK_K, scale, BLOCK_K, D,
                ROWS, STAGES, True, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )
        for i in range(gl.maximum(end - whole, 1), end):
            acc_qD, max_q, sum_q, p_qk = _forward_step(
                i, acc_qD, max_q, sum_q, p_qk, q, k_s, v_s, bars, last_q, 0, scale, BLOCK_K, D, ROWS, STAGES, False,
                S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )
        slot = (end - 1) % STAGES
        mbarrier.wait(_b_full(bars, slot, STAGES), ((end - 1) // STAGES) & 1)
        sum_qD = warpgroup_mma(p_qk, v_s.index(slot), acc_qD, is_async=True)
        acc_qD, _ = warpgroup_mma_wait(0, deps=[sum_qD, p_qk])
    unseen = sum_q == 0.0
    share_q = 1.0 / gl.where(unseen, 1.0, sum_q)
    lse_q = gl.where(unseen, float("-inf"), max_q * LN_2 + gl.log(gl.where(unseen, 1.0, sum_q)))
    gl.store(lse_ptr + (b * H + h).to(gl.int64) * S + rows, lse_q, mask=rows < S)
    acc_qD = acc_qD * gl.convert_layout(share_q, gl.SliceLayout(1, O_LAYOUT))[:, None]
    _store(out_ptr, acc_qD, b, h, first, S, H, ROWS, D, O_LAYOUT)


@gluon.jit(do_not_specialize=SIZES)
def forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, H, G, S, Z, offset, num_heads, at_once, scale, D: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, Q_SHARED: gl.constexpr,
    K_SHARED: gl.constexpr,
):
    """out [B, S, H, D] and lse [B, H, S], a block of queries of one head a program."""
    num_blocks = gl.cdiv(S, BLOCK_Q)
    block, head = _place(gl.program_id(0), num_blocks, num_heads, at_once)
    if CAUSAL:
        block = num_blocks - 1 - block
    b, h, first = head // H, head % H, block * BLOCK_Q
    whole, end = _keys_of(first, offset, S, Z, BLOCK_Q, BLOCK_K, CAUSAL)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_Q, D], Q_SHARED)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_K, D], K_SHARED)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_K, D], K_SHARED)
    bars = _barriers(STAGES, False)
    ROWS: gl.constexpr = BLOCK_Q // 2
    gl.warp_specialize(
        [
            (
                _forward_consumer,
                (
                    q_s, k_s, v_s, bars, out_ptr, lse_ptr, b, h, first, whole, end, S, Z, H, offset, scale, 0,
                    BLOCK_K, D, ROWS, STAGES, CAUSAL,
                ),
            ),
            (
                _forward_consumer,
                (
                    q_s, k_s, v_s, bars, out_ptr, lse_ptr, b, h, first, whole, end, S, Z, H, offset, scale, 1,
                    BLOCK_K, D, ROWS, STAGES, CAUSAL,
                ),
            ),
            (
                _forward_producer,
                (q_desc, k_desc, v_desc, q_s, k_s, v_s, bars, b, h, G, first, end, BLOCK_Q, BLOCK_K, D, STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# --- dk and dv --------------------------------------------------------------------------------------------------------


@gluon.jit
def _dkv_producer(
    q_desc, k_desc, v_desc, dout_desc, lse_ptr, delta_ptr, q_s, k_s, v_s, dout_s, lse_s, delta_s, bars, b, h, G, H,
    S, first, start, num_blocks_q, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """k and v once; q and dout of every block of queries of the G heads, with their statistics in base 2."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    nbytes: gl.constexpr = BLOCK_Q * D * 2
    mbarrier.expect(bars.index(HELD), 2 * BLOCK_K * D * 2)
    tma.async_copy_global_to_shared(k_desc, [b, h, first, 0], bars.index(HELD), k_s)
    tma.async_copy_global_to_shared(v_desc, [b, h, first, 0], bars.index(HELD), v_s)
    i = 0
    for shared in range(G):
        at = (b * H + h * G + shared).to(gl.int64) * S
        for block in range(start, num_blocks_q):
            slot = i % STAGES
            free = ((i // STAGES) & 1) ^ 1
            rows = block * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=LAYOUT)
            lse_q = gl.load(lse_ptr + at + rows, mask=rows < S, other=float("inf"))
            delta_q = gl.load(delta_ptr + at + rows, mask=rows < S, other=0.0)
            mbarrier.wait(_a_free(bars, slot, STAGES), free)
            _fetch(q_desc, b, h * G + shared, block * BLOCK_Q, q_s.index(slot), _a_full(bars, slot, STAGES), nbytes)
            mbarrier.wait(_b_free(bars, slot, STAGES), free)
            _fetch(
                dout_desc, b, h * G + shared, block * BLOCK_Q, dout_s.index(slot), _b_full(bars, slot, STAGES), nbytes
            )
            lse_s.index(slot).store(gl.where(lse_q == float("-inf"), float("inf"), lse_q * LOG2_E))
            delta_s.index(slot).store(delta_q)
            mbarrier.arrive(_statistics_full(bars, slot, STAGES))
            i += 1


@gluon.jit
def _dkv_weights(
    s_kq, first, keys, lse_q, Z, offset, scale, BLOCK_Q: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Probabilities of a tile of scores."""
    if MASKED:
        rows = first + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, S_LAYOUT))
        s_kq = gl.where((keys < Z)[:, None], s_kq, float("-inf"))
        if CAUSAL:
            s_kq = gl.where(keys[:, None] <= (rows + offset)[None, :], s_kq, float("-inf"))
    return gl.exp2(s_kq * scale - lse_q[None, :])


@gluon.jit
def _dkv_step(
    i, block, dk_kD, dv_kD, p16_kq, ds16_kq, k, v, q_s, dout_s, lse_s, delta_s, bars, keys, Z, offset, scale,
    BLOCK_Q: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr, LATE: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):
    """Add what a block of queries gives to dk and dv.

    LATE: what the block before gives, under the exponentials of this one.
    """
    slot = i % STAGES
    full = (i // STAGES) & 1
    q, dout = q_s.index(slot), dout_s.index(slot)
    zero = gl.zeros([ROWS, BLOCK_Q], gl.float32, S_LAYOUT)
    mbarrier.wait(_a_full(bars, slot, STAGES), full)
    s_kq = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(_b_full(bars, slot, STAGES), full)
    dp_kq = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(_statistics_full(bars, slot, STAGES), full)
    lse_q = lse_s.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
    if LATE:
        before = gl.maximum(i - 1, 0) % STAGES  # at first nothing: zeros times this block
        dv_kD = warpgroup_mma(p16_kq, dout_s.index(before), dv_kD, is_async=True)
        dk_kD = warpgroup_mma(ds16_kq, q_s.index(before), dk_kD, is_async=True)
        s_kq = warpgroup_mma_wait(3, deps=[s_kq])
        p_kq = _dkv_weights(s_kq, block * BLOCK_Q, keys, lse_q, Z, offset, scale, BLOCK_Q, CAUSAL, MASKED, S_LAYOUT)
        delta_q = delta_s.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        dp_kq = warpgroup_mma_wait(2, deps=[dp_kq])
        ds_kq = p_kq * (dp_kq - delta_q[None, :])
        dv_kD, dk_kD, p16_kq, ds16_kq = warpgroup_mma_wait(0, deps=[dv_kD, dk_kD, p16_kq, ds16_kq])
        mbarrier.arrive(_a_free(bars, before, STAGES), pred=i > 0)
        mbarrier.arrive(_b_free(bars, before, STAGES), pred=i > 0)
        p16_kq = gl.convert_layout(p_kq.to(q_s.dtype), P_LAYOUT)
        ds16_kq = gl.convert_layout(ds_kq.to(q_s.dtype), P_LAYOUT)
    else:
        s_kq = warpgroup_mma_wait(1, deps=[s_kq])
        p_kq = _dkv_weights(s_kq, block * BLOCK_Q, keys, lse_q, Z, offset, scale, BLOCK_Q, CAUSAL, MASKED, S_LAYOUT)
        now_p16_kq = gl.convert_layout(p_kq.to(q_s.dtype), P_LAYOUT)
        dv_kD = warpgroup_mma(now_p16_kq, dout, dv_kD, is_async=True)
        delta_q = delta_s.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        dp_kq = warpgroup_mma_wait(1, deps=[dp_kq])
        ds_kq = p_kq * (dp_kq - delta_q[None, :])
        now_ds16_kq = gl.convert_layout(ds_kq.to(q_s.dtype), P_LAYOUT)
        dk_kD = warpgroup_mma(now_ds16_kq, q, dk_kD, is_async=True)
        dv_kD, _ = warpgroup_mma_wait(1, deps=[dv_kD, now_p16_kq])
        mbarrier.arrive(_b_free(bars, slot, STAGES))
        dk_kD, _ = warpgroup_mma_wait(0, deps=[dk_kD, now_ds16_kq])
        mbarrier.arrive(_a_free(bars, slot, STAGES))
    return dk_kD, dv_kD, p16_kq, ds16_kq


@gluon.jit
def _dkv_consumer(
    q_s, k_s, v_s, dout_s, lse_s, delta_s, bars, dk_ptr, dv_ptr, b, h, G, H, S, Z, first, start, whole, num_blocks_q,
    offset, scale, softmax_scale, HALF: gl.constexpr, BLOCK_Q: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, LATE: gl.constexpr,
):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    k, v = k_s.slice(HALF * ROWS, ROWS), v_s.slice(HALF * ROWS, ROWS)
    first += HALF * ROWS
    keys = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    dk_kD = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    dv_kD = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    # LATE: before the first block there is one of zeros
    p16_kq = gl.convert_layout(gl.zeros([ROWS, BLOCK_Q], q_s.dtype, S_LAYOUT), P_LAYOUT)
    ds16_kq = p16_kq
    mbarrier.wait(bars.index(HELD), 0)
    i = 0
    for _ in range(G):
        for block in range(start, whole):
            dk_kD, dv_kD, p16_kq, ds16_kq = _dkv_step(
                i, block, dk_kD, dv_kD, p16_kq, ds16_kq, k, v, q_s, dout_s, lse_s, delta_s, bars, keys, Z, offset,
                scale, BLOCK_Q, D, ROWS, STAGES, CAUSAL, True, LATE, S_LAYOUT, P_LAYOUT,
            )
            i += 1
        for block in range(whole, num_blocks_q):
            dk_kD, dv_kD, p16_kq, ds16_kq = _dkv_step(
                i, block, dk_kD, dv_kD, p16_kq, ds16_kq, k, v, q_s, dout_s, lse_s, delta_s, bars, keys, Z, offset,
                scale, BLOCK_Q, D, ROWS, STAGES, CAUSAL, False, LATE, S_LAYOUT, P_LAYOUT,
            )
            i += 1
    if LATE and start < num_blocks_q:
        before = (i + STAGES - 1) % STAGES
        dv_kD = warpgroup_mma(p16_kq, dout_s.index(before), dv_kD, is_async=True)
        dk_kD = warpgroup_mma(ds16_kq, q_s.index(before), dk_kD, is_async=True)
        dv_kD, dk_kD, p16_kq, ds16_kq = warpgroup_mma_wait(0, deps=[dv_kD, dk_kD, p16_kq, ds16_kq])
    _store(dk_ptr, dk_kD * softmax_scale, b, h, first, Z, H // G, ROWS, D, O_LAYOUT)
    _store(dv_ptr, dv_kD, b, h, first, Z, H // G, ROWS, D, O_LAYOUT)


@gluon.jit(do_not_specialize=SIZES)
def dkv(
    q_desc, k_desc, v_desc, dout_desc, dk_ptr, dv_ptr, lse_ptr, delta_ptr, H, G, S, Z, offset, num_heads, at_once,
    scale, softmax_scale, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LATE: gl.constexpr, Q_SHARED: gl.constexpr, K_SHARED: gl.constexpr,
):
    """dk, dv [B, Z, K, D], a block of keys of a key head a program: it walks queries of the G heads that share it."""
    num_blocks_q, K = gl.cdiv(S, BLOCK_Q), H // G
    block, head = _place(gl.program_id(0), gl.cdiv(Z, BLOCK_K), num_heads, at_once)
    b, h, first = head // K, head % K, block * BLOCK_K
    start, whole = 0, 0
    if CAUSAL:
        start = gl.where(first - offset < S, gl.maximum(first - offset, 0) // BLOCK_Q, num_blocks_q)
        whole = gl.minimum(gl.cdiv(gl.maximum(first + BLOCK_K - 1 - offset, 0), BLOCK_Q), num_blocks_q)
    whole = gl.where(first + BLOCK_K > Z, num_blocks_q, whole)
    STATISTICS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_K, D], K_SHARED)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_K, D], K_SHARED)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_Q, D], Q_SHARED)
    dout_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_Q, D], Q_SHARED)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], STATISTICS)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], STATISTICS)
    bars = _barriers(STAGES, True)
    ROWS: gl.constexpr = BLOCK_K // 2
    gl.warp_specialize(
        [
            (
                _dkv_consumer,
                (
                    q_s, k_s, v_s, dout_s, lse_s, delta_s, bars, dk_ptr, dv_ptr, b, h, G, H, S, Z, first, start,
                    whole, num_blocks_q, offset, scale, softmax_scale, 0, BLOCK_Q, D, ROWS, STAGES, CAUSAL, LATE,
                ),
            ),
            (
                _dkv_consumer,
                (
                    q_s, k_s, v_s, dout_s, lse_s, delta_s, bars, dk_ptr, dv_ptr, b, h, G, H, S, Z, first, start,
                    whole, num_blocks_q, offset, scale, softmax_scale, 1, BLOCK_Q, D, ROWS, STAGES, CAUSAL, LATE,
                ),
            ),
            (
                _dkv_producer,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse_ptr, delta_ptr, q_s, k_s, v_s, dout_s, lse_s, delta_s,
                    bars, b, h, G, H, S, first, start, num_blocks_q, BLOCK_Q, BLOCK_K, D, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# --- dq ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def _dq_producer(
    q_desc, k_desc, v_desc, dout_desc, q_s, dout_s, k_s, v_s, bars, b, h, G, first, end, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):
    nbytes: gl.constexpr = BLOCK_K * D * 2
    mbarrier.expect(bars.index(HELD), 2 * BLOCK_Q * D * 2)
    tma.async_copy_global_to_shared(q_desc, [b, h, first, 0], bars.index(HELD), q_s)
    tma.async_copy_global_to_shared(dout_desc, [b, h, first, 0], bars.index(HELD), dout_s)
    for i in range(end):
        slot = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(_a_free(bars, slot, STAGES), free)
        _fetch(k_desc, b, h // G, i * BLOCK_K, k_s.index(slot), _a_full(bars, slot, STAGES), nbytes)
        mbarrier.wait(_b_free(bars, slot, STAGES), free)
        _fetch(v_desc, b, h // G, i * BLOCK_K, v_s.index(slot), _b_full(bars, slot, STAGES), nbytes)


@gluon.jit
def _dq_step(
    i, dq_qD, q, dout, lse_q, delta_q, k_s, v_s, bars, last_q, scale, BLOCK_K: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):
    """Add what key block i gives to dq."""
    slot = i % STAGES
    full = (i // STAGES) & 1
    k, v = k_s.index(slot), v_s.index(slot)
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S_LAYOUT)
    mbarrier.wait(_a_full(bars, slot, STAGES), full)
    s_qk = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(_b_full(bars, slot, STAGES), full)
    dp_qk = warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_qk = warpgroup_mma_wait(1, deps=[s_qk])
    if MASKED:
        keys = i * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S_LAYOUT))
        s_qk = gl.where(keys[None, :] <= last_q[:, None], s_qk, float("-inf"))
    p_qk = gl.exp2(s_qk * scale - lse_q[:, None])
    dp_qk = warpgroup_mma_wait(0, deps=[dp_qk])
    mbarrier.arrive(_b_free(bars, slot, STAGES))
    ds_qk = gl.convert_layout((p_qk * (dp_qk - delta_q[:, None])).to(k_s.dtype), P_LAYOUT)
    dq_qD = warpgroup_mma(ds_qk, k, dq_qD, is_async=True)
    dq_qD, _ = warpgroup_mma_wait(0, deps=[dq_qD, ds_qk])
    mbarrier.arrive(_a_free(bars, slot, STAGES))
    return dq_qD


@gluon.jit
def _dq_consumer(
    q_s, dout_s, k_s, v_s, bars, dq_ptr, lse_ptr, delta_ptr, b, h, first, whole, end, S, Z, H, offset, scale,
    softmax_scale, HALF: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    q, dout = q_s.slice(HALF * ROWS, ROWS), dout_s.slice(HALF * ROWS, ROWS)
    first += HALF * ROWS
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    last_q = gl.minimum(rows + offset, Z - 1) if CAUSAL else rows * 0 + (Z - 1)
    at = (b * H + h).to(gl.int64) * S
    lse_q = gl.load(lse_ptr + at + rows, mask=rows < S, other=float("inf"))
    lse_q = gl.where(lse_q == float("-inf"), float("inf"), lse_q * LOG2_E)
    delta_q = gl.load(delta_ptr + at + rows, mask=rows < S, other=0.0)
    dq_qD = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    mbarrier.wait(bars.index(HELD), 0)
    for i in range(whole):
        dq_qD = _dq_step(
            i, dq_qD, q, dout, lse_q, delta_q, k_s, v_s, bars, last_q, scale, BLOCK_K, ROWS, STAGES, False, S_LAYOUT,
            P_LAYOUT,
        )
    for i in range(whole, end):
        dq_qD = _dq_step(
            i, dq_qD, q, dout, lse_q, delta_q, k_s, v_s, bars, last_q, scale, BLOCK_K, ROWS, STAGES, True, S_LAYOUT,
            P_LAYOUT,
        )
    _store(dq_ptr, dq_qD * softmax_scale, b, h, first, S, H, ROWS, D, O_LAYOUT)


@gluon.jit(do_not_specialize=SIZES)
def dq(
    q_desc, k_desc, v_desc, dout_desc, dq_ptr, lse_ptr, delta_ptr, H, G, S, Z, offset, num_heads, at_once, scale,
    softmax_scale, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, Q_SHARED: gl.constexpr, K_SHARED: gl.constexpr,
):
    """dq [B, S, H, D], a block of queries of one head a program."""
    num_blocks = gl.cdiv(S, BLOCK_Q)
    block, head = _place(gl.program_id(0), num_blocks, num_heads, at_once)
    if CAUSAL:
        block = num_blocks - 1 - block
    b, h, first = head // H, head % H, block * BLOCK_Q
    whole, end = _keys_of(first, offset, S, Z, BLOCK_Q, BLOCK_K, CAUSAL)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_Q, D], Q_SHARED)
    dout_s = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_Q, D], Q_SHARED)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_K, D], K_SHARED)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_K, D], K_SHARED)
    bars = _barriers(STAGES, False)
    ROWS: gl.constexpr = BLOCK_Q // 2
    gl.warp_specialize(
        [
            (
                _dq_consumer,
                (
                    q_s, dout_s, k_s, v_s, bars, dq_ptr, lse_ptr, delta_ptr, b, h, first, whole, end, S, Z, H,
                    offset, scale, softmax_scale, 0, BLOCK_K, D, ROWS, STAGES, CAUSAL,
                ),
            ),
            (
                _dq_consumer,
                (
                    q_s, dout_s, k_s, v_s, bars, dq_ptr, lse_ptr, delta_ptr, b, h, first, whole, end, S, Z, H,
                    offset, scale, softmax_scale, 1, BLOCK_K, D, ROWS, STAGES, CAUSAL,
                ),
            ),
            (
                _dq_producer,
                (
                    q_desc, k_desc, v_desc, dout_desc, q_s, dout_s, k_s, v_s, bars, b, h, G, first, end, BLOCK_Q,
                    BLOCK_K, D, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
