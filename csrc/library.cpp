// The operators torch.ops.megavlm.*: schemas, checks, outputs, and the way to the kernels.
//
// Written against LibTorch's stable ABI, so that one binary serves every torch from 2.11 on, with
// and without CUDA. Python adds shapes for tracing and gradients (megavlm/ops/library.py).

#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cross_attention.h"
#include "norm.h"

namespace megavlm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// ---- What is asked of every tensor.

Element element_of(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "megavlm: the kernels take float32 and bfloat16; use "
                  "megavlm.ops.reference for other types");
  STD_TORCH_CHECK(!x.is_cuda() || type == ScalarType::BFloat16,
                  "megavlm: the CUDA kernels take bfloat16; use megavlm.ops.reference for float32");
  return type == ScalarType::Float ? Element::float32 : Element::bfloat16;
}

bool same_shape(const Tensor& x, const Tensor& y) {
  const auto a = x.sizes(), b = y.sizes();
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void check_like(const Tensor& x, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "megavlm: ", name,
                  " has another dtype than the first operand");
  STD_TORCH_CHECK(x.device() == q.device(), "megavlm: ", name,
                  " is on another device than the first operand");
}

void check_float32(const Tensor& x, int64_t elements, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() == elements &&
                      x.is_contiguous() && x.device() == like.device(),
                  "megavlm: ", name, " must be ", elements,
                  " contiguous float32 values on the operands' device, but has ", x.numel());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
             std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, Sizes(sizes.begin(), sizes.size()), type);
}

// The last axis must be contiguous; CUDA kernels also read vectors of 16 bytes along it.
bool fits_kernels(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool fits = x.size(last) <= 1 || x.stride(last) == 1;
  if (!x.is_cuda()) return fits;
  for (int64_t axis = 0; axis < last; ++axis)
    fits = fits && (x.size(axis) == 1 || (x.stride(axis) > 0 && x.stride(axis) % 8 == 0));
  return fits && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// x, or a copy that fits.
Tensor readable(const Tensor& x) {
  if (x.dim() == 0 || fits_kernels(x)) return x;
  auto copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

// torch may report any stride for an axis of size 1; kernels and the copy engine check them.
int64_t stride(const Tensor& x, int64_t axis) {
  return x.size(axis) == 1 ? x.size(x.dim() - 1) : x.stride(axis);
}

void* data(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }
float* floats(const Tensor& x) { return static_cast<float*>(data(x)); }

// ---- Running a kernel.

const cpu::ParallelFor parallel_for = [](int64_t n, const auto& range) {
  torch::stable::parallel_for(0, n, 1, range);
};

// torch's stream on this device. Found at run time, so that the binary also loads without CUDA.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                              : nullptr);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function && function(device, &stream) == 0,
                  "megavlm: this torch has no CUDA stream");
  return stream;
}

// Runs `kernel(workspace, stream)` on x's device.
template <class Kernel>
void run_on_cuda(const Tensor& x, int64_t workspace_bytes, const Kernel& kernel) {
  const auto workspace = empty(x, {workspace_bytes}, ScalarType::Byte);
  const char* error = kernel(data(workspace), current_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "megavlm: ", error);
}

// ---- Cross-attention.

View tokens_view(const Tensor& x_bthd) {
  return {data(x_bthd), stride(x_bthd, 0), stride(x_bthd, 1), stride(x_bthd, 2)};
}

View keys_view(const Tensor& x_vgd) { return {data(x_vgd), 0, stride(x_vgd, 0), stride(x_vgd, 1)}; }

// On the CPU the intervals are read and checked; on a GPU the kernels clamp them.
void check_intervals(const CrossAttention& x) {
  for (int64_t i = 0; i < x.rows * x.text_tokens; ++i) {
    const int64_t low = x.low[i], high = x.high[i];
    STD_TORCH_CHECK(0 <= low && low <= high && high <= x.image_tokens, "megavlm: text token ",
                    i % x.text_tokens, " of row ", i / x.text_tokens,
                    " is to see the image tokens ", low, " to ", high, " of ", x.image_tokens,
                    "; 0 <= low <= high <= image tokens must hold");
  }
}

