// Cross-attention forward on Hopper: warp-specialised, keys and values stationary.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <sm90.cuh>

#include "kernels.h"
#include "tiles_sm90.cuh"

namespace megavlm::cuda::sm90 {
namespace {

using namespace megavlm::sm90;

constexpr int TILE_ROWS = 128;            // of queries, 64 for each consumer warpgroup
constexpr int FIRST = 144, SECOND = 128;  // image tokens of a window's two blocks
constexpr int WINDOW = FIRST + SECOND;    // a whole image of 257 in one go
constexpr int SMALL = 64;                 // so few are multiplied with less waste
constexpr int LINE_BYTES = 128;           // 64 columns
constexpr int STAGES = 2;                 // of tiles of queries
constexpr int CONSUMER_WARPS = 8, ROW_WARPS = 2;
constexpr int THREADS = 128 + 32 * CONSUMER_WARPS;
constexpr int RUN_TILES = 8;  // successive tiles of a block, at least, where there are enough

// Named barriers; one for each consumer warpgroup.
constexpr int TURN = 1, WARPGROUP = 3;

struct Maps {
  CUtensorMap query, out, first_keys, second_keys, first_values, second_values;
};

struct Arguments {
  const int32_t *low, *high;
  float* lse;
  int text_tokens, image_tokens, heads, group, head_width, rows;
  int tile_tokens, tiles_per_row, tiles, rounds;
  float scale_log2, q_norm_epsilon;
};

// A tile's first text token, and the key/value head and row that it belongs to.
struct Tile {
  int g, b, token;
};

// How a tile goes through its image tokens: in windows from `start` on while below `high`.
struct Plan {
  Tile tile;
  Interval common;  // every token sees these
  int start, high;
  bool load;  // the first window; else it is there already
  bool keep;  // the last window, for the next tile
  bool last;  // tile of the block
};

template <int WIDTH>
struct Shared {
  static constexpr int HALVES = WIDTH / 64;
  uint8_t queries[STAGES][HALVES][TILE_ROWS * LINE_BYTES];  // in the end the tile's output
  uint8_t first_keys[HALVES][FIRST * LINE_BYTES];
  uint8_t second_keys[HALVES][SECOND * LINE_BYTES];
  uint8_t first_values[HALVES][FIRST * LINE_BYTES];
  uint8_t second_values[HALVES][SECOND * LINE_BYTES];
  // Of each row.
  Interval visible[STAGES][TILE_ROWS];
  float factor[STAGES][TILE_ROWS];  // from a product to the base-2 exponent
  float* lse[STAGES][TILE_ROWS];    // null: garbage
  Plan plan[STAGES];
  // Of each stage: queries are there; rows' data and plan are there; the output is there.
  uint64_t query_full[STAGES], rows_full[STAGES], out_full[STAGES];
  // Of a window's first and second block.
  uint64_t key_full[2], key_empty[2], value_full[2], value_empty[2];
};
static_assert(sizeof(Shared<128>) <= 227 * 1024);
static_assert(MAX_GROUP <= TILE_ROWS);

// The tiles of this block, out of all in the order (g, b, token). In each of several rounds the
// blocks take a run of successive tiles each, which share keys and values, from left to right or
// from right to left by turns: where later tokens see more, a block gets some of both kinds. All
// blocks have as many tiles in all, to within one.
class Walk {
 public:
  __device__ explicit Walk(const Arguments& x) : x(x), round(-1), index(0), end(0) { enter_run(); }
  __device__ bool valid() const { return index < end; }
  __device__ void advance() {
    if (++index == end) enter_run();
  }
  __device__ Tile tile() const {
    const int row = index / x.tiles_per_row;
    return {row / x.rows, row % x.rows, index % x.tiles_per_row * x.tile_tokens};
  }

