// RMSNorm, alone and after a gated residual: what every implementation computes, and how it is
// called. Letters: n rows, w width.
//
//   gated:  sum = residual + tanh(gate) * branch     rounded to the element type
//   plain:  sum = residual                           not written
//   normed = sum * inverse_rms * weight,  inverse_rms[n] = 1 / sqrt(mean(sum[n]^2) + epsilon)
//
// Arithmetic is in fp32 (CUDA) or fp32 with wider sums (CPU).
#pragma once

#include <cstdint>

#include "cross_attention.h"

namespace megavlm {

struct Matrix {  // (n, w); the stride counts elements; along the width it is 1
  void* data;
  int64_t stride;
};

struct Norm {
  Element element;  // of every matrix
  int64_t rows, width;
  Matrix residual, branch;  // branch.data is null: plain
  const float* gate;        // 1 element; null: plain
  const float* weight;      // (w)
  float epsilon;
};

struct NormForward : Norm {
  Matrix sum;  // gated only
  Matrix normed;
  float* inverse_rms;  // (n)
};

// `residual` holds the forward pass's sum here (plain: its input).
struct NormBackward : Norm {
  const float* inverse_rms;
  Matrix grad_normed;
  Matrix grad_sum;       // gated only
  Matrix grad_residual;  // grad_sum + what comes through the norm
  Matrix grad_branch;    // gated only: tanh(gate) * grad_residual
  float* grad_gate;      // gated only: 1 element
  float* grad_weight;    // (w)
};

namespace cpu {
void norm(const NormForward&, const ParallelFor&);
void norm_backward(const NormBackward&, const ParallelFor&);
}  // namespace cpu

// width a multiple of 8; pointers 16-byte aligned, strides multiples of 8 elements.
namespace cuda {
int64_t workspace_bytes(const NormBackward&);
const char* norm(const NormForward&, void* stream);
const char* norm_backward(const NormBackward&, void* workspace, void* stream);
}  // namespace cuda
}  // namespace megavlm
