// What Hopper's cross-attention kernels share: tiles of queries, tensor maps, intervals.
//
// A tile of queries holds whole text tokens of one row b, each with the heads that share one
// key/value head g: its row r is token r / group, head g * group + r % group, where group =
// heads / kv_heads. Rows without a token fill the tile up; they are garbage and never stored.
#pragma once

#include <sm90.cuh>

#include "../cross_attention.h"

namespace megavlm::cuda::sm90 {

// Coordinates of a box: column, head within the group, token, g, b. A box is 64 columns of
// `tokens` tokens with `group` heads each, that is rows of 128 bytes in the tile's order.
inline const char* make_query_map(CUtensorMap* map, const CrossAttention& x, const View& view,
                                  int tokens) {
  const int64_t group = x.heads / x.kv_heads;
  const int64_t sizes[5] = {x.head_width, group, x.text_tokens, x.kv_heads, x.rows};
  int64_t strides[4] = {view.head_stride, view.token_stride, group * view.head_stride,
                        view.row_stride};
  for (int axis = 0; axis < 4; ++axis)  // one that is never taken may be anything, invalid too
    if (sizes[axis + 1] == 1) strides[axis] = x.head_width;
  const int box[5] = {64, static_cast<int>(group), tokens, 1, 1};
  return megavlm::sm90::make_tensor_map(map, view.data, 5, sizes, strides, box);
}

// Keys, values and their gradients. Coordinates of a box: column, image token, g. A box is 64
// columns of `tokens` image tokens (at most 256).
inline const char* make_key_map(CUtensorMap* map, const CrossAttention& x, const View& view,
                                int tokens) {
  const int64_t sizes[3] = {x.head_width, x.image_tokens, x.kv_heads};
  int64_t strides[2] = {view.token_stride, view.head_stride};
  for (int axis = 0; axis < 2; ++axis)
    if (sizes[axis + 1] == 1) strides[axis] = x.head_width;
  const int box[3] = {64, tokens, 1};
  return megavlm::sm90::make_tensor_map(map, view.data, 3, sizes, strides, box);
}

// Image tokens low <= v < high; 0, 0 if there are none.
struct Interval {
  int low, high;
};

__device__ __forceinline__ Interval clamped_interval(int low, int high, int image_tokens) {
  low = max(low, 0);
  high = min(high, image_tokens);
  return low < high ? Interval{low, high} : Interval{0, 0};
}

// What successive text tokens see: the smallest interval that contains all of theirs, and their
// intersection; 0, 0 where that is nothing, so for `every` if one token sees nothing.
struct Seen {
  Interval any, every;
};

// One warp calls; every lane gets it.
__device__ __forceinline__ Seen seen_by(const int32_t* low, const int32_t* high, int tokens,
                                        int image_tokens) {
  Seen seen{{image_tokens, 0}, {0, image_tokens}};
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < tokens; i += 32) {
    const Interval one = clamped_interval(__ldg(low + i), __ldg(high + i), image_tokens);
    if (one.low < one.high) seen.any = {min(seen.any.low, one.low), max(seen.any.high, one.high)};
    seen.every = {max(seen.every.low, one.low), min(seen.every.high, one.high)};
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    seen.any.low = min(seen.any.low, __shfl_xor_sync(~0u, seen.any.low, lanes));
    seen.any.high = max(seen.any.high, __shfl_xor_sync(~0u, seen.any.high, lanes));
    seen.every.low = max(seen.every.low, __shfl_xor_sync(~0u, seen.every.low, lanes));
    seen.every.high = min(seen.every.high, __shfl_xor_sync(~0u, seen.every.high, lanes));
  }
  if (seen.any.low >= seen.any.high) seen.any = {0, 0};
  if (seen.every.low >= seen.every.high) seen.every = {0, 0};
  return seen;
}

}  // namespace megavlm::cuda::sm90
