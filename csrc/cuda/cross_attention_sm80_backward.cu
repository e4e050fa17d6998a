// Cross-attention backward for compute capability 8.0 and later.
//
// Two passes instead of one: grad_q by blocks that own queries, then grad_k and grad_v by blocks
// that own image tokens. Both compute the scores, so that there are 7 matrix products where one
// pass needs 5; but nothing is added up in global memory. A token sees few images here: an fp32
// grad_q of atomic additions, its zeroing and its conversion would cost more than two products.
// Besides, the result does not depend on the order in which blocks run.
//
// A text token that sees nothing may hold anything, NaN too; all other operands are to be finite.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "tiles_sm80.cuh"

namespace megavlm::cuda::sm80 {
namespace {

constexpr int QUERIES = 128;      // packed rows of a block that owns queries, 32 for each warp
constexpr int QUERY_TOKENS = 32;  // image tokens of its step
constexpr int TOKENS = 64;        // image tokens of a block that owns them, 16 for each warp
constexpr int TILE = 32;          // packed rows of its step
constexpr int TILE_GROUP = 32;    // tiles that are looked at together

// What the blocks that own image tokens need to know of a packed row. A row that sees nothing or
// does not exist has {0, infinity, 0, 0}: all its probabilities are 0.
struct alignas(16) QueryScalars {
  float scale;          // from score to base-2 logarithm
  float log_sum;        // of the row's exponentials, base 2
  float inverse_rms;    // r
  float delta_times_r;  // delta = dot(grad_out, out)
};

// What the queries of a tile see, leaving out those that see nothing.
struct alignas(16) TileIntervals {
  Interval all, common;
  unsigned seeing_rows;  // bits: those that see something
};

// Division of numbers below 2^31 by the same one: n / value = (n + n * factor / 2^32) / 2^shift.
struct Divisor {
  int value;
  unsigned factor;
  int shift;

