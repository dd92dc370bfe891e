// Rows in 8 bits: blocks of 32 activations with a scale each, and weights out of a packed table.
// Include after numeric.h.
#pragma once
#include "kernels.h"

namespace {

constexpr int GROUP_VECS = TW_GROUP / W;

static inline TwBlock* block_of(void* buffer, int64_t stride, int64_t row) {
    return (TwBlock*)((char*)buffer + row * stride);
}

// NaN and infinity make the scale NaN, and so what this row is multiplied with; no other row.
static inline void quantize_block(const F* values, TwBlock* block) {
    I most = abs_bits(values[0]);
    for (int v = 1; v < GROUP_VECS; v++) most = max_i(most, abs_bits(values[v]));
    const int32_t bits = hmax_i(most);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    block->scale = bits < 0x7F800000 ? largest / 127.0f : __builtin_nanf("");
    const float inverse = 127.0f / largest;  // too large for the smallest values: they become 0
    const F factor = set1(inverse < __builtin_inff() ? inverse : 0.0f);
    F codes[GROUP_VECS];
    for (int v = 0; v < GROUP_VECS; v++) codes[v] = mul(values[v], factor);
    const __m256i packed = to_codes(codes);
    _mm256_storeu_si256((__m256i*)block->codes, packed);
    const __m256i above = _mm256_xor_si256(packed, _mm256_set1_epi8((char)128));  // code + 128
    const __m256i sums = _mm256_sad_epu8(above, _mm256_setzero_si256());
    const __m128i half =
        _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const int32_t sum = _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2);
    block->offset = -128 * (sum - 128 * TW_GROUP);
}

// x bf16 -> blocks; columns behind k, up to whole panels, are 0.
static void quantize(const TwOp& op, const TwStep& step, int64_t row) {
    const uint16_t* x = (const uint16_t*)step.buffers[op.x] + row * op.ldx;
    TwBlock* block = block_of(step.buffers[op.out], op.ldo, row);
    for (int64_t i = 0; i < op.k; i += TW_GROUP, block++) {
        F values[GROUP_VECS];
        for (int v = 0; v < GROUP_VECS; v++) values[v] = load_bf16(x + i + v * W);
        quantize_block(values, block);
    }
}

// One value f16 at `at`.
static inline float f16_to_f32(const uint16_t* at) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*at)));
}

// Weight [row, i] of a packed quantised table.
static inline float weight_at(const TwOp& op, int64_t row, int64_t i) {
    const int64_t groups = (op.k + TW_GROUP - 1) / TW_GROUP, group = i / TW_GROUP;
    const int64_t panel = row / TW_PANEL, column = row % TW_PANEL;
    const uint8_t* codes = (const uint8_t*)op.weight;
    if (op.format == TW_INT4_GROUP32) {
        const int64_t quad = panel * groups * 4 + i / 8;
        const uint8_t pair = codes[(quad * TW_PANEL + column) * 4 + i % 4];
        const uint16_t* scale =
            (const uint16_t*)op.scales + (panel * groups + group) * 2 * TW_PANEL + column;
        const float code = (float)(i % 8 < 4 ? pair & 15 : pair >> 4);
        return code * f16_to_f32(scale) + f16_to_f32(scale + TW_PANEL);
    }
    const int64_t quad = panel * groups * 8 + i / 4;
    const float code = (float)(codes[(quad * TW_PANEL + column) * 4 + i % 4] - 128);
    if (op.format == TW_INT8) return code * ((const float*)op.scales)[row];
    return code *
           f16_to_f32((const uint16_t*)op.scales + (panel * groups + group) * TW_PANEL + column);
}

}  // namespace
