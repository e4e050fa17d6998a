// RMSNorm of one instruction set: see norm.h for what is computed and kernels.h for the tasks.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace megavlm::cpu::MEGAVLM_ISA {

// A sum of fp32 numbers in fp64.
struct WideSum {
  Doubles low = {}, high = {};
  void add_product(Vector a, Vector b) {
    low += lower(a) * lower(b);
    high += upper(a) * upper(b);
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < lanes / 2; ++i) sum += low[i] + high[i];
    return sum;
  }
};

template <class T>
inline T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

template <class T>
inline Vector rounded(Vector v) {
  T memory[lanes];
  store_floats(memory, v);
  return load_floats(memory);
}

template <class T>
void norm(const NormForward& problem, int64_t begin, int64_t end) {
  const bool gated = problem.branch.data;
  const float gate = gated ? float(__builtin_tanh(*problem.gate)) : 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* input = row_of<const T>(problem.residual, row);
    WideSum squares;
    if (gated) {
      const T* branch = row_of<const T>(problem.branch, row);
      T* sum = row_of<T>(problem.sum, row);
      for (int64_t i = 0; i < problem.width; i += lanes) {
        const int64_t count = problem.width - i;
        const Vector x =
            rounded<T>(load_floats(input + i, count) + gate * load_floats(branch + i, count));
        store_floats(sum + i, x, count);
        squares.add_product(x, x);
      }
      input = sum;
    } else {
      for (int64_t i = 0; i < problem.width; i += lanes) {
        const Vector x = load_floats(input + i, problem.width - i);
        squares.add_product(x, x);
      }
    }
    const float r =
        float(1 / __builtin_sqrt(squares.total() / double(problem.width) + problem.epsilon));
    problem.inverse_rms[row] = r;
    T* normed = row_of<T>(problem.normed, row);
    for (int64_t i = 0; i < problem.width; i += lanes) {
      const int64_t count = problem.width - i;
      store_floats(normed + i,
                   load_floats(input + i, count) * r * load_floats(problem.weight + i, count),
                   count);
    }
  }
}

// Adds the rows' share to grad_weight, (w), and to the gradient of tanh(gate).
template <class T>
void norm_backward(const NormBackward& problem, int64_t begin, int64_t end, double* grad_weight,
                   double* grad_tanh) {
  const bool gated = problem.branch.data;
  const float gate = gated ? float(__builtin_tanh(*problem.gate)) : 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* input = row_of<const T>(problem.residual, row);
    const T* grad_normed = row_of<const T>(problem.grad_normed, row);
    const float r = problem.inverse_rms[row];
    WideSum products;
    for (int64_t i = 0; i < problem.width; i += lanes) {
      const int64_t count = problem.width - i;
      const Vector x = load_floats(input + i, count), grad = load_floats(grad_normed + i, count);
      products.add_product(x * load_floats(problem.weight + i, count), grad);
      add_floats(grad_weight + i, x * r * grad, count);
    }
    const float share = float(products.total() / double(problem.width)) * r * r;

    T* grad_residual = row_of<T>(problem.grad_residual, row);
    WideSum gate_products;
    for (int64_t i = 0; i < problem.width; i += lanes) {
      const int64_t count = problem.width - i;
      Vector grad =
          r * (load_floats(grad_normed + i, count) * load_floats(problem.weight + i, count) -
               load_floats(input + i, count) * share);
      if (gated) {
        grad += load_floats(row_of<const T>(problem.grad_sum, row) + i, count);
        gate_products.add_product(load_floats(row_of<const T>(problem.branch, row) + i, count),
                                  grad);
        store_floats(row_of<T>(problem.grad_branch, row) + i, gate * grad, count);
      }
      store_floats(grad_residual + i, grad, count);
    }
    if (gated) *grad_tanh += gate_products.total();
  }
}

}  // namespace megavlm::cpu::MEGAVLM_ISA
