// Paged attention of a few query rows against one KV head's blocks; fp32 online softmax.
// Context is walked in tiles of 64 and splits of 256 positions at fixed absolute places; a split
// starts afresh and splits merge in order. So a row's bits depend on its own context only.
#pragma once
#include "attention_int8.h"
#include "attention_tile.h"

namespace {

typedef Tile<uint16_t> Bf16Tile;

// acc[row .. row + R][2 W B dims] = acc * correction + sum over positions of p * value.
// A hidden position has p = 0, and find_tile gives it values that are there: no NaN of a reused
// block is ever multiplied. `some`: pairs of the last 2 W dims that there are, when not all.
// `ahead`: the tile to fetch meanwhile, one position for each of this one's, or null.
template <int R, int B>
static inline void add_values(State& s, int row, int64_t dim, int64_t at, int some,
                              const Bf16Tile& tile, int num, const Bf16Tile* ahead, const float* p,
                              const float* correction) {
    const int64_t stride = tw_acc_stride(dim);
    F acc[R][2 * B];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2 * B; v++)
            acc[r][v] =
                mul(load(s.acc + (row + r) * stride + at + v * W), set1(correction[row + r]));
    for (int j = 0; j < num; j++) {
        if (ahead != nullptr) fetch(ahead->values, j, j + 1, dim);
        F value[2 * B];
        for (int b = 0; b < B; b++) {
            const uint16_t* from = tile.values[j] + at + b * 2 * W;
            const P pairs = some == W ? load_pairs(from) : load_some_pairs(from, some);
            value[2 * b] = low_half(pairs);
            value[2 * b + 1] = high_half(pairs);
        }
        for (int r = 0; r < R; r++) {
            const F share = set1(p[(row + r) * TW_TILE + j]);
            for (int v = 0; v < 2 * B; v++) acc[r][v] = fma(share, value[v], acc[r][v]);
        }
    }
    if (ahead != nullptr) fetch(ahead->values, num, TW_TILE, dim);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2 * B; v++)
            store(s.acc + (row + r) * stride + at + v * W, acc[r][v]);
}

template <int R>
static inline void add_all_dims(State& s, int row, int64_t dim, const Bf16Tile& tile, int num,
                                const Bf16Tile* ahead, const float* p, const float* correction) {
    int64_t at = 0;
    for (; at + 4 * W <= dim; at += 4 * W, ahead = nullptr)
        add_values<R, 2>(s, row, dim, at, W, tile, num, ahead, p, correction);
    for (; at + 2 * W <= dim; at += 2 * W, ahead = nullptr)
        add_values<R, 1>(s, row, dim, at, W, tile, num, ahead, p, correction);
    if (at < dim)
        add_values<R, 1>(s, row, dim, at, (int)(dim - at) / 2, tile, num, ahead, p, correction);
}

template <int R>
static inline void add_left(State& s, int row, int left, int64_t dim, const Bf16Tile& tile, int num,
                            const Bf16Tile* ahead, const float* p, const float* correction) {
    if constexpr (R > 0) {
        if (left == R)
            add_all_dims<R>(s, row, dim, tile, num, ahead, p, correction);
        else
            add_left<R - 1>(s, row, left, dim, tile, num, ahead, p, correction);
    }
}

// `num`: positions of the tile up to the last that any row sees.
static void attend_tile(const TwOp& op, const Rows& rows, State& s, const Bf16Tile& tile, int num,
                        const Bf16Tile* ahead) {
    const int64_t dim = op.head_dim, pairs = dim / 2;
    const int subs = (num + SUB - 1) / SUB;
    alignas(64) uint16_t keys[TW_MAX_HEAD_DIM * TW_TILE];
    alignas(64) float scores[MAX_ROWS * TW_TILE];
    float correction[MAX_ROWS];
    for (int b = 0; b < subs; b++) {
        if (ahead != nullptr) fetch(ahead->keys, b * TW_TILE / subs, (b + 1) * TW_TILE / subs, dim);
        for (int64_t i = 0; i < pairs; i += 16) {
            const int some = (int)(pairs - i < 16 ? pairs - i : 16);
            transpose_pairs(tile.keys + b * SUB, i * 2, some, keys + (b * pairs + i) * SUB * 2);
        }
    }
    score_rows<F>(rows, subs, pairs, keys, scores);
    for (int r = 0; r < rows.n; r++) {
        const int first = (int)(rows.first[r] > tile.start ? rows.first[r] - tile.start : 0);
        const int end = (int)(rows.end[r] < tile.start + num ? rows.end[r] - tile.start : num);
        if (first < end) {
            correction[r] = soften(op, s, r, first, end, subs * SUB, rows.scale[r], nullptr,
                                   scores + r * TW_TILE);
        } else {  // sees nothing of this tile: stays as it is
            correction[r] = 1.0f;
            __builtin_memset(scores + r * TW_TILE, 0, TW_TILE * sizeof(float));
        }
    }
    int row = 0;
    for (; row + VALUE_ROWS <= rows.n; row += VALUE_ROWS, ahead = nullptr)
        add_all_dims<VALUE_ROWS>(s, row, dim, tile, num, ahead, scores, correction);
    add_left<VALUE_ROWS - 1>(s, row, rows.n - row, dim, tile, num, ahead, scores, correction);
}