  // Quotient and remainder.
  __device__ __forceinline__ int2 divide(int n) const {
    const int quotient = (__umulhi(n, factor) + n) >> shift;
    return make_int2(quotient, n - quotient * value);
  }
};

Divisor divisor(int64_t value) {
  int shift = 0;
  while ((int64_t{1} << shift) < value) ++shift;
  const uint64_t excess = (int64_t{1} << shift) - value;
  return {static_cast<int>(value), static_cast<unsigned>((excess << 32) / value + 1), shift};
}

// Sizes, and what is where in the workspace. Packed rows are padded to whole blocks of queries.
struct Plan {
  int packed_rows, padded_rows, tiles, tile_groups, token_blocks, splits;
  Divisor group, tiles_per_row;
  QueryScalars* scalars;    // (g, b, padded_rows)
  Interval* intervals;      // (b, padded_rows)
  TileIntervals* seen;      // (tiles)
  Interval* seen_by_group;  // (tile_groups)
  float4* partial_sums;     // (splits, g, token_blocks, 2, WIDTH / 8, THREADS); splits > 1 only
  int64_t bytes;
};

// ---- What each tile of queries sees

// A thread per packed row, a warp per tile, a block of 1,024 threads per group of tiles.
__global__ void __launch_bounds__(TILE* TILE_GROUP)
    find_intervals(const __grid_constant__ CrossAttentionBackward x,
                   const __grid_constant__ Plan plan) {
  const int tile = blockIdx.x * TILE_GROUP + warp_index();
  const int2 b_and_tile = plan.tiles_per_row.divide(tile);
  const int b = b_and_tile.x, row = b_and_tile.y * TILE + lane_index();
  const bool exists = tile < plan.tiles && row < plan.packed_rows;
  const Interval interval = exists ? interval_of(x, b, plan.group.divide(row).x) : Interval{0, 0};
  const Interval all = warp_union(interval), common = warp_intersection(interval);
  const unsigned seeing_rows = __ballot_sync(~0u, !interval.empty());
  if (tile < plan.tiles) {
    plan.intervals[static_cast<int64_t>(tile) * TILE + lane_index()] = interval;
    if (lane_index() == 0) plan.seen[tile] = {all, common, seeing_rows};
  }
  Interval* of_warp = reinterpret_cast<Interval*>(dynamic_shared());
  if (lane_index() == 0) of_warp[warp_index()] = all;
  __syncthreads();
  if (warp_index() == 0) {
    const Interval mine = of_warp[lane_index()];
    const Interval of_block{warp_min(mine.low), warp_max(mine.high)};
    if (lane_index() == 0) plan.seen_by_group[blockIdx.x] = of_block;
  }
}

// ---- grad_q

template <int WIDTH>
constexpr int QUERY_SHARED_BYTES = 2 * (QUERIES + QUERY_TOKENS) * Tile<WIDTH>::PITCH;

// Turns scores of the warp's 32 rows into their gradients: probability * (grad_probability -
// delta), 0 for what a row does not see if `masked`, and adds up their products with the scores.
// Each lane gives the interval, scalars and delta of the row of its own index.
template <int COLUMNS>
__device__ __forceinline__ void differentiate(float (&score)[2][COLUMNS / 8][4],
                                              const float (&grad_probability)[2][COLUMNS / 8][4],
                                              float (&product_sum)[4],
                                              const QueryScalars& lane_scalars, float lane_delta,
                                              bool masked, const Interval& interval, int first) {
  first += 2 * (lane_index() % 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = 8 * j + lane_index() / 4;
    const float scale = __shfl_sync(~0u, lane_scalars.scale, row);
    const float log_sum = __shfl_sync(~0u, lane_scalars.log_sum, row);
    const float delta = __shfl_sync(~0u, lane_delta, row);
    int low = INT_MIN, high = INT_MAX;
    if (masked) {
      low = __shfl_sync(~0u, interval.low, row) - first;
      high = __shfl_sync(~0u, interval.high, row) - first;
    }
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& s = score[j / 2][n][j % 2 * 2 + e];
        float probability = exp2_fast(s * scale - log_sum);
        if (8 * n + e < low || 8 * n + e >= high) probability = 0;
        const float grad = probability * (grad_probability[j / 2][n][j % 2 * 2 + e] - delta);
        product_sum[j] += grad * s;
        s = grad;
      }
  }
}

// A block: 128 packed queries of one text row and key/value head, 32 for each of 4 warps, against
// the image tokens from their lowest low to their highest high, 32 a step; a last step of at most
// 16 tokens is 16 wide. Queries and grad_out stay in shared memory, scores and their gradients in
// registers. Values are copied while scores are computed, keys while gradients of probabilities
// are. 80 KiB of shared memory at width 128: two blocks on a multiprocessor.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    differentiate_queries(const __grid_constant__ CrossAttentionBackward x,
                          const __grid_constant__ Plan plan) {
  using T = Tile<WIDTH>;
  const int lane = lane_index();
  const int width = x.head_width;
  const int block = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int row_index = QUERIES * block + threadIdx.x;
  const PackedRow row(x, kv_head, row_index);  // 32 of a warp, one each lane
  const Interval interval = plan.intervals[static_cast<int64_t>(b) * plan.padded_rows + row_index];
  Interval block_sees{INT_MAX, 0};
#pragma unroll
  for (int i = 0; i < QUERIES / TILE; ++i) {
    const Interval tile =
        plan.seen[(b * static_cast<int>(gridDim.x) + block) * (QUERIES / TILE) + i].all;
    block_sees = {min(block_sees.low, tile.low), max(block_sees.high, tile.high)};
  }
  const int begin = block_sees.low, end = block_sees.empty() ? begin : block_sees.high;

  const int queries = warp_index() * 32 * T::PITCH, grad_outs = queries + QUERIES * T::PITCH;
  constexpr int KEYS = 2 * QUERIES * T::PITCH, VALUES = KEYS + QUERY_TOKENS * T::PITCH;
  const auto start_copy = [&](int tile, const View& view, int first) {
    if (first < end) copy_tokens<WIDTH, QUERY_TOKENS>(tile, view, kv_head, first, end, width);
    copy_commit();
  };
  QueryScalars scalars{0, INFINITY, 0, 0};
  float lane_delta = 0;
  if (begin < end) {
    copy_rows<WIDTH>(queries, x.q, row.offset(x.q, b), width);
    copy_rows<WIDTH>(grad_outs, x.grad_out, row.offset(x.grad_out, b), width);
  }
  start_copy(VALUES, x.v, begin);
  start_copy(KEYS, x.k, begin);
  if (begin < end) {
    uint4 out[T::CHUNKS];
    const int64_t from = row.offset(x.out, b);
#pragma unroll
    for (int chunk = 0; chunk < T::CHUNKS; ++chunk)
      out[chunk] = !interval.empty() && 8 * chunk < width
                       ? *reinterpret_cast<const uint4*>(static_cast<const bf16*>(x.out.data) +
                                                         from + 8 * chunk)
                       : uint4{0, 0, 0, 0};
    const float lse = interval.empty() ? INFINITY : x.lse[row.offset_bht(x, b)];
    copy_wait<1>();
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < T::CHUNKS; ++chunk)
      lane_delta += dot(out[chunk], *reinterpret_cast<const uint4*>(dynamic_shared() + grad_outs +
                                                                    T::at(lane, chunk)));
    const float r = inverse_rms<WIDTH>(x, queries);
    if (!interval.empty()) scalars = {x.scale * LOG2_E * r, lse * LOG2_E, r, lane_delta * r};
  }
  plan.scalars[(static_cast<int64_t>(kv_head) * x.rows + b) * plan.padded_rows + row_index] =
      scalars;

  float grad_q[2][WIDTH / 8][4] = {};
  float product_sum[4] = {};  // of scores and their gradients; this lane's part

  const auto step = [&](auto columns, int first) {
    constexpr int COLUMNS = decltype(columns)::value;
    const bool visible = __any_sync(~0u, interval.meets(first, first + COLUMNS));
    float grad_probability[2][COLUMNS / 8][4], score[2][COLUMNS / 8][4];
    if (visible)
      multiply_transposed<WIDTH, COLUMNS>(grad_probability, grad_outs + T::lane_position(),
                                          VALUES + T::lane_position_b());
    copy_wait<0>();
    __syncthreads();  // the step's keys are there, its values no longer in use
    start_copy(VALUES, x.v, first + QUERY_TOKENS);
    if (visible) {
      multiply_transposed<WIDTH, COLUMNS>(score, queries + T::lane_position(),
                                          KEYS + T::lane_position_b());
      const bool masked =
          __any_sync(~0u, !interval.empty() && !interval.covers(first, first + COLUMNS));
      differentiate<COLUMNS>(score, grad_probability, product_sum, scalars, lane_delta, masked,
                             interval, first);
      uint32_t grad_score[2][COLUMNS / 16][4];
      pack_operands<COLUMNS>(grad_score, score);
      add_product<WIDTH, COLUMNS>(grad_q, grad_score, KEYS + T::lane_position());
    }
    copy_wait<0>();
    __syncthreads();  // the next step's values are there, the keys no longer in use
    start_copy(KEYS, x.k, first + QUERY_TOKENS);
  };
  copy_wait<1>();
  __syncthreads();
  for (int first = begin; first < end; first += QUERY_TOKENS)
    if (end - first > 16)
      step(std::integral_constant<int, QUERY_TOKENS>(), first);
    else
      step(std::integral_constant<int, 16>(), first);

  // With u = r q: grad_q = r (scale grad_score . k - u c), c = dot(grad_score, scores) / width.
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row_of_warp = 8 * j + lane / 4;
    const bool empty = __shfl_sync(~0u, interval.empty(), row_of_warp);
    const float r = __shfl_sync(~0u, scalars.inverse_rms, row_of_warp);
    const float c = x.scale * r * quad_sum(product_sum[j]) / width;
    const float of_product = x.scale * r, of_query = x.q_norm_epsilon < 0 ? 0 : r * r * c;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      const float* product = &grad_q[j / 2][n][j % 2 * 2];
      uint32_t& pair = pair_at<WIDTH>(queries, row_of_warp, n);
      const float2 q = unpack_bf16(pair);
      pair = empty ? 0
                   : pack_bf16(of_product * product[0] - of_query * q.x,
                               of_product * product[1] - of_query * q.y);
    }
  }
  const PackedRow grad_row(x, kv_head, QUERIES * block + 32 * warp_index() + lane);
  store_rows<WIDTH, 32>(x.grad_q, grad_row.offset(x.grad_q, b), queries, width);
}

