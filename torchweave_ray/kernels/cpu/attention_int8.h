// Attention over a split of an int8 cache, row-major blocks. Queries and shares become int16 with a scale for each row,
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

// Codes of a sub -> out [pair][16 positions][2] int16.
static inline void transpose_codes(const int8_t* sub, int64_t dim, uint16_t* out) {
    alignas(64) uint16_t fours[16 * SUB * 2];
    const uint16_t* keys[SUB];
    for (int j = 0; j < SUB; j++) keys[j] = (const uint16_t*)(sub + j * dim);
    for (int64_t at = 0; at < dim; at += 64) {
        const int num = (int)(dim - at < 64 ? dim - at : 64) / 4;
        transpose_pairs(keys, at / 2, num, fours);
        for (int i = 0; i < num; i++, out += SUB * 4)
            for (int v = 0; v < VECS_OF_SUB; v++) {
                const P bytes = load_pairs(fours + i * SUB * 2 + v * W * 2);
                store_pairs(out + v * W * 2, even_bytes(bytes));
                store_pairs(out + SUB * 2 + v * W * 2, odd_bytes(bytes));
            }
    }
}

static void score_split(const TwOp& op, const TwStep& step, const Rows& rows,
                        Split<int8_t>& split) {
    const int64_t dim = op.head_dim;
    const int8_t* keys = (const int8_t*)step.keys[op.layer];
    const int8_t* values = (const int8_t*)step.values[op.layer];
    alignas(64) uint16_t wide[TW_MAX_HEAD_DIM * TW_TILE];
    for (int j = split.from; j < split.to; j += TW_TILE) {
        const uint16_t* tile[TILE_SUBS];
        int subs = 0;
        for (; subs < TILE_SUBS && j + subs * SUB < split.to; subs++) {
            const int64_t at = split.slots[j / SUB + subs] * dim;
            fetch(values + at, dim);
            transpose_codes(keys + at, dim, wide + subs * SUB * dim);
            tile[subs] = wide + subs * SUB * dim;
        }
        score_tile<P>(rows, subs, dim / 2, tile, nullptr, split.scores + j);
    }
}

// acc[R rows][B vectors] += (sum over pairs of share * value) * scale
template <int R, int B>
static inline void add_codes(float* acc, int64_t dim, int pairs, const uint16_t* values,
                             const uint16_t* shares, const float* scale) {
    P sum[R][B];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) sum[r][v] = P{};
    for (int j = 0; j < pairs; j++, values += dim * 2) {
        P value[B];
        for (int v = 0; v < B; v++) value[v] = load_pairs(values + v * W * 2);
        for (int r = 0; r < R; r++) {
            const P share = set1_pair(shares + r * TW_SPLIT + j * 2);
            for (int v = 0; v < B; v++) sum[r][v] = dot_pairs(sum[r][v], value[v], share);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) {
            float* at = acc + r * dim + v * W;
            store(at, fma(to_float(sum[r][v]), set1(scale[r]), load(at)));
        }
}

static void add_split(const TwOp& op, const TwStep& step, const Rows& rows, Split<int8_t>& split,
                      const Ahead& ahead, State& s) {
    const int64_t dim = op.head_dim;
    const int8_t* keys = (const int8_t*)step.keys[op.layer];
    const int8_t* values = (const int8_t*)step.values[op.layer];
    const int num = (split.to + SUB - 1) / SUB * SUB - split.from;
    alignas(64) uint16_t wide[TW_MAX_HEAD_DIM * TW_TILE];  // [pair of positions][head_dim][2]
    float scale[MAX_ROWS];
    for (int r = 0; r < rows.n; r++) {
        const int at = r * TW_SPLIT + split.from;
        scale[r] = quantize_int16(split.scores + at, num, (int16_t*)split.shares + at);
    }
    for (int b = 0; b < ahead.num; b++) fetch(keys + ahead.slots[b] * dim, dim);
    for (int j = split.from; j < split.to; j += TW_TILE) {
        int pairs = 0;
        for (; pairs < TW_TILE / 2 && j + 2 * pairs < split.to; pairs++) {
            const int at = j + 2 * pairs;
            const int8_t* first = values + (split.slots[at / SUB] + at % SUB) * dim;
            for (int64_t i = 0; i < dim; i += W)
                store_pairs(wide + (pairs * dim + i) * 2,
                            zip(load_bytes(first + i), load_bytes(first + dim + i)));
        }
        in_parts<VALUE_ROWS>(rows.n, [&](auto r, int row) {
            in_parts<VALUE_VECS>((int)(dim / W), [&](auto b, int vec) {
                add_codes<decltype(r)::value, decltype(b)::value>(
                    s.acc + row * dim + vec * W, dim, pairs, wide + vec * W * 2,
                    split.shares + row * TW_SPLIT + j, scale + row);
            });
        });
    }
}

}  // namespace
