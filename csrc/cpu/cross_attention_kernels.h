// Cross-attention of one instruction set: see cross_attention.h for what is computed and kernels.h
// for how it is cut into tasks. Queries of the heads that share a key/value head are rows of one
// matrix, head by head within a token: row i of a tile is head i % group of its token i / group.
#pragma once

#include <cmath>
#include <new>

#include "kernels.h"
#include "vector.h"

namespace megavlm::cpu::MEGAVLM_ISA {

// Row stride of scores, in floats: a block's columns, and room for what a tile computes past them.
inline constexpr int64_t score_stride = max_block_tokens + lanes;
static_assert(max_block_tokens % (2 * lanes) == 0);
static_assert((max_block_tokens + tile_rows - 1) / tile_rows * tile_rows <= score_stride);

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(operator new(size * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <class T>
inline T* row_of(const View& view, int64_t row, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + row * view.row_stride + token * view.token_stride +
         head * view.head_stride;
}

template <class A, class B>
inline float dot(const A* a, const B* b, int64_t width) {
  Vector total = {};
  for (int64_t d = 0; d < width; d += lanes) {
    total += load_floats(a + d, width - d) * load_floats(b + d, width - d);
  }
  return sum(total);
}

// 1 / sqrt(mean(q^2) + epsilon), or 1 where queries are taken as they are.
template <class T>
inline double inverse_rms(const T* q, int64_t width, float epsilon) {
  if (epsilon < 0) return 1;
  return 1 / __builtin_sqrt(dot(q, q, width) / double(width) + epsilon);
}

// ---- Packing: rows of numbers to operands of multiplications; a null row is zeros ----

// Words [first, first + lanes) of a row.
template <class Math, class T>
inline Vector load_words(const T* row, int64_t width, int64_t first) {
  if (!row) return Vector{};
  if constexpr (Math::per_word == 1) {
    return load_floats(row + first, width - first);
  } else {
    const int64_t count = width - 2 * first;
    if (count >= 2 * lanes) return load(row + 2 * first);
    T padded[2 * lanes] = {};
    if (count > 0) memcpy(padded, row + 2 * first, count * sizeof(T));
    return load(padded);
  }
}

// A row's numbers [first, first + lanes) of a left operand.
template <class Math>
inline void store_words(typename Math::Word* row, int64_t first, Vector v) {
  if constexpr (Math::per_word == 1) {
    store(row + first, v);
  } else {
    store_floats(reinterpret_cast<BFloat16*>(row) + first, v);
  }
}

// Words of neighbouring rows' numbers.
template <class Math>
inline Vector interleave(const Vector (&rows)[Math::per_word]) {
  if constexpr (Math::per_word == 1) {
    return rows[0];
  } else {
    return Vector(__builtin_convertvector(to_bfloat16(rows[0]), Bits) |
                  __builtin_convertvector(to_bfloat16(rows[1]), Bits) << 16);
  }
}

// A left operand, row by row.
template <class Math, class T>
inline void pack_left(const T* const* rows, int64_t count, int64_t width, typename Math::Word* left,
                      int64_t left_stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t word = 0; word < left_stride; word += lanes) {
      store(left + i * left_stride + word, load_words<Math>(rows[i], width, word));
    }
  }
}

// A right operand whose columns are the rows: summed over the width. `count` is a multiple of
// `lanes`.
template <class Math, class T>
inline void pack_columns(const T* const* rows, int64_t count, int64_t width,
                         const Panels<Math>& right) {
  for (int64_t column = 0; column < count; column += lanes) {
    for (int64_t word = 0; word < right.steps; word += lanes) {
      Vector square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        square[i] = load_words<Math>(rows[column + i], width, word);
      }
      transpose(square);
      auto* to = right.at(word, column);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(to + i * panel_columns, square[i]);
    }
  }
}

// A right operand whose steps are the rows: summed over them. `count` is a multiple of per_word.
template <class Math, class T>
inline void pack_steps(const T* const* rows, int64_t count, int64_t width,
                       const Panels<Math>& right) {
  for (int64_t i = 0; i < count; i += Math::per_word) {
    for (int64_t d = 0; d < width; d += lanes) {
      const auto load_row = [&](int64_t row) {
        return rows[row] ? load_floats(rows[row] + d, width - d) : Vector{};
      };
      Vector words = load_row(i);
      if constexpr (Math::per_word == 2) {
        words = Vector(Bits(words) >> 16 | Bits(load_row(i + 1)));
      }
      store(right.at(i / Math::per_word, d), words);
    }
  }
}