// ---- grad_k and grad_v

// A step's part of shared memory: queries, grad_out, QueryScalars, Intervals.
template <int WIDTH>
struct Stage {
  static constexpr int GRAD_OUTS = TILE * Tile<WIDTH>::PITCH, SCALARS = 2 * GRAD_OUTS,
                       INTERVALS = SCALARS + TILE * sizeof(QueryScalars),
                       BYTES = INTERVALS + TILE * sizeof(Interval);
};

// The tiles of queries that see any of the image tokens [begin, end), among those of a split. All
// lanes of a warp ask together.
class VisibleTiles {
 public:
  __device__ __forceinline__ VisibleTiles(const Plan& plan, int split, int begin, int end)
      : plan_(plan), split_(split), begin_(begin), end_(end) {}

  // -1: no more.
  __device__ __forceinline__ int next() {
    while (tiles_ == 0) {
      while (groups_ == 0) {
        if (next_group_ >= plan_.tile_groups) return -1;
        const int group = next_group_ + lane_index();
        groups_ = __ballot_sync(
            ~0u, group < plan_.tile_groups && plan_.seen_by_group[group].meets(begin_, end_));
        next_group_ += 32;
      }
      first_tile_ = (next_group_ - 32 + __ffs(groups_) - 1) * TILE_GROUP;
      groups_ &= groups_ - 1;
      const int tile = first_tile_ + lane_index();
      tiles_ = __ballot_sync(~0u, tile < plan_.tiles && tile % plan_.splits == split_ &&
                                      plan_.seen[tile].all.meets(begin_, end_));
    }
    const int tile = first_tile_ + __ffs(tiles_) - 1;
    tiles_ &= tiles_ - 1;
    return tile;
  }

