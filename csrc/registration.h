// The operators of each family, listed at the bottom of its file, and their registration.
#pragma once

#include <string>
#include <vector>

#include "boxed.h"

namespace rope {

std::vector<Operator> rotation_operators();            // rotation.cpp
std::vector<Operator> qkv_operators();                 // qkv.cpp
std::vector<Operator> table_grad_operators();          // table_grad.cpp
std::vector<Operator> angles_operators();              // angles.cpp
std::vector<Operator> rotation_by_angles_operators();  // rotation_by_angles.cpp
std::vector<Operator> kv_cache_operators();            // kv_cache.cpp
std::vector<Operator> latent_cache_operators();        // latent_cache.cpp
std::vector<Operator> cached_keys_operators();         // cached_keys.cpp
std::vector<Operator> quantize_operators();            // quantize.cpp
std::vector<Operator> rms_norm_operators();            // rms_norm.cpp

// Of all families.
const std::vector<Operator>& operators();

// Makes them torch.ops.rope.*, or torch.ops.NAME.* for a copy of this library beside another one,
// and returns true; false where this has been done. Throws where another library has taken the
// namespace or a name in it: then nothing is registered.
// for_cuda: also for CUDA tensors, which a build without CUDA refuses.
bool register_operators(const std::string& name, bool for_cuda);

}  // namespace rope
