// Vectors, exponential and matrix multiplication of one instruction set, in GCC's vector
// extensions. Included by files that are compiled once per instruction set; everything lives in
// that set's namespace, and nothing of the standard library that could be emitted out of line is
// used: the linker would keep one copy of it, maybe one that an older processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace megavlm::cpu::MEGAVLM_ISA {

// A tile of tile_rows x tile_vectors accumulators, with operands, fills the vector registers.
#if defined(__AVX512F__)
inline constexpr int lanes = 16, tile_rows = 12, tile_vectors = 2;
#elif defined(__AVX2__)
inline constexpr int lanes = 8, tile_rows = 6, tile_vectors = 2;
#elif defined(__aarch64__)
inline constexpr int lanes = 4, tile_rows = 8, tile_vectors = 2;
#else
inline constexpr int lanes = 4, tile_rows = 4, tile_vectors = 2;
#endif
inline constexpr int panel_columns = lanes * tile_vectors;

using BFloat16 = uint16_t;
using Vector = float __attribute__((vector_size(lanes * 4)));
using Integers = int32_t __attribute__((vector_size(lanes * 4)));
using Bits = uint32_t __attribute__((vector_size(lanes * 4)));
using HalfBits = uint16_t __attribute__((vector_size(lanes * 2)));
using Doubles = double __attribute__((vector_size(lanes * 4)));  // half as many lanes

template <class T>
inline T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T max(T a, T b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- Memory ----

template <class V>
inline V load_as(const void* from) {
  using Anywhere [[gnu::may_alias, gnu::aligned(1)]] = V;
  return *static_cast<const Anywhere*>(from);
}
template <class V>
inline void store(void* to, V v) {
  using Anywhere [[gnu::may_alias, gnu::aligned(1)]] = V;
  *static_cast<Anywhere*>(to) = v;
}
inline Vector load(const void* from) { return load_as<Vector>(from); }

inline Vector load_floats(const float* from) { return load(from); }
inline Vector load_floats(const BFloat16* from) {
  return Vector(__builtin_convertvector(load_as<HalfBits>(from), Bits) << 16);
}

// To nearest, ties to even; a NaN stays a NaN.
inline HalfBits to_bfloat16(Vector v) {
#if defined(__AVX512BF16__)
  return HalfBits(_mm512_cvtneps_pbh(__m512(v)));
#else
  const Bits bits = Bits(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, HalfBits);
#endif
}
inline void store_floats(float* to, Vector v) { store(to, v); }
inline void store_floats(BFloat16* to, Vector v) { store(to, to_bfloat16(v)); }

// The first `count` lanes only; a load fills the others with zeros.
template <class T>
inline Vector load_floats(const T* from, int64_t count) {
  if (count >= lanes) return load_floats(from);
  T padded[lanes] = {};
  if (count > 0) memcpy(padded, from, count * sizeof(T));
  return load_floats(padded);
}
template <class T>
inline void store_floats(T* to, Vector v, int64_t count) {
  if (count >= lanes) return store_floats(to, v);
  T padded[lanes];
  store_floats(padded, v);
  if (count > 0) memcpy(to, padded, count * sizeof(T));
}

// ---- Within a vector ----

template <int first, size_t... lane>
inline Doubles widen(Vector v, std::index_sequence<lane...>) {
  return __builtin_convertvector(__builtin_shufflevector(v, v, int(first + lane)...), Doubles);
}
inline Doubles lower(Vector v) { return widen<0>(v, std::make_index_sequence<lanes / 2>()); }
inline Doubles upper(Vector v) {
  return widen<lanes / 2>(v, std::make_index_sequence<lanes / 2>());
}
// Adds the first `count` lanes to doubles in memory.
inline void add_floats(double* to, Vector v, int64_t count) {
  if (count >= lanes) {
    store(to, load_as<Doubles>(to) + lower(v));
    store(to + lanes / 2, load_as<Doubles>(to + lanes / 2) + upper(v));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] += v[i];
  }
}

template <int distance, size_t... lane>
inline Vector rotate(Vector v, std::index_sequence<lane...>) {
  return __builtin_shufflevector(v, v, int((lane + distance) % lanes)...);
}
template <int distance = lanes / 2>
inline float sum(Vector v) {
  v += rotate<distance>(v, std::make_index_sequence<lanes>());
  if constexpr (distance > 1) return sum<distance / 2>(v);
  return v[0];
}
inline Vector max(Vector a, Vector b) { return a > b ? a : b; }
template <int distance = lanes / 2>
inline float largest(Vector v) {
  v = max(v, rotate<distance>(v, std::make_index_sequence<lanes>()));
  if constexpr (distance > 1) return largest<distance / 2>(v);
  return v[0];
}

