// Runs a linear program of ops over one step's batch: threads share each op's units of work and
// go on when they are done. Which thread computes a unit never changes a result.
#include <atomic>
#include <vector>

#include "kernels.h"

#include "team.h"

namespace {

// Rows of a product's unit: at many rows, so that more threads than panels find work.
constexpr int64_t LINEAR_ROWS = 192;
// A sequence of at most so many rows a KV head has its splits computed side by side.
constexpr int64_t SPLIT_ROWS = 64;
constexpr int64_t TOKEN_GRAIN = 4;
// Rows of a unit that shrinks: an adapter's rank makes few panels.
constexpr int64_t SHRINK_ROWS = 32;

// Which units attention has, the same for every layer of a program.
struct AttentionPlan {
    std::vector<TwUnit> units;
    std::vector<TwMerge> merges;
    int64_t num_partials = 0;
    int64_t head_dim = 0;
};

AttentionPlan plan_attention(const TwOp& op, const TwStep& step) {
    AttentionPlan plan;
    plan.head_dim = op.head_dim;
    const int64_t group = op.num_heads / op.num_kv_heads, most = tw_unit_rows(op.head_dim);
    for (int32_t seq = 0; seq < step.num_seqs; seq++) {
        const int64_t tokens = step.query_start_loc[seq + 1] - step.query_start_loc[seq];
        const int32_t rows = (int32_t)(tokens * group);
        const int32_t splits = (step.seq_lens[seq] + TW_SPLIT - 1) / TW_SPLIT;
        const bool is_split = splits > 1 && rows <= SPLIT_ROWS;
        for (int32_t kv_head = 0; kv_head < op.num_kv_heads; kv_head++) {
            for (int32_t row = 0; row < rows; row += (int32_t)most) {
                const int32_t end = row + most < rows ? row + (int32_t)most : rows;
                for (int32_t split = 0; split < (is_split ? splits : 1); split++) {
                    const int64_t partial = plan.num_partials + (int64_t)split * rows + row;
                    plan.units.push_back({seq, kv_head, row, end, is_split ? split : -1, partial});
                }
            }
            if (!is_split) continue;
            for (int32_t row = 0; row < rows; row++)
                plan.merges.push_back({seq, kv_head, row, splits, plan.num_partials + row, rows});
            plan.num_partials += (int64_t)splits * rows;
        }
    }
    return plan;
}

// Room for the mixtures of a program, which use it one after the other.
struct MixtureMemory {
    std::vector<int32_t> numbers;
    std::vector<float> shares;