// Image tokens [begin, end) of one key/value head, followed by null rows up to `count`.
template <class T>
inline void list_tokens(const View& view, int64_t head, int64_t begin, int64_t end, int64_t count,
                        const T** rows) {
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = begin + i < end ? row_of<const T>(view, 0, begin + i, head) : nullptr;
  }
}

// Image tokens that a row of queries sees, counted from the start of the block that they are
// clamped to.
struct Interval {
  int64_t low, high;
  bool empty() const { return low >= high; }
};
inline Interval clamp(Interval seen, int64_t begin, int64_t end) {
  return {max(seen.low, begin) - begin, min(seen.high, end) - begin};
}
// The smallest interval that holds all that are not empty.
inline Interval hull(const Interval* seen, int64_t count) {
  Interval all = {INT64_MAX, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (!seen[i].empty()) all = {min(all.low, seen[i].low), max(all.high, seen[i].high)};
  }
  return all;
}
inline Interval seen_by(const CrossAttention& problem, int64_t row, int64_t token) {
  const int64_t i = row * problem.text_tokens + token;
  return clamp({problem.low[i], problem.high[i]}, 0, problem.image_tokens);
}

// Tokens of one row whose queries are taken together.
struct Tile {
  int64_t row, first_token, tokens;
};
inline Tile tile_of(const CrossAttention& problem, const CrossAttentionPlan& plan, int64_t index) {
  const int64_t first_token = index % plan.tiles_per_row * plan.tile_tokens;
  return {index / plan.tiles_per_row, first_token,
          min(plan.tile_tokens, problem.text_tokens - first_token)};
}
// Calls visit(i, token, head) for each row i of a tile.
template <class Visit>
inline void visit_rows(const Tile& tile, int64_t kv_head, int64_t group, const Visit& visit) {
  for (int64_t i = 0; i < tile.tokens * group; ++i) {
    visit(i, tile.first_token + i / group, kv_head * group + i % group);
  }
}

// What a kernel's matrices measure.
template <class Math>
struct Shape {
  Shape(const CrossAttention& problem, const CrossAttentionPlan& plan)
      : group(problem.heads / problem.kv_heads),
        max_rows(round_up(plan.tile_tokens * group, tile_rows)),
        width(problem.head_width),
        width_words(ceil_div(width, Math::per_word)),
        left_stride(round_up(width_words, lanes)),
        columns(round_up(width, lanes)),
        panels_columns(round_up(width, panel_columns)) {}
  int64_t group;
  int64_t max_rows;  // of a tile
  int64_t width;
  int64_t width_words;     // steps of a sum over the width
  int64_t left_stride;     // of queries as a left operand
  int64_t columns;         // of outputs
  int64_t panels_columns;  // of right operands of this width
};

// ---- Forward: a tile's rows meet each block in turn, with a running maximum and sum ----

template <class Math, class T>
class Forward {
  using Word = typename Math::Word;

 public:
  Forward(const CrossAttentionForward& problem, const CrossAttentionPlan& plan)
      : problem_(problem), plan_(plan), shape_(problem, plan) {}

