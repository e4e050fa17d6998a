// The backward pass of cross-attention on Hopper. Image tokens stay where they are and queries
// stream past them: the gradients of keys and values gather in registers, those of queries in
// memory. Five kernels: prepare, plan, multiply, finish_queries, finish_keys.
//
// A text token that sees nothing may hold anything, NaN too; all other operands are to be finite.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <sm90.cuh>
#include <type_traits>

#include "kernels.h"
#include "tiles_sm90.cuh"

namespace megavlm::cuda::sm90 {
namespace {

using namespace megavlm::sm90;

constexpr int ROWS = 80;    // of a tile of queries
constexpr int BLOCK = 128;  // image tokens, 64 for each consumer warpgroup
constexpr int STAGES = 2;   // tiles of queries in shared memory
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
static_assert(MAX_GROUP <= ROWS);

// Rows of text are taken in pieces whose accumulator has at most this size (or are one row).
constexpr int64_t ACCUMULATOR_BYTES = 256 << 20;

// What the products need to know of a tile's rows. With a = multiplier, probabilities are
// p = 2^(a * q.k - log2_sum), and p * (a * grad_out.v - delta) is their logits' gradient times a:
// its products with keys and with queries both lack the factor ln 2 only.
struct alignas(16) TileRecord {
  Interval seen;           // the union of the tokens' intervals
  Interval common;         // their intersection; 0, 0: some token sees nothing
  float multiplier[ROWS];  // scale * log2(e) / rms(q)
  float log2_sum[ROWS];    // log2(e) * lse; infinity: the row takes no part
  float delta[ROWS];       // multiplier * grad_out.out
  int low[ROWS], high[ROWS];
};
static_assert(sizeof(TileRecord) % 16 == 0);

// Image tokens are divided into blocks, each row's text tokens into tiles.
struct Sizes {
  int kv_heads, group, tile_tokens, row_tiles, tiles, image_blocks;
};

// Work on an image block for one key/value head: entries [begin, end) of the block's list of tiles.
struct Item {
  int block, begin, end;
};

constexpr int PLAN_THREADS = 256, PLAN_WARPS = PLAN_THREADS / 32;
constexpr int MIN_ITEM_TILES = 4;  // and up to PLAN_THREADS - 1 more

struct Counters {
  int lists;                   // written
  int items;                   // of each key/value head
  int taken;                   // items of all heads
  int possible[PLAN_THREADS];  // items of each head if they had MIN_ITEM_TILES + index tiles
};

// Accumulators are kept in the order of wgmma's registers: element i of thread t at
// [i / 4][t][i % 4].
struct Workspace {
  float* grad_keys;     // (image block, g, warpgroup, {key, value}, WIDTH / 8, 128, 4)
  float* grad_queries;  // (tile, g, WIDTH / 64, ROWS / 8, 128, 4), transposed: rows are columns
  TileRecord* records;  // (tile, g); undefined where the tile sees nothing
  Interval* seen;       // (tile), as in the records
  int* lists;           // (image block, tile): the tiles that see some of the block, ascending
  int* list_lengths;    // (image block)
  Item* items;
  Counters* counters;
};

struct Problem : CrossAttentionBackward {
  int multiprocessors;
  Sizes sizes;
  Workspace workspace;
};

__device__ __forceinline__ __nv_bfloat16* row_of(const View& view, int row, int token, int head) {
  return static_cast<__nv_bfloat16*>(view.data) + row * view.row_stride +
         token * view.token_stride + head * view.head_stride;
}

__device__ __forceinline__ bool meet(Interval seen, int first, int tokens) {
  return seen.low < first + tokens && seen.high > first;
}

template <int WIDTH>
__device__ __forceinline__ float* query_accumulator(const Problem& x, int tile, int g) {
  return x.workspace.grad_queries + (int64_t{tile} * x.sizes.kv_heads + g) * (ROWS * WIDTH);
}

template <int WIDTH>
__device__ __forceinline__ float* key_accumulator(const Problem& x, int block, int g) {
  return x.workspace.grad_keys + (int64_t{block} * x.sizes.kv_heads + g) * (2 * BLOCK * WIDTH);
}

__device__ __forceinline__ void unpack(float (&to)[8], const void* from) {
  const uint4 chunk = __ldg(static_cast<const uint4*>(from));
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack_bf16(pairs[i]);
    to[2 * i] = two.x;
    to[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
          pack_bf16(x[6], x[7])};
}

// ---- prepare: one block of 256 threads per tile and key/value head, WIDTH / 8 threads per row.
// Writes the tile's record and clears its accumulator. Bound by memory: reads q, grad_out, out.

constexpr int PREPARE_THREADS = 256;

template <int WIDTH>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare(const __grid_constant__ Problem x) {
  constexpr int LANES = WIDTH / 8, ROWS_AT_ONCE = PREPARE_THREADS / LANES;
  const int tile = blockIdx.x, g = blockIdx.y, group = x.sizes.group;
  const int b = tile / x.sizes.row_tiles, first = tile % x.sizes.row_tiles * x.sizes.tile_tokens;
  const int tokens = min(x.sizes.tile_tokens, static_cast<int>(x.text_tokens) - first);
  const int32_t* low = x.low + b * x.text_tokens + first;
  const int32_t* high = x.high + b * x.text_tokens + first;
  const int image_tokens = x.image_tokens;

  const auto [seen, common] = seen_by(low, high, tokens, image_tokens);
  if (g == 0 && threadIdx.x == 0) x.workspace.seen[tile] = seen;
  if (g == 0 && tile == 0)
    for (int i = threadIdx.x; i < sizeof(Counters) / sizeof(int); i += PREPARE_THREADS)
      reinterpret_cast<int*>(x.workspace.counters)[i] = 0;
  if (seen.low >= seen.high) return;
  TileRecord& record = x.workspace.records[int64_t{tile} * x.kv_heads + g];
  if (threadIdx.x == 0) {
    record.seen = seen;
    record.common = common;
  }

  auto* accumulator = reinterpret_cast<float4*>(query_accumulator<WIDTH>(x, tile, g));
  for (int i = threadIdx.x; i < ROWS * WIDTH / 4; i += PREPARE_THREADS)
    accumulator[i] = make_float4(0.f, 0.f, 0.f, 0.f);

  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int i = 0; i < (ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; ++i) {
    const int row = i * ROWS_AT_ONCE + threadIdx.x / LANES;
    const int token = row / group, head = g * group + row % group;
    const bool exists = token < tokens;
    float squares = 0.f, delta = 0.f;
    if (exists && 8 * lane < x.head_width) {
      float q[8], out[8], grad_out[8];
      unpack(q, row_of(x.q, b, first + token, head) + 8 * lane);
      unpack(out, row_of(x.out, b, first + token, head) + 8 * lane);
      unpack(grad_out, row_of(x.grad_out, b, first + token, head) + 8 * lane);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        squares += q[j] * q[j];
        delta += out[j] * grad_out[j];
      }
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
      squares += __shfl_xor_sync(~0u, squares, lanes);
      delta += __shfl_xor_sync(~0u, delta, lanes);
    }
    if (lane == 0 && row < ROWS) {
      const Interval one =
          exists ? clamped_interval(__ldg(low + token), __ldg(high + token), image_tokens)
                 : Interval{0, 0};
      const bool sees = one.low < one.high;
      float multiplier = 0.f, log2_sum = INFINITY;
      if (sees) {
        multiplier = x.scale * LOG2_E;
        if (x.q_norm_epsilon >= 0.f)
          multiplier *= rsqrtf(squares / x.head_width + x.q_norm_epsilon);
        log2_sum = LOG2_E * __ldg(x.lse + (b * x.heads + head) * x.text_tokens + first + token);
      }
      record.multiplier[row] = multiplier;
      record.log2_sum[row] = log2_sum;
      record.delta[row] = sees ? multiplier * delta : 0.f;
      record.low[row] = one.low;
      record.high[row] = one.high;
    }
  }
}

// ---- plan: one block of 256 threads per block of image tokens lists the tiles that see it; the
// last one to end divides the lists into items.

constexpr int ITEM_COST = 3;  // of keys, values and their gradients, in tiles

// The sum of the lower threads' values; adds that of all threads to `total`.
__device__ __forceinline__ int sum_before(int value, int* warp_sums, int& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int lower = __shfl_up_sync(~0u, sum, lanes);
    if (lane >= lanes) sum += lower;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
#pragma unroll
  for (int i = 0; i < PLAN_WARPS; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  __syncthreads();
  return before;
}

__device__ __forceinline__ int64_t min_over_threads(int64_t x, int64_t* warp_values) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = min(x, __shfl_xor_sync(~0u, x, lanes));
  if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PLAN_WARPS; ++i) x = min(x, warp_values[i]);
  __syncthreads();
  return x;
}

