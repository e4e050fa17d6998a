// Cross-attention of few queries per row (generation): reads keys and values once, at the
// memory's speed, from as many multiprocessors as are needed for that.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <sm80.cuh>

#include "kernels.h"
#include "lanes.cuh"

namespace megavlm::cuda::decode {
namespace {

namespace sm80 = megavlm::sm80;  // the instructions, not the kernels

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 16;  // image tokens
constexpr int MAX_SPLITS = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// What the splits leave for the second kernel, where there are several. Splits of a row and
// key/value head follow one another, with all its queries in each.
struct Partials {
  float* out;          // (b, g, splits, queries, d): sums of 2^(score - max) * value
  float2* statistics;  // (b, g, splits, queries): max, sum; (-infinity, 0): out was not written
  int splits;
};

// One warp's shared memory: a ring of stages, each a tile of keys and then one of values. Rows
// are 16-byte chunks, permuted so that a column of eight rows lies in different banks.
template <int WIDTH>
struct Ring {
  static constexpr int CHUNKS = WIDTH / 8;
  static constexpr int ROW_BYTES = 2 * WIDTH;
  static constexpr int TILE_BYTES = TILE * ROW_BYTES;
  static constexpr int STAGE_BYTES = 2 * TILE_BYTES;
  static constexpr int STAGES = 3 * 128 / WIDTH;
  static constexpr int BYTES = STAGES * STAGE_BYTES;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int permuted = WIDTH == 96 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
    return row * ROW_BYTES + 16 * permuted;
  }
};

// What a warp found, laid over its ring when that has been read.
template <int WIDTH>
struct Found {
  float out[MAX_QUERIES][WIDTH + 8];  // 8 more against bank conflicts
  float max[MAX_QUERIES], sum[MAX_QUERIES];
};

// What to subtract from scores with this maximum; -infinity - -infinity would not be a number.
__device__ __forceinline__ float finite(float max) { return max == -INFINITY ? 0.f : max; }

__device__ __forceinline__ void write_lse(const CrossAttentionForward& x, int row, int head,
                                          int token, float max, float sum) {
  x.lse[(row * x.heads + head) * x.text_tokens + token] =
      sum != 0.f ? (max + log2f(sum)) * (1.f / LOG2_E) : -INFINITY;
}

// One block per (row, split, key/value head), the head changing fastest: neighbours in time read
// neighbours in memory. The split is a share of the hull of the row's intervals; its tiles of 16
// image tokens go to the 4 warps in turn. A warp copies its own tiles, 24 KiB ahead, and
// multiplies them with the row's queries (tokens x heads of the group, padded to 16), which it
// holds in registers. Online softmax in base 2; at the end the warps' results are merged.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    attend(const __grid_constant__ CrossAttentionForward x, const Partials partials) {
  using Ring = Ring<WIDTH>;
  using Found = Found<WIDTH>;
  static_assert(sizeof(Found) <= Ring::BYTES);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int text_tokens = x.text_tokens, kv_heads = x.kv_heads, head_width = x.head_width;
  const int group = static_cast<int>(x.heads) / kv_heads;
  const int queries = text_tokens * group;
  const int kv_head = blockIdx.x % kv_heads;
  const int split = blockIdx.x / kv_heads % partials.splits;
  const int row = blockIdx.x / kv_heads / partials.splits;
  const int64_t first_partial =
      (static_cast<int64_t>(row * kv_heads + kv_head) * partials.splits + split) * queries;

  // Lane i reads token i's interval.
  int low = 0, high = 0;
  if (lane < text_tokens) {
    low = max(x.low[row * x.text_tokens + lane], 0);
    high = min(x.high[row * x.text_tokens + lane], static_cast<int>(x.image_tokens));
  }
  if (low >= high) low = high = 0;
  int hull_low = high > 0 ? low : INT_MAX, hull_high = high;
  for (int distance = 16; distance > 0; distance /= 2) {
    hull_low = min(hull_low, __shfl_xor_sync(~0u, hull_low, distance));
    hull_high = max(hull_high, __shfl_xor_sync(~0u, hull_high, distance));
  }
  const int hull_tiles = hull_high > 0 ? (hull_high - hull_low + TILE - 1) / TILE : 0;
  const int first_tile = static_cast<int64_t>(hull_tiles) * split / partials.splits;
  const int end_tile = static_cast<int64_t>(hull_tiles) * (split + 1) / partials.splits;
  if (first_tile == end_tile && partials.splits > 1) {
    if (threadIdx.x < queries)
      partials.statistics[first_partial + threadIdx.x] = make_float2(-INFINITY, 0.f);
    return;
  }

