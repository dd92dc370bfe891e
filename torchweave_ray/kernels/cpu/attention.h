// Paged attention of a few query rows against one KV head's blocks; fp32 online softmax.
// Context is walked in tiles of 16 and splits of 256 positions at fixed absolute places; a split
// starts afresh and splits merge in order. So a row's bits depend on its own context only.
#pragma once
#include "kernels.h"

namespace {

constexpr int MAX_ROWS = 64;          // of a unit
constexpr int MAX_ACC = 4096;         // MAX_ROWS * head_dim at most
#define TW_MINUS_INF (-__builtin_inff())

struct Rows {
    int n;
    const uint16_t* queries[MAX_ROWS];
    int64_t first[MAX_ROWS], end[MAX_ROWS];  // positions a row sees
    uint16_t* out[MAX_ROWS];
};

struct State {  // of the rows over one split, or over all of them
    alignas(64) float acc[MAX_ACC];
    float max[MAX_ROWS], sum[MAX_ROWS];
};

struct Tile {
    const uint16_t* keys[TW_TILE];
    const uint16_t* values[TW_TILE];
};

static void clear(State& s, int rows, int64_t dim) {
    __builtin_memset(s.acc, 0, rows * dim * sizeof(float));
    for (int r = 0; r < rows; r++) s.max[r] = TW_MINUS_INF, s.sum[r] = 0.0f;
}

// Add a later part (acc, max, sum) to row r of `into`. A part that saw nothing changes nothing.
static inline void merge_row(State& into, int r, int64_t dim, const float* acc, float max,
                             float sum) {
    if (max == TW_MINUS_INF) return;
    const float top = into.max[r] > max ? into.max[r] : max;
    const float old_share = into.max[r] == TW_MINUS_INF ? 0.0f : exp_f32(into.max[r] - top);
    const float new_share = exp_f32(max - top);
    float* at = into.acc + r * dim;
    for (int64_t i = 0; i < dim; i += W)
        store(at + i, fma(load(at + i), set1(old_share), mul(load(acc + i), set1(new_share))));
    into.sum[r] = into.sum[r] * old_share + sum * new_share;
    into.max[r] = top;
}

static inline void finish_row(const float* acc, float sum, int64_t dim, uint16_t* out) {
    const F inverse = set1(1.0f / sum);
    for (int64_t i = 0; i < dim; i += W) store_bf16(out + i, mul(load(acc + i), inverse));
}

// Pointers to the 16 positions from `start`; those behind the last one stand on the last one.
static inline void find_tile(const TwOp& op, const TwStep& step, int seq, int32_t kv_head,
                             int64_t start, Tile& tile) {
    const int64_t dim = op.head_dim, size = step.block_size, last = step.seq_lens[seq] - 1;
    const int32_t* table = step.block_tables + seq * step.block_table_stride;
    int64_t block = start / size, offset = start % size;
    for (int j = 0; j < TW_TILE; j++) {
        const int64_t at = ((table[block] * op.num_kv_heads + kv_head) * size + offset) * dim;
        tile.keys[j] = (const uint16_t*)step.keys[op.layer] + at;
        tile.values[j] = (const uint16_t*)step.values[op.layer] + at;
        if (start + j < last && ++offset == size) block++, offset = 0;
    }
}

template <int R>
static inline void score_rows(const Rows& rows, int row, int64_t pairs, const uint16_t* keys,
                              float* scores) {
    constexpr int V = TW_TILE / W;
    F acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (int64_t i = 0; i < pairs; i++) {
        P key[V];
        for (int v = 0; v < V; v++) key[v] = load_pairs(keys + i * TW_TILE * 2 + v * W * 2);
        for (int r = 0; r < R; r++) {
            const P query = set1_pair(rows.queries[row + r] + i * 2);
            for (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], key[v], query);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(scores + (row + r) * TW_TILE + v * W, acc[r][v]);
}

template <int R>
static inline void score_left(const Rows& rows, int row, int left, int64_t pairs,
                              const uint16_t* keys, float* scores) {
    if constexpr (R > 0) {
        if (left == R)
            score_rows<R>(rows, row, pairs, keys, scores);
        else
            score_left<R - 1>(rows, row, left, pairs, keys, scores);
    }
}

// acc[row .. row + R][dims] = acc * correction + sum over the tile's positions of p * value.
// A hidden position has p = 0, and find_tile gives it values that are there: no NaN of a reused
// block is ever multiplied.
template <int R, int V>
static inline void add_values(State& s, int row, int64_t dim, int64_t at, const Tile& tile,
                              const float* p, const float* correction) {
    F acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            acc[r][v] = mul(load(s.acc + (row + r) * dim + at + v * W), set1(correction[row + r]));
    for (int j = 0; j < TW_TILE; j++) {
        F value[V];
        for (int v = 0; v < V; v++) value[v] = load_bf16(tile.values[j] + at + v * W);
        for (int r = 0; r < R; r++) {
            const F share = set1(p[(row + r) * TW_TILE + j]);
            for (int v = 0; v < V; v++) acc[r][v] = fma(share, value[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(s.acc + (row + r) * dim + at + v * W, acc[r][v]);
}

template <int R>
static inline void add_all_dims(State& s, int row, int64_t dim, const Tile& tile, const float* p,
                                const float* correction) {
    int64_t at = 0;
    for (; at + VALUE_VECS * W <= dim; at += VALUE_VECS * W)
        add_values<R, VALUE_VECS>(s, row, dim, at, tile, p, correction);
    for (; at < dim; at += W) add_values<R, 1>(s, row, dim, at, tile, p, correction);
}

template <int R>
static inline void add_left(State& s, int row, int left, int64_t dim, const Tile& tile,
                            const float* p, const float* correction) {
    if constexpr (R > 0) {
        if (left == R)
            add_all_dims<R>(s, row, dim, tile, p, correction);
        else
            add_left<R - 1>(s, row, left, dim, tile, p, correction);
    }
}

// Scores of row r -> shares p, in place; updates max and sum. Positions [first, end) of the tile.
static inline float soften(const TwOp& op, State& s, int r, int first, int end, float* scores) {
    constexpr int V = TW_TILE / W;
    F score[V];
    F top = set1(s.max[r]);
    for (int v = 0; v < V; v++) {
        score[v] = mul(load(scores + v * W), set1(op.scale));
        if (op.soft_cap != 0.0f)
            score[v] = mul(tanh_f32(div(score[v], set1(op.soft_cap))), set1(op.soft_cap));
        score[v] = keep(score[v], set1(TW_MINUS_INF), v * W, first, end);
        top = max(top, score[v]);
    }
    const float new_max = hmax(top);
    const float correction = s.max[r] == TW_MINUS_INF ? 0.0f : exp_f32(s.max[r] - new_max);
    F sum = zero();
    for (int v = 0; v < V; v++) {
        score[v] = exp_f32(sub(score[v], set1(new_max)));
        sum = add(sum, score[v]);
        store(scores + v * W, score[v]);
    }
    s.sum[r] = s.sum[r] * correction + hsum(sum);
    s.max[r] = new_max;
    return correction;
}

static void attend_tile(const TwOp& op, const Rows& rows, State& s, int64_t start,
                        const Tile& tile) {
    const int64_t dim = op.head_dim, pairs = dim / 2;
    alignas(64) uint16_t keys[TW_MAX_HEAD_DIM * TW_TILE];
    alignas(64) float scores[MAX_ROWS * TW_TILE];
    float correction[MAX_ROWS];
    for (int64_t i = 0; i < pairs; i += 16) {
        const uint16_t* at[TW_TILE];
        for (int j = 0; j < TW_TILE; j++) at[j] = tile.keys[j] + i * 2;
        transpose_pairs(at, (int)(pairs - i < 16 ? pairs - i : 16), keys + i * TW_TILE * 2);
    }
    int row = 0;
    for (; row + SCORE_ROWS <= rows.n; row += SCORE_ROWS)
        score_rows<SCORE_ROWS>(rows, row, pairs, keys, scores);
    score_left<SCORE_ROWS - 1>(rows, row, rows.n - row, pairs, keys, scores);
    for (int r = 0; r < rows.n; r++) {
        const int first = (int)(rows.first[r] > start ? rows.first[r] - start : 0);
        const int end = (int)(rows.end[r] < start + TW_TILE ? rows.end[r] - start : TW_TILE);
        if (first < end) {
            correction[r] = soften(op, s, r, first, end, scores + r * TW_TILE);
        } else {  // sees nothing of this tile: stays as it is
            correction[r] = 1.0f;
            __builtin_memset(scores + r * TW_TILE, 0, TW_TILE * sizeof(float));
        }
    }
    for (row = 0; row + VALUE_ROWS <= rows.n; row += VALUE_ROWS)
        add_all_dims<VALUE_ROWS>(s, row, dim, tile, scores, correction);
    add_left<VALUE_ROWS - 1>(s, row, rows.n - row, dim, tile, scores, correction);
}

static void attend_split(const TwOp& op, const TwStep& step, const TwUnit& unit, const Rows& rows,
                         int64_t split, State& s) {
    clear(s, rows.n, op.head_dim);
    int64_t start = split * TW_SPLIT, end = start + TW_SPLIT;
    if (rows.end[rows.n - 1] < end) end = rows.end[rows.n - 1];
    if (rows.first[0] > start) start = rows.first[0] / TW_TILE * TW_TILE;
    for (; start < end; start += TW_TILE) {
        Tile tile;
        find_tile(op, step, unit.seq, unit.kv_head, start, tile);
        attend_tile(op, rows, s, start, tile);
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

static void attend(const TwOp& op, const TwStep& step, const TwUnit& unit, float* partials) {
    Rows rows;
    find_rows(op, step, unit.seq, unit.row0, unit.row1, unit.kv_head, rows);
    const int64_t dim = op.head_dim, stride = tw_partial_stride(dim);
    State part;
    if (unit.split >= 0) {
        attend_split(op, step, unit, rows, unit.split, part);
        for (int r = 0; r < rows.n; r++) {
            float* out = partials + (unit.partial + r) * stride;
            __builtin_memcpy(out, part.acc + r * dim, dim * sizeof(float));
            out[dim] = part.max[r], out[dim + 1] = part.sum[r];
        }
        return;
    }
    State total;
    clear(total, rows.n, dim);
    const int64_t splits = (rows.end[rows.n - 1] + TW_SPLIT - 1) / TW_SPLIT;
    for (int64_t split = rows.first[0] / TW_SPLIT; split < splits; split++) {
        attend_split(op, step, unit, rows, split, part);
        for (int r = 0; r < rows.n; r++)
            merge_row(total, r, dim, part.acc + r * dim, part.max[r], part.sum[r]);
    }
    for (int r = 0; r < rows.n; r++)
        finish_row(total.acc + r * dim, total.sum[r], dim, rows.out[r]);
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
        merge_row(total, 0, dim, part, part[dim], part[dim + 1]);
    }
    finish_row(total.acc, total.sum[0], dim, rows.out[0]);
}

}  // namespace