  void run(const Tile& tile, int64_t kv_head) {
    const int64_t rows = tile.tokens * shape_.group, padded_rows = round_up(rows, tile_rows);
    visit_rows(tile, kv_head, shape_.group, [&](int64_t i, int64_t token, int64_t head) {
      row_queries_[i] = row_of<const T>(problem_.q, tile.row, token, head);
      seen_[i] = seen_by(problem_, tile.row, token);
      factors_[i] = float(problem_.scale *
                          inverse_rms(row_queries_[i], shape_.width, problem_.q_norm_epsilon));
    });
    for (int64_t i = rows; i < padded_rows; ++i) {
      row_queries_[i] = nullptr;
      seen_[i] = {0, 0};
      factors_[i] = 0;
    }
    for (int64_t i = 0; i < padded_rows; ++i) {
      maxima_[i] = -INFINITY;
      sums_[i] = 0;
    }
    memset(outputs_, 0, padded_rows * shape_.columns * sizeof(float));

    const Interval all = hull(seen_, rows);
    for (int64_t i = 0; i < plan_.blocks; ++i) {
      const int64_t begin = plan_.block_bounds[i], end = plan_.block_bounds[i + 1];
      if (!clamp(all, begin, end).empty()) attend(kv_head, begin, end, padded_rows);
    }

    visit_rows(tile, kv_head, shape_.group, [&](int64_t i, int64_t token, int64_t head) {
      const bool blind = seen_[i].empty();
      T* out = row_of<T>(problem_.out, tile.row, token, head);
      const float share = 1.0f / sums_[i];
      for (int64_t d = 0; d < shape_.width; d += lanes) {
        const Vector output = load(outputs_ + i * shape_.columns + d) * share;
        store_floats(out + d, blind ? Vector{} : output, shape_.width - d);
      }
      problem_.lse[(tile.row * problem_.heads + head) * problem_.text_tokens + token] =
          blind ? -INFINITY : maxima_[i] + __builtin_logf(sums_[i]);
    });
  }

 private:
  void attend(int64_t kv_head, int64_t begin, int64_t end, int64_t rows) {
    const Panels<Math> keys = {keys_, shape_.left_stride};
    const Panels<Math> values = {values_, max_block_tokens / Math::per_word};
    bool packed = false;
    for (int64_t first_row = 0; first_row < rows; first_row += tile_rows) {
      Interval seen[tile_rows];
      for (int i = 0; i < tile_rows; ++i) seen[i] = clamp(seen_[first_row + i], begin, end);
      const Interval all = hull(seen, tile_rows);
      if (all.empty()) continue;
      if (!packed) {
        packed = true;
        const int64_t count = round_up(end - begin, lanes);
        list_tokens<T>(problem_.k, kv_head, begin, end, count, tokens_);
        pack_columns<Math, T>(tokens_, count, shape_.width, keys);
        list_tokens<T>(problem_.v, kv_head, begin, end, count, tokens_);
        pack_steps<Math, T>(tokens_, count, shape_.width, values);
      }
      const int64_t first = all.low / lanes * lanes, last = round_up(all.high, lanes);
      pack_left<Math, T>(row_queries_ + first_row, tile_rows, shape_.width, queries_,
                         shape_.left_stride);
      multiply<Math, Left::as_is, false>(shape_.width_words, queries_, shape_.left_stride, keys, 0,
                                         first, last, scores_, score_stride);
      for (int i = 0; i < tile_rows; ++i) softmax(i, first_row + i, seen[i], first, last);
      const int64_t first_word = all.low / Math::per_word;
      multiply<Math, Left::as_is, true>(ceil_div(all.high, Math::per_word) - first_word,
                                        weights_ + first_word, score_stride / Math::per_word,
                                        values, first_word, 0, shape_.columns,
                                        outputs_ + first_row * shape_.columns, shape_.columns);
    }
  }

  // Scores of row i of a few, columns [first, last), to weights relative to the maximum so far.
  void softmax(int i, int64_t row, Interval seen, int64_t first, int64_t last) {
    const float* scores = scores_ + i * score_stride;
    const float factor = factors_[row];
    Vector maxima = Vector{} - INFINITY;
    for (int64_t column = first; column < last; column += lanes) {
      Vector score = load(scores + column) * factor;
      if (column < seen.low || column + lanes > seen.high) {
        score = lanes_within(column, seen.low, seen.high) ? score : Vector{} - INFINITY;
      }
      maxima = max(maxima, score);
    }
    const float old_maximum = maxima_[row], maximum = max(old_maximum, largest(maxima));
    if (maximum > old_maximum && old_maximum > -INFINITY) {
      const float rescale = exp(Vector{} + (old_maximum - maximum))[0];
      float* output = outputs_ + row * shape_.columns;
      for (int64_t d = 0; d < shape_.columns; d += lanes) {
        store(output + d, load(output + d) * rescale);
      }
      sums_[row] *= rescale;
    }
    maxima_[row] = maximum;

    Vector sums = {};
    Word* weights = weights_ + i * (score_stride / Math::per_word);
    for (int64_t column = first; column < last; column += lanes) {
      Vector weight = exp(load(scores + column) * factor - maximum);
      if (column < seen.low || column + lanes > seen.high) {
        weight = lanes_within(column, seen.low, seen.high) ? weight : Vector{};
      }
      sums += weight;
      store_words<Math>(weights, column, weight);
    }
    sums_[row] += sum(sums);
  }

