#include "../cross_attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace megavlm::cpu {
namespace {

// Rows (token, head of a group) of a tile. A forward task packs the keys and values of each block
// once for so many; a backward tile's scores, (rows, block) twice, should stay in a core's cache.
constexpr int64_t forward_tile_rows = 768, backward_tile_rows = 96;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Interval {
  int64_t low, high;
};
Interval seen_by(const CrossAttention& problem, int64_t i) {
  return {std::max<int64_t>(problem.low[i], 0),
          std::min<int64_t>(problem.high[i], problem.image_tokens)};
}

// Sorted bounds between which image tokens are taken together: those of intervals as far as they
// make blocks large, even cuts elsewhere.
std::vector<int64_t> cut_blocks(const CrossAttention& problem) {
  std::vector<char> interval_ends(problem.image_tokens + 1);
  for (int64_t i = 0; i < problem.rows * problem.text_tokens; ++i) {
    const auto [low, high] = seen_by(problem, i);
    if (low < high) interval_ends[low] = interval_ends[high] = true;
  }
  interval_ends[problem.image_tokens] = true;

  std::vector<int64_t> bounds = {0};
  int64_t last = 0;  // the latest interval's end after bounds.back()
  for (int64_t token = 1; token <= problem.image_tokens; ++token) {
    if (!interval_ends[token]) continue;
    if (token - bounds.back() > max_block_tokens) {
      if (last > bounds.back()) bounds.push_back(last);
      const int64_t begin = bounds.back(), cuts = ceil_div(token - begin, max_block_tokens);
      for (int64_t cut = 1; cut < cuts; ++cut) {
        bounds.push_back(begin + (token - begin) * cut / cuts);
      }
    }
    last = token;
  }
  bounds.push_back(problem.image_tokens);
  return bounds;
}

CrossAttentionPlan make_plan(const CrossAttention& problem, const std::vector<int64_t>& bounds,
                             int64_t tile_rows) {
  const int64_t tokens =
      std::clamp<int64_t>(tile_rows * problem.kv_heads / problem.heads, 1, problem.text_tokens);
  return {bounds.data(), int64_t(bounds.size()) - 1, tokens, ceil_div(problem.text_tokens, tokens)};
}

// Bounds of parts of about equal work.
std::vector<int64_t> split(const std::vector<int64_t>& work, int64_t parts) {
  int64_t total = 0, done = 0;
  for (const int64_t w : work) total += w;
  std::vector<int64_t> bounds = {0};
  for (size_t i = 0; i < work.size(); ++i) {
    while (int64_t(bounds.size()) < parts && done * parts >= total * int64_t(bounds.size())) {
      bounds.push_back(i);
    }
    done += work[i];
  }
  bounds.resize(parts + 1, work.size());
  return bounds;
}

// fp32 (heads, width) of one token.
void zero(const View& view, int64_t row, int64_t token, int64_t heads, int64_t width) {
  float* data = static_cast<float*>(view.data) + row * view.row_stride + token * view.token_stride;
  for (int64_t head = 0; head < heads; ++head) {
    memset(data + head * view.head_stride, 0, width * sizeof(float));
  }
}

// A backward plan and the tables that it points to.
class BackwardSchedule : public CrossAttentionBackwardPlan {
 public:
  explicit BackwardSchedule(const CrossAttention& problem)
      : CrossAttentionBackwardPlan(),
        bounds_(cut_blocks(problem)),
        token_meets_(problem.rows * problem.text_tokens, Meets::none) {
    static_cast<CrossAttentionPlan&>(*this) = make_plan(problem, bounds_, backward_tile_rows);
    survey(problem);
    deal_out(problem);
  }
  BackwardSchedule(const BackwardSchedule&) = delete;