    TwMixture reserve(const TwOp& op, const TwStep& step) {
        const int64_t rows = step.num_tokens * op.top_k;
        numbers.resize(3 * rows + 2 * op.num_experts + 1);
        shares.resize(rows);
        int32_t* at = numbers.data();
        return {at, shares.data(), at + rows, at + 2 * rows, at + 3 * rows,
                at + 3 * rows + op.num_experts, 0};
    }
};

struct Run {
    const TwKernels* kernels;
    const TwOp* ops;
    int64_t num_ops;
    const TwStep* step;
    AttentionPlan attention;
    float* partials;
    mutable TwMixture mixture;
};

// Spread rows in order of their experts, those of one in order of their tokens.
void group(const TwOp& op, const TwStep& step, TwMixture& mixture) {
    const int64_t rows = step.num_tokens * op.top_k;
    std::vector<int32_t> next(op.num_experts);
    for (int64_t i = 0; i < rows; i++) next[mixture.chosen[i]]++;
    mixture.num_active = 0;
    int32_t start = 0;
    for (int32_t expert = 0; expert < op.num_experts; expert++) {
        const int32_t count = next[expert];
        next[expert] = start;
        if (count == 0) continue;
        mixture.experts[mixture.num_active] = expert;
        mixture.starts[mixture.num_active++] = start;
        start += count;
    }
    mixture.starts[mixture.num_active] = start;
    for (int64_t i = 0; i < rows; i++) {
        const int32_t row = next[mixture.chosen[i]]++;
        mixture.rows[i] = row;
        mixture.tokens[row] = (int32_t)(i / op.top_k);
    }
}

int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t rows_of(const TwOp& op, const TwStep& step) {
    return op.picked ? step.num_rows : op.spread ? step.num_tokens * op.top_k : step.num_tokens;
}

int64_t adapter_rows(const TwOp& op) { return op.kind == TW_SHRINK ? SHRINK_ROWS : LINEAR_ROWS; }

// Of one adapter, as if it had all rows and the largest rank.
int64_t adapter_units(const TwOp& op, const TwStep& step) {
    return groups(op.n, TW_PANEL) * groups(step.num_tokens, adapter_rows(op));
}

int64_t num_units(const void* context, int64_t stage) {
    const Run& run = *(const Run*)context;
    const TwOp& op = run.ops[stage];
    const int64_t rows = rows_of(op, *run.step);
    switch (op.kind) {
        case TW_LINEAR:
            return groups(op.n, TW_PANEL) * groups(rows, LINEAR_ROWS);
        case TW_EXPERTS:  // at most so many are chosen; who, is not known yet
            return groups(op.n, TW_PANEL) * (rows < op.num_experts ? rows : op.num_experts);
        case TW_GROUP_ROWS:
            return 1;
        case TW_SHRINK:
        case TW_EXPAND:
            return adapter_units(op, *run.step) * run.step->num_adapters;
        case TW_ATTEND:
            return (int64_t)run.attention.units.size();
        case TW_MERGE:
            return groups((int64_t)run.attention.merges.size(), TOKEN_GRAIN);
        default:
            return groups(rows, TOKEN_GRAIN);
    }
}

template <class Work>
void each_of(int64_t unit, int64_t count, Work work) {
    const int64_t end = (unit + 1) * TOKEN_GRAIN;
    for (int64_t i = unit * TOKEN_GRAIN; i < end && i < count; i++) work(i);
}

// One panel of one chosen expert, over all of its rows.
void run_expert(const Run& run, const TwOp& op, int64_t unit) {
    const int64_t panels = groups(op.n, TW_PANEL), index = unit / panels;
    const TwMixture& mixture = run.mixture;
    if (index >= mixture.num_active) return;
    const int64_t expert = mixture.experts[index], first = mixture.starts[index];
    const int64_t rows = mixture.starts[index + 1] - first, chunks = groups(rows, LINEAR_ROWS);
    TwOp own = op;
    own.weight = (const char*)op.weight + expert * op.weight_stride;
    own.scales = (const char*)op.scales + expert * op.scales_stride;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        run.kernels->linear(own, *run.step, unit % panels, first + rows * chunk / chunks,
                            first + rows * (chunk + 1) / chunks);
}

// One panel of one adapter, over some of its rows.
void run_adapter(const Run& run, const TwOp& op, int64_t unit) {
    const TwStep& step = *run.step;
    const int64_t units = adapter_units(op, step), index = unit / units;
    const int64_t chunks = groups(step.num_tokens, adapter_rows(op));
    const int64_t panel = unit % units / chunks;
    const TwLora& lora = step.adapters[index][op.target];
    const int64_t end = step.adapter_bounds[index + 1];
    const int64_t row0 = step.adapter_bounds[index] + unit % chunks * adapter_rows(op);
    const int64_t row1 = row0 + adapter_rows(op) < end ? row0 + adapter_rows(op) : end;
    if (lora.shrink == nullptr || row0 >= row1) return;
    TwOp own = op;
    own.weight = op.kind == TW_SHRINK ? lora.shrink : lora.expand;
    (op.kind == TW_SHRINK ? own.n : own.k) = lora.rank;
    if (panel < groups(own.n, TW_PANEL)) run.kernels->linear(own, step, panel, row0, row1);
}

// The part of `work` that mixtures have.
void work_mixture(const Run& run, const TwOp& op, int64_t unit, int64_t rows) {
    const TwStep& step = *run.step;
    TwMixture& mixture = run.mixture;
    const int64_t k = op.top_k;
    switch (op.kind) {
        case TW_ROUTE:
            each_of(unit, rows, [&](int64_t i) {
                run.kernels->route(op, step, i, mixture.chosen + i * k, mixture.shares + i * k);
            });
            break;
        case TW_GROUP_ROWS:
            group(op, step, mixture);
            break;
        case TW_SPREAD:
            each_of(unit, rows, [&](int64_t i) {
                __builtin_memcpy((char*)step.buffers[op.out] + i * op.k,
                                 (const char*)step.buffers[op.x] + mixture.tokens[i] * op.k, op.k);
            });
            break;
        case TW_EXPERTS:
            run_expert(run, op, unit);
            break;
        case TW_MIX:
            each_of(unit, rows, [&](int64_t i) {
                run.kernels->mix(op, step, i, mixture.rows + i * k, mixture.shares + i * k);
            });
            break;
    }
}

void work(const void* context, int64_t stage, int64_t unit) {
    const Run& run = *(const Run*)context;
    const TwOp& op = run.ops[stage];
    const TwStep& step = *run.step;
    const TwKernels& kernels = *run.kernels;
    const int64_t rows = rows_of(op, step);
    switch (op.kind) {
        case TW_EMBED:
            each_of(unit, rows, [&](int64_t i) { kernels.embed(op, step, i); });
            break;
        case TW_RMS_NORM:
            each_of(unit, rows, [&](int64_t i) { kernels.rms_norm(op, step, i); });
            break;
        case TW_ROPE_KV:
            each_of(unit, rows, [&](int64_t i) { kernels.rope_kv(op, step, i); });
            break;
        case TW_PICK:
            each_of(unit, rows, [&](int64_t i) { kernels.pick(op, step, i); });
            break;
        case TW_QUANTIZE:
            each_of(unit, rows, [&](int64_t i) { kernels.quantize(op, step, i); });
            break;
        case TW_LINEAR: {
            const int64_t chunks = groups(rows, LINEAR_ROWS);
            const int64_t chunk = unit % chunks;  // a panel's chunks follow each other
            kernels.linear(op, step, unit / chunks, rows * chunk / chunks,
                           rows * (chunk + 1) / chunks);
            break;
        }
        case TW_ACTIVATE:
            each_of(unit, rows, [&](int64_t i) { kernels.activate(op, step, i); });
            break;
        case TW_SHRINK:
        case TW_EXPAND:
            run_adapter(run, op, unit);
            break;
        case TW_ATTEND: {
            const TwUnit* found = &run.attention.units[unit];
            const bool is_last = unit + 1 == (int64_t)run.attention.units.size();
            kernels.attend(op, step, *found, is_last ? nullptr : found + 1, run.partials);
            break;
        }
        case TW_MERGE: {
            const int64_t count = (int64_t)run.attention.merges.size();
            each_of(unit, count, [&](int64_t i) {
                kernels.merge(op, step, run.attention.merges[i], run.partials);
            });
            break;
        }
        default:
            work_mixture(run, op, unit, rows);
    }
}

const TwKernels* kernels_of(int32_t isa) {
#if defined(__x86_64__)
    if (isa == 1) return &tw_kernels_avx2;
    if (isa == 2) return &tw_kernels_avx512;
    if (isa == 3) return &tw_kernels_avx512vnni;
    if (isa == 4) return &tw_kernels_avx512bf16;
#endif
    return nullptr;
}

struct SampleRun {
    const TwKernels* kernels;
    const float* logits;
    int64_t num_rows, vocab, stride;
    const TwDraw* draws;
    int64_t* token_ids;
};

int64_t num_sampled(const void* context, int64_t) { return ((const SampleRun*)context)->num_rows; }

void sample_row(const void* context, int64_t, int64_t row) {
    const SampleRun& run = *(const SampleRun*)context;
    static thread_local std::vector<float> scratch;
    scratch.resize(4 * run.vocab);
    const float* logits = run.logits + row * run.stride;
    run.token_ids[row] = run.kernels->sample(logits, run.vocab, run.draws[row], scratch.data());
}

struct CeilingRun {
    const TwKernels* kernels;
    int32_t what;
    const char* memory;
    int64_t amount;
    int64_t num_threads;
    mutable std::atomic<int64_t> done;
};

int64_t num_ceilings(const void* context, int64_t) {
    return ((const CeilingRun*)context)->num_threads;
}

void reach_ceiling(const void* context, int64_t, int64_t unit) {
    const CeilingRun& run = *(const CeilingRun*)context;
    const char* memory = run.memory;
    int64_t amount = run.amount;
    if (run.what == TW_READ) {
        const int64_t lines = amount / 64, first = lines * unit / run.num_threads;
        memory += first * 64;
        amount = (lines * (unit + 1) / run.num_threads - first) * 64;
    }
    run.done.fetch_add(run.kernels->ceiling(run.what, memory, amount));
}

}  // namespace