template <size_t... lane>
inline Integers count_lanes(std::index_sequence<lane...>) {
  return Integers{int32_t(lane)...};
}
// All ones in the lanes whose index, counted from `first`, is in [low, high).
inline Integers lanes_within(int64_t first, int64_t low, int64_t high) {
  const Integers index = count_lanes(std::make_index_sequence<lanes>()) + int32_t(first);
  return (index >= int32_t(low)) & (index < int32_t(high));
}

template <int half, size_t... lane>
inline void exchange(Vector& a, Vector& b, std::index_sequence<lane...>) {
  const Vector low =
      __builtin_shufflevector(a, b, int(lane & half ? lanes + lane - half : lane)...);
  b = __builtin_shufflevector(a, b, int(lane & half ? lanes + lane : lane + half)...);
  a = low;
}
// Transposes a square, halves of halves at a time.
template <int half = lanes / 2>
inline void transpose(Vector (&square)[lanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (!(i & half)) {
      exchange<half>(square[i], square[i + half], std::make_index_sequence<lanes>());
    }
  }
  if constexpr (half > 1) transpose<half / 2>(square);
}

// e^x for x < 88, to 0.7 units in the last place; exactly 0 below -88.
inline Vector exp(Vector x) {
  const Vector zero = {};
  x = max(zero - 88.0f, x);
  // e^x = 2^n e^r, |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to whole numbers, which are then the
  // sum's low bits; 127 more makes them the exponent of 2^n, and 0 for n = -127. ln(2) is taken in
  // two pieces, the first short enough for exact products.
  constexpr float magic = 12582912.0f + 127;
  const Vector shifted = x * 1.44269504f + magic;
  const Vector n = shifted - magic;
  const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;
  const Vector power = Vector(Bits(shifted) << 23);
  Vector p = zero + 0.0013821448f;
  p = p * r + 0.008368662f;
  p = p * r + 0.041668255f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * power;
}

// ---- Matrix multiplication ----

// How numbers are multiplied: in 32-bit words that a vector has `lanes` of.
struct Single {
  using Word = float;
  static constexpr int per_word = 1;
  static Vector add_product(Vector sum, float left, Vector right) { return sum + left * right; }
};
#if defined(__AVX512BF16__)
struct Pair {  // of bfloat16 numbers, neighbours along the axis that is summed over
  using Word = uint32_t;
  static constexpr int per_word = 2;
  static Vector add_product(Vector sum, uint32_t left, Vector right) {
    return Vector(_mm512_dpbf16_ps(__m512(sum), (__m512bh)_mm512_set1_epi32(int(left)),
                                   (__m512bh)__m512i(right)));
  }
};
#endif

// The right operand of a multiplication, (steps, columns) words: panel_columns columns at a time,
// so that the inner loop reads memory in order.
template <class Math>
struct Panels {
  typename Math::Word* data;
  int64_t steps;
  typename Math::Word* at(int64_t step, int64_t column) const {
    return data + (column / panel_columns * steps + step) * panel_columns + column % panel_columns;
  }
};

enum class Left { as_is, transposed };

template <class Math, int vectors, Left layout, bool accumulate>
[[gnu::always_inline]] inline void multiply_tile(int64_t steps, const typename Math::Word* left,
                                                 int64_t left_stride,
                                                 const typename Math::Word* right, float* out,
                                                 int64_t out_stride) {
  Vector sums[tile_rows][vectors] = {};
#pragma GCC unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    Vector columns[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) columns[j] = load(right + step * panel_columns + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
      const auto x =
          layout == Left::as_is ? left[i * left_stride + step] : left[step * left_stride + i];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[i][j] = Math::add_product(sums[i][j], x, columns[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      float* to = out + i * out_stride + j * lanes;
      // Added last: long sums are sums of short ones, which keeps rounding errors small.
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

// out[tile_rows, columns] (+)= left[tile_rows, steps] @ right[first_step + steps, columns], for
// columns [first, last), multiples of `lanes`, which are also those of `out`. The left operand is
// stored as it is or transposed.
template <class Math, Left layout, bool accumulate>
inline void multiply(int64_t steps, const typename Math::Word* left, int64_t left_stride,
                     const Panels<Math>& right, int64_t first_step, int64_t first, int64_t last,
                     float* out, int64_t out_stride) {
  for (int64_t column = first; column < last;) {
    const auto* panel = right.at(first_step, column);
    if (column % panel_columns == 0 && column + panel_columns <= last) {
      multiply_tile<Math, tile_vectors, layout, accumulate>(steps, left, left_stride, panel,
                                                            out + column, out_stride);
      column += panel_columns;
    } else {
      multiply_tile<Math, 1, layout, accumulate>(steps, left, left_stride, panel, out + column,
                                                 out_stride);
      column += lanes;
    }
  }
}

}  // namespace megavlm::cpu::MEGAVLM_ISA
