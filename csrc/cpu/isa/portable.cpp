// The CPU kernels for any processor: SSE2, NEON or whatever the compiler's baseline offers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cpu/isa/isa.h"
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {
#include "cpu/isa/isa_body.h"
}  // namespace

const Isa kPortable{
    apply_rotary,         apply_rotary_at,         rotary_table_grad,   cos_sin,
    cos_sin_grad,         cos_sin_grad_sum,        apply_rotary_append, rms_norm_rotary,
    rms_norm_rotary_grad, rms_norm_rotary_grad_sum};

}  // namespace rope::cpu
