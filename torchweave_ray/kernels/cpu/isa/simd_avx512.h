// 16 float lanes. `F` holds floats, `P` pairs of bf16 (the lower index in the lower half).
// Everything is in an anonymous namespace: files of different instruction sets must share no code.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

typedef __m512 F;
typedef __m512i P;
constexpr int W = 16;            // lanes
// Rows of x against one panel. 8 (16 accumulators) ran at 215-220 GFLOP/s on a Zen 4 core, where
// 12 and 14, which also fit the registers, ran at 185-200.
constexpr int ROWS = 8;
constexpr int QUANTIZED_ROWS = 6;
constexpr int SCORE_ROWS = 4;    // query rows by subs of 16 positions: sums at a time
constexpr int SCORE_SUBS = 4;
constexpr int VALUE_ROWS = 4;    // query rows by vectors of a value
constexpr int VALUE_VECS = 4;

static inline F zero() { return _mm512_setzero_ps(); }
static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
static inline P load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
static inline P set1_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in b comes out: x86 returns the second operand when either is NaN.
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
static inline float hmax(F v) { return _mm512_reduce_max_ps(v); }
static inline float hsum(F v) { return _mm512_reduce_add_ps(v); }

// Lanes i with first <= lane0 + i < end keep v, others take `other`.
static inline F keep(F v, F other, int lane0, int first, int end) {
    const __m512i lanes = _mm512_add_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(lane0));
    const __mmask16 in = _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32(first), _MM_CMPINT_NLT) &
                         _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32(end), _MM_CMPINT_LT);
    return _mm512_mask_mov_ps(other, in, v);
}
// Where x < limit: other, else v (NaN in x keeps v).
static inline F below(F x, F limit, F other, F v) {
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), other);
}
// Lanes where x is NaN take x: NaN sticks in acc.
static inline F stick_nan(F acc, F x) {
    return _mm512_mask_mov_ps(acc, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}
// Bit i: a >= b in lane i.
static inline uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline F round_even(F v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2**n for whole n in [-126, 127].
static inline F exp2_whole(F n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// p * 2**n for whole n in [-160, 0]: 0 where that is smaller than any float.
static inline F times_exp2(F p, F n) { return _mm512_scalef_ps(p, n); }
static inline F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// The upper halves are v in bf16, rounded to nearest even; NaN stays NaN.
static inline P rounded(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
static inline void store_bf16(uint16_t* p, F v) {
#ifdef __AVX512BF16__  // turns denormals to 0, as its products do with them
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    const __m512i high = _mm512_srli_epi32(rounded(v), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(high));
#endif
}
static inline F low_half(P a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
static inline F high_half(P a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xFFFF0000)));
}
// acc + a.low * b.low + a.high * b.high
static inline F dot_pairs(F acc, P a, P b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fma(low_half(a), low_half(b), acc);
    return fma(high_half(a), high_half(b), acc);
#endif
}

// Integers: `P` of pairs of int16, or of one int32 a lane.
static inline P dot_pairs(P acc, P a, P b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
static inline F to_float(F a) { return a; }
static inline F to_float(P a) { return _mm512_cvtepi32_ps(a); }
// Bytes 0 and 2 of each lane, then 1 and 3, as pairs of int16.
static inline P even_bytes(P a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
static inline P odd_bytes(P a) { return _mm512_srai_epi16(a, 8); }
// W int8, each in a lane of its own.
static inline P load_bytes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}
// Pairs of the lower halves of the lanes of a and b.
static inline P zip(P a, P b) {
    return _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
}
// W floats that fit, rounded to the nearest even.
static inline void store_int8(int8_t* p, F v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
static inline void store_int16(int16_t* p, F v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}

static inline void store_pairs(uint16_t* p, P pairs) { _mm512_storeu_si512(p, pairs); }

// `I` holds whole numbers: 32-bit ones, or quads of 8-bit ones.
typedef P I;

static inline I zero_i() { return _mm512_setzero_si512(); }
static inline I set1_i32(const void* p) {
    int32_t value;
    __builtin_memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
}
static inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
static inline I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline I high_nibbles(I a) { return low_nibbles(_mm512_srli_epi32(a, 4)); }
static inline F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
// acc + the sum of a's four unsigned bytes times b's four signed ones, exact.
static inline I dot_quads(I acc, I a, I b) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(acc, a, b);
#else  // in 16 bits each: sums of 8-bit products in pairs do not fit there
    const I even = _mm512_and_si512(a, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(a, 8);
    const I b_even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), b_odd = _mm512_srai_epi16(b, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, b_even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(odd, b_odd));
#endif
}
// The same where a's bytes are at most 15.
static inline I dot_nibbles(I acc, I a, I b) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(acc, a, b);
#else
    const I pairs = _mm512_maddubs_epi16(a, b);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
// The bits of |v|: NaN and infinity are larger than all others as whole numbers, too.
static inline I abs_bits(F v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
}
static inline I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
static inline int32_t hmax_i(I a) { return _mm512_reduce_max_epi32(a); }
// 32 floats within [-128, 127], rounded to nearest even.
static inline __m256i to_codes(const F* v) {
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v[0]));
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v[1]));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// keys[j] + at points to `pairs` (<= 16) pairs of position j -> out[pair][16 positions].
static inline void transpose_pairs(const uint16_t* const* keys, int64_t at, int pairs,
                                   uint16_t* out) {
    const __mmask16 some = (__mmask16)((1u << pairs) - 1u);
    __m512i r[16], t[16];
    for (int j = 0; j < 16; j++) r[j] = _mm512_maskz_loadu_epi32(some, keys[j] + at);
    for (int j = 0; j < 16; j += 2) {
        t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
    }
    for (int j = 0; j < 16; j += 4) {
        r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
        r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
        r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
        r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xDD);
        const __m512i d = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
        const __m512i e = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xDD);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(b, e, 0x88);
        t[c + 8] = _mm512_shuffle_i32x4(a, d, 0xDD);
        t[c + 12] = _mm512_shuffle_i32x4(b, e, 0xDD);
    }
    if (pairs == 16) {  // said apart, or the compiler copies t as a whole
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * 32, t[i]);
    } else {
        for (int i = 0; i < pairs; i++) _mm512_storeu_si512(out + i * 32, t[i]);
    }
}

}  // namespace
