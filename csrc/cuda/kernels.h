// The kernels behind csrc/cross_attention.h's cuda functions, and how one is chosen.
#pragma once

#include "../cross_attention.h"

namespace megavlm::cuda {

struct Device {
  int capability;  // 80, 90, ...
  int multiprocessors;
};
const Device& current_device();

// Tensor cores by mma.sync, copies by cp.async: compute capability 8.0 and later.
namespace sm80 {
int64_t workspace_bytes(const CrossAttentionBackward&);
const char* cross_attention(const CrossAttentionForward&, void* stream);
const char* cross_attention_backward(const CrossAttentionBackward&, void* workspace, void* stream);
}  // namespace sm80

// Tensor cores by wgmma, copies by TMA: compute capability 9.0 alone.
// heads / kv_heads at most sm90::MAX_GROUP.
namespace sm90 {
constexpr int MAX_GROUP = 80;  // the rows of the backward pass's tile
int64_t workspace_bytes(const CrossAttentionBackward&);
const char* cross_attention(const CrossAttentionForward&, void* stream);
const char* cross_attention_backward(const CrossAttentionBackward&, void* workspace, void* stream);
}  // namespace sm90

// Few queries per row: key/value heads and image tokens are split over the multiprocessors.
// text_tokens * (heads / kv_heads) at most decode::MAX_QUERIES. Compute capability 8.0 and later.
namespace decode {
constexpr int MAX_QUERIES = 16;
int64_t workspace_bytes(const CrossAttentionForward&);
const char* cross_attention(const CrossAttentionForward&, void* workspace, void* stream);
}  // namespace decode

}  // namespace megavlm::cuda