template <class T>
static void attend_split(const TwOp& op, const TwStep& step, const TwUnit& unit, const Rows& rows,
                         int64_t split, const TwUnit* next, State& s) {
    clear(s, rows.n, op.head_dim);
    int64_t start = split * TW_SPLIT, end = start + TW_SPLIT;
    if (rows.end[rows.n - 1] < end) end = rows.end[rows.n - 1];
    if (rows.first[0] > start) start = rows.first[0] / TW_TILE * TW_TILE;
    if (start >= end) return;
    Tile<T> tiles[2];
    int now = 0;
    find_tile(op, step, unit, start, tiles[now]);
    for (; start < end; start += TW_TILE, now ^= 1) {
        const int num = (int)(end - start < TW_TILE ? end - start : TW_TILE);
        const Tile<T>* ahead = nullptr;
        if (start + TW_TILE < end) {
            find_tile(op, step, unit, start + TW_TILE, tiles[now ^ 1]);
            ahead = &tiles[now ^ 1];
        } else if (next != nullptr) {
            const int64_t first = next->split > 0 ? next->split * TW_SPLIT : 0;
            find_tile(op, step, *next, first, tiles[now ^ 1]);
            ahead = &tiles[now ^ 1];
        }
        attend_tile(op, rows, s, tiles[now], num, ahead);
    }
}

static void find_rows(const TwOp& op, const TwStep& step, int32_t seq, int32_t row0, int32_t row1,
                      int32_t kv_head, Rows& rows) {
    const int64_t group = op.num_heads / op.num_kv_heads, dim = op.head_dim;
    const int64_t base = step.query_start_loc[seq];
    const int64_t past = step.seq_lens[seq] - (step.query_start_loc[seq + 1] - base);
    rows.n = row1 - row0;
    for (int r = 0; r < rows.n; r++) {
        const int64_t token = (row0 + r) / group, head = kv_head * group + (row0 + r) % group;
        rows.queries[r] =
            (const uint16_t*)step.buffers[op.x] + (base + token) * op.ldx + head * dim;
        rows.scale[r] = op.scale;
        rows.out[r] = (uint16_t*)step.buffers[op.out] + (base + token) * op.ldo + head * dim;
        rows.end[r] = past + token + 1;
        const int64_t first = op.window == 0 ? 0 : rows.end[r] - op.window;
        rows.first[r] = first > 0 ? first : 0;
    }
}

template <class T>
static void attend_over(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                        float* partials) {
    Rows rows;
    find_rows(op, step, unit.seq, unit.row0, unit.row1, unit.kv_head, rows);
    const int64_t dim = op.head_dim, acc = tw_acc_stride(dim), stride = tw_partial_stride(dim);
    alignas(64) int16_t codes[IS_CODES<T> ? MAX_ACC : 1];
    if constexpr (IS_CODES<T>) quantize_rows(rows, dim, codes);
    State part;
    if (unit.split >= 0) {
        attend_split<T>(op, step, unit, rows, unit.split, next, part);
        for (int r = 0; r < rows.n; r++) {
            float* out = partials + (unit.partial + r) * stride;
            __builtin_memcpy(out, part.acc + r * acc, acc * sizeof(float));
            out[acc] = part.max[r], out[acc + 1] = part.sum[r];
        }
        return;
    }
    State total;
    clear(total, rows.n, dim);
    const int64_t splits = (rows.end[rows.n - 1] + TW_SPLIT - 1) / TW_SPLIT;
    for (int64_t split = rows.first[0] / TW_SPLIT; split < splits; split++) {
        attend_split<T>(op, step, unit, rows, split, split + 1 < splits ? nullptr : next, part);
        for (int r = 0; r < rows.n; r++)
            merge_row(total, r, dim, part.acc + r * acc, part.max[r], part.sum[r]);
    }
    for (int r = 0; r < rows.n; r++)
        finish_row(total.acc + r * acc, total.sum[r], dim, rows.out[r]);
}

static void attend(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                   float* partials) {
    if (step.key_scales == nullptr)
        attend_over<uint16_t>(op, step, unit, next, partials);
    else
        attend_over<int8_t>(op, step, unit, next, partials);
}

// One row of a sequence whose splits were units of their own.
static void merge(const TwOp& op, const TwStep& step, const TwMerge& row, const float* partials) {
    const int64_t dim = op.head_dim, stride = tw_partial_stride(dim);
    Rows rows;
    State total;
    find_rows(op, step, row.seq, row.row, row.row + 1, row.kv_head, rows);
    clear(total, 1, dim);
    for (int64_t split = 0; split < row.num_splits; split++) {
        const float* part = partials + (row.partial + split * row.split_stride) * stride;
        const float* ends = part + tw_acc_stride(dim);
        merge_row(total, 0, dim, part, ends[0], ends[1]);
    }
    finish_row(total.acc, total.sum[0], dim, rows.out[0]);
}

}  // namespace