 private:
  // The share of this round out of `tiles`: those of all rounds make up the whole.
  __device__ int share(int tiles) const { return (tiles + round) / x.rounds; }
  // Of all the blocks before this one.
  __device__ int tiles_before(int block) const {
    const int blocks = gridDim.x;
    return block * (x.tiles / blocks) + min(block, x.tiles % blocks);
  }
  __device__ void enter_run() {
    while (index == end && ++round < x.rounds) {
      const int begin = share(tiles_before(blockIdx.x)), stop = share(tiles_before(blockIdx.x + 1));
      const int all = share(x.tiles);
      const int first = x.tiles / x.rounds * round + max(0, x.tiles % x.rounds + round - x.rounds);
      index = first + (round % 2 == 0 ? begin : all - stop);
      end = index + stop - begin;
    }
  }

  const Arguments& x;
  int round, index, end;
};

// What the tile's text tokens see. One warp calls.
__device__ __forceinline__ Seen seen_by(const Arguments& x, const Tile& tile) {
  const int64_t first = static_cast<int64_t>(tile.b) * x.text_tokens + tile.token;
  const int tokens = min(x.tile_tokens, x.text_tokens - tile.token);
  return sm90::seen_by(x.low + first, x.high + first, tokens, x.image_tokens);
}

// Every warp that plans, plans the same. One warp calls.
class Planner {
 public:
  Plan plan{};

  __device__ explicit Planner(const Arguments& x) : x(x), ahead(x) { look_ahead(); }

  // To the next tile, if there is one.
  __device__ bool next() {
    if (!ahead.valid()) return false;
    plan.tile = ahead.tile();
    plan.load = !plan.keep;
    if (plan.load) plan.start = upcoming.any.low;
    plan.high = upcoming.any.high;
    plan.common = upcoming.every;
    ahead.advance();
    look_ahead();
    plan.last = !ahead.valid();
    plan.keep = !plan.last && ahead.tile().g == plan.tile.g && plan.start <= upcoming.any.low &&
                blocks(plan.high) != 0 && blocks(plan.high) == blocks(upcoming.any.high);
    return true;
  }

 private:
  // Of the one window from plan.start to high; 0 if there is no or more than one window.
  __device__ int blocks(int high) const {
    const int tokens = high - plan.start;
    return tokens <= 0 || tokens > WINDOW ? 0 : tokens <= FIRST ? 1 : 2;
  }
  __device__ void look_ahead() { upcoming = ahead.valid() ? seen_by(x, ahead.tile()) : Seen{}; }