__device__ __forceinline__ int items_of(int length, int item_tiles) {
  return (length + item_tiles - 1) / item_tiles;
}

// Each thread judges a number of tiles per item; taken is the one by which all end first. Then each
// divides the lists of some successive blocks.
__device__ __forceinline__ void divide_lists(const Problem& x, int64_t* shared) {
  const int64_t items = __ldcg(x.workspace.counters->possible + threadIdx.x);
  const int64_t rounds = (items * x.sizes.kv_heads + x.multiprocessors - 1) / x.multiprocessors;
  const int64_t time = rounds * (MIN_ITEM_TILES + threadIdx.x + ITEM_COST);
  const int64_t best = min_over_threads(time * PLAN_THREADS + threadIdx.x, shared);
  const int item_tiles = MIN_ITEM_TILES + static_cast<int>(best % PLAN_THREADS);

  const int blocks = x.sizes.image_blocks;
  const int blocks_each = (blocks + PLAN_THREADS - 1) / PLAN_THREADS;
  const int begin = min(static_cast<int>(threadIdx.x) * blocks_each, blocks);
  const int end = min(begin + blocks_each, blocks);
  int own = 0, total = 0;
  for (int block = begin; block < end; ++block)
    own += items_of(__ldcg(x.workspace.list_lengths + block), item_tiles);
  Item* item = x.workspace.items + sum_before(own, reinterpret_cast<int*>(shared), total);
  for (int block = begin; block < end; ++block) {
    const int64_t length = __ldcg(x.workspace.list_lengths + block);
    const int parts = items_of(length, item_tiles);
    for (int i = 0; i < parts; ++i)
      *item++ = {block, static_cast<int>(length * i / parts),
                 static_cast<int>(length * (i + 1) / parts)};
  }
  if (threadIdx.x == 0) x.workspace.counters->items = total;
}

