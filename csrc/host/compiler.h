// What differs between compilers: GCC and Clang on the host, nvcc on the device.
#pragma once

#if defined(__CUDACC__)
#define ROPE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ROPE_HOST_DEVICE inline __attribute__((always_inline))
#endif

// A lambda with this is inlined into the function around it, and takes its instruction set.
#define ROPE_ALWAYS_INLINE __attribute__((always_inline))

#if defined(__x86_64__)
#define ROPE_X86 1
#else
#define ROPE_X86 0
#endif
#if defined(__aarch64__)
#define ROPE_ARM64 1
#else
#define ROPE_ARM64 0
#endif
// Older compilers do not know the instructions.
#if ROPE_ARM64 && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define ROPE_ARM64_BF16 1
#else
#define ROPE_ARM64_BF16 0
#endif

// Functions between BEGIN and END are compiled for these features of the processor, such as
// "avx2,fma", whatever the flags.
#define ROPE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ROPE_BEGIN_TARGET(features) \
  ROPE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ROPE_END_TARGET ROPE_PRAGMA(clang attribute pop)
#else
#define ROPE_BEGIN_TARGET(features) ROPE_PRAGMA(GCC push_options) ROPE_PRAGMA(GCC target(features))
#define ROPE_END_TARGET ROPE_PRAGMA(GCC pop_options)
#endif

// Lanes of two vectors by index: 0 .. N-1 are those of `a`, N .. 2N-1 those of `b`.
// Index is GCC's vector type of the indices.
#if defined(__clang__)
#define ROPE_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ROPE_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// One load of a value that another thread may write; a compiler may repeat an ordinary load. On
// CUDA for memory that no thread of the kernel writes: __ldg is a volatile instruction.
template <class T>
ROPE_HOST_DEVICE T read_once(const T* from) {
#if defined(__CUDA_ARCH__)
  return __ldg(from);
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

// The compiler's name and version, for build_info().
#if defined(__clang__)
#define ROPE_COMPILER __VERSION__  // "Clang 14.0.6"
#else
#define ROPE_COMPILER "GCC " __VERSION__
#endif
