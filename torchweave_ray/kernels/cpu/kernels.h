// What every instruction set offers: one table of functions, filled by isa/*.cpp.
// A function computes one unit of work; who computes which unit never changes a result.
#pragma once
#include "api.h"

// A unit of attention: rows [row0, row1) of the query_len * group rows that a sequence has for a
// KV head. row = token * group + query head within the group.
struct TwUnit {
    int32_t seq, kv_head;
    int32_t row0, row1;
    int32_t split;        // -1: walk all splits and finish; else leave this split's partial result
    int64_t partial;      // where the first row's goes
};

// A row to put together from the partial results of its splits.
struct TwMerge {
    int32_t seq, kv_head, row, num_splits;
    int64_t partial, split_stride;  // split i's is at partial + i * split_stride
};

// How the rows of a mixture are shared out among its experts, of one op of a step.
struct TwMixture {
    int32_t* chosen;       // [T, top_k] experts, by rank
    float* shares;         // [T, top_k]
    int32_t* rows;         // [T, top_k]: their spread rows
    int32_t* tokens;       // [T * top_k]: of each spread row
    int32_t* experts;      // [num_active]: those that were chosen, in order
    int32_t* starts;       // [num_active + 1]: their first spread rows
    int32_t num_active;
};

struct TwKernels {
    void (*embed)(const TwOp& op, const TwStep& step, int64_t token);
    void (*rms_norm)(const TwOp& op, const TwStep& step, int64_t row);
    // Columns of one panel, rows [row0, row1).
    void (*linear)(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0, int64_t row1);
    void (*activate)(const TwOp& op, const TwStep& step, int64_t row);
    void (*rope_kv)(const TwOp& op, const TwStep& step, int64_t token);
    // `next`: the unit that this thread likely takes next, or null: its keys are fetched ahead.
    void (*attend)(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                   float* partials);
    void (*merge)(const TwOp& op, const TwStep& step, const TwMerge& row, const float* partials);
    void (*pick)(const TwOp& op, const TwStep& step, int64_t row);
    void (*quantize)(const TwOp& op, const TwStep& step, int64_t row);
    // Of one token: `chosen` and `shares` [top_k].
    void (*route)(const TwOp& op, const TwStep& step, int64_t token, int32_t* chosen,
                  float* shares);
    void (*mix)(const TwOp& op, const TwStep& step, int64_t token, const int32_t* rows,
                const float* shares);
    // `scratch` holds 4 * vocab floats.
    int64_t (*sample)(const float* logits, int64_t vocab, const TwDraw& draw, float* scratch);
    int64_t (*ceiling)(int32_t what, const void* memory, int64_t amount);
};

// Floats of one partial row: the accumulators, then their maximum and sum, padded.
static inline int64_t tw_partial_stride(int64_t head_dim) { return head_dim + 16; }

// Rows of an attention unit, so that its accumulators stay in the first-level cache.
static inline int64_t tw_unit_rows(int64_t head_dim) {
    const int64_t rows = 4096 / head_dim;
    return rows > 64 ? 64 : rows;
}

extern const TwKernels tw_kernels_avx2;
extern const TwKernels tw_kernels_avx512;
extern const TwKernels tw_kernels_avx512vnni;
extern const TwKernels tw_kernels_avx512bf16;