  uint8_t* ring = dynamic_shared() + warp * Ring::BYTES;
  const auto* keys = static_cast<const __nv_bfloat16*>(x.k.data) + kv_head * x.k.head_stride;
  const auto* values = static_cast<const __nv_bfloat16*>(x.v.data) + kv_head * x.v.head_stride;
  const auto copy = [&](int tile, int stage) {
    constexpr int LANES = Ring::CHUNKS & -Ring::CHUNKS;  // side by side in a row
    uint8_t* to = ring + stage * Ring::STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < TILE; i += 32 / LANES) {
      const int tile_row = i + lane / LANES;
      const int64_t token = hull_low + tile * TILE + tile_row;
#pragma unroll
      for (int j = 0; j < Ring::CHUNKS; j += LANES) {
        const int chunk = j + lane % LANES;
        const bool valid = token < hull_high && chunk * 8 < head_width;
        const int offset = Ring::offset(tile_row, chunk);
        sm80::copy_async(to + offset, keys + token * x.k.token_stride + chunk * 8, valid);
        sm80::copy_async(to + Ring::TILE_BYTES + offset,
                         values + token * x.v.token_stride + chunk * 8, valid);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < Ring::STAGES; ++i) {
    const int tile = first_tile + warp + i * WARPS;
    if (tile < end_tile) copy(tile, i);
    sm80::copy_commit();
  }

  // The lane's two of the queries, lane / 4 and lane / 4 + 8, as the multiplication's left side.
  uint32_t q[WIDTH / 16][4];
  int visible_low[2], visible_high[2];
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = lane / 4 + 8 * i, token = query / group;
    visible_low[i] = __shfl_sync(~0u, low, token);
    visible_high[i] = __shfl_sync(~0u, high, token);
    const auto* from = static_cast<const __nv_bfloat16*>(x.q.data) + row * x.q.row_stride +
                       token * x.q.token_stride +
                       (kv_head * group + query % group) * x.q.head_stride;
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      uint32_t pair = 0;
      if (query < queries && column < head_width)
        pair = *reinterpret_cast<const uint32_t*>(from + column);
      const float2 numbers = unpack_bf16(pair);
      squares += numbers.x * numbers.x + numbers.y * numbers.y;
      q[j / 2][i + j % 2 * 2] = pair;
    }
    factor[i] = x.scale * LOG2_E;
    if (x.q_norm_epsilon >= 0.f)
      factor[i] *= rsqrtf(quad_sum(squares) / head_width + x.q_norm_epsilon);
  }

  float out[WIDTH / 8][4] = {};
  float running_max[2] = {-INFINITY, -INFINITY}, running_sum[2] = {};
  int stage = 0;
  for (int tile = first_tile + warp; tile < end_tile; tile += WARPS) {
    sm80::copy_wait<Ring::STAGES - 1>();
    __syncwarp();
    const uint8_t* tile_keys = ring + stage * Ring::STAGE_BYTES;
    const uint8_t* tile_values = tile_keys + Ring::TILE_BYTES;

    float scores[2][4] = {};  // 2 x 8 image tokens; of each 2 of the one query and 2 of the other
#pragma unroll
    for (int i = 0; i < WIDTH / 16; ++i) {
      uint32_t k[4];
      sm80::load_matrices(k,
                          tile_keys + Ring::offset(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
      sm80::multiply_add(scores[0], q[i], k[0], k[1]);
      sm80::multiply_add(scores[1], q[i], k[2], k[3]);
    }

    uint32_t weights[4];
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = hull_low + tile * TILE + j / 2 * 8 + lane % 4 * 2 + j % 2;
        float& score = scores[j / 2][2 * i + j % 2];
        score = visible_low[i] <= token && token < visible_high[i] ? score * factor[i] : -INFINITY;
        tile_max = fmaxf(tile_max, score);
      }
      const float new_max = fmaxf(running_max[i], quad_max(tile_max));
      rescale[i] = exp2_fast(running_max[i] - finite(new_max));
      running_max[i] = new_max;
      running_sum[i] *= rescale[i];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float weight = exp2_fast(scores[j][2 * i] - finite(new_max));
        const float next_weight = exp2_fast(scores[j][2 * i + 1] - finite(new_max));
        running_sum[i] += weight + next_weight;
        weights[2 * j + i] = pack_bf16(weight, next_weight);
      }
    }

