#include "../norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace megavlm::cpu {

void norm(const NormForward& problem, const ParallelFor& parallel) {
  const Kernels& set = kernels(problem.element);
  parallel(problem.rows, [&](int64_t begin, int64_t end) { set.norm(problem, begin, end); });
}

void norm_backward(const NormBackward& problem, const ParallelFor& parallel) {
  const Kernels& set = kernels(problem.element);
  // Sums over rows: within chunks that do not depend on threads, then over chunks.
  const int64_t rows = problem.rows, width = problem.width;
  const int64_t chunk_rows = std::max<int64_t>(16, (rows + 63) / 64);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  std::vector<double> grad_weight(chunks * width), grad_tanh(chunks);
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      set.norm_backward(problem, i * chunk_rows, std::min(rows, (i + 1) * chunk_rows),
                        &grad_weight[i * width], &grad_tanh[i]);
    }
  });
  parallel(width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += grad_weight[chunk * width + i];
      problem.grad_weight[i] = float(sum);
    }
  });
  if (problem.branch.data) {
    double sum = 0;
    for (const double part : grad_tanh) sum += part;
    const double gate = std::tanh(double(*problem.gate));
    *problem.grad_gate = float(sum * (1 - gate * gate));
  }
}

}  // namespace megavlm::cpu
