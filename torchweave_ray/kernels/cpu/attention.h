// Paged attention of a few query rows against one KV head's blocks. Context is walked in splits of
// 256 positions at fixed absolute places, each with a softmax of its own; splits merge in order. So
// a row's bits depend on its own context only. In a bf16 cache 16 positions of a head, a sub, lie as
// the products read them: keys as [pair of dims][16][2], values as [pair of positions][head_dim][2].
#pragma once
#include "attention_int8.h"
#include "attention_tile.h"

namespace {

// acc[R rows][B vectors from `at`] += sum over `num` positions of share * value. What lies behind
// an odd number may be a reused block's NaN: it must not count, not even times a share of 0.
// `ahead`: subs to fetch meanwhile, line by line, or null.
template <int R, int B>
static inline void add_values(float* acc, int64_t dim, int64_t at, int num,
                              const uint16_t* const* values, const uint16_t* const* ahead,
                              const uint16_t* shares) {
    F sum[R][B];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) sum[r][v] = load(acc + r * dim + at + v * W);
    const auto add_pair = [&](int j, bool is_half) __attribute__((always_inline)) {
        const int64_t offset = j % SUB * dim + at * 2;
        P value[B];
        for (int v = 0; v < B; v++) {
            if (ahead != nullptr) __builtin_prefetch(ahead[j / SUB] + offset + v * W * 2, 0, 2);
            value[v] = load_pairs(values[j / SUB] + offset + v * W * 2);
            if (is_half) value[v] = zip(value[v], P{});
        }
        for (int r = 0; r < R; r++) {
            const P share = set1_pair(shares + r * TW_SPLIT + j);
            for (int v = 0; v < B; v++) sum[r][v] = dot_pairs(sum[r][v], value[v], share);
        }
    };
    for (int j = 0; j + 2 <= num; j += 2) add_pair(j, false);
    if (num % 2 != 0) add_pair(num - 1, true);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++) store(acc + r * dim + at + v * W, sum[r][v]);
}

static void score_split(const TwOp& op, const TwStep& step, const Rows& rows,
                        Split<uint16_t>& split) {
    const int64_t dim = op.head_dim;
    const uint16_t* keys = (const uint16_t*)step.keys[op.layer];
    const uint16_t* values = (const uint16_t*)step.values[op.layer];
    for (int j = split.from; j < split.to; j += TW_TILE) {
        const uint16_t *tile[TILE_SUBS], *ahead[TILE_SUBS];
        int subs = 0;
        for (; subs < TILE_SUBS && j + subs * SUB < split.to; subs++) {
            const int64_t at = split.slots[j / SUB + subs] * dim;
            tile[subs] = keys + at, ahead[subs] = values + at;
        }
        score_tile<F>(rows, subs, dim / 2, tile, ahead, split.scores + j);
    }
}

static void add_split(const TwOp& op, const TwStep& step, const Rows& rows, Split<uint16_t>& split,
                      const Ahead& next, State& s) {
    const int64_t dim = op.head_dim;
    const uint16_t* keys = (const uint16_t*)step.keys[op.layer];
    const uint16_t* values = (const uint16_t*)step.values[op.layer];
    int fetched = 0;
    for (int j = split.from; j < split.to; j += TW_TILE) {
        const uint16_t *tile[TILE_SUBS], *ahead[TILE_SUBS];
        for (int b = 0; b < TILE_SUBS && j + b * SUB < split.to; b++) {
            tile[b] = values + split.slots[j / SUB + b] * dim;
            ahead[b] = fetched < next.num ? keys + next.slots[fetched++] * dim : tile[b];
        }
        const int num = split.to - j < TW_TILE ? split.to - j : TW_TILE;
        in_parts<VALUE_ROWS>(rows.n, [&](auto r, int row) {
            in_parts<VALUE_VECS>((int)(dim / W), [&](auto b, int vec) {
                add_values<decltype(r)::value, decltype(b)::value>(
                    s.acc + row * dim, dim, vec * W, num, tile, row == 0 ? ahead : nullptr,
                    split.shares + row * TW_SPLIT + j);
            });
        });
    }
    while (fetched < next.num) fetch(keys + next.slots[fetched++] * dim, dim);
}

