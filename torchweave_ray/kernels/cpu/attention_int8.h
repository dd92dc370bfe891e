// A tile of attention over an int8 cache. Queries and shares become int16 with a scale for each row,
// codes are widened to int16: products are exact integers, the same on every instruction set.
#pragma once
#include "attention_tile.h"

namespace {

constexpr float MOST = 32767.0f;
// Shares below this are 0 beside any sum, and would have no finite inverse.
constexpr float LEAST = 1e-30f;

// x [n] (whole vectors) -> int16 codes; returns their scale, NaN where x is not finite. Products
// with 256 int8 codes stay within int32.
static inline float quantize_int16(const float* x, int64_t n, int16_t* codes) {
    F top = zero(), bad = zero();
    for (int64_t i = 0; i < n; i += W) {
        const F value = load(x + i);
        top = max(top, max(value, sub(zero(), value)));
        bad = fma(value, zero(), bad);  // infinity * 0 is NaN
    }
    const float most = hmax(top), nan = hsum(bad);
    if (!(most > LEAST) || nan != nan) {
        __builtin_memset(codes, 0, n * sizeof(int16_t));
        return nan;
    }
    const F inverse = set1(MOST / most), high = set1(MOST), low = set1(-MOST);
    for (int64_t i = 0; i < n; i += W)
        store_int16(codes + i, max(low, min(high, mul(load(x + i), inverse))));
    return most / MOST;
}

// Turns the queries of `rows` into int16 in the order that transpose_codes gives keys:
// (0, 2), (1, 3) of each four.
static void quantize_rows(Rows& rows, int64_t dim, int16_t* codes) {
    alignas(64) float query[TW_MAX_HEAD_DIM];
    for (int r = 0; r < rows.n; r++, codes += dim) {
        for (int64_t i = 0; i < dim; i += W) store(query + i, load_bf16(rows.queries[r] + i));
        rows.scale[r] *= quantize_int16(query, dim, codes);
        for (int64_t i = 0; i < dim; i += 4) {
            const int16_t second = codes[i + 1];
            codes[i + 1] = codes[i + 2];
            codes[i + 2] = second;
        }
        rows.queries[r] = (const uint16_t*)codes;
    }
}

// Codes of 16 positions -> out [pair][16 positions][2] int16.
static inline void transpose_codes(const int8_t* const* keys, int64_t dim, uint16_t* out) {
    alignas(64) uint16_t fours[16 * SUB * 2];
    for (int64_t at = 0; at < dim; at += 64) {
        const int num = (int)(dim - at < 64 ? dim - at : 64) / 4;
        transpose_pairs((const uint16_t* const*)keys, at / 2, num, fours);
        for (int i = 0; i < num; i++, out += SUB * 4)
            for (int v = 0; v < VECS_OF_SUB; v++) {
                const P bytes = load_pairs(fours + i * SUB * 2 + v * W * 2);
                store_pairs(out + v * W * 2, even_bytes(bytes));
                store_pairs(out + SUB * 2 + v * W * 2, odd_bytes(bytes));
            }
    }
}

// Values of two positions -> out [acc stride][2] int16, each 2 W dims as W even, W odd ones.
static inline void zip_values(const int8_t* first, const int8_t* second, int64_t dim,
                              uint16_t* out) {
    for (int64_t i = 0; i < tw_acc_stride(dim); i += 2 * W, out += 4 * W) {
        P a = P{}, b = P{};
        if (i + 2 * W <= dim) {
            a = load_bytes(first + i), b = load_bytes(second + i);
        } else if (i < dim) {
            a = load_some_bytes(first + i, (int)(dim - i));
            b = load_some_bytes(second + i, (int)(dim - i));
        }
        store_pairs(out, zip_low(a, b));
        store_pairs(out + 2 * W, zip_high(a, b));
    }
}

// acc[row .. row + R][B vectors from `at`] = acc * correction + (sum of share * value) * scale
template <int R, int B>
static inline void add_codes(State& s, int row, int64_t stride, int64_t at, int pairs,
                             const uint16_t* values, const int16_t* shares, const float* scale,
                             const float* correction) {
    P sum[R][B];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) sum[r][v] = P{};
    for (int j = 0; j < pairs; j++) {
        P value[B];
        for (int v = 0; v < B; v++) value[v] = load_pairs(values + (j * stride + at + v * W) * 2);
        for (int r = 0; r < R; r++) {
            const P share = set1_pair((const uint16_t*)shares + (row + r) * TW_TILE + j * 2);
            for (int v = 0; v < B; v++) sum[r][v] = dot_pairs(sum[r][v], value[v], share);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) {
            float* acc = s.acc + (row + r) * stride + at + v * W;
            const F old = mul(load(acc), set1(correction[row + r]));
            store(acc, fma(to_float(sum[r][v]), set1(scale[row + r]), old));
        }
}

template <int R>
static inline void add_all_codes(State& s, int row, int64_t stride, int pairs,
                                 const uint16_t* values, const int16_t* shares, const float* scale,
                                 const float* correction) {
    int64_t at = 0;
    for (; at + 4 * W <= stride; at += 4 * W)
        add_codes<R, 4>(s, row, stride, at, pairs, values, shares, scale, correction);
    for (; at < stride; at += 2 * W)
        add_codes<R, 2>(s, row, stride, at, pairs, values, shares, scale, correction);
}

template <int R>
static inline void add_codes_left(State& s, int row, int left, int64_t stride, int pairs,
                                  const uint16_t* values, const int16_t* shares,
                                  const float* scale, const float* correction) {
    if constexpr (R > 0) {
        if (left == R)
            add_all_codes<R>(s, row, stride, pairs, values, shares, scale, correction);
        else
            add_codes_left<R - 1>(s, row, left, stride, pairs, values, shares, scale, correction);
    }
}

// `num`: positions of the tile up to the last that any row sees.
static void attend_tile(const TwOp& op, const Rows& rows, State& s, const Tile<int8_t>& tile,
                        int num, const Tile<int8_t>* ahead) {
    const int64_t dim = op.head_dim, stride = tw_acc_stride(dim);
    const int subs = (num + SUB - 1) / SUB, seen = subs * SUB;
    alignas(64) uint16_t wide[TW_MAX_HEAD_DIM * TW_TILE];  // keys, then values
    alignas(64) float scores[MAX_ROWS * TW_TILE];
    alignas(64) int16_t shares[MAX_ROWS * TW_TILE];
    alignas(64) float key_scales[TW_TILE], value_scales[TW_TILE];
    float correction[MAX_ROWS], scale[MAX_ROWS];
    for (int j = 0; j < seen; j++) {
        key_scales[j] = *tile.key_scales[j];
        value_scales[j] = *tile.value_scales[j];
    }
    for (int b = 0; b < subs; b++) {
        if (ahead != nullptr) fetch(ahead->keys, b * TW_TILE / subs, (b + 1) * TW_TILE / subs, dim);
        transpose_codes(tile.keys + b * SUB, dim, wide + b * SUB * dim);
    }
    score_rows<P>(rows, subs, dim / 2, wide, scores);
    for (int r = 0; r < rows.n; r++) {
        const int first = (int)(rows.first[r] > tile.start ? rows.first[r] - tile.start : 0);
        const int end = (int)(rows.end[r] < tile.start + num ? rows.end[r] - tile.start : num);
        float* row = scores + r * TW_TILE;
        correction[r] = 1.0f, scale[r] = 0.0f;
        if (first < end) {
            correction[r] = soften(op, s, r, first, end, seen, rows.scale[r], key_scales, row);
            for (int j = 0; j < seen; j += W) store(row + j, mul(load(row + j), load(value_scales + j)));
            scale[r] = quantize_int16(row, seen, shares + r * TW_TILE);
        } else {  // sees nothing of this tile: stays as it is
            __builtin_memset(shares + r * TW_TILE, 0, seen * sizeof(int16_t));
        }
    }
    const int pairs = (num + 1) / 2;
    for (int j = 0; j < pairs; j++) {
        if (ahead != nullptr) fetch(ahead->values, j * 2, j * 2 + 2, dim);
        zip_values(tile.values[2 * j], tile.values[2 * j + 1], dim, wide + j * stride * 2);
    }
    if (ahead != nullptr) fetch(ahead->values, pairs * 2, TW_TILE, dim);
    int row = 0;
    for (; row + VALUE_ROWS <= rows.n; row += VALUE_ROWS)
        add_all_codes<VALUE_ROWS>(s, row, stride, pairs, wide, shares, scale, correction);
    add_codes_left<VALUE_ROWS - 1>(s, row, rows.n - row, stride, pairs, wide, shares, scale,
                                   correction);
}

}  // namespace