  const Arguments& x;
  Walk ahead;     // stands at the tile after this one
  Seen upcoming;  // by that one
};

// ---- Producer warps.

// Block number `loads` of this kind: waits until the last one is used up. One thread calls.
template <int HALVES, int BYTES>
__device__ __forceinline__ void load_block(uint8_t (&shared)[HALVES][BYTES], const CUtensorMap* map,
                                           uint64_t* full, uint64_t* empty, int loads, int start,
                                           int g) {
  barrier_wait(empty, (loads & 1) ^ 1);
  barrier_arrive_expect(full, sizeof shared);
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
    tensor_load(shared[half], map, full, 64 * half, start, g);
}

template <int WIDTH>
__device__ __forceinline__ void load_keys_and_values(Shared<WIDTH>& shared, const Maps& maps,
                                                     const Arguments& x) {
  int first = 0, second = 0;  // loads so far
  for (Planner planner(x); planner.next();) {
    const Plan& plan = planner.plan;
    const int g = plan.tile.g;
    if (threadIdx.x % 32 == 0) {
      for (int start = plan.start + (plan.load ? 0 : WINDOW); start < plan.high; start += WINDOW) {
        const bool both = plan.high - start > FIRST;
        load_block(shared.first_keys, &maps.first_keys, &shared.key_full[0], &shared.key_empty[0],
                   first, start, g);
        if (both)
          load_block(shared.second_keys, &maps.second_keys, &shared.key_full[1],
                     &shared.key_empty[1], second, start + FIRST, g);
        load_block(shared.first_values, &maps.first_values, &shared.value_full[0],
                   &shared.value_empty[0], first, start, g);
        if (both)
          load_block(shared.second_values, &maps.second_values, &shared.value_full[1],
                     &shared.value_empty[1], second, start + FIRST, g);
        ++first;
        second += both;
      }
    }
    __syncwarp();
  }
}

template <int WIDTH>
__device__ __forceinline__ void store_out(Shared<WIDTH>& shared, const Maps& maps, int count,
                                          const Tile& tile) {
  const int stage = count % STAGES;
  barrier_wait(&shared.out_full[stage], (count / STAGES) & 1);
#pragma unroll
  for (int half = 0; half < WIDTH / 64; ++half)
    tensor_store(&maps.out, shared.queries[stage][half], 64 * half, 0, tile.token, tile.g, tile.b);
  bulk_commit();
  bulk_wait_read<0>();
}

// A stage holds queries, then their output, which is stored before the next queries come.
template <int WIDTH>
__device__ __forceinline__ void load_queries_store_out(Shared<WIDTH>& shared, const Maps& maps,
                                                       const Arguments& x) {
  const bool leader = threadIdx.x % 32 == 0;
  int count = 0;
  Tile before_last{}, last{};
  for (Walk walk(x); walk.valid(); walk.advance(), ++count) {
    const Tile tile = walk.tile();
    const Interval seen = seen_by(x, tile).any;
    if (leader) {
      if (count >= STAGES) store_out(shared, maps, count - STAGES, before_last);
      const int stage = count % STAGES;
      uint64_t* full = &shared.query_full[stage];
      if (seen.low < seen.high) {
        barrier_arrive_expect(full, WIDTH / 64 * x.tile_tokens * x.group * LINE_BYTES);
#pragma unroll
        for (int half = 0; half < WIDTH / 64; ++half)
          tensor_load(shared.queries[stage][half], &maps.query, full, 64 * half, 0, tile.token,
                      tile.g, tile.b);
      } else {
        barrier_arrive(full);
      }
    }
    __syncwarp();
    before_last = last;
    last = tile;
  }
  if (leader) {
    if (count >= 2) store_out(shared, maps, count - 2, before_last);
    if (count >= 1) store_out(shared, maps, count - 1, last);
  }
}

// The sum of squares of a row of queries; its 16-byte chunks are swizzled.
template <int WIDTH>
__device__ __forceinline__ float square_sum(
    const uint8_t (&queries)[WIDTH / 64][TILE_ROWS * LINE_BYTES], int row) {
  const uint32_t first = row * LINE_BYTES + row % 8 * 16;
  float sum = 0;
#pragma unroll
  for (int half = 0; half < WIDTH / 64; ++half) {
#pragma unroll 4
    for (int chunk = 0; chunk < 8; ++chunk) {
      const uint4 eight = *reinterpret_cast<const uint4*>(&queries[half][first ^ chunk * 16]);
      for (uint32_t pair : {eight.x, eight.y, eight.z, eight.w}) {
        const float2 two = unpack_bf16(pair);
        sum += two.x * two.x + two.y * two.y;
      }
    }
  }
  return sum;
}

// What the consumers need to know of each row. Garbage rows copy the last token's interval, so as
// to need no mask where the others need none.
template <int WIDTH>
__device__ __forceinline__ void prepare_rows(Shared<WIDTH>& shared, const Arguments& x) {
  constexpr int THREAD_ROWS = TILE_ROWS / (32 * ROW_WARPS);
  const int thread = threadIdx.x % (32 * ROW_WARPS);
  int count = 0;
  for (Planner planner(x); planner.next(); ++count) {
    const Tile& tile = planner.plan.tile;
    const int stage = count % STAGES;
    const bool sees = planner.plan.start < planner.plan.high;
    Interval visible[THREAD_ROWS];
    float* lse[THREAD_ROWS];
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; ++i) {
      const int row = thread + 32 * ROW_WARPS * i;
      const int in_tile = row / x.group, head = tile.g * x.group + row % x.group;
      const int token = min(tile.token + min(in_tile, x.tile_tokens - 1), x.text_tokens - 1);
      const int64_t at = static_cast<int64_t>(tile.b) * x.text_tokens + token;
      visible[i] = clamped_interval(__ldg(x.low + at), __ldg(x.high + at), x.image_tokens);
      const bool real = token == tile.token + in_tile;
      const int64_t line = static_cast<int64_t>(tile.b) * x.heads + head;
      lse[i] = real ? x.lse + line * x.text_tokens + token : nullptr;
    }
    // The stage's queries came after the consumers were done with its last tile.
    barrier_wait(&shared.query_full[stage], (count / STAGES) & 1);
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; ++i) {
      const int row = thread + 32 * ROW_WARPS * i;
      shared.visible[stage][row] = visible[i];
      shared.lse[stage][row] = lse[i];
      float factor = x.scale_log2;
      if (sees && x.q_norm_epsilon >= 0)
        factor *=
            rsqrtf(square_sum<WIDTH>(shared.queries[stage], row) / x.head_width + x.q_norm_epsilon);
      shared.factor[stage][row] = factor;
    }
    if (thread == 0) shared.plan[stage] = planner.plan;
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.rows_full[stage]);
  }
}