  const CrossAttentionForward& problem_;
  const CrossAttentionPlan& plan_;
  const Shape<Math> shape_;
  // Of tile_rows rows and one block.
  Buffer<Word> queries_{tile_rows * shape_.left_stride};
  Buffer<float> scores_{tile_rows * score_stride};
  Buffer<Word> weights_{tile_rows * score_stride / Math::per_word};
  // Of one block.
  Buffer<Word> keys_{max_block_tokens * shape_.left_stride};
  Buffer<Word> values_{max_block_tokens / Math::per_word * shape_.panels_columns};
  Buffer<const T*> tokens_{max_block_tokens};
  // Of a tile.
  Buffer<float> outputs_{shape_.max_rows * shape_.columns};
  Buffer<const T*> row_queries_{shape_.max_rows};
  Buffer<Interval> seen_{shape_.max_rows};
  Buffer<float> factors_{shape_.max_rows}, maxima_{shape_.max_rows}, sums_{shape_.max_rows};
};

// The gradient of a query from its sum, which may be in the same place. With the norm, u = r q and
// dq = r (du - u mean(u du)); sums hold r du.
template <class T>
inline void finish_query(const T* q, const float* sums, T* grad, int64_t width, float epsilon) {
  float share = 0;
  if (epsilon >= 0) {
    const double r = inverse_rms(q, width, epsilon);
    share = float(r * r * dot(q, sums, width) / double(width));
  }
  for (int64_t d = 0; d < width; d += lanes) {
    const int64_t count = width - d;
    Vector g = load_floats(sums + d, count);
    if (epsilon >= 0) g -= load_floats(q + d, count) * share;
    store_floats(grad + d, g, count);
  }
}

// ---- Backward: a block of image tokens meets each tile of queries in turn ----

template <class Math, class T>
class Backward {
  using Word = typename Math::Word;

 public:
  Backward(const CrossAttentionBackward& problem, const CrossAttentionBackwardPlan& plan)
      : problem_(problem), plan_(plan), shape_(problem, plan) {}

  void run(int64_t kv_head, int64_t block_part, int64_t tile_part) {
    for (int64_t i = plan_.block_parts[block_part]; i < plan_.block_parts[block_part + 1]; ++i) {
      const int64_t begin = plan_.block_bounds[i], end = plan_.block_bounds[i + 1];
      bool packed = false;
      for (int64_t t = plan_.tile_parts[tile_part]; t < plan_.tile_parts[tile_part + 1]; ++t) {
        if (clamp({plan_.tile_low[t], plan_.tile_high[t]}, begin, end).empty()) continue;
        if (!packed) pack_block(kv_head, begin, end);
        packed = true;
        const Tile tile = tile_of(problem_, plan_, t);
        load_tile(tile, kv_head, begin, end);
        differentiate_scores(tile.tokens * shape_.group);
        add_to_keys_and_values(tile.tokens * shape_.group);
      }
      if (!packed) continue;
      for (int64_t token = begin; token < end; ++token) {
        const int64_t from = (token - begin) * shape_.columns;
        if (plan_.block_meets[i] == Meets::one) {
          write(row_of<T>(problem_.grad_k, 0, token, kv_head), grad_keys_ + from);
          write(row_of<T>(problem_.grad_v, 0, token, kv_head), grad_values_ + from);
        } else {
          add(row_of<float>(plan_.grad_k, 0, token, kv_head), grad_keys_ + from);
          add(row_of<float>(plan_.grad_v, 0, token, kv_head), grad_values_ + from);
        }
      }
    }
  }

 private:
  void add(float* sums, const float* terms) {
    for (int64_t d = 0; d < shape_.width; d += lanes) {
      const int64_t count = shape_.width - d;
      store_floats(sums + d, load_floats(sums + d, count) + load(terms + d), count);
    }
  }