 private:
  const Plan& plan_;
  const int split_, begin_, end_;
  unsigned groups_ = 0,
           tiles_ = 0;  // bits: still to come, from next_group_ - 32 and first_tile_ on
  int next_group_ = 0, first_tile_ = 0;
};

// Gradients of the warp's 16 image tokens.
template <int WIDTH>
struct TokenGrads {
  float k[WIDTH / 8][4] = {}, v[WIDTH / 8][4] = {};
};

// Writes a warp's gradients, through shared memory that nothing else uses.
template <int WIDTH>
__device__ __forceinline__ void store_grads(const CrossAttentionBackward& x, int kv_head,
                                            int token_block, const TokenGrads<WIDTH>& grads) {
  using T = Tile<WIDTH>;
  const int lane = lane_index();
  const int k_tile = 16 * warp_index() * T::PITCH, v_tile = k_tile + TOKENS * T::PITCH;
#pragma unroll
  for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + lane / 4;
      pair_at<WIDTH>(k_tile, row, n) =
          pack_bf16(x.scale * grads.k[n][2 * h], x.scale * grads.k[n][2 * h + 1]);
      pair_at<WIDTH>(v_tile, row, n) = pack_bf16(grads.v[n][2 * h], grads.v[n][2 * h + 1]);
    }
  const int64_t token = TOKENS * token_block + 16 * warp_index() + lane;
  const bool exists = lane < 16 && token < x.image_tokens;
  const auto offset = [&](const View& view) {
    return exists ? kv_head * view.head_stride + token * view.token_stride : -1;
  };
  store_rows<WIDTH, 16>(x.grad_k, offset(x.grad_k), k_tile, x.head_width);
  store_rows<WIDTH, 16>(x.grad_v, offset(x.grad_v), v_tile, x.head_width);
}

// A block's share of Plan::partial_sums.
template <int WIDTH>
__device__ __forceinline__ float4* partial_sums_of(const Plan& plan, int kv_heads, int split,
                                                   int kv_head, int token_block) {
  const int64_t block =
      (static_cast<int64_t>(split) * kv_heads + kv_head) * plan.token_blocks + token_block;
  return plan.partial_sums + block * (2 * WIDTH / 8 * THREADS) + threadIdx.x;
}