// ---- Consumer warpgroups.

struct Window {
  int start;
  bool continues;      // not the tile's first
  bool release;        // not needed again
  int phase, phase_2;  // in which its first and second block came
};

// A thread's two rows, 8 apart.
struct Rows {
  float factor[2];
  float maximum[2], sum[2];  // of the products so far; the sum is this thread's share
};

// Image tokens start + [0, 2 R) as in wgmma.cuh; most windows need a mask at their end alone.
template <int R>
__device__ __forceinline__ void mask(float (&score)[R], const Interval (&visible)[2],
                                     const Interval& common, int start) {
  int offset[2], tokens[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    offset[j] = start + threadIdx.x % 4 * 2 - visible[j].low;
    tokens[j] = visible[j].high - visible[j].low;
  }
#pragma unroll
  for (int i = 0; i < R; i += 8) {
    const int column = start + 2 * i;
    if (column >= common.low && column + 16 <= common.high) continue;
#pragma unroll
    for (int e = i; e < i + 8; ++e) {
      const int j = e / 2 % 2;
      const uint32_t place = offset[j] + e / 4 * 8 + e % 2;
      if (place >= static_cast<uint32_t>(tokens[j])) score[e] = -INFINITY;
    }
  }
}

template <int R>
__device__ __forceinline__ void raise_to(float (&maximum)[2], const float (&score)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], score[i]);
}

// Probabilities, not yet divided by their sum, as wgmma takes them.
template <int R>
__device__ __forceinline__ void exponentiate(uint32_t (&probability)[R / 8][4], float (&score)[R],
                                             const float (&factor)[2], const float (&offset)[2],
                                             float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < R; i += 2) {
    const int j = i / 2 % 2;
    const float x = exp2_fast(fmaf(score[i], factor[j], -offset[j]));
    const float y = exp2_fast(fmaf(score[i + 1], factor[j], -offset[j]));
    sum[j] += x + y;
    probability[i / 8][i / 2 % 4] = pack_bf16(x, y);
  }
}

// The parity, known only once the sums are, which are never negative: else the compiler puts their
// additions off until after the next products and runs out of registers for the terms.
__device__ __forceinline__ int after(const float (&sum)[2], int parity) {
  return parity | (sum[0] + sum[1] < 0);
}

// The first 2 R keys of a block of TOKENS.
template <int TOKENS, int WIDTH, int R>
__device__ __forceinline__ void multiply_keys(float (&score)[R], uint64_t queries, uint64_t keys) {
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k)
    wgmma(score, advance(queries, k / 4 * TILE_ROWS * LINE_BYTES + k % 4 * 32),
          advance(keys, k / 4 * TOKENS * LINE_BYTES + k % 4 * 32), k > 0);
}

template <int STEPS, int R>
__device__ __forceinline__ void multiply_values(float (&out)[R],
                                                const uint32_t (&probability)[STEPS][4],
                                                uint64_t values) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    wgmma<1>(out, probability[k], advance(values, k * 16 * LINE_BYTES), true);
}

