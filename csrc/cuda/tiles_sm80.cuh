// What the sm80 cross-attention kernels share: swizzled tiles in shared memory, products of them on
// tensor cores, and the packing of query heads.
//
// All query heads of a key/value head attend to the same keys, so they are packed: packed row r of
// a text row is token r / group, head r % group of the key/value head's group.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <sm80.cuh>

#include "../cross_attention.h"
#include "lanes.cuh"

namespace megavlm::cuda::sm80 {

using namespace megavlm::sm80;
using bf16 = __nv_bfloat16;

constexpr int THREADS = 128;  // of a block that multiplies matrices
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

__device__ __forceinline__ int warp_min(int x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x = min(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}
__device__ __forceinline__ int warp_max(int x) { return -warp_min(-x); }

// ---- Tiles

// Rows of WIDTH bf16. Chunks of 16 bytes are swizzled: one column of chunks of 8 rows in turn
// covers all banks. Positions are byte offsets from the start of shared memory; a tile begins at a
// multiple of 128.
template <int WIDTH>
struct Tile {
  static constexpr int CHUNKS = WIDTH / 8;                 // per row
  static constexpr int PITCH = 2 * WIDTH;                  // bytes from row to row
  static constexpr int SPAN = WIDTH % 64 == 0 ? 128 : 64;  // bytes that a swizzle stays within

  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * PITCH + 16 * (chunk ^ (SPAN == 128 ? row % 8 : row / 2 % 4));
  }
  // Where each lane points to load the 16 x 16 fragment in the tile's top left corner: as operand a
  // of multiply_add or, transposed, as operand b of two (k x n in memory).
  static __device__ __forceinline__ int lane_position() {
    return at(lane_index() % 16, lane_index() / 16);
  }
  // The same as operand b of two multiply_adds (n x k in memory).
  static __device__ __forceinline__ int lane_position_b() {
    return at(lane_index() / 16 * 8 + lane_index() % 8, lane_index() / 8 % 2);
  }
  // The same place, `columns` (a multiple of 16) to the right.
  static __device__ __forceinline__ int right(int position, int columns) {
    return (position ^ (2 * columns % SPAN)) + 2 * columns / SPAN * SPAN;
  }
};

// The 16 x 16 elements at a lane position plus a tile's start plus rows (a multiple of 8). As
// operand b, f[0] and f[1] are the first 8 columns, f[2] and f[3] the others.
__device__ __forceinline__ void load_fragment(uint32_t (&f)[4], int position) {
  load_matrices(f, dynamic_shared() + position);
}
__device__ __forceinline__ void load_fragment_transposed(uint32_t (&f)[4], int position) {
  load_matrices_transposed(f, dynamic_shared() + position);
}

// The warp's 32 rows of an accumulator as operands a.
template <int COLUMNS>
__device__ __forceinline__ void pack_operands(uint32_t (&a)[2][COLUMNS / 16][4],
                                              const float (&s)[2][COLUMNS / 8][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[i][k][j] = pack_bf16(s[i][2 * k + j / 2][j % 2 * 2], s[i][2 * k + j / 2][j % 2 * 2 + 1]);
}

// s = a . b^T for the warp's 32 rows of a tile `a` and COLUMNS rows of a tile `b`.
template <int WIDTH, int COLUMNS>
__device__ __forceinline__ void multiply_transposed(float (&s)[2][COLUMNS / 8][4], int a_position,
                                                    int b_position) {
  using T = Tile<WIDTH>;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][n][e] = 0;
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_fragment(a[i], T::right(a_position, k) + 16 * i * T::PITCH);
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; ++n) {
      uint32_t b[4];
      load_fragment(b, T::right(b_position, k) + 16 * n * T::PITCH);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add(s[i][2 * n], a[i], b[0], b[1]);
        multiply_add(s[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// o += a . b for the warp's 32 rows; tile `b` has COLUMNS rows.
template <int WIDTH, int COLUMNS>
__device__ __forceinline__ void add_product(float (&o)[2][WIDTH / 8][4],
                                            const uint32_t (&a)[2][COLUMNS / 16][4],
                                            int b_position) {
  using T = Tile<WIDTH>;
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
    for (int n = 0; n < WIDTH / 16; ++n) {
      uint32_t b[4];
      load_fragment_transposed(b, T::right(b_position, 16 * n) + 16 * k * T::PITCH);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add(o[i][2 * n], a[i][k], b[0], b[1]);
        multiply_add(o[i][2 * n + 1], a[i][k], b[2], b[3]);
      }
    }
}

// ---- Rows of global memory

// Strides fit in 32 bits (see strides_fit), which makes the product one instruction.
__device__ __forceinline__ int64_t times_stride(int index, int64_t stride) {
  return static_cast<uint64_t>(static_cast<unsigned>(index)) * static_cast<unsigned>(stride);
}

struct alignas(8) Interval {
  int low, high;
  __device__ __forceinline__ bool empty() const { return low >= high; }
  __device__ __forceinline__ bool meets(int begin, int end) const {
    return low < end && high > begin;
  }
  __device__ __forceinline__ bool covers(int begin, int end) const {
    return low <= begin && high >= end;
  }
};

// The interval that text token (b, token) sees; {0, 0} if it sees nothing.
__device__ __forceinline__ Interval interval_of(const CrossAttention& x, int b, int token) {
  const int64_t index = times_stride(b, x.text_tokens) + token;
  const Interval interval{max(x.low[index], 0),
                          min(x.high[index], static_cast<int>(x.image_tokens))};
  return interval.empty() ? Interval{0, 0} : interval;
}

// From the lowest low to the highest high of the warp's intervals, leaving out empty ones.
__device__ __forceinline__ Interval warp_union(const Interval& interval) {
  return {warp_min(interval.empty() ? INT_MAX : interval.low), warp_max(interval.high)};
}

// What all the warp's intervals have in common, leaving out empty ones.
__device__ __forceinline__ Interval warp_intersection(const Interval& interval) {
  return {warp_max(interval.low), warp_min(interval.empty() ? INT_MAX : interval.high)};
}

// A packed row of a text row; token -1: there is no such row.
struct PackedRow {
  int token, head;

  __device__ __forceinline__ PackedRow(const CrossAttention& x, int kv_head, int row) {
    const int group = static_cast<int>(x.heads) / static_cast<int>(x.kv_heads);
    const bool exists = row < static_cast<int>(x.text_tokens) * group;
    token = exists ? row / group : -1;
    head = kv_head * group + row % group;
  }
  __device__ __forceinline__ bool exists() const { return token >= 0; }
  __device__ __forceinline__ int64_t offset(const View& view, int b) const {
    return exists() ? times_stride(b, view.row_stride) + times_stride(token, view.token_stride) +
                          times_stride(head, view.head_stride)
                    : -1;
  }
  // In (b, h, t), contiguous.
  __device__ __forceinline__ int64_t offset_bht(const CrossAttention& x, int b) const {
    return exists() ? (b * x.heads + head) * x.text_tokens + token : -1;
  }
  __device__ __forceinline__ Interval interval(const CrossAttention& x, int b) const {
    return exists() ? interval_of(x, b, token) : Interval{0, 0};
  }
};

// Copies a warp's 32 rows into its tile; each lane gives the offset of the row of its own index;
// -1: zeros.
template <int WIDTH>
__device__ __forceinline__ void copy_rows(int tile, const View& view, int64_t offset, int width) {
  using T = Tile<WIDTH>;
  const bf16* data = static_cast<const bf16*>(view.data);
#pragma unroll
  for (int i = 0; i < T::CHUNKS; ++i) {
    const int index = i * 32 + lane_index();
    const int row = index / T::CHUNKS, chunk = index % T::CHUNKS;
    const int64_t from = __shfl_sync(~0u, offset, row);
    const bool valid = from >= 0 && 8 * chunk < width;
    copy_async(dynamic_shared() + tile + T::at(row, chunk), data + (valid ? from + 8 * chunk : 0),
               valid);
  }
}

// How the threads of a block share the copying of a tile: each has one column of chunks and every
// ROWS-th row.
template <int WIDTH>
struct BlockCopy {
  static constexpr int ROWS = THREADS / Tile<WIDTH>::CHUNKS / 8 * 8;
  int row = threadIdx.x / Tile<WIDTH>::CHUNKS, chunk = threadIdx.x % Tile<WIDTH>::CHUNKS;

  // A width of 96 leaves some threads without work.
  __device__ __forceinline__ bool takes_part() const {
    return THREADS % Tile<WIDTH>::CHUNKS == 0 || row < ROWS;
  }
  // What the thread's row `i` (a multiple of ROWS) further down is copied to.
  __device__ __forceinline__ uint8_t* target(int tile, int i) const {
    return dynamic_shared() + tile + Tile<WIDTH>::at(row, chunk) + i * Tile<WIDTH>::PITCH;
  }
};

// Copies image tokens [first, first + TOKENS) of a key/value head into a tile, by the block; zeros
// from token `end` on.
template <int WIDTH, int TOKENS>
__device__ __forceinline__ void copy_tokens(int tile, const View& view, int kv_head, int first,
                                            int end, int width) {
  const BlockCopy<WIDTH> copy;
  if (!copy.takes_part()) return;
  const bool valid = 8 * copy.chunk < width;
  const bf16* from = static_cast<const bf16*>(view.data) + times_stride(kv_head, view.head_stride) +
                     times_stride(first + copy.row, view.token_stride) + 8 * copy.chunk;
#pragma unroll
  for (int i = 0; i < TOKENS; i += copy.ROWS) {
    copy_async(copy.target(tile, i), from, valid && first + copy.row + i < end);
    from += copy.ROWS * view.token_stride;
  }
}

// Writes ROWS rows of a tile that the warp has filled; each lane gives the offset of the row of its
// own index; -1: not written.
template <int WIDTH, int ROWS>
__device__ __forceinline__ void store_rows(const View& view, int64_t offset, int tile, int width) {
  using T = Tile<WIDTH>;
  bf16* data = static_cast<bf16*>(view.data);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < ROWS * T::CHUNKS / 32; ++i) {
    const int index = i * 32 + lane_index();
    const int row = index / T::CHUNKS, chunk = index % T::CHUNKS;
    const int64_t to = __shfl_sync(~0u, offset, row);
    if (to >= 0 && 8 * chunk < width)
      *reinterpret_cast<uint4*>(data + to + 8 * chunk) =
          *reinterpret_cast<const uint4*>(dynamic_shared() + tile + T::at(row, chunk));
  }
}

// The two neighbouring elements that a lane holds of rows `row` of an accumulator's block of 8
// columns, in a tile.
template <int WIDTH>
__device__ __forceinline__ uint32_t& pair_at(int tile, int row, int block) {
  return *reinterpret_cast<uint32_t*>(dynamic_shared() + tile + Tile<WIDTH>::at(row, block) +
                                      4 * (lane_index() % 4));
}

__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = unpack_bf16(xs[i]), b = unpack_bf16(ys[i]);
    sum += a.x * b.x + a.y * b.y;
  }
  return sum;
}

// r of the query in row lane_index() of a tile.
template <int WIDTH>
__device__ __forceinline__ float inverse_rms(const CrossAttention& x, int tile) {
  if (x.q_norm_epsilon < 0) return 1;
  float sum = 0;
#pragma unroll
  for (int chunk = 0; chunk < Tile<WIDTH>::CHUNKS; ++chunk) {
    const uint4 q = *reinterpret_cast<const uint4*>(dynamic_shared() + tile +
                                                    Tile<WIDTH>::at(lane_index(), chunk));
    sum += dot(q, q);
  }
  return rsqrtf(sum / static_cast<int>(x.head_width) + x.q_norm_epsilon);
}

inline bool strides_fit(const View& view) {
  return view.row_stride <= INT_MAX && view.token_stride <= INT_MAX && view.head_stride <= INT_MAX;
}

}  // namespace megavlm::cuda::sm80
