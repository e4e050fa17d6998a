// Cross-attention forward for compute capability 8.0 and later.
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "tiles_sm80.cuh"

namespace megavlm::cuda::sm80 {
namespace {

constexpr int QUERIES = 128;  // packed rows of a block, 32 for each warp
constexpr int TOKENS = 64;    // image tokens of a step
constexpr int SLOTS = 3;      // of shared memory, each for the keys or the values of a step

template <int WIDTH>
constexpr int SHARED_BYTES = (QUERIES + SLOTS * TOKENS) * Tile<WIDTH>::PITCH;

// What a warp keeps of its 32 queries. A lane holds parts of four rows of each fragment: row j is
// 8 j + lane / 4.
template <int WIDTH>
struct Softmax {
  float out[2][WIDTH / 8][4] = {};                                  // of 16 rows each
  float maximum[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // of the unscaled scores
  float sum[4] = {};                                                // this lane's part
};

// Hides what the rows do not see of the scores of image tokens [first, first + COLUMNS). Each lane
// gives the interval of the row of its own index.
template <int COLUMNS>
__device__ __forceinline__ void mask(float (&score)[2][COLUMNS / 8][4], const Interval& interval,
                                     int first) {
  first += 2 * (lane_index() % 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = 8 * j + lane_index() / 4;
    const int low = __shfl_sync(~0u, interval.low, row) - first;
    const int high = __shfl_sync(~0u, interval.high, row) - first;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < low || 8 * n + e >= high) score[j / 2][n][j % 2 * 2 + e] = -INFINITY;
  }
}

// Turns scores into probabilities, up to a factor, and brings what has been summed to that factor.
template <int WIDTH, int COLUMNS>
__device__ __forceinline__ void exponentiate(float (&score)[2][COLUMNS / 8][4],
                                             Softmax<WIDTH>& softmax, float lane_scale) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = j / 2, h = j % 2 * 2;
    float maximum = softmax.maximum[j];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
      maximum = fmaxf(maximum, fmaxf(score[i][n][h], score[i][n][h + 1]));
    maximum = quad_max(maximum);
    const float scale = __shfl_sync(~0u, lane_scale, 8 * j + lane_index() / 4);
    const float shift = maximum == -INFINITY ? 0 : maximum * scale;
    const float rescale = exp2_fast(softmax.maximum[j] * scale - shift);
    softmax.maximum[j] = maximum;
    softmax.sum[j] *= rescale;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) softmax.out[i][n][h + e] *= rescale;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = score[i][n][h + e];
        x = exp2_fast(x * scale - shift);
        softmax.sum[j] += x;
      }
  }
}