#pragma unroll
    for (int i = 0; i < WIDTH / 16; ++i) {
      uint32_t v[4];
      sm80::load_matrices_transposed(
          v, tile_values + Ring::offset(lane / 8 % 2 * 8 + lane % 8, 2 * i + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float (&columns)[4] = out[2 * i + j];
        columns[0] *= rescale[0];
        columns[1] *= rescale[0];
        columns[2] *= rescale[1];
        columns[3] *= rescale[1];
        sm80::multiply_add(columns, weights, v[2 * j], v[2 * j + 1]);
      }
    }

    __syncwarp();
    const int next = tile + Ring::STAGES * WARPS;
    if (next < end_tile) copy(next, stage);
    sm80::copy_commit();
    stage = stage + 1 < Ring::STAGES ? stage + 1 : 0;
  }

  // The last tile's readers are past a __syncwarp, and no copy is under way.
  Found& mine = *reinterpret_cast<Found*>(ring);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = lane / 4 + 8 * i;
    const float sum = quad_sum(running_sum[i]);
    if (lane % 4 == 0) {
      mine.max[query] = running_max[i];
      mine.sum[query] = sum;
    }
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
      *reinterpret_cast<float2*>(&mine.out[query][8 * j + 2 * (lane % 4)]) =
          make_float2(out[j][2 * i], out[j][2 * i + 1]);
  }
  __syncthreads();

  const auto found = [&](int warp) -> const Found& {
    return *reinterpret_cast<const Found*>(dynamic_shared() + warp * Ring::BYTES);
  };
  for (int i = threadIdx.x; i < queries * Ring::CHUNKS; i += THREADS) {
    const int query = i / Ring::CHUNKS, column = i % Ring::CHUNKS * 8;
    if (column >= head_width) continue;
    float max = -INFINITY, sum = 0.f, total[8] = {};
#pragma unroll
    for (int j = 0; j < WARPS; ++j) max = fmaxf(max, found(j).max[query]);
#pragma unroll
    for (int j = 0; j < WARPS; ++j) {
      const float weight = exp2_fast(found(j).max[query] - finite(max));
      sum += weight * found(j).sum[query];
#pragma unroll
      for (int c = 0; c < 8; c += 4) {
        const float4 part = *reinterpret_cast<const float4*>(&found(j).out[query][column + c]);
        total[c] += weight * part.x;
        total[c + 1] += weight * part.y;
        total[c + 2] += weight * part.z;
        total[c + 3] += weight * part.w;
      }
    }
    if (partials.splits > 1) {
      auto* to =
          reinterpret_cast<float4*>(partials.out + (first_partial + query) * head_width + column);
      to[0] = make_float4(total[0], total[1], total[2], total[3]);
      to[1] = make_float4(total[4], total[5], total[6], total[7]);
      if (column == 0) partials.statistics[first_partial + query] = make_float2(max, sum);
    } else {
      const int token = query / group, head = kv_head * group + query % group;
      const float inverse = sum != 0.f ? 1.f / sum : 0.f;
      uint4 packed;
      packed.x = pack_bf16(total[0] * inverse, total[1] * inverse);
      packed.y = pack_bf16(total[2] * inverse, total[3] * inverse);
      packed.z = pack_bf16(total[4] * inverse, total[5] * inverse);
      packed.w = pack_bf16(total[6] * inverse, total[7] * inverse);
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(x.out.data) + row * x.out.row_stride +
                                token * x.out.token_stride + head * x.out.head_stride + column) =
          packed;
      if (column == 0) write_lse(x, row, head, token, max, sum);
    }
  }
}

// One block per (row, key/value head, query): each of 4 warps adds up every fourth split, 4
// columns per lane, with weights that every warp works out for itself.
__global__ void __launch_bounds__(THREADS)
    combine(const __grid_constant__ CrossAttentionForward x, const Partials partials) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kv_heads = x.kv_heads, head_width = x.head_width;
  const int group = static_cast<int>(x.heads) / kv_heads;
  const int queries = static_cast<int>(x.text_tokens) * group;
  const int query = blockIdx.x % queries, row_and_head = blockIdx.x / queries;
  const int64_t first_partial =
      static_cast<int64_t>(row_and_head) * partials.splits * queries + query;

  constexpr int SPLITS_PER_LANE = MAX_SPLITS / 32;
  float2 statistics[SPLITS_PER_LANE];  // of splits lane, lane + 32, ...
  float max = -INFINITY, sum = 0.f, weights[SPLITS_PER_LANE];