  void write(T* to, const float* from) {
    for (int64_t d = 0; d < shape_.width; d += lanes) {
      store_floats(to + d, load(from + d), shape_.width - d);
    }
  }

  Panels<Math> keys_by_width() { return {keys_by_width_, shape_.left_stride}; }
  Panels<Math> values_by_width() { return {values_by_width_, shape_.left_stride}; }
  Panels<Math> keys_by_token() { return {keys_by_token_, max_block_tokens / Math::per_word}; }
  Panels<Math> queries_by_row() { return {queries_by_row_, shape_.max_rows / Math::per_word}; }
  Panels<Math> grads_by_row() { return {grads_by_row_, shape_.max_rows / Math::per_word}; }

  void pack_block(int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t count = round_up(end - begin, lanes);
    list_tokens<T>(problem_.k, kv_head, begin, end, count, tokens_);
    pack_columns<Math, T>(tokens_, count, shape_.width, keys_by_width());
    pack_steps<Math, T>(tokens_, count, shape_.width, keys_by_token());
    list_tokens<T>(problem_.v, kv_head, begin, end, count, tokens_);
    pack_columns<Math, T>(tokens_, count, shape_.width, values_by_width());
    const int64_t bytes = round_up(end - begin, tile_rows) * shape_.columns * sizeof(float);
    memset(grad_keys_, 0, bytes);
    memset(grad_values_, 0, bytes);
  }

  void load_tile(const Tile& tile, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t rows = tile.tokens * shape_.group, padded_rows = round_up(rows, tile_rows);
    visit_rows(tile, kv_head, shape_.group, [&](int64_t i, int64_t token, int64_t head) {
      const T* q = row_queries_[i] = row_of<const T>(problem_.q, tile.row, token, head);
      const T* grad = row_grads_[i] = row_of<const T>(problem_.grad_out, tile.row, token, head);
      const bool once = plan_.token_meets[tile.row * problem_.text_tokens + token] == Meets::one;
      row_grad_queries_[i] = once ? row_of<T>(problem_.grad_q, tile.row, token, head) : nullptr;
      row_sums_[i] = row_of<float>(plan_.grad_q, tile.row, token, head);
      seen_[i] = clamp(seen_by(problem_, tile.row, token), begin, end);
      factors_[i] = float(problem_.scale * inverse_rms(q, shape_.width, problem_.q_norm_epsilon));
      logs_[i] = problem_.lse[(tile.row * problem_.heads + head) * problem_.text_tokens + token];
      deltas_[i] = dot(grad, row_of<const T>(problem_.out, tile.row, token, head), shape_.width);
    });
    for (int64_t i = rows; i < padded_rows; ++i) {
      row_queries_[i] = row_grads_[i] = nullptr;
      seen_[i] = {0, 0};
      factors_[i] = logs_[i] = deltas_[i] = 0;
    }
    pack_left<Math, T>(row_queries_, padded_rows, shape_.width, queries_, shape_.left_stride);
    pack_left<Math, T>(row_grads_, padded_rows, shape_.width, grads_, shape_.left_stride);
    pack_steps<Math, T>(row_queries_, padded_rows, shape_.width, queries_by_row());
    pack_steps<Math, T>(row_grads_, padded_rows, shape_.width, grads_by_row());
  }

  // Weights and the scores' gradients of a tile; the queries' gradients from them.
  void differentiate_scores(int64_t rows) {
    for (int64_t first_row = 0; first_row < rows; first_row += tile_rows) {
      const Interval all = hull(seen_ + first_row, tile_rows);
      const int64_t first = all.empty() ? 0 : all.low / lanes * lanes;
      const int64_t last = round_up(all.high, lanes);
      multiply<Math, Left::as_is, false>(
          shape_.width_words, queries_ + first_row * shape_.left_stride, shape_.left_stride,
          keys_by_width(), 0, first, last, scores_, score_stride);
      multiply<Math, Left::as_is, false>(
          shape_.width_words, grads_ + first_row * shape_.left_stride, shape_.left_stride,
          values_by_width(), 0, first, last, grad_weights_, score_stride);
      for (int i = 0; i < tile_rows; i += Math::per_word) {
        differentiate_rows(i, first_row + i, first, last);
      }
      if (all.empty()) continue;
      const int64_t first_word = all.low / Math::per_word;
      multiply<Math, Left::as_is, false>(ceil_div(all.high, Math::per_word) - first_word,
                                         left_grad_scores_ + first_word,
                                         score_stride / Math::per_word, keys_by_token(), first_word,
                                         0, shape_.columns, grad_queries_, shape_.columns);
      for (int i = 0; i < tile_rows; ++i) {
        const int64_t row = first_row + i;
        const float* grad = grad_queries_ + i * shape_.columns;
        if (seen_[row].empty()) continue;
        if (row_grad_queries_[row]) {
          finish_query(row_queries_[row], grad, row_grad_queries_[row], shape_.width,
                       problem_.q_norm_epsilon);
        } else {
          add(row_sums_[row], grad);
        }
      }
    }
  }

