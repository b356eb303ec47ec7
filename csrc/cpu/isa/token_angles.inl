// sin and cos of the angles of a token, for some of its pairs.

// Pairs whose angles are held at a time: their sin and cos stay in the L1 cache.
constexpr int64_t kAnglePairs = 128;

// Calls f with a pointer of the type of the positions.
template <class F>
ROPE_HOST_DEVICE void dispatch(const TokenPositions& positions, const F& f) {
  switch (positions.type) {
    case PositionType::Int32: return f(static_cast<const int32_t*>(positions.data));
    case PositionType::Int64: return f(static_cast<const int64_t*>(positions.data));
    case PositionType::Float64: return f(static_cast<const double*>(positions.data));
    case PositionType::Float32: return f(static_cast<const float*>(positions.data));
    case PositionType::Float16: return f(static_cast<const Half*>(positions.data));
    case PositionType::BFloat16: return f(static_cast<const BFloat16*>(positions.data));
  }
}

ROPE_HOST_DEVICE double position_at(const TokenPositions& positions, int64_t at) {
  if (positions.data == nullptr) return static_cast<double>(positions.start + at);
  double position = 0;
  dispatch(positions, [&](const auto* data) ROPE_ALWAYS_INLINE { position = as_double(data[at]); });
  return position;
}

// The value for pair i: one for all pairs, or one for each.
ROPE_HOST_DEVICE double of_pair(double all, int64_t) { return all; }
ROPE_HOST_DEVICE double of_pair(const double* each, int64_t i) { return each[i]; }

template <bool kDouble, class Position, class Scale>
ROPE_HOST_DEVICE void sin_cos_of(Position position, const double* inv_freq, int64_t pairs,
                                 Scale scale, double* sin, double* cos) {
  for (int64_t i = 0; i < pairs; ++i) {
    const SinCos value = sin_cos<kDouble>(of_pair(position, i), inv_freq[i]);
    sin[i] = value.sin * of_pair(scale, i);
    cos[i] = value.cos * of_pair(scale, i);
  }
}

// Pairs [first, first + pairs) of the angles, of one token after the other.
struct TokenAngles {
  const Angles& angles;
  const int64_t pairs;  // at most kAnglePairs
  alignas(64) double inv_freq[kAnglePairs], sin[kAnglePairs], cos[kAnglePairs];
  alignas(64) double position[kAnglePairs], scale[kAnglePairs];  // used where there are axes
  int64_t axis_at[kAnglePairs];  // where the positions of its axis begin

  // A pair whose axis does not exist gets NaN.
  ROPE_HOST_DEVICE TokenAngles(const Angles& of, int64_t first, int64_t count)
      : angles(of), pairs(count) {
    convert(angles.inv_freq_dtype, angles.inv_freq, first, pairs, inv_freq);
    const Axes& axes = angles.axes;
    if (axes.data == nullptr) return;
    const int64_t axis_count = angles.positions.axes, stride = angles.positions.stride_axis;
    const auto find_axes = [&](const auto* axis_of) ROPE_ALWAYS_INLINE {
      for (int64_t i = 0; i < pairs; ++i) {
        int64_t axis = read_once(axis_of + first + i);
        if (!is_inside(axis, axis_count)) axis = 0, inv_freq[i] = NAN;
        axis_at[i] = axis * stride;
      }
    };
    axes.int64 ? find_axes(static_cast<const int64_t*>(axes.data))
               : find_axes(static_cast<const int32_t*>(axes.data));
  }

  // Sets sin and cos to those of token (b, s), times attention_scaling; kSlope: and times the
  // position, as
  //   d cos / d inv_freq = -position scaling sin(angle)
  //   d sin / d inv_freq =  position scaling cos(angle)
  template <bool kDouble, bool kSlope = false>
  ROPE_HOST_DEVICE void compute(int64_t b, int64_t s) {
    const TokenPositions& positions = angles.positions;
    const int64_t at = b * positions.stride_b + s * positions.stride_s;
    const double scaling = angles.attention_scaling;
    if (angles.axes.data == nullptr) {
      const double all = position_at(positions, at);
      sin_cos_of<kDouble>(all, inv_freq, pairs, kSlope ? all * scaling : scaling, sin, cos);
      return;
    }
    dispatch(positions, [&](const auto* data) ROPE_ALWAYS_INLINE {
      for (int64_t i = 0; i < pairs; ++i) position[i] = as_double(data[axis_at[i] + at]);
    });
    for (int64_t i = 0; i < pairs; ++i) scale[i] = kSlope ? position[i] * scaling : scaling;
    const double* const each = position;
    const double* const scale_of_each = scale;
    sin_cos_of<kDouble>(each, inv_freq, pairs, scale_of_each, sin, cos);
  }
};

// What cached keys turn by: the angles of their new positions less those of the old ones.
struct ShiftAngles : TokenAngles {
  const ShiftArgs& args;
  TokenAngles old;

  ROPE_HOST_DEVICE ShiftAngles(const ShiftArgs& of, int64_t first, int64_t count)
      : TokenAngles(of.angles, first, count), args(of), old(of.old, first, count) {}

  template <bool kDouble>
  ROPE_HOST_DEVICE void compute(int64_t b, int64_t s) {
    if (args.same_frequencies) {
      const TokenPositions &from = old.angles.positions, &to = angles.positions;
      const double distance =
          position_at(to, s * to.stride_s) - position_at(from, s * from.stride_s);
      sin_cos_of<kDouble>(distance, inv_freq, pairs, angles.attention_scaling, sin, cos);
      return;
    }
    TokenAngles::compute<kDouble>(b, s);
    old.compute<kDouble>(b, s);
    for (int64_t i = 0; i < pairs; ++i) {
      const SinCos turn = difference({sin[i], cos[i]}, {old.sin[i], old.cos[i]});
      sin[i] = turn.sin, cos[i] = turn.cos;
    }
  }
};

ROPE_HOST_DEVICE TokenAngles angles_of(const RotaryAtArgs& args, int64_t first, int64_t count) {
  return TokenAngles(args.angles, first, count);
}
ROPE_HOST_DEVICE ShiftAngles angles_of(const ShiftArgs& args, int64_t first, int64_t count) {
  return ShiftAngles(args, first, count);
}
