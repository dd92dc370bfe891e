// Embedding, RMSNorm, rope with the KV write, and picking rows: one token or row a call.
// Include after numeric.h.
#pragma once
#include "blocks.h"

namespace {

static inline float bf16_to_f32(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

// Columns [n, ld) of the output become 0: products read whole pairs.
static void embed(const TwOp& op, const TwStep& step, int64_t token) {
    const int64_t id = step.input_ids[token];
    float* out = (float*)step.buffers[op.out] + token * op.ldo;
    const uint16_t* table = (const uint16_t*)op.weight;
    if (op.format != TW_BF16) {
        for (int64_t i = 0; i < op.k; i++) out[i] = weight_at(op, id, i) * op.scale;
    } else if (op.mode == TW_PACKED) {
        const int64_t pairs = (op.k + 1) / 2;
        const uint16_t* at = table + (id / TW_PANEL * pairs * TW_PANEL + id % TW_PANEL) * 2;
        for (int64_t i = 0; i < pairs; i++, at += TW_PANEL * 2) {
            out[2 * i] = bf16_to_f32(at[0]) * op.scale;
            out[2 * i + 1] = bf16_to_f32(at[1]) * op.scale;
        }
    } else {
        for (int64_t i = 0; i < op.k; i++) out[i] = bf16_to_f32(table[id * op.k + i]) * op.scale;
    }
    for (int64_t i = op.k; i < op.ldo; i++) out[i] = 0.0f;
}

// 1 / sqrt(mean of squares + eps). Columns behind n, up to whole vectors, must be 0.
static inline float inverse_rms(const float* x, int64_t n, float eps) {
    F sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int v = 0; v < 4; v++) {
            const F value = load(x + i + v * W);
            sums[v] = fma(value, value, sums[v]);
        }
    for (; i < n; i += W) {
        const F value = keep(load(x + i), zero(), (int)i, 0, (int)n);
        sums[0] = fma(value, value, sums[0]);
    }
    const float sum = hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    return 1.0f / __builtin_sqrtf(sum / (float)n + eps);
}

static void rms_norm(const TwOp& op, const TwStep& step, int64_t row) {
    const float* x = (const float*)step.buffers[op.x] + row * op.ldx;
    uint16_t* out = (uint16_t*)step.buffers[op.out] + row * op.ldo;
    const float* weight = (const float*)op.weight;
    const F scale = set1(inverse_rms(x, op.n, op.eps));
    int64_t i = 0;  // weights are padded with zeros to whole panels
    if (op.mode == TW_NORM_BLOCKS) {
        TwBlock* block = block_of(step.buffers[op.out], op.ldo, row);
        for (; i < op.n; i += TW_GROUP, block++) {
            F values[GROUP_VECS];
            for (int v = 0; v < GROUP_VECS; v++)
                values[v] = mul(mul(load(x + i + v * W), scale), load(weight + i + v * W));
            quantize_block(values, block);
        }
        return;
    }
    if (op.mode == TW_NORM_ADD) {
        float* sum = (float*)step.buffers[op.out] + row * op.ldo;
        for (; i < op.n; i += W)
            store(sum + i, add(load(sum + i), mul(mul(load(x + i), scale), load(weight + i))));
        return;
    }
    for (; i < op.n; i += W) store_bf16(out + i, mul(mul(load(x + i), scale), load(weight + i)));
    for (; i < op.ldo; i += W) store_bf16(out + i, zero());
}

static void pick(const TwOp& op, const TwStep& step, int64_t row) {
    const float* x = (const float*)step.buffers[op.x] + step.logit_rows[row] * op.ldx;
    __builtin_memcpy((float*)step.buffers[op.out] + row * op.ldo, x, op.ldo * sizeof(float));
}

// x [head_dim] f32: norm if asked, then rotate the halves of its first rotary_dim (a, b) -> (ac - bs,
// bc + as). The result is x itself or in `scratch`. head_dim and rotary_dim are multiples of 16: rows
// are whole vectors.
static inline const float* norm_and_rotate(const TwOp& op, const float* x, const float* norm,
                                           const float* table, float* scratch) {
    const int64_t dim = op.head_dim, half = op.rotary_dim / 2;
    alignas(64) float normed[TW_MAX_HEAD_DIM];
    if (norm != nullptr) {
        float* out = table == nullptr ? scratch : normed;
        const F scale = set1(inverse_rms(x, dim, op.eps));
        for (int64_t i = 0; i < dim; i += W)
            store(out + i, mul(mul(load(x + i), scale), load(norm + i)));
        x = out;
    }
    if (table == nullptr) return x;
    for (int64_t i = 0; i < half; i += 8) {  // halves are whole half-vectors of 8 lanes at least
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + half + i);
        const __m256 c = _mm256_loadu_ps(table + i), s = _mm256_loadu_ps(table + half + i);
        _mm256_storeu_ps(scratch + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        _mm256_storeu_ps(scratch + half + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
    }
    for (int64_t i = op.rotary_dim; i < dim; i += W) store(scratch + i, load(x + i));
    return scratch;
}

static inline void store_row(uint16_t* out, const float* x, int64_t dim) {
    for (int64_t i = 0; i < dim; i += W) store_bf16(out + i, load(x + i));
}

// One position into its sub: keys [pair of dims][16][2], values [pair of positions][head_dim][2].
// Other positions' halves of a pair are other threads' to write.
static inline void store_key(uint16_t* sub, const float* key, int64_t dim, int64_t position) {
    alignas(64) uint16_t row[TW_MAX_HEAD_DIM];
    store_row(row, key, dim);
    for (int64_t i = 0; i < dim; i += 2)
        __builtin_memcpy(sub + i * TW_SUB + position * 2, row + i, 2 * sizeof(uint16_t));
}
static inline void store_value(uint16_t* sub, const float* value, int64_t dim, int64_t position) {
    alignas(64) uint16_t row[TW_MAX_HEAD_DIM];
    store_row(row, value, dim);
    uint16_t* out = sub + position / 2 * dim * 2 + position % 2;
    for (int64_t i = 0; i < dim; i++) out[i * 2] = row[i];
}

// Symmetric int8: x = codes * scale, scale = max|x| / 127. Where x is not finite the scale is NaN:
// it spoils what reads this position and nothing else.
static inline float quantize_row(int8_t* out, const float* x, int64_t dim) {
    F top = zero(), bad = zero();
    for (int64_t i = 0; i < dim; i += W) {
        const F value = load(x + i);
        top = max(top, max(value, sub(zero(), value)));
        bad = fma(value, zero(), bad);  // infinity * 0 is NaN
    }
    const float scale = hmax(top) / 127.0f + hsum(bad);
    if (!(scale > 0.0f)) {  // all zeros, or NaN
        __builtin_memset(out, 0, dim);
        return scale;
    }
    // A denormal scale is coarse, and could give a code above 127.
    const F whole = set1(scale), most = set1(127.0f), least = set1(-127.0f);
    for (int64_t i = 0; i < dim; i += W)
        store_int8(out + i, max(least, min(most, div(load(x + i), whole))));
    return scale;
}

// A key goes to dim / 2 lines, that are fetched while queries are computed.
static inline void fetch_key_lines(const TwOp& op, const TwStep& step, int64_t at) {
    const int64_t dim = op.head_dim;
    for (int64_t head = 0; head < op.num_kv_heads; head++, at += step.block_size)
        for (int64_t i = 0; i < dim / 2; i++)
            __builtin_prefetch(
                (uint16_t*)step.keys[op.layer] + (at - at % TW_SUB) * dim + i * TW_SUB * 2, 1);
}

// One token of qkv [num_heads + 2 * num_kv_heads, head_dim]: queries out, K and V into its slot.
static void rope_kv(const TwOp& op, const TwStep& step, int64_t token) {
    const int64_t dim = op.head_dim, kv_heads = op.num_kv_heads, size = step.block_size;
    const float* x = (const float*)step.buffers[op.x] + token * op.ldx;
    uint16_t* queries = (uint16_t*)step.buffers[op.out] + token * op.ldo;
    const float* table =
        op.rope < 0 ? nullptr : step.ropes[op.rope] + step.positions[token] * op.rotary_dim;
    const int64_t slot = step.slot_mapping[step.kv_groups[op.layer] * step.num_tokens + token];
    const int64_t block = slot / size, offset = slot % size;
    if (step.key_scales == nullptr) fetch_key_lines(op, step, block * kv_heads * size + offset);
    alignas(64) float scratch[TW_MAX_HEAD_DIM];
    for (int64_t head = 0; head < op.num_heads; head++, x += dim) {
        const float* query = norm_and_rotate(op, x, (const float*)op.weight, table, scratch);
        store_row(queries + head * dim, query, dim);
    }
    for (int64_t head = 0; head < kv_heads; head++, x += dim) {
        const float* key = norm_and_rotate(op, x, (const float*)op.extra, table, scratch);
        const float* value = x + kv_heads * dim;
        const int64_t at = (block * kv_heads + head) * size + offset;
        if (step.key_scales == nullptr) {
            const int64_t position = at % TW_SUB, sub = (at - position) * dim;
            store_key((uint16_t*)step.keys[op.layer] + sub, key, dim, position);
            store_value((uint16_t*)step.values[op.layer] + sub, value, dim, position);
        } else {
            int8_t* keys = (int8_t*)step.keys[op.layer];
            int8_t* values = (int8_t*)step.values[op.layer];
            step.key_scales[op.layer][at] = quantize_row(keys + at * dim, key, dim);
            step.value_scales[op.layer][at] = quantize_row(values + at * dim, value, dim);
        }
    }
}

}  // namespace