int32_t tw_abi(void) { return TW_ABI; }

int32_t tw_best_isa(void) {
#if defined(__x86_64__)
    // These ask the operating system too: registers it does not save do not count.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512vnni")) return 2;
        return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
    }
    // Every CPU with AVX2 has F16C, which this compiler's list of names need not know.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

TwTeam* tw_team_create(int32_t num_threads) {
    return num_threads < 1 ? nullptr : new TwTeam(num_threads);
}

void tw_team_destroy(TwTeam* team) { delete team; }

int32_t tw_run(TwTeam* team, int32_t isa, const TwOp* ops, int64_t num_ops, const TwStep* step) {
    Run run{kernels_of(isa), ops, num_ops, step, {}, nullptr, {}};
    if (run.kernels == nullptr) return -1;
    MixtureMemory mixture;
    for (int64_t i = 0; i < num_ops; i++) {
        if (ops[i].kind != TW_ROUTE) continue;
        if (ops[i].num_experts > TW_MAX_EXPERTS || ops[i].top_k > ops[i].num_experts) return -4;
        run.mixture = mixture.reserve(ops[i], *step);
        break;
    }
    for (int64_t i = 0; i < num_ops; i++) {
        if (ops[i].kind != TW_ATTEND) continue;
        if (ops[i].head_dim > TW_MAX_HEAD_DIM || ops[i].head_dim % 16 != 0) return -2;
        if (step->block_size % TW_SUB != 0) return -3;
        run.attention = plan_attention(ops[i], *step);
        break;
    }
    std::vector<float> partials(run.attention.num_partials *
                                tw_partial_stride(run.attention.head_dim));
    run.partials = partials.data();
    team->run({num_ops, num_units, work, &run});
    return 0;
}

int32_t tw_sample(TwTeam* team, int32_t isa, const float* logits, int64_t num_rows, int64_t vocab,
                  int64_t stride, const TwDraw* draws, int64_t* token_ids) {
    SampleRun run{kernels_of(isa), logits, num_rows, vocab, stride, draws, token_ids};
    if (run.kernels == nullptr) return -1;
    team->run({1, num_sampled, sample_row, &run});
    return 0;
}

int64_t tw_ceiling(TwTeam* team, int32_t isa, int32_t what, const void* memory, int64_t amount) {
    CeilingRun run{kernels_of(isa), what, (const char*)memory, amount, team->size(), {0}};
    if (run.kernels == nullptr) return -1;
    team->run({1, num_ceilings, reach_ceiling, &run});
    return run.done.load();
}