__global__ void __launch_bounds__(PLAN_THREADS) plan(const __grid_constant__ Problem x) {
  auto* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  auto* shared_ints = reinterpret_cast<int*>(shared);
  const int tiles = x.sizes.tiles;
  int* entries = x.workspace.lists + int64_t{blockIdx.x} * tiles;
  int length = 0;
  for (int first = 0; first < tiles; first += PLAN_THREADS) {
    const int tile = first + threadIdx.x;
    const bool meets = tile < tiles && meet(x.workspace.seen[tile], blockIdx.x * BLOCK, BLOCK);
    int* entry = entries + length;
    entry += sum_before(meets, shared_ints, length);
    if (meets) *entry = tile;
  }
  if (length > 0)
    atomicAdd(x.workspace.counters->possible + threadIdx.x,
              items_of(length, MIN_ITEM_TILES + threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) {
    x.workspace.list_lengths[blockIdx.x] = length;
    __threadfence();
    shared_ints[0] = atomicAdd(&x.workspace.counters->lists, 1);
    __threadfence();
  }
  __syncthreads();
  const bool last = shared_ints[0] + 1 == static_cast<int>(gridDim.x);
  __syncthreads();
  if (last) divide_lists(x, shared);
}

// ---- multiply: one block per multiprocessor takes items. Three warpgroups: one thread of the
// first copies (keys and values once per item, then tiles of 80 queries into 2 stages); the others
// own 64 image tokens each. Of a tile they make S' = K Q' and dP' = V dO' (64 x 80, from shared
// memory), from them P' and dS' in registers, and add P' dO to the values' and dS' Q to the keys'
// gradient (64 x WIDTH, registers). dS goes to shared memory, and dQ' = K' dS' (WIDTH x 80) to the
// accumulator in global memory. With WIDTH 128, each warpgroup makes one half of dQ' from all 128
// image tokens; with 64, all of dQ' from its own image tokens.

constexpr int MULTIPLY_THREADS = 384, CONSUMER_WARPS = 8;
constexpr int BLOCK_BYTES = BLOCK * 128, TILE_BYTES = ROWS * 128;  // of 64 columns

template <int WIDTH>
struct Shared {
  static constexpr int PARTS = WIDTH / 64;
  uint8_t keys[PARTS][BLOCK_BYTES], values[PARTS][BLOCK_BYTES];
  uint8_t queries[STAGES][PARTS][TILE_BYTES], grads[STAGES][PARTS][TILE_BYTES];
  uint8_t grad_scores[2][TILE_BYTES];  // rows of queries, 64 image tokens of one warpgroup
  float4 staging[2][ROWS / 8][128];    // what is added to accumulators
  TileRecord records[STAGES];
  int tiles[STAGES];
  struct {
    int block, g, tiles;  // no tiles: there are no more items
  } item;
  uint64_t full[STAGES], empty[STAGES], item_full, item_empty;
};
static_assert(sizeof(Shared<128>) <= 227 << 10);

// Named barriers.
constexpr int WARPGROUP = 1;     // + 0, 1
constexpr int SCORES_READY = 3;  // both warpgroups' dS are in shared memory
constexpr int SCORES_READ = 4;   // + 0, 1: the other warpgroup has read dS
constexpr int CLEARED = 6;       // both warpgroups have cleared rows

template <int WIDTH>
__device__ __forceinline__ void copy_tiles(Shared<WIDTH>& shared, const Problem& x,
                                           const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map,
                                           const CUtensorMap& grad_out_map) {
  constexpr int PARTS = Shared<WIDTH>::PARTS;
  const Sizes& sizes = x.sizes;
  const uint32_t tile_bytes =
      2 * PARTS * sizes.tile_tokens * sizes.group * 128 + sizeof(TileRecord);
  const int head_items = x.workspace.counters->items;
  int count = 0, item_parity = 1;  // of tiles so far
  for (;;) {
    // Neighbours in time see much the same tiles.
    const int number = atomicAdd(&x.workspace.counters->taken, 1);
    if (number >= head_items * sizes.kv_heads) break;
    const int g = number / head_items;
    const Item item = x.workspace.items[number % head_items];
    barrier_wait(&shared.item_empty, item_parity);
    item_parity ^= 1;
    shared.item = {item.block, g, item.end - item.begin};
    barrier_arrive_expect(&shared.item_full, 2 * sizeof(shared.keys));
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int token = item.block * BLOCK;
      tensor_load(shared.keys[part], &k_map, &shared.item_full, 64 * part, token, g);
      tensor_load(shared.values[part], &v_map, &shared.item_full, 64 * part, token, g);
    }
    const int* const entries = x.workspace.lists + int64_t{item.block} * sizes.tiles;
#pragma unroll 1
    for (int i = item.begin; i < item.end; ++i, ++count) {
      const int stage = count % STAGES, tile = entries[i];
      const int b = tile / sizes.row_tiles, token = tile % sizes.row_tiles * sizes.tile_tokens;
      barrier_wait(&shared.empty[stage], count / STAGES % 2 ^ 1);
      shared.tiles[stage] = tile;
      uint64_t* const full = &shared.full[stage];
      barrier_arrive_expect(full, tile_bytes);
      bulk_load(&shared.records[stage], x.workspace.records + tile * sizes.kv_heads + g,
                sizeof(TileRecord), full);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        tensor_load(shared.queries[stage][part], &q_map, full, 64 * part, 0, token, g, b);
        tensor_load(shared.grads[stage][part], &grad_out_map, full, 64 * part, 0, token, g, b);
      }
    }
  }
  barrier_wait(&shared.item_empty, item_parity);
  shared.item.tiles = 0;
  barrier_arrive(&shared.item_full);
}