// Rows over split `at`; `next` is what this thread likely walks then, or null.
template <class T>
static void attend_split(const TwOp& op, const TwStep& step, const Rows& rows, const Place& at,
                         const Place* next, State& s) {
    const int64_t start = at.split * TW_SPLIT;
    Split<T> split;
    Ahead ahead;
    clear(s, rows.n, op.head_dim);
    split.from = within(rows.first[0] - start) / TW_TILE * TW_TILE;
    split.to = within(rows.end[rows.n - 1] - start);
    if (split.from >= split.to) return;
    find_slots(op, step, at, split.from, split.to, split.slots);
    score_split(op, step, rows, split);
    for (int r = 0; r < rows.n; r++) soften(op, step, rows, r, start, split, s);
    find_ahead(op, step, next, ahead);
    add_split(op, step, rows, split, ahead, s);
}

static void find_rows(const TwOp& op, const TwStep& step, int32_t seq, int32_t row0, int32_t row1,
                      int32_t kv_head, Rows& rows) {
    const int64_t group = op.num_heads / op.num_kv_heads, dim = op.head_dim;
    const int64_t base = step.query_start_loc[seq];
    const int64_t past = step.seq_lens[seq] - (step.query_start_loc[seq + 1] - base);
    rows.n = row1 - row0;
    for (int r = 0; r < rows.n; r++) {
        const int64_t token = (row0 + r) / group, head = kv_head * group + (row0 + r) % group;
        rows.queries[r] =
            (const uint16_t*)step.buffers[op.x] + (base + token) * op.ldx + head * dim;
        rows.scale[r] = op.scale;
        rows.out[r] = (uint16_t*)step.buffers[op.out] + (base + token) * op.ldo + head * dim;
        rows.end[r] = past + token + 1;
        const int64_t first = op.window == 0 ? 0 : rows.end[r] - op.window;
        rows.first[r] = first > 0 ? first : 0;
    }
}

template <class T>
static void attend_over(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                        float* partials) {
    Rows rows;
    find_rows(op, step, unit.seq, unit.row0, unit.row1, unit.kv_head, rows);
    const int64_t dim = op.head_dim, stride = tw_partial_stride(dim);
    alignas(64) int16_t codes[IS_CODES<T> ? MAX_ACC : 1];
    if constexpr (IS_CODES<T>) quantize_rows(rows, dim, codes);
    Place after{0, 0, 0};
    if (next != nullptr) after = {next->seq, next->kv_head, next->split > 0 ? next->split : 0};
    const Place* last = next == nullptr ? nullptr : &after;
    State part;
    if (unit.split >= 0) {
        attend_split<T>(op, step, rows, {unit.seq, unit.kv_head, unit.split}, last, part);
        for (int r = 0; r < rows.n; r++) {
            float* out = partials + (unit.partial + r) * stride;
            __builtin_memcpy(out, part.acc + r * dim, dim * sizeof(float));
            out[dim] = part.max[r], out[dim + 1] = part.sum[r];
        }
        return;
    }
    State total;
    clear(total, rows.n, dim);
    const int64_t splits = (rows.end[rows.n - 1] + TW_SPLIT - 1) / TW_SPLIT;
    for (int64_t split = rows.first[0] / TW_SPLIT; split < splits; split++) {
        const Place at{unit.seq, unit.kv_head, split}, then{unit.seq, unit.kv_head, split + 1};
        attend_split<T>(op, step, rows, at, split + 1 < splits ? &then : last, part);
        for (int r = 0; r < rows.n; r++)
            merge_row(total, r, dim, part.acc + r * dim, part.max[r], part.sum[r]);
    }
    for (int r = 0; r < rows.n; r++)
        finish_row(total.acc + r * dim, total.sum[r], dim, rows.out[r]);
}

static void attend(const TwOp& op, const TwStep& step, const TwUnit& unit, const TwUnit* next,
                   float* partials) {
    if (step.key_scales == nullptr)
        attend_over<uint16_t>(op, step, unit, next, partials);
    else
        attend_over<int8_t>(op, step, unit, next, partials);
}

// One row of a sequence whose splits were units of their own.
static void merge(const TwOp& op, const TwStep& step, const TwMerge& row, const float* partials) {
    const int64_t dim = op.head_dim, stride = tw_partial_stride(dim);
    Rows rows;
    State total;
    find_rows(op, step, row.seq, row.row, row.row + 1, row.kv_head, rows);
    clear(total, 1, dim);
    for (int64_t split = 0; split < row.num_splits; split++) {
        const float* part = partials + (row.partial + split * row.split_stride) * stride;
        const float* ends = part + dim;
        merge_row(total, 0, dim, part, ends[0], ends[1]);
    }
    finish_row(total.acc, total.sum[0], dim, rows.out[0]);
}

}  // namespace
