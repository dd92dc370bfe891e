// What this machine can do at most, to hold kernels against: reading memory and nothing else,
// multiplying registers and nothing else. Include after numeric.h.
#pragma once
#include "kernels.h"

namespace {

// Bytes read, or floating-point or whole-number operations done; `amount` of bytes or of rounds.
static int64_t ceiling(int32_t what, const void* memory, int64_t amount) {
    constexpr int CHAINS = 8;  // hide the latency of additions
    if (what == TW_READ) {
        I sums[CHAINS];
        for (int i = 0; i < CHAINS; i++) sums[i] = zero_i();
        const char* at = (const char*)memory;
        const int64_t step = CHAINS * sizeof(I);
        for (int64_t done = 0; done + step <= amount; done += step, at += step)
            for (int i = 0; i < CHAINS; i++) sums[i] = max_i(sums[i], load_i(at + i * sizeof(I)));
        for (int i = 0; i < CHAINS; i++) asm volatile("" : : "v"(sums[i]));
        return amount / step * step;
    }
    if (what == TW_MULTIPLY_BF16) {
        F sums[CHAINS];
        for (int i = 0; i < CHAINS; i++) sums[i] = zero();
        P a = (P)zero(), b = a;
        for (int64_t round = 0; round < amount; round++) {
            asm volatile("" : "+v"(a), "+v"(b));  // or the loop is left out
            for (int i = 0; i < CHAINS; i++) sums[i] = dot_pairs(sums[i], a, b);
        }
        for (int i = 0; i < CHAINS; i++) asm volatile("" : : "v"(sums[i]));
        return amount * CHAINS * W * 4;
    }
    I sums[CHAINS];
    for (int i = 0; i < CHAINS; i++) sums[i] = zero_i();
    I a = zero_i(), b = a;
    for (int64_t round = 0; round < amount; round++) {
        asm volatile("" : "+v"(a), "+v"(b));
        for (int i = 0; i < CHAINS; i++) sums[i] = dot_quads(sums[i], a, b);
    }
    for (int i = 0; i < CHAINS; i++) asm volatile("" : : "v"(sums[i]));
    return amount * CHAINS * W * 8;
}

}  // namespace
