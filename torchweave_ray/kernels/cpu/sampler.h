// The pinned draw of runner/sampler.py, one row of logits a call: same filters, same order of the
// float64 sums; only exp may differ from torch's in its last bit. Include after numeric.h.
#pragma once
#include "kernels.h"

namespace {

// Philox4x32-10; see runner/sampling/philox.py for which words make the uniform.
static inline double uniform(uint64_t seed, uint64_t index) {
    uint32_t c0 = (uint32_t)index, c1 = 0, c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        if (i) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
    }
    const uint64_t mantissa = (((uint64_t)c0 << 32) | c1) >> 11;
    return ((double)mantissa + 0.5) * 0x1p-53;
}

// The largest of n floats; NaN if there is one.
static inline float largest(const float* x, int64_t n) {
    F top = set1(-__builtin_inff()), nan = zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const F v = load(x + i);
        top = max(v, top);
        nan = stick_nan(nan, v);
    }
    float result = hmax(top), sum = hsum(nan);
    for (; i < n; i++) {
        if (x[i] != x[i]) sum = x[i];
        if (x[i] > result) result = x[i];
    }
    return sum != sum ? sum : result;
}

static inline int64_t first_at_least(const float* x, int64_t n, float limit) {
    int64_t i = 0;
    for (; i + W <= n; i += W)
        if (const uint32_t mask = at_least(load(x + i), set1(limit)))
            return i + __builtin_ctz(mask);
    for (; i < n; i++)
        if (x[i] >= limit) return i;
    return -1;
}

// Weights with their token ids, in id order; ids == nullptr: all tokens of the row.
struct Kept {
    float* weights;
    int32_t* ids;
    int64_t n;
};

// Keep entries whose `value` is at least the limit. May write over what it reads: it never leads.
static inline Kept keep_at_least(const Kept& from, const float* values, float limit,
                                 float* weights, int32_t* ids) {
    Kept kept{weights, ids, 0};
    const auto take = [&](int64_t i) {
        ids[kept.n] = from.ids == nullptr ? (int32_t)i : from.ids[i];
        weights[kept.n++] = from.weights[i];
    };
    int64_t i = 0;
    for (; i + W <= from.n; i += W)
        for (uint32_t mask = at_least(load(values + i), set1(limit)); mask; mask &= mask - 1)
            take(i + __builtin_ctz(mask));
    for (; i < from.n; i++)
        if (values[i] >= limit) take(i);
    return kept;
}