// A block: 128 packed queries of one text row and key/value head, 32 for each of 4 warps, against
// the image tokens from their lowest low to their highest high, 64 a step; a last step of at most
// 16 tokens (an image of 257 leaves 1) is 16 wide. Keys and values take turns in a ring of three
// slots, so that two copies are under way while tensor cores work. Scores, probabilities and sums
// stay in registers. 80 KiB of shared memory at width 128: two blocks on a multiprocessor.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    forward(const __grid_constant__ CrossAttentionForward x) {
  using T = Tile<WIDTH>;
  const int lane = lane_index();
  const int width = x.head_width, text_tokens = x.text_tokens;
  const int group = static_cast<int>(x.heads) / static_cast<int>(x.kv_heads);
  const int tile = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const PackedRow row(x, kv_head, QUERIES * tile + threadIdx.x);  // 32 of a warp, one each lane

  const Interval interval = row.interval(x, b);
  Interval block_sees{INT_MAX, 0};  // each warp looks at all tokens of the block
  const int last_token = min((QUERIES * tile + QUERIES - 1) / group, text_tokens - 1);
  for (int token = QUERIES * tile / group + lane; token <= last_token; token += 32) {
    const Interval other = interval_of(x, b, token);
    if (!other.empty())
      block_sees = {min(block_sees.low, other.low), max(block_sees.high, other.high)};
  }
  block_sees = {warp_min(block_sees.low), warp_max(block_sees.high)};
  const int begin = block_sees.low, end = block_sees.empty() ? begin : block_sees.high;

  const int queries = warp_index() * 32 * T::PITCH;  // this warp's tile
  const auto tile_of = [](int slot) { return (QUERIES + slot % SLOTS * TOKENS) * T::PITCH; };
  const auto start_copy = [&](int slot, const View& view, int first) {
    if (first < end) copy_tokens<WIDTH, TOKENS>(tile_of(slot), view, kv_head, first, end, width);
    copy_commit();
  };
  if (begin < end) copy_rows<WIDTH>(queries, x.q, row.offset(x.q, b), width);
  start_copy(0, x.k, begin);
  start_copy(1, x.v, begin);

  Softmax<WIDTH> softmax;
  copy_wait<1>();
  __syncwarp();
  const float scale = x.scale * LOG2_E * (begin < end ? inverse_rms<WIDTH>(x, queries) : 1);
  // Keys are in this slot, values in the next; the one after is free.
  int slot = 0;
  const auto step = [&](auto columns, int first) {
    constexpr int COLUMNS = decltype(columns)::value;
    const bool visible = __any_sync(~0u, interval.meets(first, first + COLUMNS));
    uint32_t probability[2][COLUMNS / 16][4];
    copy_wait<1>();
    __syncthreads();  // the step's keys are there, the values before them no longer in use
    start_copy(slot + 2, x.k, first + TOKENS);
    if (visible) {
      float score[2][COLUMNS / 8][4];
      multiply_transposed<WIDTH, COLUMNS>(score, queries + T::lane_position(),
                                          tile_of(slot) + T::lane_position_b());
      if (!__all_sync(~0u, interval.empty() || interval.covers(first, first + COLUMNS)))
        mask<COLUMNS>(score, interval, first);
      exponentiate<WIDTH, COLUMNS>(score, softmax, scale);
      pack_operands<COLUMNS>(probability, score);
    }
    copy_wait<1>();
    __syncthreads();  // the same with keys and values exchanged
    start_copy(slot, x.v, first + TOKENS);
    if (visible)
      add_product<WIDTH, COLUMNS>(softmax.out, probability, tile_of(slot + 1) + T::lane_position());
    slot = (slot + 2) % SLOTS;
  };
  for (int first = begin; first < end; first += TOKENS)
    if (end - first > 16)
      step(std::integral_constant<int, TOKENS>(), first);
    else
      step(std::integral_constant<int, 16>(), first);

  // The warp's output replaces its queries, which no other warp reads. The row is worked out anew:
  // written this way the compiler does not hold it in registers, which the loop needs.
  const PackedRow out_row(x, kv_head, QUERIES * tile + 32 * warp_index() + lane);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = 8 * j + lane / 4;
    const bool empty = __shfl_sync(~0u, interval.empty(), r);
    const float sum = quad_sum(softmax.sum[j]);
    const float inverse = 1 / sum, row_scale = __shfl_sync(~0u, scale, r);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      const float* out = &softmax.out[j / 2][n][j % 2 * 2];
      pair_at<WIDTH>(queries, r, n) = empty ? 0 : pack_bf16(out[0] * inverse, out[1] * inverse);
    }
    const int64_t index = __shfl_sync(~0u, out_row.offset_bht(x, b), r);
    if (lane % 4 == 0 && index >= 0)
      x.lse[index] = empty ? -INFINITY : LN_2 * (softmax.maximum[j] * row_scale + log2f(sum));
  }
  store_rows<WIDTH, 32>(x.out, out_row.offset(x.out, b), queries, width);
}

template <int WIDTH>
const char* launch(const CrossAttentionForward& x, void* stream) {
  const int64_t packed_rows = x.text_tokens * (x.heads / x.kv_heads);
  if (x.rows > 65535) return "cross-attention has more than 65,535 rows";  // a grid's limit
  if (packed_rows > INT_MAX - QUERIES || x.image_tokens > INT_MAX - TOKENS)
    return "cross-attention has too many tokens";
  if (!strides_fit(x.q) || !strides_fit(x.k) || !strides_fit(x.v) || !strides_fit(x.out))
    return "a stride of cross-attention does not fit in 32 bits";
  cudaError_t error = cudaFuncSetAttribute(
      forward<WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<WIDTH>);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((packed_rows + QUERIES - 1) / QUERIES, x.kv_heads, x.rows);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED_BYTES<WIDTH>;
  config.stream = static_cast<cudaStream_t>(stream);
  error = cudaLaunchKernelEx(&config, forward<WIDTH>, x);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* cross_attention(const CrossAttentionForward& x, void* stream) {
  if (x.head_width <= 64) return launch<64>(x, stream);
  if (x.head_width <= 96) return launch<96>(x, stream);
  return launch<128>(x, stream);
}

}  // namespace megavlm::cuda::sm80
