#include "check/overlap.h"

#include <algorithm>
#include <array>

namespace rope {

void Footprint::add_dim(int64_t dim_size, int64_t dim_stride_bytes) {
  if (dim_size < 2) return;
  int at = dims++;
  for (; at > 0 && stride[at - 1] > dim_stride_bytes; --at) {
    size[at] = size[at - 1];
    stride[at] = stride[at - 1];
  }
  size[at] = dim_size;
  stride[at] = dim_stride_bytes;
}

int64_t Footprint::extent() const {
  int64_t extent_bytes = bytes;
  for (int d = 0; d < dims; ++d) extent_bytes += (size[d] - 1) * stride[d];
  return extent_bytes;
}

bool overlaps_itself(const Footprint& a) {
  int64_t extent = a.bytes;
  for (int d = 0; d < a.dims; ++d) {
    if (a.stride[d] < extent) return true;
    extent += (a.size[d] - 1) * a.stride[d];
  }
  return false;
}

namespace {

// A multiple of `stride`, from low * stride to high * stride.
struct Term {
  int64_t stride, low, high;
};

struct Search {
  std::array<Term, 2 * Footprint::kMaxDims> terms;
  int count = 0;
  int steps_left = 10000;

  // Keeps the terms in order of falling stride, and merges terms of one stride.
  void add(int64_t stride, int64_t low, int64_t high) {
    if (stride == 0) return;
    int at = 0;
    while (at < count && terms[at].stride > stride) ++at;
    if (at < count && terms[at].stride == stride) {
      terms[at].low += low;
      terms[at].high += high;
      return;
    }
    for (int i = count++; i > at; --i) terms[i] = terms[i - 1];
    terms[at] = {stride, low, high};
  }

  // Is there a sum of one multiple of each term from `first` on, within [low, high]?
  bool reaches(int first, int64_t low, int64_t high) {
    if (--steps_left < 0) return true;
    if (first == count) return low <= 0 && 0 <= high;
    int64_t rest_low = 0, rest_high = 0;
    for (int i = first + 1; i < count; ++i) {
      rest_low += terms[i].low * terms[i].stride;
      rest_high += terms[i].high * terms[i].stride;
    }
    const Term& term = terms[first];
    // Multiples outside of [low - rest_high, high - rest_low] can't be balanced by the other terms.
    const double stride = static_cast<double>(term.stride);
    const int64_t from = std::max(term.low, static_cast<int64_t>((low - rest_high) / stride) - 1);
    const int64_t to = std::min(term.high, static_cast<int64_t>((high - rest_low) / stride) + 1);
    for (int64_t n = from; n <= to; ++n) {
      if (reaches(first + 1, low - n * term.stride, high - n * term.stride)) return true;
    }
    return false;
  }
};

}  // namespace

bool overlap(const Footprint& a, const Footprint& b) {
  const int64_t distance = b.base - a.base;
  if (distance >= a.extent() || -distance >= b.extent()) return false;
  // A byte of both: a.base + multiples + i == b.base + multiples + j, with i < a.bytes and j <
  // b.bytes.
  Search search;
  for (int d = 0; d < a.dims; ++d) search.add(a.stride[d], 0, a.size[d] - 1);
  for (int d = 0; d < b.dims; ++d) search.add(b.stride[d], 1 - b.size[d], 0);
  return search.reaches(0, distance - (a.bytes - 1), distance + (b.bytes - 1));
}

}  // namespace rope