// Order-preserving map of floats to integers, and back.
static inline uint32_t to_key(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static inline float from_key(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// The k-th largest of n floats (1 <= k <= n), by radix selection. -0 counts as 0.
static float kth_largest(const float* x, int64_t n, int64_t k, uint32_t* scratch) {
    constexpr int SHIFTS[3] = {21, 10, 0}, BITS[3] = {11, 11, 10};
    int64_t left = n;
    for (int64_t i = 0; i < n; i++) scratch[i] = to_key(x[i] + 0.0f);
    uint32_t prefix = 0;
    for (int digit = 0; digit < 3; digit++) {
        int32_t counts[2048] = {0};
        const uint32_t mask = (1u << BITS[digit]) - 1;
        for (int64_t i = 0; i < left; i++) counts[(scratch[i] >> SHIFTS[digit]) & mask]++;
        uint32_t bucket = mask;
        while (counts[bucket] < k) k -= counts[bucket--];
        prefix |= bucket << SHIFTS[digit];
        int64_t next = 0;
        for (int64_t i = 0; i < left; i++)
            if (((scratch[i] >> SHIFTS[digit]) & mask) == bucket) scratch[next++] = scratch[i];
        left = next;
    }
    return from_key(prefix);
}

static inline double sum_in_order(const float* x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

// Descending, least significant byte first. `other` is as long; the result is in `keys`.
static void sort_descending(uint32_t* keys, uint32_t* other, int64_t n) {
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t starts[257] = {0};
        for (int64_t i = 0; i < n; i++) starts[256 - ((keys[i] >> shift) & 255)]++;
        for (int i = 1; i < 257; i++) starts[i] += starts[i - 1];
        for (int64_t i = 0; i < n; i++) other[starts[255 - ((keys[i] >> shift) & 255)]++] = keys[i];
        uint32_t* swap = keys;
        keys = other, other = swap;
    }
}

// The smallest weight that top_p keeps: sums run over weights in descending order. Only weights
// above a bound are sorted, lowered until they reach the target.
static float lowest_kept(const Kept& kept, double top_p, float most, uint32_t* scratch,
                         int64_t room) {
    const double target = top_p * sum_in_order(kept.weights, kept.n);
    float bound = most / 64.0f;
    while (true) {
        int64_t n = 0;
        for (int64_t i = 0; i < kept.n; i++) {
            scratch[n] = to_key(kept.weights[i]);
            n += kept.weights[i] >= bound;
        }
        sort_descending(scratch, scratch + room, n);
        double before = 0.0;
        int64_t num = 0;
        while (num < n && (num == 0 || before < target)) before += from_key(scratch[num++]);
        if (before >= target || n == kept.n) return from_key(scratch[num - 1]);
        bound = bound < 1e-30f ? 0.0f : bound / 64.0f;
    }
}

static int64_t draw(const Kept& kept, double u) {
    constexpr int64_t BLOCK = 256;
    double before[1 << 12];  // the sum at the start of each block
    int64_t size = BLOCK;
    while (kept.n / size >= (1 << 12)) size *= 2;
    double sum = 0.0;
    for (int64_t start = 0; start < kept.n; start += size) {
        before[start / size] = sum;
        const int64_t end = start + size < kept.n ? start + size : kept.n;
        for (int64_t i = start; i < end; i++) sum += kept.weights[i];
    }
    const double target = u * sum;
    int64_t block = kept.n == 0 ? 0 : (kept.n - 1) / size;
    while (block > 0 && before[block] > target) block--;
    sum = before[block];
    for (int64_t i = block * size; i < kept.n; i++) {
        sum += kept.weights[i];
        if (sum > target) return kept.ids == nullptr ? i : kept.ids[i];
    }
    int64_t last = kept.n - 1;  // rounding left none
    while (last > 0 && kept.weights[last] == 0.0f) last--;
    return kept.ids == nullptr ? last : kept.ids[last];
}

static int64_t sample(const float* logits, int64_t vocab, const TwDraw& d, float* scratch) {
    const float top = largest(logits, vocab);
    if (!(top - top == 0.0f)) return -1;  // NaN or infinite
    if (d.temperature == 0.0f) return first_at_least(logits, vocab, top);
    const float temperature = d.temperature < 0x1p-100f ? 0x1p-100f : d.temperature;
    float* weights = scratch;
    int64_t i = 0;
    for (; i + W <= vocab; i += W)
        store(weights + i, exp_f32(div(sub(load(logits + i), set1(top)), set1(temperature))));
    for (; i < vocab; i++) weights[i] = exp_f32((logits[i] - top) / temperature);
    Kept kept{weights, nullptr, vocab};
    int32_t* ids = (int32_t*)(scratch + 3 * vocab);
    uint32_t* spare = (uint32_t*)(scratch + vocab);
    if (0 < d.top_k && d.top_k < vocab)
        kept = keep_at_least(kept, logits, kth_largest(logits, vocab, d.top_k, spare), weights, ids);
    if (d.top_p < 1.0) {
        const float lowest = lowest_kept(kept, d.top_p, 1.0f, spare, vocab);
        kept = keep_at_least(kept, kept.weights, lowest, weights, ids);
    }
    if (d.min_p > 0.0f) kept = keep_at_least(kept, kept.weights, d.min_p, weights, ids);
    return draw(kept, uniform(d.seed, d.index));
}

}  // namespace
