// What is compiled once per instruction set, and the plans it works from.
#pragma once

#include <cstdint>

#include "../cross_attention.h"
#include "../norm.h"

namespace megavlm::cpu {

// Image tokens are taken block by block, so that memory and cache hold one block's keys, values
// and scores.
inline constexpr int64_t max_block_tokens = 320;

// Blocks [block_bounds[i], block_bounds[i + 1]) of image tokens, and tiles of up to tile_tokens
// text tokens of one row.
struct CrossAttentionPlan {
  const int64_t* block_bounds;
  int64_t blocks;
  int64_t tile_tokens, tiles_per_row;
};

// How many partners something meets.
enum class Meets : uint8_t { none, one, several };

// Blocks and tiles are dealt out in as many parts each. In phase p, one task per key/value head g
// and part of the blocks i adds what the tiles of part (i + p) % parts give and get: no two tasks
// of a phase touch the same memory, and every sum has an order that threads do not change.
// What is summed over several tasks or blocks is summed in fp32, in memory of its own unless the
// problem is in fp32; what is not is written once.
struct CrossAttentionBackwardPlan : CrossAttentionPlan {
  int64_t parts;
  const int64_t* block_parts;  // bounds, parts + 1
  const int64_t* tile_parts;   // bounds, parts + 1
  const int32_t* tile_low;     // image tokens that some token of the tile sees lie between
  const int32_t* tile_high;
  const Meets* token_meets;     // blocks
  const Meets* block_meets;     // parts of the tiles
  View grad_q, grad_k, grad_v;  // fp32 sums, zeros at first
};

struct Kernels {
  // Tasks [begin, end) of rows * tiles_per_row * kv_heads.
  void (*cross_attention)(const CrossAttentionForward&, const CrossAttentionPlan&, int64_t begin,
                          int64_t end);
  // Tasks [begin, end) of kv_heads * parts.
  void (*cross_attention_backward)(const CrossAttentionBackward&, const CrossAttentionBackwardPlan&,
                                   int64_t phase, int64_t begin, int64_t end);
  // From the plan's sums to the problem's gradients, and zeros for what meets nothing: text tokens
  // [begin, end) of all rows; blocks [begin, end).
  void (*finish_queries)(const CrossAttentionBackward&, const CrossAttentionBackwardPlan&,
                         int64_t begin, int64_t end);
  void (*finish_keys_and_values)(const CrossAttentionBackward&, const CrossAttentionBackwardPlan&,
                                 int64_t begin, int64_t end);
  // Rows [begin, end). The backward pass adds to the gradients of the weight, (w), and of
  // tanh(gate).
  void (*norm)(const NormForward&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end, double* grad_weight,
                        double* grad_tanh);
};

// Those of the best instruction set that this processor has, or of the one that the environment
// variable MEGAVLM_CPU_ISA names. Throws std::runtime_error where that cannot be had.
const Kernels& kernels(Element);

}  // namespace megavlm::cpu
