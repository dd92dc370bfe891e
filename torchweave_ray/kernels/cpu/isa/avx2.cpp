// The kernels compiled for one instruction set; setup.py gives the flags by this file's name.
#include "simd_avx2.h"

#include "numeric.h"

#include "attention.h"
#include "ceiling.h"
#include "elementwise.h"
#include "experts.h"
#include "matmul.h"
#include "quantized.h"
#include "sampler.h"

extern const TwKernels tw_kernels_avx2 = {
    embed, rms_norm, linear, activate, rope_kv, attend, merge, pick, quantize, route, mix,
    sample, ceiling,
};
