// The floors of the benchmarks: operators that only move the bytes, and operators that do nothing.
// They are called like rope_ext's own: boxed, through PyTorch's stable ABI, on PyTorch's threads.
// Built by floors.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <optional>
#include <tuple>

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

constexpr int64_t kGrain = int64_t{32} << 10;  // bytes: less is not worth a thread
constexpr int64_t kRowsAhead = 32;             // prefetched if rows are not neighbours
constexpr int64_t kVector = 32;
constexpr int64_t kHalfVector = 16;

// With any alignment, and over elements of any type.
using Vector = uint64_t __attribute__((vector_size(kVector), aligned(1), may_alias));
using HalfVector = uint64_t __attribute__((vector_size(kHalfVector), aligned(1), may_alias));

// Flips a sign: no number becomes infinite or NaN, and every byte is really written.
constexpr uint64_t kSigns = 0x8000800080008000;

// Rows of `bytes` bytes, `stride` bytes apart; bytes is a multiple of kHalfVector.
struct Rows {
  uint8_t* first;
  int64_t count, stride, bytes;
};

// The channels of x [B, S, H, D], dense, that rotate: all of them without rotary_dim.
Rows rotated_channels(const Tensor& x, OptionalInt rotary_dim) {
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t head_dim = x.size(x.dim() - 1);
  const int64_t bytes = rotary_dim.value_or(head_dim) * size;
  STD_TORCH_CHECK(x.is_contiguous() && bytes % kHalfVector == 0,
                  "rope_floors: expected dense tensors and whole vectors to rotate");
  return {static_cast<uint8_t*>(x.mutable_data_ptr()), x.numel() / head_dim, head_dim * size,
          bytes};
}

void flip(uint8_t* at, int64_t bytes) {
  int64_t i = 0;
  for (; i + kVector <= bytes; i += kVector) *reinterpret_cast<Vector*>(at + i) ^= kSigns;
  if (i < bytes) *reinterpret_cast<HalfVector*>(at + i) ^= kSigns;
}

void flip_rows(const Rows& rows, int64_t begin, int64_t end) {
  uint8_t* const first = rows.first + begin * rows.stride;
  if (rows.bytes == rows.stride) return flip(first, (end - begin) * rows.stride);
  for (int64_t i = 0; i < end - begin; ++i) {
    __builtin_prefetch(first + (i + kRowsAhead) * rows.stride, 1);
    flip(first + i * rows.stride, rows.bytes);
  }
}

// Reads, modifies and writes the same bytes as apply_rotary_qk_, in place.
void rmw_qk(const Tensor& q, const Tensor& k, const Tensor&, const Tensor&, const OptionalTensor&,
            OptionalInt rotary_dim, bool, bool) {
  const Rows of_q = rotated_channels(q, rotary_dim);
  const Rows of_k = rotated_channels(k, rotary_dim);
  const int64_t grain = kGrain / of_q.bytes + 1;
  torch::stable::parallel_for(0, of_q.count + of_k.count, grain, [&](int64_t begin, int64_t end) {
    if (begin < of_q.count) flip_rows(of_q, begin, end < of_q.count ? end : of_q.count);
    if (end > of_q.count) {
      flip_rows(of_k, begin > of_q.count ? begin - of_q.count : 0, end - of_q.count);
    }
  });
}

void null_qk_in_place(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const OptionalTensor&, OptionalInt, bool, bool) {}

std::tuple<Tensor, Tensor> null_qk(const Tensor& q, const Tensor& k, const Tensor&, const Tensor&,
                                   const OptionalTensor&, OptionalInt, bool, bool) {
  return {torch::stable::empty_like(q), torch::stable::empty_like(k)};
}

void null_one(const Tensor&) {}

void store(uint8_t* to, Vector value, bool streaming) {
#if defined(__AVX2__)
  if (streaming) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
  }
#endif
  *reinterpret_cast<Vector*>(to) = value;
}

void finish(bool streaming) {
#if defined(__AVX2__)
  if (streaming) _mm_sfence();
#endif
}

// Calls body(begin, end) on ranges of the vectors of a dense x that is a whole number of them.
template <class Body>
void over_vectors(const Tensor& x, const Body& body) {
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  STD_TORCH_CHECK(x.is_contiguous() && bytes % kVector == 0,
                  "rope_floors: expected a dense tensor of whole vectors");
  torch::stable::parallel_for(0, bytes / kVector, kGrain / kVector, body);
}

// streaming: with non-temporal stores, which bypass the caches and do not read a line first
void copy(const Tensor& to, const Tensor& from, bool streaming) {
  uint8_t* const out = static_cast<uint8_t*>(to.mutable_data_ptr());
  const uint8_t* const in = static_cast<const uint8_t*>(from.const_data_ptr());
  over_vectors(to, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin * kVector; i < end * kVector; i += kVector) {
      store(out + i, *reinterpret_cast<const Vector*>(in + i), streaming);
    }
    finish(streaming);
  });
}

void fill(const Tensor& x, bool streaming) {
  uint8_t* const out = static_cast<uint8_t*>(x.mutable_data_ptr());
  over_vectors(x, [=](int64_t begin, int64_t end) {
    const Vector zero{};
    for (int64_t i = begin * kVector; i < end * kVector; i += kVector) {
      store(out + i, zero, streaming);
    }
    finish(streaming);
  });
}

}  // namespace

// Schemas of apply_rotary_qk_ and apply_rotary_qk, under other names.
STABLE_TORCH_LIBRARY(rope_floors, m) {
  m.def(
      "rmw_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, bool interleaved=False, bool inverse=False) -> ()");
  m.def(
      "null_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, bool interleaved=False, bool inverse=False) -> ()");
  m.def(
      "null_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, bool interleaved=False, bool inverse=False) -> (Tensor, Tensor)");
  m.def("null_one_(Tensor(a!) x) -> ()");
  m.def("copy_(Tensor(a!) to, Tensor from, *, bool streaming) -> ()");
  m.def("fill_(Tensor(a!) x, *, bool streaming) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rope_floors, CPU, m) {
  m.impl("rmw_qk_", TORCH_BOX(&rmw_qk));
  m.impl("null_qk_", TORCH_BOX(&null_qk_in_place));
  m.impl("null_qk", TORCH_BOX(&null_qk));
  m.impl("null_one_", TORCH_BOX(&null_one));
  m.impl("copy_", TORCH_BOX(&copy));
  m.impl("fill_", TORCH_BOX(&fill));
}
