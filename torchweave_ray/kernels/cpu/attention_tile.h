// What attention over a bf16 and over an int8 cache share: the rows of a unit, a tile of positions,
// scores of rows against keys, and their softmax. attention.h walks tiles.
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
    const uint16_t* queries[MAX_ROWS];  // bf16, or int16 of quantize_rows
    float scale[MAX_ROWS];              // of the products of queries and keys
    int64_t first[MAX_ROWS], end[MAX_ROWS];  // positions a row sees
    uint16_t* out[MAX_ROWS];
};

// Of the rows over one split, or over all of them. acc holds each 2 W dims as W even, W odd ones:
// so bf16 values need no shuffle to become floats.
struct State {
    alignas(64) float acc[MAX_ACC];
    float max[MAX_ROWS], sum[MAX_ROWS];
};

// T: what the cache holds, uint16_t for bf16 or int8_t for codes. Only codes have scales.
template <class T>
struct Tile {
    int64_t start;
    const T* keys[TW_TILE];
    const T* values[TW_TILE];
    const float* key_scales[TW_TILE];
    const float* value_scales[TW_TILE];
};

template <class T>
constexpr bool IS_CODES = sizeof(T) == 1;

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
template <class T>
static inline void find_tile(const TwOp& op, const TwStep& step, const TwUnit& unit, int64_t start,
                             Tile<T>& tile) {
    const int64_t dim = op.head_dim, size = step.block_size, last = step.seq_lens[unit.seq] - 1;
    const int32_t* table = step.block_tables + unit.seq * step.block_table_stride;
    const T* keys = (const T*)step.keys[op.layer];
    const T* values = (const T*)step.values[op.layer];
    tile.start = start;
    int64_t block = start / size, offset = start % size;
    int64_t slot = (table[block] * op.num_kv_heads + unit.kv_head) * size + offset;
    for (int j = 0; j < TW_TILE; j++) {
        tile.keys[j] = keys + slot * dim;
        tile.values[j] = values + slot * dim;
        if constexpr (IS_CODES<T>) {
            tile.key_scales[j] = step.key_scales[op.layer] + slot;
            tile.value_scales[j] = step.value_scales[op.layer] + slot;
            if (j == 0 || offset == 0) {
                __builtin_prefetch(tile.key_scales[j], 0, 2);
                __builtin_prefetch(tile.value_scales[j], 0, 2);
            }
        }
        if (start + j >= last) continue;
        slot++;
        if (++offset == size) {
            offset = 0;
            slot = (table[++block] * op.num_kv_heads + unit.kv_head) * size;
        }
    }
}

// Blocks lie anywhere in memory: no prefetcher of the processor foresees the next one.
template <class T>
static inline void fetch(const T* const* rows, int from, int end, int64_t dim) {
    for (int j = from; j < end; j++)
        for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(rows[j] + i, 0, 2);
}

// Scores of R rows against S subs of 16 positions: keys [sub][pair][16][2]. Sum: F of bf16 or P of
// int16 pairs.
template <class Sum, int R, int S>
static inline void score(const Rows& rows, int row, int sub, int64_t pairs, const uint16_t* keys,
                         float* scores) {
    Sum acc[R][S][VECS_OF_SUB];
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++) acc[r][s][v] = Sum{};
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
                store(scores + (row + r) * TW_TILE + (sub + s) * SUB + v * W, to_float(acc[r][s][v]));
}

template <class Sum, int R>
static inline void score_subs(const Rows& rows, int row, int subs, int64_t pairs,
                              const uint16_t* keys, float* scores) {
    constexpr int CHAINS = SCORE_CHAINS / (R * VECS_OF_SUB);
    constexpr int S = CHAINS >= 4 ? 4 : CHAINS >= 2 ? 2 : 1;
    int sub = 0;
    for (; sub + S <= subs; sub += S) score<Sum, R, S>(rows, row, sub, pairs, keys, scores);
    for (; sub < subs; sub++) score<Sum, R, 1>(rows, row, sub, pairs, keys, scores);
}

template <class Sum, int R>
static inline void score_left(const Rows& rows, int row, int left, int subs, int64_t pairs,
                              const uint16_t* keys, float* scores) {
    if constexpr (R > 0) {
        if (left == R)
            score_subs<Sum, R>(rows, row, subs, pairs, keys, scores);
        else
            score_left<Sum, R - 1>(rows, row, left, subs, pairs, keys, scores);
    }
}

// Of all rows against `subs` subs.
template <class Sum>
static inline void score_rows(const Rows& rows, int subs, int64_t pairs, const uint16_t* keys,
                              float* scores) {
    constexpr int R = SCORE_CHAINS / VECS_OF_SUB < 8 ? SCORE_CHAINS / VECS_OF_SUB : 8;
    int row = 0;
    for (; row + R <= rows.n; row += R) score_subs<Sum, R>(rows, row, subs, pairs, keys, scores);
    score_left<Sum, R - 1>(rows, row, rows.n - row, subs, pairs, keys, scores);
}

// Scores of row r -> shares p, in place, 0 outside [first, end); updates max and sum. Positions
// from `num` on are not looked at: they would add zeros. `key_scales`: null where there are none.
static inline float soften(const TwOp& op, State& s, int r, int first, int end, int num,
                           float scale, const float* key_scales, float* scores) {
    F top = set1(s.max[r]);
    for (int j = 0; j < num; j += W) {
        F score = mul(load(scores + j), set1(scale));
        if (key_scales != nullptr) score = mul(score, load(key_scales + j));
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

}  // namespace