// A block: 64 image tokens of one key/value head, 16 for each of 4 warps, against the tiles of 32
// packed queries that see any of them, or every plan.splits-th of these. Scores are computed
// transposed, image tokens by queries, so that probabilities and their gradients are operands of
// the next products without leaving registers; the warp's keys and values stay in registers as
// well. Two stages of shared memory: the next tile is copied while one is worked on. 34 KiB at
// width 128; registers allow two blocks on a multiprocessor.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    differentiate_tokens(const __grid_constant__ CrossAttentionBackward x,
                         const __grid_constant__ Plan plan) {
  using T = Tile<WIDTH>;
  using S = Stage<WIDTH>;
  const int lane = lane_index();
  const int width = x.head_width, image_tokens = x.image_tokens;
  const int token_block = blockIdx.x, split = blockIdx.y, kv_head = blockIdx.z;
  const int block_first = TOKENS * token_block, block_end = min(block_first + TOKENS, image_tokens);
  const int warp_first = block_first + 16 * warp_index();

  VisibleTiles visible_tiles(plan, split, block_first, block_end);
  int tile = visible_tiles.next();
  uint32_t keys[WIDTH / 16][4], values[WIDTH / 16][4];
  if (tile >= 0) {
    copy_tokens<WIDTH, TOKENS>(0, x.k, kv_head, block_first, block_end, width);
    copy_tokens<WIDTH, TOKENS>(S::BYTES, x.v, kv_head, block_first, block_end, width);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const int position = 16 * warp_index() * T::PITCH + T::lane_position();
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
      load_fragment(keys[k], T::right(position, 16 * k));
      load_fragment(values[k], T::right(S::BYTES + position, 16 * k));
    }
    __syncthreads();
  }

  const BlockCopy<WIDTH> copy;
  const int64_t q_head = times_stride(kv_head * plan.group.value, x.q.head_stride),
                grad_out_head = times_stride(kv_head * plan.group.value, x.grad_out.head_stride);
  // Rows that see nothing become zeros: probabilities of 0 would not keep a NaN from others.
  const auto start_copy = [&](int tile, unsigned seeing_rows, int stage) {
    if (tile >= 0) {
      const int2 b_and_tile = plan.tiles_per_row.divide(tile);
      const auto row_of = [&](const View& view, int64_t head, int2 token_and_head) {
        return static_cast<const bf16*>(view.data) + head +
               times_stride(b_and_tile.x, view.row_stride) +
               times_stride(token_and_head.x, view.token_stride) +
               times_stride(token_and_head.y, view.head_stride) + 8 * copy.chunk;
      };
      if (copy.takes_part())
#pragma unroll
        for (int i = 0; i < TILE; i += copy.ROWS) {
          const bool valid = seeing_rows >> (copy.row + i) & 1 && 8 * copy.chunk < width;
          const int2 token_and_head = plan.group.divide(b_and_tile.y * TILE + copy.row + i);
          copy_async(copy.target(stage, i), row_of(x.q, q_head, token_and_head), valid);
          copy_async(copy.target(stage + S::GRAD_OUTS, i),
                     row_of(x.grad_out, grad_out_head, token_and_head), valid);
        }
      if (warp_index() == 0)
        copy_async(dynamic_shared() + stage + S::SCALARS + lane * sizeof(QueryScalars),
                   plan.scalars + (static_cast<int64_t>(kv_head) * plan.tiles + tile) * TILE + lane,
                   true);
      if (warp_index() == 1 && lane < TILE / 2)
        copy_async(dynamic_shared() + stage + S::INTERVALS + 2 * lane * sizeof(Interval),
                   plan.intervals + static_cast<int64_t>(tile) * TILE + 2 * lane, true);
    }
    copy_commit();
  };
  TileIntervals next_seen{};
  if (tile >= 0) next_seen = plan.seen[tile];
  start_copy(tile, next_seen.seeing_rows, 0);

  TokenGrads<WIDTH> grads;
  for (int stage = 0; tile >= 0; stage = S::BYTES - stage) {
    const int next_tile = visible_tiles.next();
    const TileIntervals seen = next_seen;
    if (next_tile >= 0) next_seen = plan.seen[next_tile];
    const bool all_visible = seen.common.covers(warp_first, warp_first + 16);
    copy_wait<0>();
    __syncthreads();  // the tile is there, the other stage no longer in use
    start_copy(next_tile, next_seen.seeing_rows, S::BYTES - stage);
    tile = next_tile;
    if (!seen.all.meets(warp_first, warp_first + 16)) continue;

#pragma unroll 1
    for (int first = 0; first < TILE; first += 16) {
      const int queries = stage + first * T::PITCH, grad_outs = queries + S::GRAD_OUTS;
      float score[2][4] = {}, grad_probability[2][4] = {};
#pragma unroll
      for (int k = 0; k < WIDTH / 16; ++k) {
        uint32_t q[4], grad_out[4];
        load_fragment(q, T::right(queries + T::lane_position_b(), 16 * k));
        load_fragment(grad_out, T::right(grad_outs + T::lane_position_b(), 16 * k));
        multiply_add(score[0], keys[k], q[0], q[1]);
        multiply_add(score[1], keys[k], q[2], q[3]);
        multiply_add(grad_probability[0], values[k], grad_out[0], grad_out[1]);
        multiply_add(grad_probability[1], values[k], grad_out[2], grad_out[3]);
      }

      uint32_t probability[4], grad_score[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float p[2][2], g[2][2];  // [image token][query]
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = first + 8 * n + 2 * (lane % 4) + e;
          const QueryScalars of = *reinterpret_cast<const QueryScalars*>(
              dynamic_shared() + stage + S::SCALARS + query * sizeof(QueryScalars));
          Interval interval{0, INT_MAX};
          if (!all_visible)
            interval = *reinterpret_cast<const Interval*>(dynamic_shared() + stage + S::INTERVALS +
                                                          query * sizeof(Interval));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int token = warp_first + 8 * h + lane / 4;
            p[h][e] = exp2_fast(score[n][2 * h + e] * of.scale - of.log_sum);
            if (token < interval.low || token >= interval.high) p[h][e] = 0;
            g[h][e] =
                p[h][e] * (grad_probability[n][2 * h + e] * of.inverse_rms - of.delta_times_r);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          probability[2 * n + h] = pack_bf16(p[h][0], p[h][1]);
          grad_score[2 * n + h] = pack_bf16(g[h][0], g[h][1]);
        }
      }

#pragma unroll
      for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t q[4], grad_out[4];
        load_fragment_transposed(grad_out, T::right(grad_outs + T::lane_position(), 16 * n));
        load_fragment_transposed(q, T::right(queries + T::lane_position(), 16 * n));
        multiply_add(grads.v[2 * n], probability, grad_out[0], grad_out[1]);
        multiply_add(grads.v[2 * n + 1], probability, grad_out[2], grad_out[3]);
        multiply_add(grads.k[2 * n], grad_score, q[0], q[1]);
        multiply_add(grads.k[2 * n + 1], grad_score, q[2], q[3]);
      }
    }
  }

  if (plan.splits > 1) {
    float4* sums = partial_sums_of<WIDTH>(plan, x.kv_heads, split, kv_head, token_block);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      sums[n * THREADS] = make_float4(grads.k[n][0], grads.k[n][1], grads.k[n][2], grads.k[n][3]);
      sums[(WIDTH / 8 + n) * THREADS] =
          make_float4(grads.v[n][0], grads.v[n][1], grads.v[n][2], grads.v[n][3]);
    }
  } else {
    __syncthreads();
    store_grads(x, kv_head, token_block, grads);
  }
}

