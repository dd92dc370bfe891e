// A mixture of experts: who computes which row, and their results added up. The products between are
// matmul.h's, over rows put in order of their experts (TwMixture). Include after numeric.h.
#pragma once
#include "kernels.h"

namespace {

// The top_k largest of a token's logits, of equal ones the first, and their shares of the softmax.
static void route(const TwOp& op, const TwStep& step, int64_t token, int32_t* chosen,
                  float* shares) {
    alignas(64) float logits[TW_MAX_EXPERTS + W], powers[TW_MAX_EXPERTS + W];
    const float* x = (const float*)step.buffers[op.x] + token * op.ldx;
    const int num = op.num_experts;
    for (int i = 0; i < num; i++) logits[i] = x[i];
    for (int i = num; i < num + W; i++) logits[i] = -__builtin_inff();
    float most = logits[0];
    for (int i = 1; i < num; i++) most = logits[i] > most ? logits[i] : most;
    float sum = 0.0f;
    for (int i = 0; i < num; i += W) {
        store(powers + i, exp_f32(sub(load(logits + i), set1(most))));
        for (int j = i; j < num && j < i + W; j++) sum += powers[j];
    }
    float of_chosen = 0.0f;
    for (int rank = 0; rank < op.top_k; rank++) {
        int best = -1;  // NaN is never above: a spoilt row takes the first experts
        for (int i = 0; i < num; i++)
            if (powers[i] >= 0.0f && (best < 0 || logits[i] > logits[best])) best = i;
        if (best < 0) best = rank;
        chosen[rank] = best;
        shares[rank] = powers[best] / sum;
        of_chosen += shares[rank];
        powers[best] = -1.0f;
    }
    if (op.mode == TW_NORMALIZED)
        for (int rank = 0; rank < op.top_k; rank++) shares[rank] /= of_chosen;
}

// In order of rank, whatever else is in the batch.
static void mix(const TwOp& op, const TwStep& step, int64_t token, const int32_t* rows,
                const float* shares) {
    float* out = (float*)step.buffers[op.out] + token * op.ldo;
    for (int rank = 0; rank < op.top_k; rank++) {
        const float* x = (const float*)step.buffers[op.x] + rows[rank] * op.ldx;
        const F share = set1(shares[rank]);
        for (int64_t i = 0; i < op.n; i += W) store(out + i, fma(load(x + i), share, load(out + i)));
    }
}

}  // namespace
