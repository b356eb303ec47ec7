// The rotation of one pair, and its gradient to the table: the only place where either is written.
//
//     [x1']   [c1  -s1] [x1]
//     [x2'] = [s2   c2] [x2]        RoFormer, arXiv 2104.09864, equation 34, with c1 = c2, s1 = s2
//
// c1, s1 and c2, s2 differ only for tables with one angle a channel. The inverse rotation, which
// is also the backward, is the transpose: the same formula with (s1, s2) -> (-s2, -s1).
//
// T is a scalar or a vector of float or double. Two products and a sum, each rounded, never
// contracted to a fused multiply-add (-ffp-contract=off, nvcc -fmad=false): so the CPU, CUDA and
// x * cos + rotate_half(x) * sin written in PyTorch give the same float32 bits.
#pragma once

#include "args.h"
#include "host/compiler.h"

namespace rope {

// One row of the table for one pair.
template <class T>
struct Turn {
  T c1, s1, c2, s2;
};

template <class T>
ROPE_HOST_DEVICE Turn<T> inverse_of(const Turn<T>& turn) {
  return {turn.c1, -turn.s2, turn.c2, -turn.s1};
}

// What the flags of a rotation make of a row of the table, and whether they change it.
template <class T>
ROPE_HOST_DEVICE Turn<T> flagged(const Turn<T>& turn, const RotationFlags& flags) {
  return flags.inverse ? inverse_of(turn) : turn;
}
ROPE_HOST_DEVICE bool changes_turns(const RotationFlags& flags) { return flags.inverse; }

// Rotates (x1, x2) in place.
template <class T>
ROPE_HOST_DEVICE void rotate(const Turn<T>& turn, T& x1, T& x2) {
  const T y1 = x1 * turn.c1 - x2 * turn.s1;
  const T y2 = x2 * turn.c2 + x1 * turn.s2;
  x1 = y1;
  x2 = y2;
}

// Sums of the four products of a gradient (g1, g2) with its input (x1, x2), over heads and tokens.
template <class T>
struct TurnGrad {
  T g1x1, g1x2, g2x1, g2x2;
};

template <class T>
ROPE_HOST_DEVICE void accumulate(TurnGrad<T>& sum, const T& g1, const T& g2, const T& x1,
                                 const T& x2) {
  sum.g1x1 += g1 * x1;
  sum.g1x2 += g1 * x2;
  sum.g2x1 += g2 * x1;
  sum.g2x2 += g2 * x2;
}

// The gradient to (c1, s1, c2, s2). For tables with one angle a pair, c = c1 + c2 and s = s1 + s2.
template <class T>
ROPE_HOST_DEVICE Turn<T> grad_of(const TurnGrad<T>& sum, const RotationFlags& flags) {
  return flagged(Turn<T>{sum.g1x1, -sum.g1x2, sum.g2x2, sum.g2x1}, flags);
}

}  // namespace rope
