// Paged attention of a few query rows against one KV head's blocks; fp32 online softmax.
// Context is walked in tiles of 64 and splits of 256 positions at fixed absolute places; a split
// starts afresh and splits merge in order. So a row's bits depend on its own context only.
#pragma once
#include "kernels.h"

namespace {

constexpr int MAX_ROWS = 64;          // of a unit
constexpr int MAX_ACC = 4096;         // MAX_ROWS * tw_acc_stride(head_dim) at most
constexpr int SUB = 16;               // positions whose keys are transposed together
constexpr int SUBS = TW_TILE / SUB;
constexpr int VECS_OF_SUB = SUB / W;
constexpr float MINUS_INF = -__builtin_inff();

struct Rows {
    int n;
    const uint16_t* queries[MAX_ROWS];
    int64_t first[MAX_ROWS], end[MAX_ROWS];  // positions a row sees
    uint16_t* out[MAX_ROWS];
};

// Of the rows over one split, or over all of them. acc holds each 2 W dims as W even, W odd ones:
// so bf16 values need no shuffle to become floats.
struct State {
    alignas(64) float acc[MAX_ACC];
    float max[MAX_ROWS], sum[MAX_ROWS];
};

struct Tile {
    int64_t start;
    const uint16_t* keys[TW_TILE];
    const uint16_t* values[TW_TILE];
};

static void clear(State& s, int rows, int64_t dim) {
    __builtin_memset(s.acc, 0, rows * tw_acc_stride(dim) * sizeof(float));
    for (int r = 0; r < rows; r++) s.max[r] = MINUS_INF, s.sum[r] = 0.0f;
}

// Add a later part (acc, max, sum) to row r of `into`. A part that saw nothing changes nothing.
static inline void merge_row(State& into, int r, int64_t dim, const float* acc, float max,
                             float sum) {
    if (max == MINUS_INF) return;
    const float top = into.max[r] > max ? into.max[r] : max;
    const float old_share = into.max[r] == MINUS_INF ? 0.0f : exp_f32(into.max[r] - top);
    const float new_share = exp_f32(max - top);
    float* at = into.acc + r * tw_acc_stride(dim);
    for (int64_t i = 0; i < tw_acc_stride(dim); i += W)
        store(at + i, fma(load(at + i), set1(old_share), mul(load(acc + i), set1(new_share))));
    into.sum[r] = into.sum[r] * old_share + sum * new_share;
    into.max[r] = top;
}

static inline void finish_row(const float* acc, float sum, int64_t dim, uint16_t* out) {
    const F inverse = set1(1.0f / sum);
    for (int64_t i = 0; i < dim; i += 2 * W) {
        const F even = mul(load(acc + i), inverse), odd = mul(load(acc + i + W), inverse);
        if (i + 2 * W <= dim) {
            store_pairs(out + i, even, odd);
        } else {
            alignas(64) uint16_t pairs[2 * W];
            store_pairs(pairs, even, odd);
            __builtin_memcpy(out + i, pairs, (dim - i) * sizeof(uint16_t));
        }
    }
}

// Pointers to the positions from `start`; those behind the sequence's last stand on the last one:
// a reused block may hold anything there.
static inline void find_tile(const TwOp& op, const TwStep& step, const TwUnit& unit, int64_t start,
                             Tile& tile) {
    const int64_t dim = op.head_dim, size = step.block_size, last = step.seq_lens[unit.seq] - 1;
    const int32_t* table = step.block_tables + unit.seq * step.block_table_stride;
    const uint16_t* keys = (const uint16_t*)step.keys[op.layer];
    const uint16_t* values = (const uint16_t*)step.values[op.layer];
    tile.start = start;
    int64_t block = start / size, offset = start % size;
    int64_t at = ((table[block] * op.num_kv_heads + unit.kv_head) * size + offset) * dim;
    for (int j = 0; j < TW_TILE; j++) {
        tile.keys[j] = keys + at;
        tile.values[j] = values + at;
        if (start + j >= last) continue;
        at += dim;
        if (++offset == size) {
            offset = 0;
            at = (table[++block] * op.num_kv_heads + unit.kv_head) * size * dim;
        }
    }
}

// Blocks lie anywhere in memory: no prefetcher of the processor foresees the next one.
static inline void fetch(const uint16_t* const* rows, int from, int end, int64_t dim) {
    for (int j = from; j < end; j++)
        for (int64_t i = 0; i < dim; i += 32) __builtin_prefetch(rows[j] + i, 0, 2);
}

// Scores of R rows against S subs of 16 positions: keys [sub][pair][16][2].
template <int R, int S>
static inline void score(const Rows& rows, int row, int sub, int64_t pairs, const uint16_t* keys,
                         float* scores) {
    F acc[R][S][VECS_OF_SUB];
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++) acc[r][s][v] = zero();
    for (int64_t i = 0; i < pairs; i++) {
        P query[R];
        for (int r = 0; r < R; r++) query[r] = set1_pair(rows.queries[row + r] + i * 2);
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++) {
                const P key = load_pairs(keys + ((sub + s) * pairs + i) * SUB * 2 + v * W * 2);
                for (int r = 0; r < R; r++) acc[r][s][v] = dot_pairs(acc[r][s][v], key, query[r]);
            }
    }
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++)
                store(scores + (row + r) * TW_TILE + (sub + s) * SUB + v * W, acc[r][s][v]);
}

