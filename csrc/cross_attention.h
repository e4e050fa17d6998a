// Cross-attention from rows of text tokens to packed image tokens: what every implementation
// computes, and how it is called. Letters: b rows, t text tokens, v image tokens, h heads, g
// key/value heads, d head width.
//
//   score[b,t,h,v] = scale * r[b,t,h] * dot(q[b,t,h], k[v, h / (heads / kv_heads)])
//                    for low[b,t] <= v < high[b,t]
//   r[b,t,h]       = 1, or 1 / sqrt(mean(q[b,t,h]^2) + q_norm_epsilon)
//   out[b,t,h]     = softmax(score[b,t,h]) . v
//   lse[b,h,t]     = log(sum(exp(score[b,t,h])))
//
// RMSNorm on queries costs nothing beyond r: its weight is folded into the keys beforehand.
// A token that sees nothing has out = 0, lse = -infinity and sends gradient 0, exactly, as long as
// all operands are finite.
#pragma once

#include <cstdint>
#include <functional>

namespace megavlm {

enum class Element { float32, bfloat16 };

// Memory of (rows, tokens, heads, width). Strides count elements; along the width they are 1.
// Keys and values have no rows: (v, g, d), row_stride 0.
struct View {
  void* data;
  int64_t row_stride, token_stride, head_stride;
};

struct CrossAttention {
  Element element;  // of every view
  int64_t rows, text_tokens, image_tokens, heads, kv_heads, head_width;
  View q, k, v;
  const int32_t* low;   // (b, t), contiguous
  const int32_t* high;  // (b, t), contiguous
  float scale;
  float q_norm_epsilon;  // negative: queries are taken as they are
};

struct CrossAttentionForward : CrossAttention {
  View out;
  float* lse;  // (b, h, t), contiguous
};

// grad_k and grad_v are those of the keys and values given, so with the norm's weight folded in.
struct CrossAttentionBackward : CrossAttention {
  View grad_out, out;
  const float* lse;
  View grad_q, grad_k, grad_v;
};

namespace cpu {

// Calls the function with ranges [begin, end) that cover [0, n), possibly at once.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>&)>;

void cross_attention(const CrossAttentionForward&, const ParallelFor&);
void cross_attention_backward(const CrossAttentionBackward&, const ParallelFor&);

}  // namespace cpu

// bfloat16 only; head_width a multiple of 8, at most 128; every pointer 16-byte aligned, every
// stride a multiple of 8 elements. Intervals are clamped to [0, image_tokens].
namespace cuda {

// Scratch memory of a call, 256-byte aligned, contents undefined.
int64_t workspace_bytes(const CrossAttentionForward&);
int64_t workspace_bytes(const CrossAttentionBackward&);

// Queue the work on a cudaStream_t. Return null, or what went wrong.
const char* cross_attention(const CrossAttentionForward&, void* workspace, void* stream);
const char* cross_attention_backward(const CrossAttentionBackward&, void* workspace, void* stream);

}  // namespace cuda
}  // namespace megavlm