 private:
  // What each tile sees, and how many pairs of tokens meet in each tile and block.
  void survey(const CrossAttention& problem) {
    const int64_t tiles = problem.rows * tiles_per_row;
    tile_low_.assign(tiles, problem.image_tokens);
    tile_high_.assign(tiles, 0);
    tile_work_.assign(tiles, 0);
    block_work_.assign(blocks, 0);
    std::vector<int64_t> viewers(problem.image_tokens + 1);  // differences from token to token
    for (int64_t i = 0; i < problem.rows * problem.text_tokens; ++i) {
      const auto [low, high] = seen_by(problem, i);
      if (low >= high) continue;
      const int64_t tile =
          i / problem.text_tokens * tiles_per_row + i % problem.text_tokens / tile_tokens;
      tile_low_[tile] = std::min<int64_t>(tile_low_[tile], low);
      tile_high_[tile] = std::max<int64_t>(tile_high_[tile], high);
      tile_work_[tile] += high - low;
      viewers[low] += 1;
      viewers[high] -= 1;
      const int64_t block_end = *std::upper_bound(bounds_.begin(), bounds_.end(), low);
      token_meets_[i] = high <= block_end ? Meets::one : Meets::several;
    }
    int64_t now = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t token = bounds_[block]; token < bounds_[block + 1]; ++token) {
        block_work_[block] += now += viewers[token];
      }
    }
    tile_low = tile_low_.data();
    tile_high = tile_high_.data();
    token_meets = token_meets_.data();
  }

  void deal_out(const CrossAttention& problem) {
    // Few enough that packing a block for a part of the tiles stays cheap.
    const int64_t rows = problem.rows * problem.text_tokens * (problem.heads / problem.kv_heads);
    parts = std::clamp<int64_t>(std::min(blocks, rows / 512), 1, 16);
    block_parts_ = split(block_work_, parts);
    tile_parts_ = split(tile_work_, parts);
    block_meets_.assign(blocks, Meets::none);
    std::vector<int64_t> first_part(blocks);  // of the tiles, that meets the block
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t tile = tile_parts_[part]; tile < tile_parts_[part + 1]; ++tile) {
        int64_t block =
            std::upper_bound(bounds_.begin(), bounds_.end(), tile_low_[tile]) - bounds_.begin() - 1;
        for (; block < blocks && bounds_[block] < tile_high_[tile]; ++block) {
          if (block_meets_[block] == Meets::none) {
            block_meets_[block] = Meets::one;
            first_part[block] = part;
          } else if (first_part[block] != part) {
            block_meets_[block] = Meets::several;
          }
        }
      }
    }
    block_parts = block_parts_.data();
    tile_parts = tile_parts_.data();
    block_meets = block_meets_.data();
  }

  std::vector<int64_t> bounds_, tile_work_, block_work_, block_parts_, tile_parts_;
  std::vector<int32_t> tile_low_, tile_high_;
  std::vector<Meets> token_meets_, block_meets_;
};

}  // namespace

void cross_attention(const CrossAttentionForward& problem, const ParallelFor& parallel) {
  const Kernels& set = kernels(problem.element);
  const auto bounds = cut_blocks(problem);
  const auto plan = make_plan(problem, bounds, forward_tile_rows);
  parallel(problem.rows * plan.tiles_per_row * problem.kv_heads,
           [&](int64_t begin, int64_t end) { set.cross_attention(problem, plan, begin, end); });
}

void cross_attention_backward(const CrossAttentionBackward& problem, const ParallelFor& parallel) {
  const Kernels& set = kernels(problem.element);
  BackwardSchedule plan(problem);
  const int64_t tokens = problem.rows * problem.text_tokens;
  // Sums are in fp32: in the gradients' own memory or, for bfloat16, beside it.
  plan.grad_q = problem.grad_q;
  plan.grad_k = problem.grad_k;
  plan.grad_v = problem.grad_v;
  std::unique_ptr<float[]> sums;
  if (problem.element == Element::bfloat16) {
    const int64_t q_stride = problem.heads * problem.head_width;
    const int64_t kv_stride = problem.kv_heads * problem.head_width;
    const int64_t q_size = tokens * q_stride, kv_size = problem.image_tokens * kv_stride;
    sums.reset(new float[q_size + 2 * kv_size]);
    plan.grad_q = {sums.get(), problem.text_tokens * q_stride, q_stride, problem.head_width};
    plan.grad_k = {sums.get() + q_size, 0, kv_stride, problem.head_width};
    plan.grad_v = {sums.get() + q_size + kv_size, 0, kv_stride, problem.head_width};
  }
  parallel(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (plan.token_meets[i] != Meets::several) continue;
      zero(plan.grad_q, i / problem.text_tokens, i % problem.text_tokens, problem.heads,
           problem.head_width);
    }
  });
  parallel(plan.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (plan.block_meets[i] != Meets::several) continue;
      for (int64_t token = plan.block_bounds[i]; token < plan.block_bounds[i + 1]; ++token) {
        zero(plan.grad_k, 0, token, problem.kv_heads, problem.head_width);
        zero(plan.grad_v, 0, token, problem.kv_heads, problem.head_width);
      }
    }
  });
  for (int64_t phase = 0; phase < plan.parts; ++phase) {
    parallel(problem.kv_heads * plan.parts, [&](int64_t begin, int64_t end) {
      set.cross_attention_backward(problem, plan, phase, begin, end);
    });
  }
  parallel(tokens,
           [&](int64_t begin, int64_t end) { set.finish_queries(problem, plan, begin, end); });
  parallel(plan.blocks, [&](int64_t begin, int64_t end) {
    set.finish_keys_and_values(problem, plan, begin, end);
  });
}

}  // namespace megavlm::cpu