// A block: 8 columns of grad_k or grad_v of the 64 image tokens of one key/value head that
// plan.splits blocks of differentiate_tokens shared; each thread adds up what it held there.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
    add_splits(const __grid_constant__ CrossAttentionBackward x,
               const __grid_constant__ Plan plan) {
  const int block = blockIdx.x, token_block = blockIdx.y, kv_head = blockIdx.z;
  const bool of_values = block >= WIDTH / 8;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int split = 0; split < plan.splits; ++split) {
    const float4 part =
        partial_sums_of<WIDTH>(plan, x.kv_heads, split, kv_head, token_block)[block * THREADS];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  const View& view = of_values ? x.grad_v : x.grad_k;
  const float scale = of_values ? 1 : x.scale;
  const uint32_t pairs[2] = {pack_bf16(scale * sum.x, scale * sum.y),
                             pack_bf16(scale * sum.z, scale * sum.w)};
  const int column = block % (WIDTH / 8) * 8 + lane_index() % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = TOKENS * token_block + 16 * warp_index() + 8 * h + lane_index() / 4;
    if (token < x.image_tokens && column < x.head_width)
      *reinterpret_cast<uint32_t*>(static_cast<bf16*>(view.data) +
                                   times_stride(kv_head, view.head_stride) +
                                   times_stride(token, view.token_stride) + column) = pairs[h];
  }
}

// ---- The call

int padded_width(const CrossAttention& x) {
  return x.head_width <= 64 ? 64 : x.head_width <= 96 ? 96 : 128;
}