// Adds COUNT registers of every thread of a warpgroup to an accumulator.
template <int COUNT>
__device__ __forceinline__ void add_registers(float* accumulator, const float* registers,
                                              float4 (*staging)[128], int barrier) {
  const int thread = threadIdx.x % 128;
  if (thread == 0) bulk_wait_read<0>();
  named_barrier_sync(barrier, 128);
#pragma unroll
  for (int i = 0; i < COUNT; i += 4)
    staging[i / 4][thread] =
        make_float4(registers[i], registers[i + 1], registers[i + 2], registers[i + 3]);
  async_proxy_fence();
  named_barrier_sync(barrier, 128);
  if (thread == 0) {
    bulk_add(accumulator, &staging[0][0].x, COUNT * 128 * sizeof(float));
    bulk_commit();
  }
}

// Clears the tile's rows of tokens that see nothing: probabilities of 0 would not keep a NaN there
// from others. Both warpgroups call.
template <int WIDTH>
__device__ __forceinline__ void clear_blind_rows(Shared<WIDTH>& shared, int stage) {
  const TileRecord& record = shared.records[stage];
  const int thread = threadIdx.x - 128, column = thread % 8 * 16;
#pragma unroll 1
  for (int row = thread / 8; row < ROWS; row += 32)
    if (record.low[row] >= record.high[row])
#pragma unroll
      for (int part = 0; part < Shared<WIDTH>::PARTS; ++part)
        for (auto* tile : {shared.queries[stage][part], shared.grads[stage][part]})
          *reinterpret_cast<uint4*>(tile + row * 128 + column) = make_uint4(0, 0, 0, 0);
  async_proxy_fence();
  named_barrier_sync(CLEARED, 256);
}

// What a thread holds of S', dP' and so on: of every 8 rows of the tile, which are columns here,
// `column` and the next; of its warpgroup's image tokens `token` and token + 8.

__device__ __forceinline__ float2 two(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}
__device__ __forceinline__ int2 two(const int* x) { return *reinterpret_cast<const int2*>(x); }

// From q.k to probabilities, were there no intervals.
__device__ __forceinline__ void exponentiate(float (&scores)[ROWS / 2], const TileRecord& record,
                                             int column) {
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) {
    const float2 a = two(record.multiplier + 8 * j + column);
    const float2 log2_sum = two(record.log2_sum + 8 * j + column);
    float* s = scores + 4 * j;
    s[0] = exp2_fast(fmaf(s[0], a.x, -log2_sum.x));
    s[1] = exp2_fast(fmaf(s[1], a.y, -log2_sum.y));
    s[2] = exp2_fast(fmaf(s[2], a.x, -log2_sum.x));
    s[3] = exp2_fast(fmaf(s[3], a.y, -log2_sum.y));
  }
}

__device__ __forceinline__ void clear_unseen(float (&p)[ROWS / 2], const TileRecord& record,
                                             int column, int token) {
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) {
    const int2 low = two(record.low + 8 * j + column), high = two(record.high + 8 * j + column);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int t = token + 4 * i;
      if (t < low.x || t >= high.x) p[4 * j + i] = 0.f;
      if (t < low.y || t >= high.y) p[4 * j + i + 1] = 0.f;
    }
  }
}

// wgmma's operand a, for every 16 rows of the tile.
using Operand = uint32_t[ROWS / 16][4];

// P' and dS' of P' and dP'.
__device__ __forceinline__ void make_operands(Operand& p, Operand& ds,
                                              const float (&probabilities)[ROWS / 2],
                                              const float (&grads)[ROWS / 2],
                                              const TileRecord& record, int column) {
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) {
    const float2 a = two(record.multiplier + 8 * j + column);
    const float2 delta = two(record.delta + 8 * j + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* pair = probabilities + 4 * j + 2 * i;
      const float* grad_pair = grads + 4 * j + 2 * i;
      p[j / 2][j % 2 * 2 + i] = pack_bf16(pair[0], pair[1]);
      ds[j / 2][j % 2 * 2 + i] = pack_bf16(pair[0] * fmaf(grad_pair[0], a.x, -delta.x),
                                           pair[1] * fmaf(grad_pair[1], a.y, -delta.y));
    }
  }
}

