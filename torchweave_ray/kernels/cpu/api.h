// The C interface that Python calls through ctypes, and the structs both sides lay out alike.
// kernels/structs.py mirrors them; TW_ABI guards the pair. Knows no torch and no Python.
#pragma once
#include <stdint.h>

#define TW_ABI 5
#define TW_PANEL 32          // output columns of one packed panel
#define TW_GROUP 32          // inputs that share a scale
#define TW_SPLIT 256         // positions of an attention split: fixed and absolute
#define TW_TILE 64           // positions of an attention tile: fixed and absolute
#define TW_SUB 16            // positions that lie together in the cache: blocks are whole subs
#define TW_MAX_BUFFERS 24
#define TW_MAX_ROPES 4
#define TW_MAX_HEAD_DIM 256
#define TW_MAX_EXPERTS 1024

#ifdef __cplusplus
extern "C" {
#endif

enum TwOpKind {
    TW_EMBED = 0,     // out f32 = table[id] * scale
    TW_RMS_NORM = 1,  // x f32 -> out, by mode
    TW_LINEAR = 2,    // x bf16, or blocks where the weight is quantised -> out, by mode
    TW_ROPE_KV = 3,   // x f32 (qkv) -> out bf16 (queries), keys and values into the cache
    TW_ATTEND = 4,    // x bf16 (queries) -> out bf16
    TW_MERGE = 5,     // out bf16 from the partial results of sequences that were split
    TW_PICK = 6,      // out f32 [R] = x f32 [logit_rows]
    TW_QUANTIZE = 7,  // x bf16 -> out blocks
    // A mixture of experts, see experts.h. Spread rows: T * top_k, those of an expert together.
    TW_ROUTE = 8,     // x f32 [T, num_experts] (logits): who computes each row, and their shares
    TW_GROUP_ROWS = 9,     // the order of spread rows
    TW_SPREAD = 10,   // out = spread rows of x, k bytes each
    TW_EXPERTS = 11,  // LINEAR over spread rows, each with its expert's weights
    TW_MIX = 12,      // out f32 += shares of x f32 (spread rows)
    // A step with LoRA adapters: products of each group of rows with its adapter's weights.
    TW_ACTIVATE = 13,  // x f32 (a gated product's panels) -> out bf16, by mode
    TW_SHRINK = 14,    // x bf16 -> out bf16 [T, rank]
    TW_EXPAND = 15,    // x bf16 [T, rank] -> out f32 +=
};

enum TwLinearMode {
    TW_STORE_F32 = 0,
    TW_ADD_F32 = 1,   // residual add
    TW_STORE_BF16 = 2,
    TW_SILU = 3,      // panels of 16 gate and 16 up columns -> 16 columns bf16
    TW_GELU = 4,      // the same, tanh approximation
};

enum TwEmbedMode { TW_ROW_MAJOR = 0, TW_PACKED = 1 };
enum TwNormMode {
    TW_NORM_BF16 = 0,
    TW_NORM_BLOCKS = 1,
    TW_NORM_ADD = 2,  // out f32 +=
};
enum TwRouteMode {
    TW_SHARES = 0,      // the softmax over all experts
    TW_NORMALIZED = 1,  // adding up to 1 over the chosen ones
};

// Of a weight [n, k]; packing.py says how each lies in panels.
enum TwFormat {
    TW_BF16 = 0,
    TW_INT8 = 1,          // (u8 code - 128) * scale: f32 a column
    TW_INT8_GROUP32 = 2,  // (u8 code - 128) * scale: f16 a column and group
    TW_INT4_GROUP32 = 3,  // 4-bit code * scale + minimum: f16 a column and group
};

// A row of quantised activations is ceil(k / 32) of these. A weight's group against one is
// scale * (codes . (weights + 128) + offset).
struct TwBlock {
    int8_t codes[TW_GROUP];
    float scale;
    int32_t offset;  // -128 * sum of the codes
};

// Fields that an op does not name are unused. Strides (ld*) are elements.
struct TwOp {
    int32_t kind;
    int32_t mode;
    int32_t picked;      // 1: runs over the R picked rows, 0: over all T tokens
    int32_t x, out;      // buffer slots
    int32_t layer;
    int32_t rope;        // slot of the table; -1: none
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window;      // positions a query sees, itself included; 0: all
    int32_t format;      // of the weight: LINEAR, EMBED
    float eps;           // RMS_NORM, ROPE_KV
    float scale;         // EMBED, ATTEND
    float soft_cap;      // 0: none
    int32_t target;      // SHRINK, EXPAND: index into an adapter's weights
    int32_t rotary_dim;  // ROPE_KV: the first dimensions of a head, that turn
    int32_t num_experts, top_k;
    int32_t spread;      // 1: runs over spread rows
    int64_t n, k;        // LINEAR: out and in features; RMS_NORM, EMBED, PICK: columns
    int64_t ldx, ldo;    // of blocks: bytes
    const void* weight;  // packed; RMS_NORM: f32; row-major EMBED: bf16; ROPE_KV: f32 q norm or null
    const void* extra;   // LINEAR: f32 bias or null; ROPE_KV: f32 k norm or null
    const void* scales;  // of a quantised weight
    int64_t weight_stride, scales_stride;  // EXPERTS: bytes from one expert's to the next one's
};

// What one adapter adds to one product: x @ shrink @ expand, both packed bf16. Null: nothing.
struct TwLora {
    const void* shrink;  // [rank, k]
    const void* expand;  // [n, rank]
    int64_t rank;
};

// One step's batch: T tokens of S sequences, R rows picked. See attention/base.py's StepInputs.
struct TwStep {
    int64_t num_tokens, num_seqs, num_rows;
    const int64_t* input_ids;        // [T]
    const int64_t* positions;        // [T]
    const int64_t* slot_mapping;     // [KV groups, T]
    const int32_t* query_start_loc;  // [S + 1]
    const int32_t* seq_lens;         // [S]
    const int32_t* block_tables;     // [KV groups, S, block_table_stride]
    int64_t block_table_stride;
    const int32_t* kv_groups;        // [layers]: whose slots and tables a layer has
    const int64_t* logit_rows;       // [R]
    // [layers]: int8 [blocks, num_kv_heads, block_size, head_dim], or bf16 as attention.h says
    void* const* keys;
    void* const* values;
    float* const* key_scales;        // null: bf16; else of int8: [blocks, num_kv_heads, block_size]
    float* const* value_scales;
    int64_t block_size;
    void* buffers[TW_MAX_BUFFERS];
    const float* ropes[TW_MAX_ROPES];  // [positions, rotary_dim]: cos then sin of each half
    int64_t num_adapters;
    const int64_t* adapter_bounds;         // [num_adapters + 1]: adapter i has rows [i] .. [i + 1]
    const struct TwLora* const* adapters;  // [num_adapters][targets]
};

// One row of a draw; see runner/sampler.py for what each field means.
struct TwDraw {
    double top_p;
    uint64_t seed;
    uint64_t index;
    int64_t top_k;
    float temperature;   // 0: greedy
    float min_p;
};

enum TwCeiling {
    TW_READ = 0,           // memory: amount is bytes
    TW_MULTIPLY_BF16 = 1,  // registers: amount is rounds of a few multiply-adds
    TW_MULTIPLY_INT8 = 2,
};

struct TwTeam;

#define TW_EXPORT __attribute__((visibility("default")))

TW_EXPORT int32_t tw_abi(void);
// Best instruction set of this machine that has kernels: 0 none, 1 avx2, 2 avx512, 3 avx512vnni,
// 4 avx512bf16.
TW_EXPORT int32_t tw_best_isa(void);
TW_EXPORT struct TwTeam* tw_team_create(int32_t num_threads);
TW_EXPORT void tw_team_destroy(struct TwTeam* team);
// Run ops over a step. 0, or a negative number for arguments that no kernel takes.
TW_EXPORT int32_t tw_run(struct TwTeam* team, int32_t isa, const struct TwOp* ops, int64_t num_ops,
                         const struct TwStep* step);
// Token ids of logits [num_rows, vocab]; -1 where a row has no draw.
TW_EXPORT int32_t tw_sample(struct TwTeam* team, int32_t isa, const float* logits, int64_t num_rows,
                            int64_t vocab, int64_t stride, const struct TwDraw* draws,
                            int64_t* token_ids);
// Do only one of TwCeiling on all threads: bytes that were read, or operations that were done, or a
// negative number. Threads share out the memory; each does all rounds.
TW_EXPORT int64_t tw_ceiling(struct TwTeam* team, int32_t isa, int32_t what, const void* memory,
                             int64_t amount);

#ifdef __cplusplus
}
#endif
