// Chooses the kernel: by the number of queries, then by the device.

#include <cuda_runtime.h>

#include "kernels.h"

namespace megavlm::cuda {

const Device& current_device() {
  thread_local Device device;
  thread_local int known = -1;
  int index = 0;
  cudaGetDevice(&index);
  if (index != known) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    device.capability = 10 * major + minor;
    known = index;
  }
  return device;
}

// Hopper's kernels hold all query heads of a key/value head in one tile.
static bool for_hopper(const CrossAttention& x) {
  return current_device().capability == 90 && x.heads / x.kv_heads <= sm90::MAX_GROUP;
}

static bool few_queries(const CrossAttention& x) {
  return x.text_tokens * (x.heads / x.kv_heads) <= decode::MAX_QUERIES;
}

int64_t workspace_bytes(const CrossAttentionForward& x) {
  return few_queries(x) ? decode::workspace_bytes(x) : 0;
}

const char* cross_attention(const CrossAttentionForward& x, void* workspace, void* stream) {
  if (current_device().capability < 80) return "the kernels need compute capability 8.0 or later";
  if (few_queries(x)) return decode::cross_attention(x, workspace, stream);
  return for_hopper(x) ? sm90::cross_attention(x, stream) : sm80::cross_attention(x, stream);
}

int64_t workspace_bytes(const CrossAttentionBackward& x) {
  return for_hopper(x) ? sm90::workspace_bytes(x) : sm80::workspace_bytes(x);
}

const char* cross_attention_backward(const CrossAttentionBackward& x, void* workspace,
                                     void* stream) {
  if (current_device().capability < 80) return "the kernels need compute capability 8.0 or later";
  return for_hopper(x) ? sm90::cross_attention_backward(x, workspace, stream)
                       : sm80::cross_attention_backward(x, workspace, stream);
}

}  // namespace megavlm::cuda
