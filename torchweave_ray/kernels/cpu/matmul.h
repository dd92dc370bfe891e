// Products with packed weights: [N / 32][K / 2][32][2] bf16, fp32 sums.
// One accumulator per output runs over all of K in order, whatever the number of rows: so a row's
// result has the same bits in every batch. Include after numeric.h.
#pragma once
#include "kernels.h"

namespace {

constexpr int VECS = TW_PANEL / W;  // vectors of one row of a panel
// From so many rows on the next panel is fetched by instructions; below, arithmetic hides nothing
// and the processor's own prefetcher does better: at 4 rows of one Zen 4 core 111 against 82 GFLOP/s
// in bf16, 223 against 158 in int8.
constexpr int FETCH_ROWS = 6;
constexpr int QUANTIZED_FETCH_ROWS = 5;
constexpr int FETCH_TILE = 3;  // tiles of fewer rows are never part of so many

static inline F bias_at(const TwOp& op, int64_t column) {
    return op.extra == nullptr ? zero() : load((const float*)op.extra + column);
}

// Write one row of a panel: acc holds VECS vectors of columns [32 * panel, 32 * panel + 32).
static inline void write_row(const TwOp& op, void* out, int64_t row, int64_t panel, F* acc) {
    const int64_t column = panel * TW_PANEL;
    for (int v = 0; v < VECS; v++) acc[v] = add(acc[v], bias_at(op, column + v * W));
    switch (op.mode) {
        case TW_STORE_F32: {
            float* at = (float*)out + row * op.ldo + column;
            for (int v = 0; v < VECS; v++) store(at + v * W, acc[v]);
            break;
        }
        case TW_ADD_F32: {
            float* at = (float*)out + row * op.ldo + column;
            for (int v = 0; v < VECS; v++) store(at + v * W, add(load(at + v * W), acc[v]));
            break;
        }
        case TW_STORE_BF16: {
            uint16_t* at = (uint16_t*)out + row * op.ldo + column;
            for (int v = 0; v < VECS; v++) store_bf16(at + v * W, acc[v]);
            break;
        }
        default: {  // 16 gate columns, then their 16 up columns
            uint16_t* at = (uint16_t*)out + row * op.ldo + column / 2;
            for (int v = 0; v < VECS / 2; v++) {
                const F gate = acc[v];
                const F activated = op.mode == TW_SILU ? silu(gate) : gelu_tanh(gate);
                store_bf16(at + v * W, mul(activated, acc[v + VECS / 2]));
            }
        }
    }
}

// What a gated product leaves to its activation where something was added in between.
static void activate(const TwOp& op, const TwStep& step, int64_t row) {
    const float* x = (const float*)step.buffers[op.x] + row * op.ldx;
    for (int64_t panel = 0; panel < op.n / TW_PANEL; panel++) {
        F acc[VECS];
        for (int v = 0; v < VECS; v++) acc[v] = load(x + panel * TW_PANEL + v * W);
        write_row(op, step.buffers[op.out], row, panel, acc);
    }
}

// R rows. `ahead`: what the processor fetches meanwhile, `ahead_stride` bytes for each pair.
template <int R>
struct PairTile {
    static void run(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0,
                    const char* ahead, int64_t ahead_stride) {
        const int64_t pairs = (op.k + 1) / 2;
        const uint16_t* w = (const uint16_t*)op.weight + panel * pairs * TW_PANEL * 2;
        const uint16_t* x = (const uint16_t*)step.buffers[op.x] + row0 * op.ldx;
        F acc[R][VECS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) acc[r][v] = zero();
        for (int64_t i = 0; i < pairs; i++) {
            if (R >= FETCH_TILE) {
                __builtin_prefetch(ahead, 0, 2);
                __builtin_prefetch(ahead + 64, 0, 2);
                ahead += ahead_stride;
            }
            P weights[VECS];
            for (int v = 0; v < VECS; v++)
                weights[v] = load_pairs(w + i * TW_PANEL * 2 + v * W * 2);
            for (int r = 0; r < R; r++) {
                const P value = set1_pair(x + r * op.ldx + i * 2);
                for (int v = 0; v < VECS; v++) acc[r][v] = dot_pairs(acc[r][v], weights[v], value);
            }
        }
        for (int r = 0; r < R; r++) write_row(op, step.buffers[op.out], row0 + r, panel, acc[r]);
    }
};

typedef void (*TileRun)(const TwOp&, const TwStep&, int64_t, int64_t, const char*, int64_t);

template <template <int> class Tile, int R>
static void fill_table(TileRun* table) {
    if constexpr (R > 0) {
        fill_table<Tile, R - 1>(table);
        table[R] = Tile<R>::run;
    }
}

// Blocks of rows share out among them the fetching of the next panel into the second-level cache:
// then memory and arithmetic overlap. `pieces` of `piece_bytes` make a panel of the weight.
template <template <int> class Tile, int MOST, int FETCH>
static void run_tiles(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0, int64_t row1,
                      int64_t pieces, int64_t piece_bytes) {
    TileRun table[MOST + 1];
    fill_table<Tile, MOST>(table);
    const int64_t rows = row1 - row0;
    if (rows <= 0) return;
    const int64_t blocks = (rows + MOST - 1) / MOST;  // of nearly equal height
    const bool fetch = rows >= FETCH;
    const char* next = (const char*)op.weight + (panel + 1) * pieces * piece_bytes;
    const char* here = (const char*)op.weight + panel * pieces * piece_bytes;  // costs next to nothing
    // Rounded up: a line that is missed stalls the next panel, at 3 blocks for a fifth of its time.
    const int64_t stride = fetch ? (piece_bytes + blocks - 1) / blocks : 0;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = row0 + rows * b / blocks, end = row0 + rows * (b + 1) / blocks;
        const char* ahead = fetch ? next + b * pieces * piece_bytes / blocks : here;
        table[end - first](op, step, panel, first, ahead, stride);
    }
}

static void linear_bf16(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0,
                        int64_t row1) {
    run_tiles<PairTile, ROWS, FETCH_ROWS>(op, step, panel, row0, row1, (op.k + 1) / 2, TW_PANEL * 4);
}

}  // namespace