// How many blocks share the queries of 64 image tokens: what takes least time if two blocks run on
// each multiprocessor and all queries see all image tokens. Time is in tiles; what a block does
// before and after them, and add_splits, are estimates.
int choose_splits(int64_t blocks, int64_t tiles) {
  constexpr int MAX_SPLITS = 64, BLOCK_TIME = 4, ADD_TIME = 3, SPLITS_ADDED_PER_TIME = 16;
  const int64_t at_once = 2 * current_device().multiprocessors;
  if (blocks >= 2 * at_once) return 1;
  int best = 1;
  int64_t best_time = INT64_MAX;
  for (int splits = 1; splits <= std::min<int64_t>(MAX_SPLITS, tiles); ++splits) {
    const int64_t rounds = (blocks * splits + at_once - 1) / at_once;
    const int64_t time = rounds * ((tiles + splits - 1) / splits + BLOCK_TIME) +
                         (splits > 1 ? ADD_TIME + splits / SPLITS_ADDED_PER_TIME : 0);
    if (time < best_time) best = splits, best_time = time;
  }
  return best;
}

Plan make_plan(const CrossAttentionBackward& x, void* workspace) {
  Plan plan{};
  const int64_t packed_rows = x.text_tokens * (x.heads / x.kv_heads);
  const int64_t padded_rows = (packed_rows + QUERIES - 1) / QUERIES * QUERIES;
  const int64_t tiles = x.rows * padded_rows / TILE;
  const int64_t token_blocks = (x.image_tokens + TOKENS - 1) / TOKENS;
  plan.packed_rows = packed_rows;
  plan.padded_rows = padded_rows;
  plan.tiles = tiles;
  plan.tile_groups = (tiles + TILE_GROUP - 1) / TILE_GROUP;
  plan.token_blocks = token_blocks;
  plan.group = divisor(x.heads / x.kv_heads);
  plan.tiles_per_row = divisor(padded_rows / TILE);
  plan.splits = choose_splits(token_blocks * x.kv_heads, tiles);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        static_cast<uint8_t*>(workspace) + plan.bytes);
    plan.bytes += (count * static_cast<int64_t>(sizeof(*pointer)) + 255) / 256 * 256;
  };
  take(plan.scalars, x.rows * x.kv_heads * padded_rows);
  take(plan.intervals, x.rows * padded_rows);
  take(plan.seen, tiles);
  take(plan.seen_by_group, plan.tile_groups);
  if (plan.splits > 1)
    take(plan.partial_sums,
         plan.splits * x.kv_heads * token_blocks * 2 * (padded_width(x) / 8) * THREADS);
  return plan;
}

using Kernel = void (*)(CrossAttentionBackward, Plan);

cudaError_t launch(Kernel kernel, dim3 blocks, int threads, int shared_bytes,
                   const CrossAttentionBackward& x, const Plan& plan, void* stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, x, plan);
}

template <int WIDTH>
const char* launch_all(const CrossAttentionBackward& x, void* workspace, void* stream) {
  const Plan plan = make_plan(x, workspace);
  cudaError_t error = launch(find_intervals, plan.tile_groups, TILE * TILE_GROUP,
                             TILE_GROUP * sizeof(Interval), x, plan, stream);
  if (error == cudaSuccess)
    error =
        launch(differentiate_queries<WIDTH>, dim3(plan.padded_rows / QUERIES, x.kv_heads, x.rows),
               THREADS, QUERY_SHARED_BYTES<WIDTH>, x, plan, stream);
  if (error == cudaSuccess)
    error = launch(differentiate_tokens<WIDTH>, dim3(plan.token_blocks, plan.splits, x.kv_heads),
                   THREADS, 2 * Stage<WIDTH>::BYTES, x, plan, stream);
  if (error == cudaSuccess && plan.splits > 1)
    error = launch(add_splits<WIDTH>, dim3(2 * WIDTH / 8, plan.token_blocks, x.kv_heads), THREADS,
                   0, x, plan, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_bytes(const CrossAttentionBackward& x) { return make_plan(x, nullptr).bytes; }

const char* cross_attention_backward(const CrossAttentionBackward& x, void* workspace,
                                     void* stream) {
  const int64_t packed_rows = x.text_tokens * (x.heads / x.kv_heads) + QUERIES;
  if (x.rows * packed_rows > INT_MAX || x.image_tokens > INT_MAX - TOKENS)
    return "cross-attention has too many tokens";
  for (const View& view : {x.q, x.k, x.v, x.out, x.grad_out, x.grad_q, x.grad_k, x.grad_v})
    if (!strides_fit(view)) return "a stride of cross-attention does not fit in 32 bits";
  switch (padded_width(x)) {
    case 64:
      return launch_all<64>(x, workspace, stream);
    case 96:
      return launch_all<96>(x, workspace, stream);
    default:
      return launch_all<128>(x, workspace, stream);
  }
}

}  // namespace megavlm::cuda::sm80
