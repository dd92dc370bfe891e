// Products with packed quantised weights against rows in blocks: whole-number sums within a group
// of 32 inputs, added up in fp32, group by group in order: a row's result has the same bits in
// every batch. Include after matmul.h.
#pragma once
#include "blocks.h"
#include "matmul.h"

namespace {

// Bytes of a panel's codes that are multiplied before the next are loaded: quads of 32 columns.
constexpr int QUAD_BYTES = TW_PANEL * 4;

constexpr int group_bytes(int format) {
    return QUAD_BYTES * TW_GROUP / (format == TW_INT4_GROUP32 ? 8 : 4);
}

// R rows. `ahead`: what the processor fetches meanwhile, `ahead_stride` bytes for each QUAD_BYTES.
template <int FORMAT, int R>
struct QuadTile {
    static void run(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0,
                    const char* ahead, int64_t ahead_stride) {
        const int64_t groups = (op.k + TW_GROUP - 1) / TW_GROUP;
        const uint8_t* codes = (const uint8_t*)op.weight + panel * groups * group_bytes(FORMAT);
        const uint16_t* scales = (const uint16_t*)op.scales +
                                 panel * groups * TW_PANEL * (FORMAT == TW_INT4_GROUP32 ? 2 : 1);
        const char* x = (const char*)step.buffers[op.x] + row0 * op.ldx;
        F sums[R][VECS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) sums[r][v] = zero();
        for (int64_t g = 0; g < groups; g++) {
            I dots[R][VECS];
            for (int r = 0; r < R; r++) {
                const I start = FORMAT == TW_INT4_GROUP32
                                    ? zero_i()
                                    : set1_i32(&((const TwBlock*)(x + r * op.ldx))->offset);
                for (int v = 0; v < VECS; v++) dots[r][v] = start;
            }
            for (int i = 0; i < group_bytes(FORMAT) / QUAD_BYTES; i++) {
                if (R >= FETCH_TILE) {
                    __builtin_prefetch(ahead, 0, 2);
                    __builtin_prefetch(ahead + 64, 0, 2);
                    ahead += ahead_stride;
                    asm("" : "+r"(ahead));  // one addition, not an address for each step
                }
                I loaded[VECS];
                for (int v = 0; v < VECS; v++) loaded[v] = load_i(codes + v * W * 4);
                codes += QUAD_BYTES;
                if constexpr (FORMAT == TW_INT4_GROUP32) {
                    I low[VECS], high[VECS];
                    for (int v = 0; v < VECS; v++) {
                        low[v] = low_nibbles(loaded[v]);
                        high[v] = high_nibbles(loaded[v]);
                    }
                    for (int r = 0; r < R; r++) {
                        const I first = set1_i32(x + r * op.ldx + i * 8);
                        const I second = set1_i32(x + r * op.ldx + i * 8 + 4);
                        for (int v = 0; v < VECS; v++) {
                            dots[r][v] = dot_nibbles(dots[r][v], low[v], first);
                            dots[r][v] = dot_nibbles(dots[r][v], high[v], second);
                        }
                    }
                } else {
                    for (int r = 0; r < R; r++) {
                        const I quad = set1_i32(x + r * op.ldx + i * 4);
                        for (int v = 0; v < VECS; v++)
                            dots[r][v] = dot_quads(dots[r][v], loaded[v], quad);
                    }
                }
            }
            F scale[VECS], least[VECS];
            if constexpr (FORMAT != TW_INT8) {
                for (int v = 0; v < VECS; v++) scale[v] = load_f16(scales + v * W);
                scales += TW_PANEL;
            }
            if constexpr (FORMAT == TW_INT4_GROUP32) {  // times -128 * sum of codes / -128
                for (int v = 0; v < VECS; v++)
                    least[v] = mul(load_f16(scales + v * W), set1(-1.0f / 128));
                scales += TW_PANEL;
            }
            for (int r = 0; r < R; r++) {
                const TwBlock* block = (const TwBlock*)(x + r * op.ldx);
                const F of_row = set1(block->scale);
                for (int v = 0; v < VECS; v++) {
                    F part = to_float(dots[r][v]);
                    if constexpr (FORMAT != TW_INT8) part = mul(part, scale[v]);
                    if constexpr (FORMAT == TW_INT4_GROUP32)
                        part = fma(least[v], to_float(set1_i32(&block->offset)), part);
                    sums[r][v] = fma(of_row, part, sums[r][v]);
                }
            }
            x += sizeof(TwBlock);
        }
        for (int r = 0; r < R; r++) {
            if constexpr (FORMAT == TW_INT8)
                for (int v = 0; v < VECS; v++)
                    sums[r][v] = mul(sums[r][v],
                                     load((const float*)op.scales + panel * TW_PANEL + v * W));
            write_row(op, step.buffers[op.out], row0 + r, panel, sums[r]);
        }
    }
};

template <int R>
using Int8Tile = QuadTile<TW_INT8, R>;
template <int R>
using Int8GroupTile = QuadTile<TW_INT8_GROUP32, R>;
template <int R>
using Int4GroupTile = QuadTile<TW_INT4_GROUP32, R>;

template <template <int> class Tile>
static void linear_quads(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0,
                         int64_t row1, int64_t quads) {
    run_tiles<Tile, QUANTIZED_ROWS, QUANTIZED_FETCH_ROWS>(op, step, panel, row0, row1, quads,
                                                          QUAD_BYTES);
}

// Columns of one panel, rows [row0, row1).
static void linear(const TwOp& op, const TwStep& step, int64_t panel, int64_t row0, int64_t row1) {
    const int64_t groups = (op.k + TW_GROUP - 1) / TW_GROUP;
    switch (op.format) {
        case TW_INT8:
            return linear_quads<Int8Tile>(op, step, panel, row0, row1, groups * 8);
        case TW_INT8_GROUP32:
            return linear_quads<Int8GroupTile>(op, step, panel, row0, row1, groups * 8);
        case TW_INT4_GROUP32:
            return linear_quads<Int4GroupTile>(op, step, panel, row0, row1, groups * 4);
        default:
            return linear_bf16(op, step, panel, row0, row1);
    }
}

}  // namespace
