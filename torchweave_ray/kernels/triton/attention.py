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
def load_tile(cache, scales, slots, dims, visible, HEAD_DIM: tl.constexpr, IS_INT8: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """[TILE, DIM_PAD] rows of a cache and [TILE] scales. What no query of the tile may see is 0,
    whatever lies there: a weight of 0 would not undo a NaN."""
    seen = visible[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(cache + slots[:, None] * HEAD_DIM + dims[None, :], mask=seen, other=0).to(DTYPE)
    of_rows = tl.load(scales + slots, mask=visible, other=0.0) if IS_INT8 else 1.0
    return rows, of_rows


@triton.jit
def rows_of(query_start_loc, seq_lens, num_seqs, BLOCK_Q: tl.constexpr, IS_SHORT: tl.constexpr):
    """Of this program: its sequence, that one's first row of the batch, the first of its new tokens
    here, how many it has, and how many are in the cache before them."""
    seq = tl.program_id(0)
    first = 0
    if not IS_SHORT:
        seq = sequence_of(tl.program_id(0), query_start_loc, num_seqs, BLOCK_Q)
    start = tl.load(query_start_loc + seq)
    if not IS_SHORT:
        first = (tl.program_id(0) - start // BLOCK_Q - seq) * BLOCK_Q
    query_len = tl.load(query_start_loc + seq + 1) - start
    return seq, start, first, query_len, tl.load(seq_lens + seq) - query_len


@triton.jit
def split_of(seq_len, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Positions of a split: SPLIT, or so many times 2 that MAX_SPLITS of them are enough."""
    split = seq_len * 0 + SPLIT
    while split * MAX_SPLITS < seq_len:
        split *= 2
    return split


@triton.jit
def score(q, k, k_scale, positions, cached, visible, scale, soft_cap, window,
          HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, IS_INT8: tl.constexpr):  # fmt: skip
    """[BLOCK_M, TILE] times log2(e); what a row does not see is -inf."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if IS_INT8:
        scores *= k_scale[None, :]
    if HAS_CAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
        turned = tl.exp2(scores * (2.0 * LOG2E / soft_cap))
        scores = soft_cap - 2.0 * soft_cap / (turned + 1.0)
    sees = visible[None, :] & (cached[None, :] <= positions[:, None])
    if HAS_WINDOW:
        sees = sees & (cached[None, :] > positions[:, None] - window)
    return tl.where(sees, scores * LOG2E, float("-inf"))


@triton.jit
def anchor_of(best):
    """What exponents are taken from; 0 for a row that has seen nothing yet."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit(do_not_specialize=["num_seqs", "num_splits"])
def attend(
    out, parts, part_sums, queries, keys, values, key_scales, value_scales,
    query_start_loc, seq_lens, block_tables,
    num_seqs, num_splits, table_stride, query_stride, head_stride, scale, soft_cap, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SHORT_LEN: tl.constexpr, IS_SHORT: tl.constexpr,
    IN_PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows: some query tokens of one sequence, each with all query heads of a KV head.

    IS_SHORT: grid (sequences, KV heads, splits), those of at most SHORT_LEN new tokens, one split
    of its positions each. Else: grid (tiles, KV heads), the others, over their whole context.
    Which of both computes a row, and where tiles and splits begin, follows from its own sequence.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    seq, start, first, query_len, context = rows_of(query_start_loc, seq_lens, num_seqs, BLOCK_Q,
                                                    IS_SHORT)  # fmt: skip
    if first >= query_len or (query_len <= SHORT_LEN) != IS_SHORT:
        return
    end = context + tl.minimum(first + BLOCK_Q, query_len)
    lowest = tl.maximum(context + first - window + 1, 0) if HAS_WINDOW else 0
    low, high = lowest, end
    if IS_SHORT:
        split = split_of(context + query_len, SPLIT, MAX_SPLITS)
        low = tl.maximum(lowest, tl.program_id(2) * split)
        high = tl.minimum(end, (tl.program_id(2) + 1) * split)
        if low >= high:
            return
    attend_span(
        out, parts, part_sums, queries, keys, values, key_scales, value_scales,
        block_tables + seq * table_stride, seq, start, first, query_len, context, lowest, end,
        low // TILE * TILE, high, num_splits, query_stride, head_stride, scale, soft_cap, window,
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_M, TILE, IN_PARTS, HAS_WINDOW,
        HAS_CAP, IS_INT8,
    )  # fmt: skip


@triton.jit
def attend_span(
    out, parts, part_sums, queries, keys, values, key_scales, value_scales,
    block_table, seq, start, first, query_len, context, lowest, end,
    low, high, num_splits, query_stride, head_stride, scale, soft_cap, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    IN_PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """The rows of `rows_of` over the cache's positions [low, high)."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head, dims = tl.program_id(1), tl.arange(0, DIM_PAD)
    heads, tokens, is_cell = rows_and_cells(kv_head, first, query_len, GROUP, BLOCK_M, HEAD_DIM,
                                            DIM_PAD)  # fmt: skip
    q_cells = (start + tokens).to(tl.int64) * query_stride + heads * head_stride
    q = tl.load(queries + q_cells[:, None] + dims[None, :], mask=is_cell, other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for begin in range(low, high, TILE):
        cached = begin + tl.arange(0, TILE)
        visible = (cached >= lowest) & (cached < end)
        block = tl.load(block_table + cached // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        slots = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + cached % BLOCK_SIZE
        k, k_scale = load_tile(keys, key_scales, slots, dims, visible, HEAD_DIM, IS_INT8, q.dtype)
        scores = score(q, k, k_scale, context + tokens, cached, visible, scale, soft_cap, window,
                       HAS_WINDOW, HAS_CAP, IS_INT8)  # fmt: skip
        above = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - anchor_of(above)[:, None])
        kept = tl.exp2(best - anchor_of(above))
        total = total * kept + tl.sum(weights, 1)
        v, v_scale = load_tile(values, value_scales, slots, dims, visible, HEAD_DIM, IS_INT8,
                               q.dtype)  # fmt: skip
        if IS_INT8:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(q.dtype), v, acc * kept[:, None], input_precision="ieee")
        best = above
    if IN_PARTS:
        part = ((seq * NUM_KV_HEADS + kv_head) * num_splits + tl.program_id(2)).to(tl.int64)
        part_rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts + part_rows[:, None] * DIM_PAD + dims[None, :], acc)
        tl.store(part_sums + part_rows * 2, best)
        tl.store(part_sums + part_rows * 2 + 1, total)
    else:
        store_rows(out, acc, total, start + tokens, heads, dims, is_cell, NUM_HEADS, HEAD_DIM)


@triton.jit
def rows_and_cells(kv_head, first, query_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                   HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr):  # fmt: skip
    """[BLOCK_M] head and new token of each row, [BLOCK_M, DIM_PAD] which cells there are."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD)
    tokens = first + rows // GROUP
    is_row = (rows < BLOCK_M // GROUP * GROUP) & (tokens < query_len)
    is_cell = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    return kv_head * GROUP + rows % GROUP, tokens, is_cell


@triton.jit
def store_rows(out, acc, total, rows, heads, dims, is_cell, NUM_HEADS: tl.constexpr,
               HEAD_DIM: tl.constexpr):  # fmt: skip
    cells = (rows.to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + cells[:, None] + dims[None, :], result, mask=is_cell)


@triton.jit(do_not_specialize=["num_splits"])
def merge(
    out, parts, part_sums, query_start_loc, seq_lens, num_splits, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SHORT_LEN: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, KV heads): the splits of each short sequence, in order of position."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - start
    if query_len == 0 or query_len > SHORT_LEN:
        return
    end = tl.load(seq_lens + seq)
    positions = split_of(end, SPLIT, MAX_SPLITS)
    first_split = 0
    if HAS_WINDOW:
        first_split = tl.maximum(end - query_len - window + 1, 0) // positions
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PAD)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for split in range(first_split, tl.cdiv(end, positions)):
        part = ((seq * NUM_KV_HEADS + kv_head) * num_splits + split).to(tl.int64)
        part_rows = part * BLOCK_M + rows
        part_best = tl.load(part_sums + part_rows * 2)
        above = tl.maximum(best, part_best)
        kept, added = tl.exp2(best - anchor_of(above)), tl.exp2(part_best - anchor_of(above))
        total = total * kept + tl.load(part_sums + part_rows * 2 + 1) * added
        part_acc = tl.load(parts + part_rows[:, None] * DIM_PAD + dims[None, :])
        acc = acc * kept[:, None] + part_acc * added[:, None]
        best = above
    heads, tokens, is_cell = rows_and_cells(kv_head, 0, query_len, GROUP, BLOCK_M, HEAD_DIM,
                                            DIM_PAD)  # fmt: skip
    store_rows(out, acc, total, start + tokens, heads, dims, is_cell, NUM_HEADS, HEAD_DIM)