__device__ __forceinline__ void hold_operand(Operand& operand) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) hold(operand[k]);
}

// product (64 x ROWS) = image_tokens (64 x WIDTH) . tile (ROWS x WIDTH)'
template <int WIDTH>
__device__ __forceinline__ void multiply_rows(float (&product)[ROWS / 2],
                                              const uint8_t* image_tokens, const uint8_t* tile) {
  const uint64_t a = descriptor(image_tokens), b = descriptor(tile);
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k)
    wgmma(product, advance(a, k / 4 * BLOCK_BYTES + k % 4 * 32),
          advance(b, k / 4 * TILE_BYTES + k % 4 * 32), k > 0);
}

// grad (64 x WIDTH) += a (64 x ROWS) . tile (ROWS x WIDTH)
template <int N>
__device__ __forceinline__ void add_product(float (&grad)[N], const Operand& a,
                                            const uint8_t* tile) {
  const uint64_t b = descriptor(tile, TILE_BYTES);
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) wgmma<1>(grad, a[k], advance(b, k * 2048), true);
}

// grad (64 x ROWS) = or += keys (64 image tokens x 64)' . grad_scores (ROWS x 64 image tokens)'
__device__ __forceinline__ void multiply_columns(float (&grad)[ROWS / 2], const uint8_t* keys,
                                                 const uint8_t* grad_scores, bool accumulate) {
  const uint64_t a = descriptor(keys, BLOCK_BYTES), b = descriptor(grad_scores);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma<1, 0>(grad, advance(a, k * 2048), advance(b, k * 32), accumulate || k > 0);
}

template <int WIDTH>
__device__ __forceinline__ void multiply_tiles(Shared<WIDTH>& shared, const Problem& x) {
  constexpr bool SHARED_QUERIES = WIDTH == 128;  // dQ' needs both warpgroups' dS
  constexpr int HALF_BYTES = BLOCK_BYTES / 2;    // 64 image tokens
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  // Uniform in the warp, which the compiler cannot know otherwise.
  const int own = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128 - 1, 0), other = 1 - own;
  const int column = 2 * (lane % 4), own_token = thread / 32 * 16 + lane / 4;
  const auto& query_keys = shared.keys[SHARED_QUERIES ? own : 0];
  float4(*const staging)[128] = shared.staging[own];
  // Where stmatrix writes the transposed 8 x 8 matrices of 16 queries and 16 image tokens.
  uint8_t* const own_scores = shared.grad_scores[own] + (lane / 16 * 8 + lane % 8) * 128 +
                              ((thread / 32 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;

  if (SHARED_QUERIES) named_barrier_arrive(SCORES_READ + other, 256);
  int count = 0;  // of tiles so far
  for (int item_parity = 0;; item_parity ^= 1) {
    barrier_wait(&shared.item_full, item_parity);
    int left = shared.item.tiles;
    if (left == 0) break;
    float grad_k[WIDTH / 2], grad_v[WIDTH / 2], scaled_grad_q[ROWS / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) grad_k[i] = grad_v[i] = 0.f;
    int last_tile = -1;  // whose grad_q is still to be added
    const auto add_grad_q = [&] {
      if (last_tile >= 0)
        add_registers<ROWS / 2>(query_accumulator<WIDTH>(x, last_tile, shared.item.g) +
                                    (SHARED_QUERIES ? own : 0) * (64 * ROWS),
                                scaled_grad_q, staging, WARPGROUP + own);
    };

    for (; left > 0; --left, ++count) {
      const int stage = count % STAGES;
      barrier_wait(&shared.full[stage], count / STAGES % 2);
      const TileRecord& record = shared.records[stage];
      if (record.common.high == 0) clear_blind_rows(shared, stage);
      const int first = shared.item.block * BLOCK + 64 * own;
      const bool meets = meet(record.seen, first, 64);
      Operand p, ds;
      if (!meets) {
        add_grad_q();
      } else {
        float scores[ROWS / 2], grads[ROWS / 2];
        wgmma_fence();
        multiply_rows<WIDTH>(scores, shared.keys[0] + own * HALF_BYTES, shared.queries[stage][0]);
        wgmma_commit();
        add_grad_q();
        wgmma_fence();
        multiply_rows<WIDTH>(grads, shared.values[0] + own * HALF_BYTES, shared.grads[stage][0]);
        wgmma_commit();
        wgmma_wait<1>();
        hold(scores);
        exponentiate(scores, record, column);
        if (record.common.low > first || record.common.high < first + 64)
          clear_unseen(scores, record, column, first + own_token);
        wgmma_wait<0>();
        hold(grads);
        make_operands(p, ds, scores, grads, record, column);
        hold_operand(p);
        hold_operand(ds);
        hold(grad_v);
        hold(grad_k);
        wgmma_fence();
        add_product(grad_v, p, shared.grads[stage][0]);
        add_product(grad_k, ds, shared.queries[stage][0]);
        wgmma_commit();
      }

      if (SHARED_QUERIES) named_barrier_sync(SCORES_READ + own, 256);
      if (meets) {
#pragma unroll
        for (int k = 0; k < ROWS / 16; ++k) store_matrices_transposed(own_scores + k * 2048, ds[k]);
        async_proxy_fence();
      }
      if (SHARED_QUERIES)
        named_barrier_sync(SCORES_READY, 256);
      else
        named_barrier_sync(WARPGROUP + own, 128);

      float grad_q[ROWS / 2];
      const int other_first = shared.item.block * BLOCK + 64 * other;
      if (SHARED_QUERIES && meets && meet(record.seen, other_first, 64)) {
        wgmma_fence();
        multiply_columns(grad_q, query_keys, shared.grad_scores[0], false);
        multiply_columns(grad_q, query_keys + HALF_BYTES, shared.grad_scores[1], true);
        wgmma_commit();
      } else if (SHARED_QUERIES || meets) {
        const int half = meets ? own : other;
        wgmma_fence();
        multiply_columns(grad_q, query_keys + half * HALF_BYTES, shared.grad_scores[half], false);
        wgmma_commit();
      }
      last_tile = SHARED_QUERIES || meets ? shared.tiles[stage] : -1;
      wgmma_wait<1>();
      hold(grad_k);
      hold(grad_v);
      hold_operand(p);
      hold_operand(ds);
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.empty[stage]);
      wgmma_wait<0>();
      hold(grad_q);
      if (SHARED_QUERIES) named_barrier_arrive(SCORES_READ + other, 256);
      // Ordinary registers from here on: the assembler would not let accumulators be read while
      // the next tile's products are under way.
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) scaled_grad_q[i] = LN_2 * grad_q[i];
    }

    add_grad_q();
    float* const accumulator =
        key_accumulator<WIDTH>(x, shared.item.block, shared.item.g) + own * (2 * 64 * WIDTH);
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.item_empty);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 32) {
      add_registers<32>(accumulator + i * 128, grad_k + i, staging, WARPGROUP + own);
      add_registers<32>(accumulator + 64 * WIDTH + i * 128, grad_v + i, staging, WARPGROUP + own);
    }
  }
  if (SHARED_QUERIES) named_barrier_sync(SCORES_READ + own, 256);
  if (thread == 0) bulk_wait_read<0>();
}