  // Scores of a few rows, columns [first, last), to weights and gradients of the scores, with
  // scale and norm. Zeros wherever the rows see nothing, in all columns.
  void differentiate_rows(int i, int64_t row, int64_t first, int64_t last) {
    Word* weights = weights_ + row / Math::per_word * score_stride;
    Word* grad_scores = grad_scores_ + row / Math::per_word * score_stride;
    for (Word* words : {weights, grad_scores}) {
      memset(words, 0, first * sizeof(Word));
      memset(words + last, 0, (score_stride - last) * sizeof(Word));
    }
    for (int64_t column = first; column < last; column += lanes) {
      Vector weight[Math::per_word], grad[Math::per_word];
      for (int j = 0; j < Math::per_word; ++j) {
        const int64_t at = (i + j) * score_stride + column;
        const float factor = factors_[row + j];
        weight[j] = exp(load(scores_ + at) * factor - logs_[row + j]);
        grad[j] = weight[j] * (load(grad_weights_ + at) - deltas_[row + j]) * factor;
        const Interval seen = seen_[row + j];
        if (column < seen.low || column + lanes > seen.high) {
          const Integers visible = lanes_within(column, seen.low, seen.high);
          weight[j] = visible ? weight[j] : Vector{};
          grad[j] = visible ? grad[j] : Vector{};
        }
        store_words<Math>(left_grad_scores_ + (i + j) * (score_stride / Math::per_word), column,
                          grad[j]);
      }
      store(weights + column, interleave<Math>(weight));
      store(grad_scores + column, interleave<Math>(grad));
    }
  }

  void add_to_keys_and_values(int64_t rows) {
    const Interval all = hull(seen_, rows);
    for (int64_t token = all.low / tile_rows * tile_rows; token < all.high; token += tile_rows) {
      int64_t first = rows, last = 0;  // rows that see some of these tokens
      for (int64_t i = 0; i < rows; i += shape_.group) {
        if (clamp(seen_[i], token, token + tile_rows).empty()) continue;
        first = min(first, i);
        last = i + shape_.group;
      }
      if (first >= last) continue;
      const int64_t first_word = first / Math::per_word;
      const int64_t words = ceil_div(last, Math::per_word) - first_word;
      const int64_t from = first_word * score_stride + token, to = token * shape_.columns;
      multiply<Math, Left::transposed, true>(words, weights_ + from, score_stride, grads_by_row(),
                                             first_word, 0, shape_.columns, grad_values_ + to,
                                             shape_.columns);
      multiply<Math, Left::transposed, true>(words, grad_scores_ + from, score_stride,
                                             queries_by_row(), first_word, 0, shape_.columns,
                                             grad_keys_ + to, shape_.columns);
    }
  }