template <int STEPS>
__device__ __forceinline__ void hold_steps(uint32_t (&probability)[STEPS][4]) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k) hold(probability[k]);
}

// This warp has done its part.
__device__ __forceinline__ void arrive_as_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// One window: COLUMNS[_2] image tokens of the first and second block; none of the second if that is
// 0. visible: of the thread's first row.
template <int COLUMNS, int COLUMNS_2, int WIDTH>
__device__ __forceinline__ void attend(float (&out)[WIDTH / 2], Rows& rows, Shared<WIDTH>& shared,
                                       uint64_t queries, int warpgroup, const Interval& common,
                                       const Interval* visible, const Window& window) {
  constexpr bool BOTH = COLUMNS_2 > 0;
  float score[COLUMNS / 2];
  float score_2[BOTH ? COLUMNS_2 / 2 : 8];

  // The warpgroups multiply by turns, so that one's exponentials run beside the other's products.
  barrier_wait(&shared.key_full[0], window.phase);
  named_barrier_sync(TURN + warpgroup, 256);
  hold(score);
  wgmma_fence();
  multiply_keys<FIRST, WIDTH>(score, queries, descriptor(shared.first_keys));
  wgmma_commit();
  if constexpr (BOTH) {
    barrier_wait(&shared.key_full[1], window.phase_2);
    wgmma_fence();
    multiply_keys<SECOND, WIDTH>(score_2, queries, descriptor(shared.second_keys));
    wgmma_commit();
  }
  named_barrier_arrive(TURN + 1 - warpgroup, 256);

  const Interval all_see = common, row_sees[2] = {visible[0], visible[8]};
  float maximum[2] = {rows.maximum[0], rows.maximum[1]};
  wgmma_wait<BOTH ? 1 : 0>();
  hold(score);
  if (window.release) arrive_as_warp(&shared.key_empty[0]);
  mask(score, row_sees, all_see, window.start);
  raise_to(maximum, score);
  if constexpr (BOTH) {
    wgmma_wait<0>();
    hold(score_2);
    if (window.release) arrive_as_warp(&shared.key_empty[1]);
    mask(score_2, row_sees, all_see, window.start + FIRST);
    raise_to(maximum, score_2);
  }

  float offset[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    maximum[j] = fmaxf(maximum[j], __shfl_xor_sync(~0u, maximum[j], 1));
    maximum[j] = fmaxf(maximum[j], __shfl_xor_sync(~0u, maximum[j], 2));
    offset[j] = maximum[j] == -INFINITY ? 0 : maximum[j] * rows.factor[j];
  }
  if (window.continues) {
    float shrink[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      shrink[j] = exp2_fast(fmaf(rows.maximum[j], rows.factor[j], -offset[j]));
      rows.sum[j] *= shrink[j];
    }
    if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
      for (int i = 0; i < WIDTH / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) rows.maximum[j] = maximum[j];

  uint32_t probability[COLUMNS / 16][4];
  exponentiate(probability, score, rows.factor, offset, rows.sum);
  barrier_wait(&shared.value_full[0], after(rows.sum, window.phase));
  hold(out);
  hold_steps(probability);
  wgmma_fence();
  multiply_values(out, probability, descriptor(shared.first_values, FIRST * LINE_BYTES));
  wgmma_commit();
  if constexpr (BOTH) {
    hold(score_2);
    uint32_t probability_2[COLUMNS_2 / 16][4];
    exponentiate(probability_2, score_2, rows.factor, offset, rows.sum);
    barrier_wait(&shared.value_full[1], after(rows.sum, window.phase_2));
    hold_steps(probability_2);
    wgmma_fence();
    multiply_values(out, probability_2, descriptor(shared.second_values, SECOND * LINE_BYTES));
    wgmma_commit();
    wgmma_wait<1>();
    hold_steps(probability);
    if (window.release) arrive_as_warp(&shared.value_empty[0]);
    wgmma_wait<0>();
    hold_steps(probability_2);
    if (window.release) arrive_as_warp(&shared.value_empty[1]);
  } else {
    wgmma_wait<0>();
    hold_steps(probability);
    if (window.release) arrive_as_warp(&shared.value_empty[0]);
  }
  hold(out);
}

// Writes the output over the queries. `row`: of the tile, this warp's first.
template <int WIDTH>
__device__ __forceinline__ void write_out(uint8_t (&stage)[WIDTH / 64][TILE_ROWS * LINE_BYTES],
                                          const float (&out)[WIDTH / 2], const float (&scale)[2],
                                          int row) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i += 8) {  // 16 columns
    const uint32_t fragment[4] = {
        pack_bf16(out[i] * scale[0], out[i + 1] * scale[0]),
        pack_bf16(out[i + 2] * scale[1], out[i + 3] * scale[1]),
        pack_bf16(out[i + 4] * scale[0], out[i + 5] * scale[0]),
        pack_bf16(out[i + 6] * scale[1], out[i + 7] * scale[1]),
    };
    const int chunk = i / 4 % 8 + matrix / 2;
    store_matrices(
        &stage[i / 32][(row + matrix % 2 * 8 + lane % 8) * LINE_BYTES + ((chunk ^ lane % 8) * 16)],
        fragment);
  }
}

