"""Paged attention: one kernel for decodes, drafts and prompt chunks, and the merge of its splits.

Flash attention's running softmax (Dao et al., https://arxiv.org/abs/2205.14135) over blocks found
through the block table; long contexts of short queries in splits (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(tile, query_start_loc, num_seqs, BLOCK_Q: tl.constexpr):
    """The last sequence s with query_start_loc[s] // BLOCK_Q + s <= tile: each begins a tile of its
    own, and finding it here spares the host a look at the lengths."""
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def load_tile(cache, scales, cells, scale_cells, dims, visible, HEAD_DIM: tl.constexpr,
              IS_INT8: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """[TILE, DIM_PAD] rows of a cache and [TILE] scales. What no query of the tile may see is 0,
    whatever lies there: a weight of 0 would not undo a NaN."""
    seen = visible[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(cache + cells[:, None] + dims[None, :], mask=seen, other=0).to(DTYPE)
    of_rows = tl.load(scales + scale_cells, mask=visible, other=0.0) if IS_INT8 else 1.0
    return rows, of_rows


@triton.jit
def attend(
    out, parts, part_sums, queries, keys, values, key_scales, value_scales,
    query_start_loc, seq_lens, block_tables,
    num_seqs, num_splits, table_stride, query_stride, head_stride, scale, soft_cap, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, SHORT_LEN: tl.constexpr, IS_SHORT: tl.constexpr, IN_PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows: some query tokens of one sequence, each with all query heads of a KV head.

    IS_SHORT: grid (sequences, KV heads, splits), those of at most SHORT_LEN new tokens, one split
    of SPLIT positions each. Else: grid (tiles, KV heads), the others, over their whole context.
    Which of both computes a row, and where tiles and splits begin, follows from its own sequence.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    seq = tl.program_id(0)
    first = 0
    if not IS_SHORT:
        seq = sequence_of(tl.program_id(0), query_start_loc, num_seqs, BLOCK_Q)
    start = tl.load(query_start_loc + seq)
    if not IS_SHORT:
        first = (tl.program_id(0) - start // BLOCK_Q - seq) * BLOCK_Q
    query_len = tl.load(query_start_loc + seq + 1) - start
    if first >= query_len or (query_len <= SHORT_LEN) != IS_SHORT:
        return
    context = tl.load(seq_lens + seq) - query_len
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD)
    tokens = first + rows // GROUP
    is_row = (rows < BLOCK_Q * GROUP) & (tokens < query_len)
    heads = kv_head * GROUP + rows % GROUP
    positions = context + tokens  # [BLOCK_M] of the queries
    q_cells = (start + tokens).to(tl.int64) * query_stride + heads * head_stride
    is_cell = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(queries + q_cells[:, None] + dims[None, :], mask=is_cell, other=0.0)

    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(context + first - window + 1, 0)
    end = context + tl.minimum(first + BLOCK_Q, query_len)
    low, high = lowest, end
    if IS_SHORT:
        low = tl.maximum(lowest, tl.program_id(2) * SPLIT)
        high = tl.minimum(end, (tl.program_id(2) + 1) * SPLIT)
        if low >= high:
            return
    low = low // TILE * TILE

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for begin in range(low, high, TILE):
        cached = begin + tl.arange(0, TILE)
        visible = (cached >= lowest) & (cached < end)
        block = tl.load(block_tables + seq * table_stride + cached // BLOCK_SIZE,
                        mask=visible, other=0).to(tl.int64)  # fmt: skip
        slots = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + cached % BLOCK_SIZE
        cells = slots * HEAD_DIM
        k, k_scale = load_tile(keys, key_scales, cells, slots, dims, visible, HEAD_DIM, IS_INT8,
                               q.dtype)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if IS_INT8:
            scores *= k_scale[None, :]
        if HAS_CAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
            turned = tl.exp2(scores * (2.0 * LOG2E / soft_cap))
            scores = soft_cap - 2.0 * soft_cap / (turned + 1.0)
        sees = visible[None, :] & (cached[None, :] <= positions[:, None])
        if HAS_WINDOW:
            sees = sees & (cached[None, :] > positions[:, None] - window)
        scores = tl.where(sees, scores * LOG2E, float("-inf"))
        above = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen nothing yet
        weights = tl.exp2(scores - anchor[:, None])
        kept = tl.exp2(best - anchor)
        total = total * kept + tl.sum(weights, 1)
        v, v_scale = load_tile(values, value_scales, cells, slots, dims, visible, HEAD_DIM,
                               IS_INT8, q.dtype)  # fmt: skip
        if IS_INT8:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(q.dtype), v, acc * kept[:, None], input_precision="ieee")
        best = above

    if IN_PARTS:
        part = ((seq * NUM_KV_HEADS + kv_head) * num_splits + tl.program_id(2)).to(tl.int64)
        part_rows = part * BLOCK_M + rows
        tl.store(parts + part_rows[:, None] * DIM_PAD + dims[None, :], acc)
        tl.store(part_sums + part_rows * 2, best)
        tl.store(part_sums + part_rows * 2 + 1, total)
    else:
        out_rows = (start + tokens).to(tl.int64) * NUM_HEADS + heads
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + out_rows[:, None] * HEAD_DIM + dims[None, :], result, mask=is_cell)


@triton.jit
def merge(
    out, parts, part_sums, query_start_loc, seq_lens, num_splits, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, SHORT_LEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, KV heads): the splits of each short sequence, in order of position."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - start
    if query_len == 0 or query_len > SHORT_LEN:
        return
    end = tl.load(seq_lens + seq)
    first_split = 0
    if HAS_WINDOW:
        first_split = tl.maximum(end - query_len - window + 1, 0) // SPLIT
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for split in range(first_split, tl.cdiv(end, SPLIT)):
        part = ((seq * NUM_KV_HEADS + kv_head) * num_splits + split).to(tl.int64)
        part_rows = part * BLOCK_M + rows
        part_best = tl.load(part_sums + part_rows * 2)
        above = tl.maximum(best, part_best)
        anchor = tl.where(above == float("-inf"), 0.0, above)
        kept, added = tl.exp2(best - anchor), tl.exp2(part_best - anchor)
        total = total * kept + tl.load(part_sums + part_rows * 2 + 1) * added
        part_acc = tl.load(parts + part_rows[:, None] * DIM_PAD + dims[None, :])
        acc = acc * kept[:, None] + part_acc * added[:, None]
        best = above
    tokens = rows // GROUP
    is_row = (rows < BLOCK_M // GROUP * GROUP) & (tokens < query_len)
    is_cell = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    out_rows = (start + tokens).to(tl.int64) * NUM_HEADS + kv_head * GROUP + rows % GROUP
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_rows[:, None] * HEAD_DIM + dims[None, :], result, mask=is_cell)
