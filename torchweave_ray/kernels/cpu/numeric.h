// exp and the gated activations on vectors. Include after an isa/simd_*.h.
#pragma once

namespace {

// e**x to about 1 ulp (Cephes' polynomial): exactly 1 at 0, 0 below -87.3, 2.4e38 above 88.3.
// NaN stays NaN.
static inline F exp_f32(F x) {
    const F low = set1(-87.33654f);
    const F clamped = min(set1(88.37f), max(low, x));
    const F n = round_even(mul(clamped, set1(1.44269504088896341f)));
    F r = fma(n, set1(-0.693359375f), clamped);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    return below(x, low, zero(), mul(p, exp2_whole(n)));
}

static inline float exp_f32(float x) {
    alignas(64) float lanes[W];
    store(lanes, exp_f32(set1(x)));
    return lanes[0];
}

// 2**x for x <= 0 to about 1 ulp (Cephes' polynomial): exactly 1 at 0, 0 at -infinity, NaN stays NaN.
static inline F exp2_f32(F x) {
    const F clamped = max(set1(-160.0f), x);
    const F n = round_even(clamped), r = sub(clamped, n);
    F p = set1(1.535336188e-4f);
    p = fma(p, r, set1(1.339887440e-3f));
    p = fma(p, r, set1(9.618437357e-3f));
    p = fma(p, r, set1(5.550332471e-2f));
    p = fma(p, r, set1(2.402264791e-1f));
    p = fma(p, r, set1(6.931472028e-1f));
    return times_exp2(fma(p, r, set1(1.0f)), n);
}

static inline float exp2_f32(float x) {
    alignas(64) float lanes[W];
    store(lanes, exp2_f32(set1(x)));
    return lanes[0];
}

// x * sigmoid(z)
static inline F gated(F x, F z) {
    return div(x, add(set1(1.0f), exp_f32(sub(zero(), z))));
}
static inline F silu(F x) { return gated(x, x); }
// 0.5 x (1 + tanh(u)) = x * sigmoid(2u)
static inline F gelu_tanh(F x) {
    const F cube = mul(mul(x, x), x);
    return gated(x, mul(set1(1.5957691216f), fma(set1(0.044715f), cube, x)));
}
static inline F tanh_f32(F x) {
    const F e = exp_f32(mul(set1(2.0f), x));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace
