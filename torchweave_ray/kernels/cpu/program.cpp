// Runs a linear program of ops over one step's batch: threads share each op's units of work and
// meet at a barrier behind it. Which thread computes a unit never changes a result.
#include <atomic>
#include <cstdlib>
#include <vector>

#include "kernels.h"

#include "team.h"

namespace {

// Rows of a product's unit: at many rows, so that more threads than panels find work.
constexpr int64_t LINEAR_ROWS = 192;
// A sequence of at most so many rows a KV head has its splits computed side by side.
constexpr int64_t SPLIT_ROWS = 64;
constexpr int64_t TOKEN_GRAIN = 4;

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

struct Run {
    const TwKernels* kernels;
    const TwOp* ops;
    int64_t num_ops;
    const TwStep* step;
    AttentionPlan attention;
    float* partials;
};

template <class Work>
void share(TwTeam& team, int thread, int64_t num_units, int64_t grain, Work work) {
    for (int64_t unit; (unit = team.next(thread, num_units, grain)) >= 0;)
        for (int64_t i = unit; i < unit + grain && i < num_units; i++) work(i);
}

void run_op(const Run& run, const TwOp& op, TwTeam& team, int thread) {
    const TwStep& step = *run.step;
    const TwKernels& kernels = *run.kernels;
    const int64_t rows = op.picked ? step.num_rows : step.num_tokens;
    switch (op.kind) {
        case TW_EMBED:
            share(team, thread, rows, TOKEN_GRAIN, [&](int64_t i) { kernels.embed(op, step, i); });
            break;
        case TW_RMS_NORM:
            share(team, thread, rows, TOKEN_GRAIN, [&](int64_t i) { kernels.rms_norm(op, step, i); });
            break;
        case TW_ROPE_KV:
            share(team, thread, rows, TOKEN_GRAIN, [&](int64_t i) { kernels.rope_kv(op, step, i); });
            break;
        case TW_PICK:
            share(team, thread, rows, TOKEN_GRAIN, [&](int64_t i) { kernels.pick(op, step, i); });
            break;
        case TW_QUANTIZE:
            share(team, thread, rows, TOKEN_GRAIN, [&](int64_t i) { kernels.quantize(op, step, i); });
            break;
        case TW_LINEAR: {
            const int64_t panels = (op.n + TW_PANEL - 1) / TW_PANEL;
            const int64_t chunks = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
            share(team, thread, panels * chunks, 1, [&](int64_t i) {
                const int64_t chunk = i % chunks;  // a panel's chunks follow each other
                kernels.linear(op, step, i / chunks, rows * chunk / chunks,
                               rows * (chunk + 1) / chunks);
            });
            break;
        }
        case TW_ATTEND: {
            const TwUnit* units = run.attention.units.data();
            const int64_t num_units = (int64_t)run.attention.units.size();
            share(team, thread, num_units, 1, [&](int64_t i) {
                const TwUnit* next = i + 1 < num_units ? &units[i + 1] : nullptr;
                kernels.attend(op, step, units[i], next, run.partials);
            });
            break;
        }
        case TW_MERGE:
            share(team, thread, (int64_t)run.attention.merges.size(), TOKEN_GRAIN, [&](int64_t i) {
                kernels.merge(op, step, run.attention.merges[i], run.partials);
            });
            break;
    }
}

void run_all(void* context, TwTeam& team, int thread) {
    const Run& run = *(const Run*)context;
    for (int64_t i = 0; i < run.num_ops; i++) {
        if (run.ops[i].kind == TW_MERGE && run.attention.merges.empty()) continue;
        run_op(run, run.ops[i], team, thread);
        team.barrier();
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

void run_sample(void* context, TwTeam& team, int thread) {
    const SampleRun& run = *(const SampleRun*)context;
    float* scratch = (float*)std::malloc(4 * run.vocab * sizeof(float));
    share(team, thread, run.num_rows, 1, [&](int64_t i) {
        const float* row = run.logits + i * run.stride;
        run.token_ids[i] = run.kernels->sample(row, run.vocab, run.draws[i], scratch);
    });
    std::free(scratch);
}

struct CeilingRun {
    const TwKernels* kernels;
    int32_t what;
    const char* memory;
    int64_t amount;
    std::atomic<int64_t> done;
};

void run_ceiling(void* context, TwTeam& team, int thread) {
    CeilingRun& run = *(CeilingRun*)context;
    const char* memory = run.memory;
    int64_t amount = run.amount;
    if (run.what == TW_READ) {
        const int64_t lines = amount / 64;
        memory += lines * thread / team.size() * 64;
        amount = lines * (thread + 1) / team.size() * 64 - lines * thread / team.size() * 64;
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
    Run run{kernels_of(isa), ops, num_ops, step, {}, nullptr};
    if (run.kernels == nullptr) return -1;
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
    team->run(run_all, &run);
    return 0;
}

int32_t tw_sample(TwTeam* team, int32_t isa, const float* logits, int64_t num_rows, int64_t vocab,
                  int64_t stride, const TwDraw* draws, int64_t* token_ids) {
    SampleRun run{kernels_of(isa), logits, num_rows, vocab, stride, draws, token_ids};
    if (run.kernels == nullptr) return -1;
    team->run(run_sample, &run);
    return 0;
}

int64_t tw_ceiling(TwTeam* team, int32_t isa, int32_t what, const void* memory, int64_t amount) {
    CeilingRun run{kernels_of(isa), what, (const char*)memory, amount, {0}};
    if (run.kernels == nullptr) return -1;
    team->run(run_ceiling, &run);
    return run.done.load();
}
