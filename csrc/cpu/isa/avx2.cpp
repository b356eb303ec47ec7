// The CPU kernels for AVX2, FMA and F16C.
#include "host/compiler.h"

#if ROPE_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cpu/isa/isa.h"

ROPE_BEGIN_AVX2
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"
#define ROPE_ISA_WIDE
#define ROPE_ISA_F16C
#define ROPE_ISA_STREAMS

namespace rope::cpu {
namespace {
#include "cpu/isa/isa_body.h"
}  // namespace

const Isa kAvx2{apply_rotary,         apply_rotary_at,         rotary_table_grad,   cos_sin,
                cos_sin_grad,         cos_sin_grad_sum,        apply_rotary_append, rms_norm_rotary,
                rms_norm_rotary_grad, rms_norm_rotary_grad_sum};

}  // namespace rope::cpu
ROPE_END_AVX2
#endif