template <int WIDTH>
__device__ __forceinline__ void consume(Shared<WIDTH>& shared, const Arguments& x) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4;
  const int warpgroup = warp / 4, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4;

  if (warpgroup == 1) named_barrier_arrive(TURN, 256);
  int count = 0;
  Window window{0, false, false, 1, 1};
  for (bool last = false; !last; ++count) {
    const int stage = count % STAGES, parity = (count / STAGES) & 1;
    barrier_wait(&shared.query_full[stage], parity);
    barrier_wait(&shared.rows_full[stage], parity);
    const Plan& plan = shared.plan[stage];

    Rows rows;
    float out[WIDTH / 2];
#pragma unroll
    for (float& element : out) element = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rows.factor[j] = shared.factor[stage][row + 8 * j];
      rows.maximum[j] = -INFINITY;
      rows.sum[j] = 0;
    }
    const uint64_t queries = descriptor(&shared.queries[stage][0][64 * warpgroup * LINE_BYTES]);
    const Interval* visible = &shared.visible[stage][row];
    window.start = plan.start;
    for (int left = plan.high - plan.start; left > 0; left -= WINDOW) {
      window.continues = window.start > plan.start;
      window.release = left > WINDOW || !plan.keep;
      if (window.continues || plan.load) {
        window.phase ^= 1;
        window.phase_2 ^= left > FIRST;
      }
      if (left > FIRST)
        attend<FIRST, SECOND>(out, rows, shared, queries, warpgroup, plan.common, visible, window);
      else if (left > SMALL)
        attend<FIRST, 0>(out, rows, shared, queries, warpgroup, plan.common, visible, window);
      else
        attend<SMALL, 0>(out, rows, shared, queries, warpgroup, plan.common, visible, window);
      window.start += WINDOW;
    }

    float scale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rows.sum[j] += __shfl_xor_sync(~0u, rows.sum[j], 1);
      rows.sum[j] += __shfl_xor_sync(~0u, rows.sum[j], 2);
      scale[j] = rows.sum[j] != 0 ? 1 / rows.sum[j] : 0;
    }
    named_barrier_sync(WARPGROUP + warpgroup, 128);  // all have multiplied their queries
    write_out<WIDTH>(shared.queries[stage], out, scale, 16 * warp);
    async_proxy_fence();
    float* const lse[2] = {shared.lse[stage][row], shared.lse[stage][row + 8]};
    last = plan.last;
    arrive_as_warp(&shared.out_full[stage]);  // the stage may change from here on
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float log2_sum = rows.maximum[j] * rows.factor[j] + log2f(rows.sum[j]);
      if (lane % 4 == 0 && lse[j])
        *lse[j] = rows.sum[j] != 0 ? log2_sum * 0.693147180559945f : -INFINITY;
    }
  }
  if (warpgroup == 0) named_barrier_sync(TURN, 256);
}

