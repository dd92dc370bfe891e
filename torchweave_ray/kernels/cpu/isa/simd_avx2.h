// 8 float lanes, with the same names and meaning as simd_avx512.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

typedef __m256 F;
typedef __m256i P;
constexpr int W = 8;
constexpr int ROWS = 2;          // 8 accumulators of 16 registers
constexpr int QUANTIZED_ROWS = 2;
constexpr int SCORE_ROWS = 2;
constexpr int SCORE_SUBS = 2;
constexpr int VALUE_ROWS = 2;
constexpr int VALUE_VECS = 4;

static inline F zero() { return _mm256_setzero_ps(); }
static inline F set1(float x) { return _mm256_set1_ps(x); }
static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
static inline P load_pairs(const uint16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline P set1_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
}
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in b comes out.
static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
static inline float hmax(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
    return _mm_cvtss_f32(m);
}
static inline float hsum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
    return _mm_cvtss_f32(s);
}
static inline F keep(F v, F other, int lane0, int first, int end) {
    const __m256i lanes =
        _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(lane0));
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes));
    return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(in));
}
static inline F below(F x, F limit, F other, F v) {
    return _mm256_blendv_ps(v, other, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}
static inline F stick_nan(F acc, F x) {
    return _mm256_blendv_ps(acc, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
static inline uint32_t at_least(F a, F b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
static inline F round_even(F v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline F exp2_whole(F n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F times_exp2(F p, F n) {
    return below(n, set1(-126.0f), zero(), mul(p, exp2_whole(n)));
}
static inline F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline P rounded(F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan));
}
static inline void store_bf16(uint16_t* p, F v) {
    const __m256i high = _mm256_srli_epi32(rounded(v), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline F low_half(P a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
static inline F high_half(P a) {
    return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xFFFF0000)));
}
static inline F dot_pairs(F acc, P a, P b) {
    acc = fma(low_half(a), low_half(b), acc);
    return fma(high_half(a), high_half(b), acc);
}

static inline P dot_pairs(P acc, P a, P b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
static inline F to_float(F a) { return a; }
static inline F to_float(P a) { return _mm256_cvtepi32_ps(a); }
static inline P even_bytes(P a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
static inline P odd_bytes(P a) { return _mm256_srai_epi16(a, 8); }
static inline P load_bytes(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
static inline P zip(P a, P b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA); }
static inline __m128i to_int16(F v) {
    const __m256i whole = _mm256_cvtps_epi32(v);
    return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}
static inline void store_int16(int16_t* p, F v) { _mm_storeu_si128((__m128i*)p, to_int16(v)); }
static inline void store_int8(int8_t* p, F v) {
    const __m128i words = to_int16(v);
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

static inline void store_pairs(uint16_t* p, P pairs) { _mm256_storeu_si256((__m256i*)p, pairs); }

typedef P I;

static inline I zero_i() { return _mm256_setzero_si256(); }
static inline I set1_i32(const void* p) {
    int32_t value;
    __builtin_memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
}
static inline I load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline I low_nibbles(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline I high_nibbles(I a) { return low_nibbles(_mm256_srli_epi32(a, 4)); }
static inline F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
static inline I dot_quads(I acc, I a, I b) {
    const I even = _mm256_and_si256(a, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(a, 8);
    const I b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, b_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, b_odd));
}
static inline I dot_nibbles(I acc, I a, I b) {
    const I pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline I abs_bits(F v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
}
static inline I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
static inline int32_t hmax_i(I a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
static inline __m256i to_codes(const F* v) {
    const I low = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    const I high = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
    const I mixed = _mm256_packs_epi16(low, high);  // within halves of a register
    return _mm256_permutevar8x32_epi32(mixed, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}

// keys[j] + at points to `pairs` (<= 16) pairs of position j -> out[pair][16 positions].
static inline void transpose_pairs(const uint16_t* const* keys, int64_t at, int pairs,
                                   uint16_t* out) {
    for (int i = 0; i < pairs; i++)
        for (int j = 0; j < 16; j++) __builtin_memcpy(out + i * 32 + j * 2, keys[j] + at + i * 2, 4);
}

}  // namespace