// Checks everything and describes it. The tensors must outlive what is returned.
CrossAttention described(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& low,
                         const Tensor& high, double scale, std::optional<double> q_norm_epsilon) {
  STD_TORCH_CHECK(q.dim() == 4,
                  "megavlm: q must be (rows, text tokens, heads, head width), but has ", q.dim(),
                  " axes");
  STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && same_shape(k, v),
                  "megavlm: k and v must both be (image tokens, key/value heads, head width)");
  check_like(k, q, "k");
  check_like(v, q, "v");
  CrossAttention x{element_of(q), q.size(0), q.size(1), k.size(0), q.size(2), k.size(1), q.size(3)};
  STD_TORCH_CHECK(k.size(2) == x.head_width, "megavlm: q has head width ", x.head_width,
                  ", k and v have ", k.size(2));
  STD_TORCH_CHECK(x.kv_heads > 0 && x.heads % x.kv_heads == 0, "megavlm: ", x.heads,
                  " query heads are not a multiple of ", x.kv_heads, " key/value heads");
  STD_TORCH_CHECK(
      x.head_width > 0 && (!q.is_cuda() || (x.head_width % 8 == 0 && x.head_width <= 128)),
      "megavlm: head width ", x.head_width, "; the CUDA kernels take multiples of 8 up to 128");
  STD_TORCH_CHECK(q_norm_epsilon.value_or(0) >= 0, "megavlm: q_norm_epsilon is ", *q_norm_epsilon,
                  ", but must not be negative");
  STD_TORCH_CHECK(scale > 0, "megavlm: scale is ", scale, ", but must be positive");
  for (const auto* ends : {&low, &high}) {
    STD_TORCH_CHECK(ends->scalar_type() == ScalarType::Int && ends->dim() == 2 &&
                        ends->size(0) == x.rows && ends->size(1) == x.text_tokens &&
                        ends->device() == q.device(),
                    "megavlm: low and high must be int32 (rows, text tokens) = (", x.rows, ", ",
                    x.text_tokens, ") on q's device");
  }
  x.q = tokens_view(q);
  x.k = keys_view(k);
  x.v = keys_view(v);
  x.low = static_cast<const int32_t*>(low.const_data_ptr());
  x.high = static_cast<const int32_t*>(high.const_data_ptr());
  x.scale = static_cast<float>(scale);
  x.q_norm_epsilon = static_cast<float>(q_norm_epsilon.value_or(-1.0));
  if (q.is_cpu()) check_intervals(x);
  return x;
}

template <bool CUDA>
std::tuple<Tensor, Tensor> cross_attention(const Tensor& q_given, const Tensor& k_given,
                                           const Tensor& v_given, const Tensor& low_given,
                                           const Tensor& high_given, double scale,
                                           std::optional<double> q_norm_epsilon) {
  const auto q = readable(q_given), k = readable(k_given), v = readable(v_given);
  const auto low = torch::stable::contiguous(low_given),
             high = torch::stable::contiguous(high_given);
  CrossAttentionForward x{described(q, k, v, low, high, scale, q_norm_epsilon)};
  auto out = torch::stable::empty_like(q_given);
  auto lse = empty(q, {x.rows, x.heads, x.text_tokens}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  if (x.image_tokens == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITE);
    return {out, lse};
  }
  // A kernel writes whole vectors, so where torch laid `out` out otherwise it is copied at the end.
  const auto written = readable(out);
  x.out = tokens_view(written);
  x.lse = floats(lse);
  if constexpr (CUDA) {
#ifdef MEGAVLM_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    run_on_cuda(q, cuda::workspace_bytes(x), [&](void* workspace, void* stream) {
      return cuda::cross_attention(x, workspace, stream);
    });
#endif
  } else {
    cpu::cross_attention(x, parallel_for);
  }
  if (data(written) != data(out)) torch::stable::copy_(out, written);
  return {out, lse};
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out_given, const Tensor& q_given, const Tensor& k_given,
    const Tensor& v_given, const Tensor& low_given, const Tensor& high_given,
    const Tensor& out_given, const Tensor& lse, double scale,
    std::optional<double> q_norm_epsilon) {
  const auto q = readable(q_given), k = readable(k_given), v = readable(v_given);
  const auto low = torch::stable::contiguous(low_given),
             high = torch::stable::contiguous(high_given);
  const auto grad_out = readable(grad_out_given), out = readable(out_given);
  CrossAttentionBackward x{described(q, k, v, low, high, scale, q_norm_epsilon)};
  STD_TORCH_CHECK(same_shape(grad_out, q) && same_shape(out, q),
                  "megavlm: out and its gradient must have q's shape");
  check_like(grad_out, q, "the gradient of out");
  check_like(out, q, "out");
  check_float32(lse, x.rows * x.heads * x.text_tokens, q, "lse");
  auto grad_q = torch::stable::empty_like(q_given);
  auto grad_k = empty(k, {x.image_tokens, x.kv_heads, x.head_width});
  auto grad_v = empty(k, {x.image_tokens, x.kv_heads, x.head_width});
  if (q.numel() == 0 || x.image_tokens == 0) {
    for (auto* grad : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v};
  }
  const auto written = readable(grad_q);
  x.grad_out = tokens_view(grad_out);
  x.out = tokens_view(out);
  x.lse = floats(lse);
  x.grad_q = tokens_view(written);
  x.grad_k = keys_view(grad_k);
  x.grad_v = keys_view(grad_v);
  if constexpr (CUDA) {
#ifdef MEGAVLM_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    run_on_cuda(q, cuda::workspace_bytes(x), [&](void* workspace, void* stream) {
      return cuda::cross_attention_backward(x, workspace, stream);
    });
