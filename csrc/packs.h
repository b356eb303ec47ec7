// Parameters that several operators share, as structs: each with its part of a schema, which
// schema.cpp inserts where its name stands in braces.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "call.h"
#include "tensor.h"

namespace rope {

// {rows}
struct Rows {
  using Parameters = std::tuple<Tensor, Tensor, OptionalTensor>;
  static std::string schema() { return "Tensor cos, Tensor sin, Tensor? position_ids=None"; }

  Tensor cos, sin;
  OptionalTensor position_ids;
};

// {angles}
struct AngleSource {
  using Parameters = std::tuple<Tensor, OptionalTensor, OptionalTensor>;
  static std::string schema() {
    return "Tensor inv_freq, Tensor? position_ids=None, Tensor? axes=None";
  }

  Tensor inv_freq;
  OptionalTensor position_ids, axes;
};

// {table}
struct TableOptions {
  using Parameters = std::tuple<double, std::optional<ScalarType>>;
  static std::string schema() { return "float attention_scaling=1.0, ScalarType? dtype=None"; }

  double attention_scaling;
  std::optional<ScalarType> dtype;
};

// {weights}
struct NormWeights {
  using Parameters = std::tuple<Tensor, Tensor>;
  static std::string schema() { return "Tensor q_weight, Tensor k_weight"; }

  Tensor q_weight, k_weight;
};

// {norm}
struct NormOptions {
  using Parameters = std::tuple<double, bool>;
  static std::string schema() { return "float eps=1e-6, bool unit_offset=False"; }

  double eps;
  bool unit_offset;
};

// {float8_q}. Out: OptionalTensor, or OptionalTokenTensor where q is a TokenTensor.
template <class Out>
struct Float8Query {
  using Parameters = std::tuple<Out, OptionalTensor, OptionalTensor>;
  static std::string schema() {
    return "Tensor(x!)? q_out=None, Tensor? q_scale=None, Tensor(y!)? q_scale_out=None";
  }

  Out q_out;
  OptionalTensor q_scale, q_scale_out;
};

// The keywords of a rotation. An operator that has not all of them leaves the others as they are.
struct Rotation {
  std::optional<int64_t> rotary_dim;
  int64_t rotary_offset = 0;
  bool interleaved = false;
  std::optional<bool> interleaved_out;
  bool inverse = false;

  // The order of the pairs in the result.
  bool result_interleaved() const { return interleaved_out.value_or(interleaved); }
};

template <class T>
struct Keyword {
  using Type = T;
  const char* schema;
  T Rotation::* member;
};
template <class T>
Keyword(const char*, T Rotation::*) -> Keyword<T>;

inline constexpr Keyword kRotaryDim{"int? rotary_dim=None", &Rotation::rotary_dim};
inline constexpr Keyword kRotaryOffset{"int rotary_offset=0", &Rotation::rotary_offset};
inline constexpr Keyword kInterleaved{"bool interleaved=False", &Rotation::interleaved};
inline constexpr Keyword kInterleavedOut{"bool? interleaved_out=None", &Rotation::interleaved_out};
inline constexpr Keyword kInverse{"bool inverse=False", &Rotation::inverse};

// A rotation with these keywords.
template <const auto&... keywords>
struct RotationWith : Rotation {
  using Parameters = std::tuple<typename std::decay_t<decltype(keywords)>::Type...>;
  static std::string schema() {
    std::string out;
    ((out += out.empty() ? "" : ", ", out += keywords.schema), ...);
    return out;
  }

  explicit RotationWith(typename std::decay_t<decltype(keywords)>::Type... values) {
    ((this->*keywords.member = values), ...);
  }
};

// {rotation}
using AnyRotation =
    RotationWith<kRotaryDim, kRotaryOffset, kInterleaved, kInterleavedOut, kInverse>;
// {rotation_by_angles}: inv_freq gives rotary_dim
using RotationByAngles = RotationWith<kRotaryOffset, kInterleaved, kInterleavedOut, kInverse>;
// {rotation_of_kv}: in place, so the pairs keep their order
using RotationOfKv = RotationWith<kRotaryDim, kRotaryOffset, kInterleaved, kInverse>;
// {rotation_of_cache}: inv_freq gives rotary_dim, and the pairs keep their order
using RotationOfCache = RotationWith<kRotaryOffset, kInterleaved>;
// {pair_order}
using PairOrder = RotationWith<kInterleaved, kInterleavedOut>;

}  // namespace rope