#pragma unroll
  for (int i = 0; i < SPLITS_PER_LANE; ++i) {
    const int split = lane + 32 * i;
    statistics[i] = split < partials.splits ? partials.statistics[first_partial + split * queries]
                                            : make_float2(-INFINITY, 0.f);
    max = fmaxf(max, statistics[i].x);
  }
  for (int distance = 16; distance > 0; distance /= 2)
    max = fmaxf(max, __shfl_xor_sync(~0u, max, distance));
#pragma unroll
  for (int i = 0; i < SPLITS_PER_LANE; ++i) {
    weights[i] = exp2_fast(statistics[i].x - finite(max));
    sum += weights[i] * statistics[i].y;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);

  const int column = 4 * lane;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < SPLITS_PER_LANE; ++i) {
#pragma unroll
    for (int j = 0; j < 32; j += WARPS) {
      const float weight = __shfl_sync(~0u, weights[i], warp + j);
      if (weight == 0.f || column >= head_width) continue;  // what is there may be no number
      const float4 part = *reinterpret_cast<const float4*>(
          partials.out + (first_partial + (32 * i + warp + j) * queries) * head_width + column);
      total.x += weight * part.x;
      total.y += weight * part.y;
      total.z += weight * part.z;
      total.w += weight * part.w;
    }
  }
  auto* totals = reinterpret_cast<float4*>(dynamic_shared());
  totals[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || column >= head_width) return;
#pragma unroll
  for (int i = 1; i < WARPS; ++i) {
    const float4 part = totals[32 * i + lane];
    total.x += part.x;
    total.y += part.y;
    total.z += part.z;
    total.w += part.w;
  }

  const int row = row_and_head / kv_heads, token = query / group;
  const int head = row_and_head % kv_heads * group + query % group;
  const float inverse = sum != 0.f ? 1.f / sum : 0.f;
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(x.out.data) + row * x.out.row_stride +
                            token * x.out.token_stride + head * x.out.head_stride + column) =
      make_uint2(pack_bf16(total.x * inverse, total.y * inverse),
                 pack_bf16(total.z * inverse, total.w * inverse));
  if (lane == 0) write_lse(x, row, head, token, max, sum);
}

// Two blocks fit a multiprocessor. Several splits need a second kernel, and its launch takes as
// long as reading some megabytes: short rows are split only if most multiprocessors would be idle.
int splits(const CrossAttentionForward& x) {
  const int64_t blocks = x.rows * x.kv_heads, multiprocessors = current_device().multiprocessors;
  const int64_t shortest = 2 * blocks < multiprocessors ? 256 : 1024;  // image tokens
  const int64_t wanted = std::min(2 * multiprocessors / blocks, x.image_tokens / x.rows / shortest);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, MAX_SPLITS));
}

int64_t partial_count(const CrossAttentionForward& x) {
  return x.rows * x.text_tokens * x.heads * splits(x);
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, int64_t blocks, int shared_bytes, void* stream,
                   const CrossAttentionForward& x, const Partials& partials) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, x, partials);
}

template <int WIDTH>
cudaError_t launch_attend(const CrossAttentionForward& x, const Partials& partials, void* stream) {
  return launch(attend<WIDTH>, x.rows * x.kv_heads * partials.splits, WARPS * Ring<WIDTH>::BYTES,
                stream, x, partials);
}

}  // namespace

int64_t workspace_bytes(const CrossAttentionForward& x) {
  if (splits(x) == 1) return 0;
  return partial_count(x) * (x.head_width * sizeof(float) + sizeof(float2));
}

const char* cross_attention(const CrossAttentionForward& x, void* workspace, void* stream) {
  auto* out = static_cast<float*>(workspace);
  const Partials partials = {out, reinterpret_cast<float2*>(out + partial_count(x) * x.head_width),
                             splits(x)};
  cudaError_t error = x.head_width <= 64   ? launch_attend<64>(x, partials, stream)
                      : x.head_width <= 96 ? launch_attend<96>(x, partials, stream)
                                           : launch_attend<128>(x, partials, stream);
  if (error == cudaSuccess && partials.splits > 1)
    error = launch(combine, x.rows * x.heads * x.text_tokens, THREADS * sizeof(float4), stream, x,
                   partials);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megavlm::cuda::decode
