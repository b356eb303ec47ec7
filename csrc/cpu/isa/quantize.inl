// apply_rotary_quantize: each head is rotated into scratch memory, in the type A of the arithmetic,
// and rounded from there.

template <class T>
class HeadQuantizer {
 public:
  using A = ArithmeticOf<T>;

  HeadQuantizer(const QuantizeArgs& args, A* scratch)
      : args_(args), pieces_(args, args.interleaved), head_(scratch) {}

  void quantize(int64_t b, int64_t s, int64_t head) {
    const auto at = [&](const auto& x) {
      return b * x.stride_b + s * x.stride_s + head * x.stride_h;
    };
    const T* const x = static_cast<const T*>(args_.q.in.data) + at(args_.q.in);
    for (int64_t i = 0; i < pieces_.count(); ++i) read_piece(b, s, x, pieces_.at(i));

    const bool e4m3 = args_.float8_dtype == CacheDType::Float8E4M3;
    uint8_t* const to = static_cast<uint8_t*>(args_.float8.data) + at(args_.float8);
    float* scale = args_.scales.data + at(args_.scales);
    for (int64_t first = 0; first < args_.head_dim; first += args_.group_size) {
      const A* const group = head_ + first;
      const float largest = largest_magnitude(group, args_.group_size);
      *scale = group_scale(bit_cast<uint32_t>(largest), args_.eps, e4m3, args_.power_of_two_scales);
      quantise(args_.float8_dtype, group, to + first, args_.group_size, *scale);
      scale += args_.scales_stride_group;
    }
  }

 private:
  // x: the first channel of the head that rotates.
  void read_piece(int64_t b, int64_t s, const T* x, const Piece& piece) {
    A* const rotating = head_ + args_.rotary_offset;
    if (!piece.rotates) {
      convert<A, T>(x + piece.channel[0], 0, piece.channels, rotating + piece.channel[0]);
      return;
    }
    const int64_t half = args_.rotary_dim / 2;
    A* const to = rotating + (args_.interleaved_out ? 2 : 1) * piece.first;
    rotate_piece(args_, x + piece.channel[0], half, to, half, piece.pairs,
                 row_.at(args_, b, s, piece));
  }

  const QuantizeArgs& args_;
  const Pieces pieces_;
  A* const head_;  // all channels
  PieceRow<A, Lanes<T>::kLanes> row_;
};

void apply_rotary_quantize(const QuantizeArgs& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.dtype, [&](auto storage) {
    using T = decltype(storage);
    HeadQuantizer<T> quantizer(args, static_cast<ArithmeticOf<T>*>(scratch));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item / args.q.heads, b = token / args.seq;
      quantizer.quantize(b, token - b * args.seq, item - token * args.q.heads);
    }
  });
}
