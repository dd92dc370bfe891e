"""The structs of cpu/api.h for ctypes, field by field. Knows nothing of what the fields do."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from types import MappingProxyType

from torchweave_ray.kernels.quantization import Format

ABI = 5
PANEL = 32
BLOCK_BYTES = 40
"""Of 32 quantised activations: their codes, scale and offset."""
MAX_BUFFERS = 24
MAX_ROPES = 4
MAX_HEAD_DIM = 256
MAX_EXPERTS = 1024

EMBED, RMS_NORM, LINEAR, ROPE_KV, ATTEND, MERGE, PICK, QUANTIZE = range(8)
ROUTE, GROUP_ROWS, SPREAD, EXPERTS, MIX, ACTIVATE, SHRINK, EXPAND = range(8, 16)
STORE_F32, ADD_F32, STORE_BF16, SILU, GELU = range(5)
ROW_MAJOR, PACKED = range(2)
NORM_BF16, NORM_BLOCKS, NORM_ADD = range(3)
SHARES, NORMALIZED = range(2)
READ, MULTIPLY_BF16, MULTIPLY_INT8 = range(3)
FORMATS: Mapping[Format, int] = MappingProxyType(
    {"bf16": 0, "int8": 1, "int8-group32": 2, "int4-group32": 3}
)


class Op(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("mode", c_int32),
        ("picked", c_int32),
        ("x", c_int32),
        ("out", c_int32),
        ("layer", c_int32),
        ("rope", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("format", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("target", c_int32),
        ("rotary_dim", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("spread", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("ldx", c_int64),
        ("ldo", c_int64),
        ("weight", c_void_p),
        ("extra", c_void_p),
        ("scales", c_void_p),
        ("weight_stride", c_int64),
        ("scales_stride", c_int64),
    )


class Lora(ctypes.Structure):
    _fields_ = (("shrink", c_void_p), ("expand", c_void_p), ("rank", c_int64))


class Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("num_rows", c_int64),
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("block_table_stride", c_int64),
        ("kv_groups", c_void_p),
        ("logit_rows", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("block_size", c_int64),
        ("buffers", c_void_p * MAX_BUFFERS),
        ("ropes", c_void_p * MAX_ROPES),
        ("num_adapters", c_int64),
        ("adapter_bounds", c_void_p),
        ("adapters", c_void_p),
    )


class Draw(ctypes.Structure):
    _fields_ = (
        ("top_p", c_double),
        ("seed", c_uint64),
        ("index", c_uint64),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("min_p", c_float),
    )