template <int WIDTH>
__global__ void __launch_bounds__(MULTIPLY_THREADS, 1)
    multiply(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map,
             const __grid_constant__ CUtensorMap grad_out_map, const __grid_constant__ Problem x) {
  auto& shared = *reinterpret_cast<Shared<WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], CONSUMER_WARPS);
    }
    barrier_init(&shared.item_full, 1);
    barrier_init(&shared.item_empty, CONSUMER_WARPS);
    barrier_init_fence();
  }
  // Rows of a tile that no copy writes: their probabilities are 0, but 0 * NaN would be NaN.
  const int used_bytes = x.sizes.tile_tokens * x.sizes.group * 128;
  for (int offset = used_bytes + 16 * threadIdx.x; offset < TILE_BYTES;
       offset += 16 * MULTIPLY_THREADS)
    for (int stage = 0; stage < STAGES; ++stage)
      for (int part = 0; part < Shared<WIDTH>::PARTS; ++part) {
        *reinterpret_cast<uint4*>(shared.queries[stage][part] + offset) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(shared.grads[stage][part] + offset) = make_uint4(0, 0, 0, 0);
      }
  async_proxy_fence();
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<24>();
    if (threadIdx.x == 0) copy_tiles<WIDTH>(shared, x, q_map, k_map, v_map, grad_out_map);
  } else {
    registers_increase<240>();
    multiply_tiles<WIDTH>(shared, x);
  }
}

// ---- finish_queries: from the accumulator to grad_q, with the norm's part. Four threads hold two
// rows each of 8 (what a quad of wgmma's threads holds), WIDTH / 16 such quads the columns, 16
// each; so a warp holds 8 rows or, where WIDTH is 64, 16.

constexpr int FINISH_THREADS = 128;