template <int R>
static inline void score_subs(const Rows& rows, int row, int subs, int64_t pairs,
                              const uint16_t* keys, float* scores) {
    constexpr int CHAINS = SCORE_CHAINS / (R * VECS_OF_SUB);
    constexpr int S = CHAINS >= 4 ? 4 : CHAINS >= 2 ? 2 : 1;
    int sub = 0;
    for (; sub + S <= subs; sub += S) score<R, S>(rows, row, sub, pairs, keys, scores);
    for (; sub < subs; sub++) score<R, 1>(rows, row, sub, pairs, keys, scores);
}

template <int R>
static inline void score_left(const Rows& rows, int row, int left, int subs, int64_t pairs,
                              const uint16_t* keys, float* scores) {
    if constexpr (R > 0) {
        if (left == R)
            score_subs<R>(rows, row, subs, pairs, keys, scores);
        else
            score_left<R - 1>(rows, row, left, subs, pairs, keys, scores);
    }
}

// acc[row .. row + R][2 W B dims] = acc * correction + sum over positions of p * value.
// A hidden position has p = 0, and find_tile gives it values that are there: no NaN of a reused
// block is ever multiplied. `some`: pairs of the last 2 W dims that there are, when not all.
// `ahead`: the tile to fetch meanwhile, one position for each of this one's, or null.
template <int R, int B>
static inline void add_values(State& s, int row, int64_t dim, int64_t at, int some,
                              const Tile& tile, int num, const Tile* ahead, const float* p,
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
static inline void add_all_dims(State& s, int row, int64_t dim, const Tile& tile, int num,
                                const Tile* ahead, const float* p, const float* correction) {
    int64_t at = 0;
    for (; at + 4 * W <= dim; at += 4 * W, ahead = nullptr)
        add_values<R, 2>(s, row, dim, at, W, tile, num, ahead, p, correction);
    for (; at + 2 * W <= dim; at += 2 * W, ahead = nullptr)
        add_values<R, 1>(s, row, dim, at, W, tile, num, ahead, p, correction);
    if (at < dim)
        add_values<R, 1>(s, row, dim, at, (int)(dim - at) / 2, tile, num, ahead, p, correction);
}

template <int R>
static inline void add_left(State& s, int row, int left, int64_t dim, const Tile& tile, int num,
                            const Tile* ahead, const float* p, const float* correction) {
    if constexpr (R > 0) {
        if (left == R)
            add_all_dims<R>(s, row, dim, tile, num, ahead, p, correction);
        else
            add_left<R - 1>(s, row, left, dim, tile, num, ahead, p, correction);
    }
}

// Scores of row r -> shares p, in place, 0 outside [first, end); updates max and sum. Positions
// from `num` on are not looked at: they would add zeros.
static inline float soften(const TwOp& op, State& s, int r, int first, int end, int num,
                           float* scores) {
    F top = set1(s.max[r]);
    for (int j = 0; j < num; j += W) {
        F score = mul(load(scores + j), set1(op.scale));
        if (op.soft_cap != 0.0f)
            score = mul(tanh_f32(div(score, set1(op.soft_cap))), set1(op.soft_cap));
        score = keep(score, set1(MINUS_INF), j, first, end);
        store(scores + j, score);
        top = max(top, score);
    }
    const float new_max = hmax(top);
    const float correction = s.max[r] == MINUS_INF ? 0.0f : exp_f32(s.max[r] - new_max);
    F sum = zero();
    for (int j = 0; j < num; j += W) {
        const F share = exp_f32(sub(load(scores + j), set1(new_max)));
        sum = add(sum, share);
        store(scores + j, share);
    }
    s.sum[r] = s.sum[r] * correction + hsum(sum);
    s.max[r] = new_max;
    return correction;
}

// `num`: positions of the tile up to the last that any row sees.
static void attend_tile(const TwOp& op, const Rows& rows, State& s, const Tile& tile, int num,
                        const Tile* ahead) {
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
    constexpr int R = SCORE_CHAINS / VECS_OF_SUB < 8 ? SCORE_CHAINS / VECS_OF_SUB : 8;
    int row = 0;
    for (; row + R <= rows.n; row += R) score_subs<R>(rows, row, subs, pairs, keys, scores);
    score_left<R - 1>(rows, row, rows.n - row, subs, pairs, keys, scores);
    for (int r = 0; r < rows.n; r++) {
        const int first = (int)(rows.first[r] > tile.start ? rows.first[r] - tile.start : 0);
        const int end = (int)(rows.end[r] < tile.start + num ? rows.end[r] - tile.start : num);
        if (first < end) {
            correction[r] = soften(op, s, r, first, end, subs * SUB, scores + r * TW_TILE);
        } else {  // sees nothing of this tile: stays as it is
            correction[r] = 1.0f;
            __builtin_memset(scores + r * TW_TILE, 0, TW_TILE * sizeof(float));
        }
    }
    for (row = 0; row + VALUE_ROWS <= rows.n; row += VALUE_ROWS, ahead = nullptr)
        add_all_dims<VALUE_ROWS>(s, row, dim, tile, num, ahead, scores, correction);
    add_left<VALUE_ROWS - 1>(s, row, rows.n - row, dim, tile, num, ahead, scores, correction);
}

static void attend_split(const TwOp& op, const TwStep& step, const TwUnit& unit, const Rows& rows,
                         int64_t split, const TwUnit* next, State& s) {
    clear(s, rows.n, op.head_dim);
    int64_t start = split * TW_SPLIT, end = start + TW_SPLIT;
    if (rows.end[rows.n - 1] < end) end = rows.end[rows.n - 1];
    if (rows.first[0] > start) start = rows.first[0] / TW_TILE * TW_TILE;
    if (start >= end) return;
    Tile tiles[2];
    int now = 0;
    find_tile(op, step, unit, start, tiles[now]);
    for (; start < end; start += TW_TILE, now ^= 1) {
        const int num = (int)(end - start < TW_TILE ? end - start : TW_TILE);
        const Tile* ahead = nullptr;
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
        rows.out[r] = (uint16_t*)step.buffers[op.out] + (base + token) * op.ldo + head * dim;
        rows.end[r] = past + token + 1;
        const int64_t first = op.window == 0 ? 0 : rows.end[r] - op.window;
        rows.first[r] = first > 0 ? first : 0;
    }
}

static void attend(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                   float* partials) {
    Rows rows;
    find_rows(op, step, unit.seq, unit.row0, unit.row1, unit.kv_head, rows);
    const int64_t dim = op.head_dim, acc = tw_acc_stride(dim), stride = tw_partial_stride(dim);
    State part;
    if (unit.split >= 0) {
        attend_split(op, step, unit, rows, unit.split, next, part);
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
        attend_split(op, step, unit, rows, split, split + 1 < splits ? nullptr : next, part);
        for (int r = 0; r < rows.n; r++)
            merge_row(total, r, dim, part.acc + r * acc, part.max[r], part.sum[r]);
    }
    for (int r = 0; r < rows.n; r++)
        finish_row(total.acc + r * acc, total.sum[r], dim, rows.out[r]);
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