#endif
  } else {
    cpu::cross_attention_backward(x, parallel_for);
  }
  if (data(written) != data(grad_q)) torch::stable::copy_(grad_q, written);
  return {grad_q, grad_k, grad_v};
}

// ---- Norms.

Matrix matrix(const Tensor& x_nw) { return {data(x_nw), stride(x_nw, 0)}; }

Norm described(const Tensor& residual, const Tensor* branch, const Tensor* gate,
               const Tensor& weight, double epsilon) {
  STD_TORCH_CHECK(residual.dim() == 2, "megavlm: a norm takes (rows, width), but got ",
                  residual.dim(), " axes");
  Norm x{element_of(residual), residual.size(0), residual.size(1)};
  STD_TORCH_CHECK(x.width > 0 && (!residual.is_cuda() || (x.width % 8 == 0 && x.width <= 12288)),
                  "megavlm: a norm of width ", x.width,
                  "; the CUDA kernels take multiples of 8 up to 12,288");
  check_float32(weight, x.width, residual, "the norm's weight");
  x.residual = matrix(residual);
  x.branch = {nullptr, 0};
  if (branch) {
    STD_TORCH_CHECK(same_shape(*branch, residual),
                    "megavlm: residual and branch must have one shape");
    check_like(*branch, residual, "the branch");
    check_float32(*gate, 1, residual, "the gate");
    x.branch = matrix(*branch);
    x.gate = floats(*gate);
  }
  x.weight = floats(weight);
  x.epsilon = static_cast<float>(epsilon);
  return x;
}

template <bool CUDA>
void run(const NormForward& x, const Tensor& on) {
  if constexpr (CUDA) {
#ifdef MEGAVLM_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    run_on_cuda(on, 0, [&](void*, void* stream) { return cuda::norm(x, stream); });
#endif
  } else {
    cpu::norm(x, parallel_for);
  }
}

template <bool CUDA>
void run(const NormBackward& x, const Tensor& on) {
  if constexpr (CUDA) {
#ifdef MEGAVLM_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    run_on_cuda(on, cuda::workspace_bytes(x), [&](void* workspace, void* stream) {
      return cuda::norm_backward(x, workspace, stream);
    });
#endif
  } else {
    cpu::norm_backward(x, parallel_for);
  }
}

template <bool CUDA>
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_given, const Tensor& weight_given,
                                    double epsilon) {
  const auto input = readable(x_given), weight = readable(weight_given);
  NormForward x{described(input, nullptr, nullptr, weight, epsilon)};
  auto normed = empty(input, {x.rows, x.width});
  auto inverse_rms = empty(input, {x.rows}, ScalarType::Float);
  x.normed = matrix(normed);
  x.inverse_rms = floats(inverse_rms);
  if (x.rows > 0) run<CUDA>(x, input);
  return {normed, inverse_rms};
}