// Tiles of up to 128 rows: the query heads of one key/value head for as many text tokens of one
// row. A tile's image tokens, from the first to the last that any of it sees, come in windows of
// 272, a single one of which stays for the next tile if that sees no others. Warp 0 copies keys and
// values, warp 1 queries and outputs, warps 2 and 3 prepare each row's data. Two warpgroups
// multiply 64 rows each: products of a window in registers, softmax relative to the highest product
// so far, probabilities times values.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ Maps maps, const __grid_constant__ Arguments x) {
  Shared<WIDTH>& shared = *reinterpret_cast<Shared<WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.query, &maps.out, &maps.first_keys, &maps.second_keys,
                                   &maps.first_values, &maps.second_values})
      tensor_map_prefetch(map);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&shared.query_full[i], 1);
      barrier_init(&shared.rows_full[i], ROW_WARPS);
      barrier_init(&shared.out_full[i], CONSUMER_WARPS);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.key_full[i], 1);
      barrier_init(&shared.key_empty[i], CONSUMER_WARPS);
      barrier_init(&shared.value_full[i], 1);
      barrier_init(&shared.value_empty[i], CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<40>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0)
      load_keys_and_values(shared, maps, x);
    else if (warp == 1)
      load_queries_store_out(shared, maps, x);
    else
      prepare_rows(shared, x);
  } else {
    registers_increase<232>();
    consume(shared, x);
  }
}

template <int WIDTH>
const char* launch(const CrossAttentionForward& x, void* stream) {
  const int group = static_cast<int>(x.heads / x.kv_heads);
  Arguments arguments{};
  arguments.low = x.low;
  arguments.high = x.high;
  arguments.lse = x.lse;
  arguments.text_tokens = static_cast<int>(x.text_tokens);
  arguments.image_tokens = static_cast<int>(x.image_tokens);
  arguments.heads = static_cast<int>(x.heads);
  arguments.group = group;
  arguments.head_width = static_cast<int>(x.head_width);
  arguments.rows = static_cast<int>(x.rows);
  arguments.scale_log2 = x.scale * 1.44269504088896f;
  arguments.q_norm_epsilon = x.q_norm_epsilon;
  arguments.tile_tokens = TILE_ROWS / group;
  arguments.tiles_per_row =
      (arguments.text_tokens + arguments.tile_tokens - 1) / arguments.tile_tokens;
  arguments.tiles = arguments.tiles_per_row * arguments.rows * static_cast<int>(x.kv_heads);
  const int blocks = std::min(arguments.tiles, current_device().multiprocessors);
  arguments.rounds = 2 * std::max(1, arguments.tiles / blocks / (2 * RUN_TILES));

  // Comes before the tensor maps: it also makes the context that the driver needs for them.
  const int shared_bytes = sizeof(Shared<WIDTH>);
  cudaError_t status = cudaFuncSetAttribute(
      forward<WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  Maps maps;
  const char* error = nullptr;
  if ((error = make_query_map(&maps.query, x, x.q, arguments.tile_tokens)) ||
      (error = make_query_map(&maps.out, x, x.out, arguments.tile_tokens)) ||
      (error = make_key_map(&maps.first_keys, x, x.k, FIRST)) ||
      (error = make_key_map(&maps.second_keys, x, x.k, SECOND)) ||
      (error = make_key_map(&maps.first_values, x, x.v, FIRST)) ||
      (error = make_key_map(&maps.second_values, x, x.v, SECOND)))
    return error;

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  status = cudaLaunchKernelEx(&config, forward<WIDTH>, maps, arguments);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* cross_attention(const CrossAttentionForward& x, void* stream) {
  const int64_t tiles = x.rows * x.kv_heads * x.text_tokens;  // at most
  if (tiles > INT_MAX || x.image_tokens > INT_MAX - WINDOW)
    return "cross-attention has too many tokens";
  return x.head_width <= 64 ? launch<64>(x, stream) : launch<128>(x, stream);
}

}  // namespace megavlm::cuda::sm90