template <int WIDTH>
__global__ void __launch_bounds__(FINISH_THREADS)
    finish_queries(const __grid_constant__ Problem x) {
  constexpr int SLICES = WIDTH / 16, WARP_ROWS = 8 * 8 / SLICES, WARPS = ROWS / WARP_ROWS;
  const int warp = (blockIdx.x * FINISH_THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int tile = warp / WARPS / x.kv_heads, g = warp / WARPS % x.kv_heads;
  if (tile >= x.sizes.tiles) return;  // the whole warp
  const int eighth = warp % WARPS * (WARP_ROWS / 8) + lane / 4 / SLICES;
  const int slice = lane / 4 % SLICES, column = 16 * slice;
  const Interval seen = x.workspace.seen[tile];

  float grad[2][2][8] = {};  // row, half of the columns, column
  if (seen.low < seen.high) {
    const auto* accumulator =
        reinterpret_cast<const float4*>(query_accumulator<WIDTH>(x, tile, g)) +
        (slice / 4 * (ROWS / 8) + eighth) * 128 + slice % 4 * 32 + lane % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 four = accumulator[4 * i];
      grad[0][0][i] = four.x;
      grad[1][0][i] = four.y;
      grad[0][1][i] = four.z;
      grad[1][1][i] = four.w;
    }
  }

  const int b = tile / x.sizes.row_tiles, first = tile % x.sizes.row_tiles * x.sizes.tile_tokens;
  const int tokens = min(x.sizes.tile_tokens, static_cast<int>(x.text_tokens) - first);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 8 * eighth + 2 * (lane % 4) + i;
    const int token = row / x.sizes.group, head = g * x.sizes.group + row % x.sizes.group;
    bool sees = false;
    if (token < tokens) {
      const int64_t at = b * x.text_tokens + first + token;
      sees = max(__ldg(x.low + at), 0) < min(__ldg(x.high + at), static_cast<int>(x.image_tokens));
    }
    if (x.q_norm_epsilon >= 0.f && seen.low < seen.high) {
      float q[2][8] = {};
      float squares = 0.f, product = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (sees && column + 8 * half < x.head_width)
          unpack(q[half], row_of(x.q, b, first + token, head) + column + 8 * half);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          squares += q[half][j] * q[half][j];
          product += q[half][j] * grad[i][half][j];
        }
      }
#pragma unroll
      for (int lanes = 4; lanes < 4 * SLICES; lanes *= 2) {
        squares += __shfl_xor_sync(~0u, squares, lanes);
        product += __shfl_xor_sync(~0u, product, lanes);
      }
      const float factor =
          squares > 0.f ? product / (squares + x.q_norm_epsilon * x.head_width) : 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 8; ++j) grad[i][half][j] -= factor * q[half][j];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (token < tokens && column + 8 * half < x.head_width)
        *reinterpret_cast<uint4*>(row_of(x.grad_q, b, first + token, head) + column + 8 * half) =
            sees ? pack(grad[i][half]) : make_uint4(0, 0, 0, 0);
  }
}

// ---- finish_keys: from the accumulators to grad_k and grad_v. A thread takes what a quad of
// wgmma's threads holds of 8 columns: two rows.

template <int WIDTH>
__global__ void __launch_bounds__(FINISH_THREADS) finish_keys(const __grid_constant__ Problem x) {
  int index = blockIdx.x * FINISH_THREADS + threadIdx.x;
  const auto next = [&index](int count) {
    const int at = index % count;
    index /= count;
    return at;
  };
  const int eighth = next(WIDTH / 8), quad = next(32), value = next(2), warpgroup = next(2);
  const int g = next(x.kv_heads), block = index;
  if (block >= x.sizes.image_blocks || 8 * eighth >= x.head_width) return;
  const float factor = value ? 1.f : LN_2;
  const auto* accumulator = reinterpret_cast<const float4*>(key_accumulator<WIDTH>(x, block, g)) +
                            ((warpgroup * 2 + value) * (WIDTH / 8) + eighth) * 128 + 4 * quad;
  float grad[2][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 four = accumulator[i];
    grad[0][2 * i] = factor * four.x;
    grad[0][2 * i + 1] = factor * four.y;
    grad[1][2 * i] = factor * four.z;
    grad[1][2 * i + 1] = factor * four.w;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = block * BLOCK + 64 * warpgroup + quad / 8 * 16 + quad % 8 + 8 * i;
    if (token < x.image_tokens)
      *reinterpret_cast<uint4*>(row_of(value ? x.grad_v : x.grad_k, 0, token, g) + 8 * eighth) =
          pack(grad[i]);
  }
}

// ---- Host