  const CrossAttentionBackward& problem_;
  const CrossAttentionBackwardPlan& plan_;
  const Shape<Math> shape_;
  // Of one block.
  Buffer<Word> keys_by_width_{max_block_tokens * shape_.left_stride};
  Buffer<Word> values_by_width_{max_block_tokens * shape_.left_stride};
  Buffer<Word> keys_by_token_{max_block_tokens / Math::per_word * shape_.panels_columns};
  Buffer<float> grad_keys_{score_stride * shape_.columns};
  Buffer<float> grad_values_{score_stride * shape_.columns};
  Buffer<const T*> tokens_{max_block_tokens};
  // Of a tile.
  Buffer<Word> queries_{shape_.max_rows * shape_.left_stride};
  Buffer<Word> grads_{shape_.max_rows * shape_.left_stride};
  Buffer<Word> queries_by_row_{shape_.max_rows / Math::per_word * shape_.panels_columns};
  Buffer<Word> grads_by_row_{shape_.max_rows / Math::per_word * shape_.panels_columns};
  Buffer<Word> weights_{shape_.max_rows / Math::per_word * score_stride};
  Buffer<Word> grad_scores_{shape_.max_rows / Math::per_word * score_stride};
  Buffer<const T*> row_queries_{shape_.max_rows}, row_grads_{shape_.max_rows};
  Buffer<T*> row_grad_queries_{shape_.max_rows};  // null: to be summed
  Buffer<float*> row_sums_{shape_.max_rows};
  Buffer<Interval> seen_{shape_.max_rows};
  Buffer<float> factors_{shape_.max_rows}, logs_{shape_.max_rows}, deltas_{shape_.max_rows};
  // Of tile_rows rows.
  Buffer<float> scores_{tile_rows * score_stride}, grad_weights_{tile_rows * score_stride};
  Buffer<Word> left_grad_scores_{tile_rows * score_stride / Math::per_word};
  Buffer<float> grad_queries_{tile_rows * shape_.columns};
};

// ---- Entries of the table ----

template <class Math, class T>
void cross_attention(const CrossAttentionForward& problem, const CrossAttentionPlan& plan,
                     int64_t begin, int64_t end) {
  Forward<Math, T> forward(problem, plan);
  for (int64_t task = begin; task < end; ++task) {
    forward.run(tile_of(problem, plan, task / problem.kv_heads), task % problem.kv_heads);
  }
}

template <class Math, class T>
void cross_attention_backward(const CrossAttentionBackward& problem,
                              const CrossAttentionBackwardPlan& plan, int64_t phase, int64_t begin,
                              int64_t end) {
  Backward<Math, T> backward(problem, plan);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block_part = task % plan.parts;
    backward.run(task / plan.parts, block_part, (block_part + phase) % plan.parts);
  }
}

template <class T>
void finish_queries(const CrossAttentionBackward& problem, const CrossAttentionBackwardPlan& plan,
                    int64_t begin, int64_t end) {
  const int64_t width = problem.head_width;
  for (int64_t i = begin; i < end; ++i) {
    if (plan.token_meets[i] == Meets::one) continue;
    const int64_t row = i / problem.text_tokens, token = i % problem.text_tokens;
    for (int64_t head = 0; head < problem.heads; ++head) {
      T* grad = row_of<T>(problem.grad_q, row, token, head);
      if (plan.token_meets[i] == Meets::none) {
        memset(grad, 0, width * sizeof(T));
      } else {
        finish_query(row_of<const T>(problem.q, row, token, head),
                     row_of<const float>(plan.grad_q, row, token, head), grad, width,
                     problem.q_norm_epsilon);
      }
    }
  }
}

template <class T>
void finish_keys_and_values(const CrossAttentionBackward& problem,
                            const CrossAttentionBackwardPlan& plan, int64_t begin, int64_t end) {
  const auto finish = [&](Meets meets, const View& sums, const View& grad, int64_t token,
                          int64_t head) {
    T* to = row_of<T>(grad, 0, token, head);
    if (meets == Meets::none) {
      memset(to, 0, problem.head_width * sizeof(T));
      return;
    }
    const float* from = row_of<const float>(sums, 0, token, head);
    for (int64_t d = 0; d < problem.head_width; d += lanes) {
      const int64_t count = problem.head_width - d;
      store_floats(to + d, load_floats(from + d, count), count);
    }
  };
  for (int64_t i = begin; i < end; ++i) {
    if (plan.block_meets[i] == Meets::one) continue;
    for (int64_t token = plan.block_bounds[i]; token < plan.block_bounds[i + 1]; ++token) {
      for (int64_t head = 0; head < problem.kv_heads; ++head) {
        finish(plan.block_meets[i], plan.grad_k, problem.grad_k, token, head);
        finish(plan.block_meets[i], plan.grad_v, problem.grad_v, token, head);
      }
    }
  }
}

}  // namespace megavlm::cpu::MEGAVLM_ISA
