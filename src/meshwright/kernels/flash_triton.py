"""FlashAttention-2 in Triton, for every device, dtype and head dimension: forward, and backward as two kernels.

B batch   S queries   Z keys   H query heads   K key heads   G = H/K   D head_dim   q, k: a block of queries, of keys

Inputs are [B, S or Z, H or K, D] with any strides and a contiguous last dim, as pointers, or (`DESCRIPTORS`) as tensor
descriptors [B, H or K, S or Z, D], which the copy engine of Hopper reads. Outputs are contiguous. Query i sees key j
where j <= i + offset if CAUSAL, else all.

Scores are kept in the base-2 domain: `scale` is log2(e)/sqrt(D). A query that sees no key has out 0 and lse -inf; in
backward its lse is read as +inf, so that its probabilities vanish.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Formatted, every argument of a kernel would have a line of its own.
# fmt: off

SIZES = ("H", "S", "Z", "offset", "num_heads", "at_once")
"""Arguments for whose values nothing is compiled anew."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(
    source, b, h, first, length, stride_b, stride_s, stride_h, ROWS: tl.constexpr, D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows [first, first + ROWS) of a head [ROWS, D]; zeros past the end."""
    if DESCRIPTORS:
        return source.load([b, h, first, 0]).reshape([ROWS, D])
    else:
        rows = first + tl.arange(0, ROWS)
        base = source + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        at = base + rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, D)[None, :]
        return tl.load(at, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def _place(first_block, num_blocks, num_heads, at_once):
    """Block and head of a program: `at_once` heads side by side, so that what they share stays in the L2 cache."""
    per_group = num_blocks * at_once
    group = first_block // per_group
    within = first_block - group * per_group
    size = tl.minimum(at_once, num_heads - group * at_once)
    return within // size, group * at_once + within % size


@triton.jit
def _keys_of(first, offset, S, Z, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Of a block of queries: key blocks that all see whole, the end of those that any sees, each one's last key."""
    rows = first + tl.arange(0, BLOCK_Q)
    if CAUSAL:
        last = tl.minimum(rows + offset, Z - 1)
        whole = tl.maximum(tl.minimum(first + offset + 1, Z), 0) // BLOCK_K
        end = tl.cdiv(tl.maximum(tl.minimum(tl.minimum(first + BLOCK_Q, S) + offset, Z), 0), BLOCK_K)
    else:
        last = tl.zeros([BLOCK_Q], tl.int32) + (Z - 1)
        whole = Z // BLOCK_K
        end = tl.cdiv(Z, BLOCK_K)
    return whole, end, last


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_keys(
    acc_qD, sum_q, max_q, q_qD, k_ptr, v_ptr, b, h, kb, ks, kh, vb, vs, vh, start, end, Z, last_q, scale,
    BLOCK_K: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Let a block of queries see key blocks [start, end): the online softmax."""
    for block in tl.range(start, end):
        first = block * BLOCK_K
        k_kD = _tile(k_ptr, b, h, first, Z, kb, ks, kh, BLOCK_K, D, DESCRIPTORS)
        s_qk = tl.dot(q_qD, k_kD.T, input_precision=PRECISION)
        if MASKED:
            keys = first + tl.arange(0, BLOCK_K)
            s_qk = tl.where(keys[None, :] <= last_q[:, None], s_qk, float("-inf"))
        new_max_q = tl.maximum(max_q, tl.max(s_qk, 1) * scale)
        safe_q = new_max_q
        if MASKED:  # a query that has seen no key yet
            safe_q = tl.where(new_max_q == float("-inf"), 0.0, new_max_q)
        p_qk = tl.exp2(s_qk * scale - safe_q[:, None])
        shrink_q = tl.exp2(max_q - safe_q)
        acc_qD = acc_qD * shrink_q[:, None]
        v_kD = _tile(v_ptr, b, h, first, Z, vb, vs, vh, BLOCK_K, D, DESCRIPTORS)
        sum_q = sum_q * shrink_q + tl.sum(p_qk, 1)
        acc_qD = tl.dot(p_qk.to(v_kD.dtype), v_kD, acc_qD, input_precision=PRECISION)
        max_q = new_max_q
    return acc_qD, sum_q, max_q


@triton.jit(do_not_specialize=SIZES)
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, qb, qs, qh, kb, ks, kh, vb, vs, vh, H, G, S, Z, offset, num_heads,
    at_once, scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """out [B, S, H, D] and lse [B, H, S], a block of queries of one head a program."""
    num_blocks = tl.cdiv(S, BLOCK_Q)
    block, head = _place(tl.program_id(0), num_blocks, num_heads, at_once)
    if CAUSAL:  # late queries have most to do: they begin
        block = num_blocks - 1 - block
    b, h, first = head // H, head % H, block * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    q_qD = _tile(q_ptr, b, h, first, S, qb, qs, qh, BLOCK_Q, D, DESCRIPTORS)
    whole, end, last_q = _keys_of(first, offset, S, Z, BLOCK_Q, BLOCK_K, CAUSAL)
    max_q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sum_q = tl.zeros([BLOCK_Q], tl.float32)
    acc_qD = tl.zeros([BLOCK_Q, D], tl.float32)
    acc_qD, sum_q, max_q = _forward_keys(
        acc_qD, sum_q, max_q, q_qD, k_ptr, v_ptr, b, h // G, kb, ks, kh, vb, vs, vh, 0, whole, Z, last_q, scale,
        BLOCK_K, D, False, DESCRIPTORS, PRECISION,
    )
    acc_qD, sum_q, max_q = _forward_keys(
        acc_qD, sum_q, max_q, q_qD, k_ptr, v_ptr, b, h // G, kb, ks, kh, vb, vs, vh, whole, end, Z, last_q, scale,
        BLOCK_K, D, True, DESCRIPTORS, PRECISION,
    )
    unseen = sum_q == 0.0
    acc_qD = acc_qD * (1.0 / tl.where(unseen, 1.0, sum_q))[:, None]
    lse_q = tl.where(unseen, float("-inf"), max_q * LN_2 + tl.log(tl.where(unseen, 1.0, sum_q)))
    inside = rows < S
    tl.store(lse_ptr + head.to(tl.int64) * S + rows, lse_q, mask=inside)
    at = (b.to(tl.int64) * S + rows.to(tl.int64)) * H + h
    at = out_ptr + at[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, acc_qD.to(out_ptr.dtype.element_ty), mask=inside[:, None])


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("H", "S", "num_rows"))
def delta(out_ptr, dout_ptr, delta_ptr, H, S, num_rows, ob, os, oh, db, ds, dh, D: tl.constexpr, ROWS: tl.constexpr):
    """delta [B, H, S] = rowsum(dout ∘ out): rows of all heads in the order in which they lie in memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    token, h = row // H, row % H
    b, s = token // S, token % S
    columns = tl.arange(0, D)[None, :]
    out_rD = tl.load(out_ptr + (b * ob + s * os + h * oh)[:, None] + columns, mask=inside[:, None], other=0.0)
    dout_rD = tl.load(dout_ptr + (b * db + s * ds + h * dh)[:, None] + columns, mask=inside[:, None], other=0.0)
    sums = tl.sum(out_rD.to(tl.float32) * dout_rD.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * S + s, sums, mask=inside)


@triton.jit
def _statistics(lse_ptr, delta_ptr, head, first, S, ROWS: tl.constexpr):
    """lse (base 2) and delta of a block of queries; those past the end, and those that see no key, have lse +inf."""
    rows = first + tl.arange(0, ROWS)
    at = head.to(tl.int64) * S + rows
    lse_q = tl.load(lse_ptr + at, mask=rows < S, other=float("inf"))
    delta_q = tl.load(delta_ptr + at, mask=rows < S, other=0.0)
    return tl.where(lse_q == float("-inf"), float("inf"), lse_q * LOG2_E), delta_q


@triton.jit
def _dkv_queries(
    dk_kD, dv_kD, k_kD, v_kD, q_ptr, dout_ptr, lse_ptr, delta_ptr, b, h, H, qb, qs, qh, db, ds, dh, start, end, S,
    first_key, Z, offset, scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what query blocks [start, end) of one head give to dk and dv of a block of keys."""
    keys = first_key + tl.arange(0, BLOCK_K)
    for block in tl.range(start, end):
        first = block * BLOCK_Q
        q_qD = _tile(q_ptr, b, h, first, S, qb, qs, qh, BLOCK_Q, D, DESCRIPTORS)
        lse_q, delta_q = _statistics(lse_ptr, delta_ptr, b * H + h, first, S, BLOCK_Q)
        s_kq = tl.dot(k_kD, q_qD.T, input_precision=PRECISION)
        if MASKED:
            seen = (keys < Z)[:, None]
            if CAUSAL:
                rows = first + tl.arange(0, BLOCK_Q)
                seen = seen & (keys[:, None] <= rows[None, :] + offset)
            s_kq = tl.where(seen, s_kq, float("-inf"))
        p_kq = tl.exp2(s_kq * scale - lse_q[None, :])
        dout_qD = _tile(dout_ptr, b, h, first, S, db, ds, dh, BLOCK_Q, D, DESCRIPTORS)
        dv_kD = tl.dot(p_kq.to(dout_qD.dtype), dout_qD, dv_kD, input_precision=PRECISION)
        dp_kq = tl.dot(v_kD, dout_qD.T, input_precision=PRECISION)
        ds_kq = p_kq * (dp_kq - delta_q[None, :])
        dk_kD = tl.dot(ds_kq.to(q_qD.dtype), q_qD, dk_kD, input_precision=PRECISION)
    return dk_kD, dv_kD


@triton.jit(do_not_specialize=SIZES)
def dkv(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, qb, qs, qh, kb, ks, kh, vb, vs, vh, db, ds,
    dh, H, G, S, Z, offset, num_heads, at_once, scale, softmax_scale, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk, dv [B, Z, K, D], a block of keys of a key head a program: it walks queries of the G heads that share it."""
    num_blocks_q, K = tl.cdiv(S, BLOCK_Q), H // G
    block, head = _place(tl.program_id(0), tl.cdiv(Z, BLOCK_K), num_heads, at_once)  # early keys have most queries
    b, h, first = head // K, head % K, block * BLOCK_K
    k_kD = _tile(k_ptr, b, h, first, Z, kb, ks, kh, BLOCK_K, D, DESCRIPTORS)
    v_kD = _tile(v_ptr, b, h, first, Z, vb, vs, vh, BLOCK_K, D, DESCRIPTORS)
    start, whole = 0, 0
    if CAUSAL:
        start = tl.where(first - offset < S, tl.maximum(first - offset, 0) // BLOCK_Q, num_blocks_q)
        whole = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_K - 1 - offset, 0), BLOCK_Q), num_blocks_q)
    whole = tl.where(first + BLOCK_K > Z, num_blocks_q, whole)
    dk_kD = tl.zeros([BLOCK_K, D], tl.float32)
    dv_kD = tl.zeros([BLOCK_K, D], tl.float32)
    for shared in tl.range(0, G):
        dk_kD, dv_kD = _dkv_queries(
            dk_kD, dv_kD, k_kD, v_kD, q_ptr, dout_ptr, lse_ptr, delta_ptr, b, h * G + shared, H, qb, qs, qh, db, ds,
            dh, start, whole, S, first, Z, offset, scale, BLOCK_Q, BLOCK_K, D, CAUSAL, True, DESCRIPTORS, PRECISION,
        )
        dk_kD, dv_kD = _dkv_queries(
            dk_kD, dv_kD, k_kD, v_kD, q_ptr, dout_ptr, lse_ptr, delta_ptr, b, h * G + shared, H, qb, qs, qh, db, ds,
            dh, whole, num_blocks_q, S, first, Z, offset, scale, BLOCK_Q, BLOCK_K, D, CAUSAL, False, DESCRIPTORS,
            PRECISION,
        )
    keys = first + tl.arange(0, BLOCK_K)
    at = ((b.to(tl.int64) * Z + keys.to(tl.int64)) * K + h)[:, None] * D + tl.arange(0, D)[None, :]
    inside = (keys < Z)[:, None]
    tl.store(dk_ptr + at, (dk_kD * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv_kD.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dq_keys(
    dq_qD, q_qD, dout_qD, lse_q, delta_q, k_ptr, v_ptr, b, h, kb, ks, kh, vb, vs, vh, start, end, Z, last_q, scale,
    BLOCK_K: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what key blocks [start, end) give to dq of a block of queries."""
    for block in tl.range(start, end):
        first = block * BLOCK_K
        k_kD = _tile(k_ptr, b, h, first, Z, kb, ks, kh, BLOCK_K, D, DESCRIPTORS)
        s_qk = tl.dot(q_qD, k_kD.T, input_precision=PRECISION)
        if MASKED:
            keys = first + tl.arange(0, BLOCK_K)
            s_qk = tl.where(keys[None, :] <= last_q[:, None], s_qk, float("-inf"))
        p_qk = tl.exp2(s_qk * scale - lse_q[:, None])
        v_kD = _tile(v_ptr, b, h, first, Z, vb, vs, vh, BLOCK_K, D, DESCRIPTORS)
        dp_qk = tl.dot(dout_qD, v_kD.T, input_precision=PRECISION)
        ds_qk = p_qk * (dp_qk - delta_q[:, None])
        dq_qD = tl.dot(ds_qk.to(k_kD.dtype), k_kD, dq_qD, input_precision=PRECISION)
    return dq_qD


@triton.jit(do_not_specialize=SIZES)
def dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr, qb, qs, qh, kb, ks, kh, vb, vs, vh, db, ds, dh, H, G,
    S, Z, offset, num_heads, at_once, scale, softmax_scale, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq [B, S, H, D], a block of queries of one head a program."""
    num_blocks = tl.cdiv(S, BLOCK_Q)
    block, head = _place(tl.program_id(0), num_blocks, num_heads, at_once)
    if CAUSAL:
        block = num_blocks - 1 - block
    b, h, first = head // H, head % H, block * BLOCK_Q
    q_qD = _tile(q_ptr, b, h, first, S, qb, qs, qh, BLOCK_Q, D, DESCRIPTORS)
    dout_qD = _tile(dout_ptr, b, h, first, S, db, ds, dh, BLOCK_Q, D, DESCRIPTORS)
    lse_q, delta_q = _statistics(lse_ptr, delta_ptr, head, first, S, BLOCK_Q)
    whole, end, last_q = _keys_of(first, offset, S, Z, BLOCK_Q, BLOCK_K, CAUSAL)
    dq_qD = tl.zeros([BLOCK_Q, D], tl.float32)
    dq_qD = _dq_keys(
        dq_qD, q_qD, dout_qD, lse_q, delta_q, k_ptr, v_ptr, b, h // G, kb, ks, kh, vb, vs, vh, 0, whole, Z, last_q,
        scale, BLOCK_K, D, False, DESCRIPTORS, PRECISION,
    )
    dq_qD = _dq_keys(
        dq_qD, q_qD, dout_qD, lse_q, delta_q, k_ptr, v_ptr, b, h // G, kb, ks, kh, vb, vs, vh, whole, end, Z, last_q,
        scale, BLOCK_K, D, True, DESCRIPTORS, PRECISION,
    )
    rows = first + tl.arange(0, BLOCK_Q)
    at = ((b.to(tl.int64) * S + rows.to(tl.int64)) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + at, (dq_qD * softmax_scale).to(dq_ptr.dtype.element_ty), mask=(rows < S)[:, None])