int ceil_divide(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

int padded_width(const CrossAttention& x) { return x.head_width <= 64 ? 64 : 128; }

Sizes sizes_of(const CrossAttention& x) {
  Sizes sizes;
  sizes.kv_heads = x.kv_heads;
  sizes.group = x.heads / x.kv_heads;
  sizes.tile_tokens = ROWS / sizes.group;
  sizes.row_tiles = ceil_divide(x.text_tokens, sizes.tile_tokens);
  sizes.tiles = x.rows * sizes.row_tiles;
  sizes.image_blocks = ceil_divide(x.image_tokens, BLOCK);
  return sizes;
}

int64_t rows_at_once(const CrossAttention& x) {
  const int64_t row_bytes =
      sizeof(float) * sizes_of(x).row_tiles * x.kv_heads * ROWS * padded_width(x);
  return std::clamp<int64_t>(ACCUMULATOR_BYTES / row_bytes, 1, x.rows);
}

int64_t key_accumulator_bytes(const CrossAttention& x) {
  return sizeof(float) * ceil_divide(x.image_tokens, BLOCK) * x.kv_heads * 2 * BLOCK *
         padded_width(x);
}

// Sets the pointers; returns the bytes in all.
int64_t lay_out(Workspace& workspace, void* memory, const CrossAttention& x, const Sizes& sizes) {
  const int64_t head_tiles = x.kv_heads * sizes.tiles;
  int64_t bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(memory) + bytes);
    bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  place(workspace.grad_keys, key_accumulator_bytes(x) / sizeof(float));
  place(workspace.grad_queries, head_tiles * ROWS * padded_width(x));
  place(workspace.records, head_tiles);
  place(workspace.seen, sizes.tiles);
  place(workspace.lists, sizes.image_blocks * int64_t{sizes.tiles});
  place(workspace.list_lengths, sizes.image_blocks);
  place(workspace.items, sizes.image_blocks * int64_t{ceil_divide(sizes.tiles, MIN_ITEM_TILES)});
  place(workspace.counters, 1);
  return bytes;
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// All but finish_keys, for some of the rows.
template <int WIDTH>
const char* run_rows(const Problem& x, const CUtensorMap& k_map, const CUtensorMap& v_map,
                     cudaStream_t stream) {
  const Sizes& sizes = x.sizes;
  CUtensorMap q_map, grad_out_map;
  if (const char* error = make_query_map(&q_map, x, x.q, sizes.tile_tokens)) return error;
  if (const char* error = make_query_map(&grad_out_map, x, x.grad_out, sizes.tile_tokens))
    return error;

  const dim3 head_tiles(sizes.tiles, sizes.kv_heads);
  cudaError_t error = launch(prepare<WIDTH>, head_tiles, PREPARE_THREADS, 0, stream, x);
  if (error == cudaSuccess)
    error = launch(plan, sizes.image_blocks, PLAN_THREADS, PLAN_WARPS * sizeof(int64_t), stream, x);
  if (error == cudaSuccess)
    error = launch(multiply<WIDTH>, x.multiprocessors, MULTIPLY_THREADS, sizeof(Shared<WIDTH>),
                   stream, q_map, k_map, v_map, grad_out_map, x);
  if (error == cudaSuccess) {
    const int64_t threads = int64_t{sizes.tiles} * sizes.kv_heads * (ROWS / 2) * (WIDTH / 16);
    error = launch(finish_queries<WIDTH>, ceil_divide(threads, FINISH_THREADS), FINISH_THREADS, 0,
                   stream, x);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int WIDTH>
const char* run(const CrossAttentionBackward& x, void* memory, cudaStream_t stream) {
  Problem piece{x, current_device().multiprocessors, {}, {}};
  piece.rows = rows_at_once(x);
  piece.sizes = sizes_of(piece);
  lay_out(piece.workspace, memory, piece, piece.sizes);
  CUtensorMap k_map, v_map;
  if (const char* failure = make_key_map(&k_map, x, x.k, BLOCK)) return failure;
  if (const char* failure = make_key_map(&v_map, x, x.v, BLOCK)) return failure;
  cudaError_t error =
      cudaMemsetAsync(piece.workspace.grad_keys, 0, key_accumulator_bytes(x), stream);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(multiply<WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(Shared<WIDTH>));
  if (error != cudaSuccess) return cudaGetErrorString(error);

  for (int64_t first = 0; first < x.rows; first += piece.rows) {
    if (piece.rows > x.rows - first) {
      piece.rows = x.rows - first;
      piece.sizes = sizes_of(piece);
    }
    if (const char* failure = run_rows<WIDTH>(piece, k_map, v_map, stream)) return failure;
    for (View* view : {&piece.q, &piece.out, &piece.grad_out, &piece.grad_q})
      view->data = static_cast<__nv_bfloat16*>(view->data) + piece.rows * view->row_stride;
    piece.lse += piece.rows * x.heads * x.text_tokens;
    piece.low += piece.rows * x.text_tokens;
    piece.high += piece.rows * x.text_tokens;
  }

  const int64_t threads =
      int64_t{piece.sizes.image_blocks} * piece.sizes.kv_heads * BLOCK * (WIDTH / 8);
  error = launch(finish_keys<WIDTH>, ceil_divide(threads, FINISH_THREADS), FINISH_THREADS, 0,
                 stream, piece);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// For indices of 32 bits.
bool too_many_tokens(const CrossAttention& x) {
  if (x.text_tokens > INT_MAX || x.image_tokens > INT_MAX - BLOCK) return true;
  CrossAttention piece = x;
  piece.rows = rows_at_once(x);
  const Sizes sizes = sizes_of(piece);
  const int64_t tile_items = ceil_divide(sizes.tiles, MIN_ITEM_TILES);
  const int64_t most = std::max({int64_t{sizes.tiles} * (ROWS / 2) * (128 / 16),   // finish_queries
                                 int64_t{sizes.image_blocks} * BLOCK * (128 / 8),  // finish_keys
                                 sizes.image_blocks * tile_items});                // items
  return most > INT_MAX / x.kv_heads;
}

}  // namespace

int64_t workspace_bytes(const CrossAttentionBackward& x) {
  if (too_many_tokens(x)) return 0;
  CrossAttentionBackward piece = x;
  piece.rows = rows_at_once(x);
  Workspace workspace;
  return lay_out(workspace, nullptr, piece, sizes_of(piece));
}

const char* cross_attention_backward(const CrossAttentionBackward& x, void* workspace,
                                     void* stream) {
  if (too_many_tokens(x)) return "cross-attention has too many tokens";
  const auto run_width = padded_width(x) == 64 ? run<64> : run<128>;
  return run_width(x, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace megavlm::cuda::sm90
