// What attention over a bf16 and over an int8 cache share: the rows of a unit, where the positions
// of a split lie, scores of rows against keys, and their softmax. attention.h walks splits.
#pragma once
#include "kernels.h"

namespace {

constexpr int MAX_ROWS = 64;   // of a unit
constexpr int MAX_ACC = 4096;  // MAX_ROWS * head_dim at most
constexpr int SUB = TW_SUB;
constexpr int SUBS = TW_SPLIT / SUB;
constexpr int TILE_SUBS = TW_TILE / SUB;
constexpr int VECS_OF_SUB = SUB / W;
constexpr float LOG2_E = 1.44269504f;  // scores are powers of 2, not of e, once they are scaled
constexpr float MINUS_INF = -__builtin_inff();

struct Rows {
    int n;
    const uint16_t* queries[MAX_ROWS];  // bf16, or int16 of quantize_rows
    float scale[MAX_ROWS];              // of the products of queries and keys
    int64_t first[MAX_ROWS], end[MAX_ROWS];  // positions a row sees
    uint16_t* out[MAX_ROWS];
};

// Of the rows over one split, or over all of them.
struct State {
    alignas(64) float acc[MAX_ACC];  // [row][head_dim]
    float max[MAX_ROWS], sum[MAX_ROWS];
};

struct Place {
    int32_t seq, kv_head;
    int64_t split;
};

// A split with what its rows make of it; positions count from its start. T: what the cache holds,
// uint16_t for bf16 or int8_t for codes. Only codes have scales.
template <class T>
struct Split {
    int from, to;         // positions that any row sees, from a whole tile
    int64_t slots[SUBS];  // of the first position of each sub; slot * head_dim is where it lies
    alignas(64) float scores[MAX_ROWS * TW_SPLIT];
    alignas(64) uint16_t shares[MAX_ROWS * TW_SPLIT];  // bf16, or int16
};

// The subs that are read next, to fetch ahead.
struct Ahead {
    int num;
    int64_t slots[SUBS];
};

template <class T>
constexpr bool IS_CODES = sizeof(T) == 1;

template <int N>
struct Count {
    static constexpr int value = N;
};

// work(Count<N>, first) over parts of [first, n): as many of N = MOST as there are, then a smaller.
template <int MOST, class Work>
static inline void in_parts(int n, Work work, int first = 0) {
    for (; first + MOST <= n; first += MOST) work(Count<MOST>{}, first);
    if constexpr (MOST > 1) in_parts<MOST - 1>(n, work, first);
}

static inline int within(int64_t position) {
    return position < 0 ? 0 : position > TW_SPLIT ? TW_SPLIT : (int)position;
}

static void clear(State& s, int rows, int64_t dim) {
    __builtin_memset(s.acc, 0, rows * dim * sizeof(float));
    for (int r = 0; r < rows; r++) s.max[r] = MINUS_INF, s.sum[r] = 0.0f;
}

// Add a later part (acc, max, sum) to row r of `into`. A part that saw nothing changes nothing.
static inline void merge_row(State& into, int r, int64_t dim, const float* acc, float max,
                             float sum) {
    if (max == MINUS_INF) return;
    const float top = into.max[r] > max ? into.max[r] : max;
    const float old_share = exp2_f32(into.max[r] - top), new_share = exp2_f32(max - top);
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

static inline void find_slots(const TwOp& op, const TwStep& step, const Place& at, int from, int to,
                              int64_t* slots) {
    const int64_t size = step.block_size;
    const int64_t row = step.kv_groups[op.layer] * step.num_seqs + at.seq;
    const int32_t* table = step.block_tables + row * step.block_table_stride;
    for (int j = from; j < to; j += SUB) {
        const int64_t position = at.split * TW_SPLIT + j, block = table[position / size];
        slots[j / SUB] = (block * op.num_kv_heads + at.kv_head) * size + position % size;
    }
}

static inline void find_ahead(const TwOp& op, const TwStep& step, const Place* next, Ahead& ahead) {
    ahead.num = 0;
    if (next == nullptr) return;
    const int to = within(step.seq_lens[next->seq] - next->split * TW_SPLIT);
    find_slots(op, step, *next, 0, to, ahead.slots);
    ahead.num = (to + SUB - 1) / SUB;
}

// A sub. They lie anywhere in memory: no prefetcher of the processor foresees the next one.
template <class T>
static inline void fetch(const T* sub, int64_t dim) {
    for (int64_t i = 0; i < SUB * dim; i += 64 / sizeof(T)) __builtin_prefetch(sub + i, 0, 2);
}

// Scores of R rows against S subs: keys [sub][pair][16][2]. Sum: F of bf16 or P of int16 pairs.
// `ahead`: subs of the same size to fetch meanwhile, line by line, or null.
template <class Sum, int R, int S>
static inline void score(const Rows& rows, int row, int64_t pairs, const uint16_t* const* keys,
                         const uint16_t* const* ahead, float* scores) {
    Sum acc[R][S][VECS_OF_SUB];
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++) acc[r][s][v] = Sum{};
    for (int64_t i = 0; i < pairs; i++) {
        P query[R];
        for (int r = 0; r < R; r++) query[r] = set1_pair(rows.queries[row + r] + i * 2);
        for (int s = 0; s < S; s++) {
            if (ahead != nullptr) __builtin_prefetch(ahead[s] + i * SUB * 2, 0, 2);
            for (int v = 0; v < VECS_OF_SUB; v++) {
                const P key = load_pairs(keys[s] + i * SUB * 2 + v * W * 2);
                for (int r = 0; r < R; r++) acc[r][s][v] = dot_pairs(acc[r][s][v], key, query[r]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++)
            for (int v = 0; v < VECS_OF_SUB; v++)
                store(scores + (row + r) * TW_SPLIT + s * SUB + v * W, to_float(acc[r][s][v]));
}

// Of all rows against `subs` subs.
template <class Sum>
static inline void score_tile(const Rows& rows, int subs, int64_t pairs,
                              const uint16_t* const* keys, const uint16_t* const* ahead,
                              float* scores) {
    in_parts<SCORE_ROWS>(rows.n, [&](auto r, int row) {
        const bool fetches = row == 0 && ahead != nullptr;
        in_parts<SCORE_SUBS>(subs, [&](auto s, int sub) {
            score<Sum, decltype(r)::value, decltype(s)::value>(
                rows, row, pairs, keys + sub, fetches ? ahead + sub : nullptr, scores + sub * SUB);
        });
    });
}

// Scores of row r -> its max, its sum, and shares: bf16, or of codes fp32 times the values' scales
// in place of the scores. They are 0 where the row sees nothing.
template <class T>
static inline void soften(const TwOp& op, const TwStep& step, const Rows& rows, int r,
                          int64_t start, Split<T>& split, State& s) {
    const int first = within(rows.first[r] - start), end = within(rows.end[r] - start);
    const int seen = (split.to + SUB - 1) / SUB * SUB;
    float* row = split.scores + r * TW_SPLIT;
    uint16_t* shares = split.shares + r * TW_SPLIT;
    if (first >= end) {
        __builtin_memset(row, 0, seen * sizeof(float));
        __builtin_memset(shares, 0, seen * sizeof(uint16_t));
        return;
    }
    const float cap = op.soft_cap;
    const F scale = set1(cap == 0.0f ? rows.scale[r] * LOG2_E : rows.scale[r] / cap);
    F top = set1(MINUS_INF);
    for (int j = split.from; j < seen; j += W) {
        F score = mul(load(row + j), scale);
        if constexpr (IS_CODES<T>)
            score = mul(score, load(step.key_scales[op.layer] + split.slots[j / SUB] + j % SUB));
        if (cap != 0.0f) score = mul(tanh_f32(score), set1(cap * LOG2_E));
        if (j < first || j + W > end) score = keep(score, set1(MINUS_INF), j, first, end);
        store(row + j, score);
        top = max(top, score);
    }
    s.max[r] = hmax(top);
    F sum = zero();
    for (int j = split.from; j < seen; j += W) {
        const F share = exp2_f32(sub(load(row + j), set1(s.max[r])));
        sum = add(sum, share);
        if constexpr (IS_CODES<T>) {  // a scale behind the sequence's end may be NaN
            const float* scales = step.value_scales[op.layer] + split.slots[j / SUB] + j % SUB;
            store(row + j, keep(mul(share, load(scales)), zero(), j, first, end));
        } else {
            store_bf16(shares + j, share);
        }
    }
    s.sum[r] = hsum(sum);
}

}  // namespace