template <bool CUDA>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_normed_given, const Tensor& x_given,
                                             const Tensor& weight_given,
                                             const Tensor& inverse_rms) {
  const auto input = readable(x_given), weight = readable(weight_given);
  const auto grad_normed = readable(grad_normed_given);
  NormBackward x{described(input, nullptr, nullptr, weight, 0)};
  STD_TORCH_CHECK(same_shape(grad_normed, input),
                  "megavlm: a norm's output and its gradient must have one shape");
  check_like(grad_normed, input, "the gradient");
  check_float32(inverse_rms, x.rows, input, "inverse_rms");
  auto grad_x = empty(input, {x.rows, x.width});
  auto grad_weight = empty(input, {x.width}, ScalarType::Float);
  x.inverse_rms = floats(inverse_rms);
  x.grad_normed = matrix(grad_normed);
  x.grad_residual = matrix(grad_x);
  x.grad_weight = floats(grad_weight);
  if (x.rows > 0)
    run<CUDA>(x, input);
  else
    torch::stable::zero_(grad_weight);
  return {grad_x, grad_weight};
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor> gated_norm(const Tensor& residual_given,
                                              const Tensor& branch_given, const Tensor& gate,
                                              const Tensor& weight_given, double epsilon) {
  const auto residual = readable(residual_given), branch = readable(branch_given);
  const auto weight = readable(weight_given);
  NormForward x{described(residual, &branch, &gate, weight, epsilon)};
  auto sum = empty(residual, {x.rows, x.width});
  auto normed = empty(residual, {x.rows, x.width});
  auto inverse_rms = empty(residual, {x.rows}, ScalarType::Float);
  x.sum = matrix(sum);
  x.normed = matrix(normed);
  x.inverse_rms = floats(inverse_rms);
  if (x.rows > 0) run<CUDA>(x, residual);
  return {sum, normed, inverse_rms};
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward(
    const Tensor& grad_sum_given, const Tensor& grad_normed_given, const Tensor& sum_given,
    const Tensor& branch_given, const Tensor& gate, const Tensor& weight_given,
    const Tensor& inverse_rms) {
  const auto sum = readable(sum_given), branch = readable(branch_given);
  const auto weight = readable(weight_given);
  const auto grad_sum = readable(grad_sum_given), grad_normed = readable(grad_normed_given);
  NormBackward x{described(sum, &branch, &gate, weight, 0)};
  STD_TORCH_CHECK(same_shape(grad_sum, sum) && same_shape(grad_normed, sum),
                  "megavlm: a norm's outputs and their gradients must have one shape");
  check_like(grad_sum, sum, "the gradient of the sum");
  check_like(grad_normed, sum, "the gradient of the norm");
  check_float32(inverse_rms, x.rows, sum, "inverse_rms");
  auto grad_residual = empty(sum, {x.rows, x.width});
  auto grad_branch = empty(sum, {x.rows, x.width});
  auto grad_gate = empty(sum, {1}, ScalarType::Float);
  auto grad_weight = empty(sum, {x.width}, ScalarType::Float);
  x.inverse_rms = floats(inverse_rms);
  x.grad_normed = matrix(grad_normed);
  x.grad_sum = matrix(grad_sum);
  x.grad_residual = matrix(grad_residual);
  x.grad_branch = matrix(grad_branch);
  x.grad_gate = floats(grad_gate);
  x.grad_weight = floats(grad_weight);
  if (x.rows > 0) {
    run<CUDA>(x, sum);
  } else {
    torch::stable::zero_(grad_gate);
    torch::stable::zero_(grad_weight);
  }
  return {grad_residual, grad_branch, grad_gate, grad_weight};
}

template <bool CUDA>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("cross_attention", TORCH_BOX(&cross_attention<CUDA>));
  library.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward<CUDA>));
  library.impl("rms_norm", TORCH_BOX(&rms_norm<CUDA>));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<CUDA>));
  library.impl("gated_norm", TORCH_BOX(&gated_norm<CUDA>));
  library.impl("gated_norm_backward", TORCH_BOX(&gated_norm_backward<CUDA>));
}

}  // namespace
}  // namespace megavlm

// Letters: b rows, t text tokens, v image tokens, h heads, g key/value heads, d head width; n rows,
// w width of a norm. low and high are int32; lse, inverse_rms, gate and weight are float32.
STABLE_TORCH_LIBRARY(megavlm, library) {
  // q (b, t, h, d); k, v (v, g, d); low, high (b, t) -> out like q, lse (b, h, t)
  library.def(
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor low, Tensor high, float scale, "
      "float? q_norm_epsilon=None) -> (Tensor out, Tensor lse)");
  library.def(
      "cross_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor low, "
      "Tensor high, Tensor out, Tensor lse, float scale, float? q_norm_epsilon=None) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // x (n, w) -> normed (n, w), inverse_rms (n)
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  library.def(
      "rms_norm_backward(Tensor grad_normed, Tensor x, Tensor weight, Tensor inverse_rms) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  // residual, branch (n, w); gate (1) -> sum, normed (n, w), inverse_rms (n)
  library.def(
      "gated_norm(Tensor residual, Tensor branch, Tensor gate, Tensor weight, float epsilon) "
      "-> (Tensor sum, Tensor normed, Tensor inverse_rms)");
  library.def(
      "gated_norm_backward(Tensor grad_sum, Tensor grad_normed, Tensor sum, Tensor branch, "
      "Tensor gate, Tensor weight, Tensor inverse_rms) "
      "-> (Tensor grad_residual, Tensor grad_branch, Tensor grad_gate, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(megavlm, CPU, library) { megavlm::implement<false>(library); }

#ifdef MEGAVLM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megavlm, CUDA, library) { megavlm::implement<true>(library); }
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
