// RMSNorm and gated residual: every element is read once and written once.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <sm80.cuh>
#include <type_traits>

#include "../norm.h"
#include "kernels.h"

namespace megavlm::cuda {
namespace {

namespace sm80 = megavlm::sm80;  // the instructions, not the kernels

constexpr int MAX_WARPS = 32;       // of a block
constexpr int REDUCTION_ROWS = 32;  // of partial sums that are added side by side

// How rows are dealt out: LANES neighbouring threads (0: the whole block) share a row, and each
// holds up to VECTORS vectors of 16 bytes, which lie LANES vectors apart.
template <typename Element, int LANES_>
struct Layout {
  using T = Element;
  using Vector = std::conditional_t<std::is_same_v<T, float>, float4, uint4>;
  static constexpr int LANES = LANES_;
  static constexpr int VECTORS = 2;
  static constexpr int COUNT = 16 / sizeof(T);   // elements of a vector
  static constexpr int WIDTH = VECTORS * COUNT;  // of a thread
  static constexpr int MAX_THREADS = LANES > 0 ? 256 : 1024;
  static constexpr int MAX_WIDTH = (LANES > 0 ? LANES : MAX_THREADS) * WIDTH;
  static constexpr int THREADS_PER_MULTIPROCESSOR = LANES > 0 ? 768 : 1024;  // have registers
  static constexpr int MIN_BLOCKS = THREADS_PER_MULTIPROCESSOR / MAX_THREADS;

  static int threads(int64_t width) {
    return LANES > 0 ? MAX_THREADS : (width + 32 * WIDTH - 1) / (32 * WIDTH) * 32;
  }
  static __host__ __device__ int rows_per_block(int threads) {
    return LANES > 0 ? threads / LANES : 1;
  }
};

__device__ __forceinline__ void unpack(const float4& vector, float (&x)[4]) {
  x[0] = vector.x, x[1] = vector.y, x[2] = vector.z, x[3] = vector.w;
}

__device__ __forceinline__ void unpack(const uint4& vector, float (&x)[8]) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_bf16(pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ float4 pack(const float (&x)[4]) {
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                    pack_bf16(x[6], x[7]));
}

// A thread's share of one of the rows that its block handles at once, the first of which is given.
// Threads without a row take part in sums.
template <typename Layout>
class Share {
 public:
  using Vector = typename Layout::Vector;
  static constexpr int VECTORS = Layout::VECTORS, COUNT = Layout::COUNT, LANES = Layout::LANES;

  __device__ Share(const Norm& x, int first_row) {
    const int lanes = LANES > 0 ? LANES : blockDim.x;
    const int row_of_block = LANES > 0 ? threadIdx.x / lanes : 0;
    const int lane = threadIdx.x - row_of_block * lanes;
    row_ = first_row + row_of_block;
    first_ = lane == 0 && row_ < x.rows;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      columns_[i] = (i * lanes + lane) * COUNT;
      live_[i] = columns_[i] < x.width && row_ < x.rows;
    }
  }

  __device__ int row() const { return row_; }
  __device__ bool first() const { return first_; }
  __device__ int column(int vector) const { return columns_[vector]; }

  // Zeros where the share ends, or where there is no matrix.
  __device__ void read(const Matrix& matrix, Vector (&to)[VECTORS]) const {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      to[i] = Vector();
      if (live_[i] && matrix.data) to[i] = *address(matrix, i);
    }
  }

  __device__ void copy(const Matrix& matrix, int vector, Vector* shared) const {
    sm80::copy_async(shared, address(matrix, vector), live_[vector] && matrix.data);
  }

  __device__ void write(const Matrix& matrix, int vector, const float (&x)[COUNT]) const {
    if (live_[vector]) *address(matrix, vector) = pack(x);
  }

  __device__ void read_weight(const float* weight, int vector, float (&to)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      float4 part = make_float4(0.f, 0.f, 0.f, 0.f);
      if (live_[vector]) part = *reinterpret_cast<const float4*>(weight + columns_[vector] + i);
      to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
    }
  }

 private:
  __device__ Vector* address(const Matrix& matrix, int vector) const {
    return reinterpret_cast<Vector*>(static_cast<typename Layout::T*>(matrix.data) +
                                     row_ * matrix.stride + columns_[vector]);
  }

  int row_, columns_[VECTORS];
  bool first_, live_[VECTORS];
};

// Under --use_fast_math tanhf has only 11 bits.
__device__ __forceinline__ float exact_tanh(float x) {
  const float e = expm1f(2.f * x);
  return x > 10.f ? 1.f : x < -10.f ? -1.f : e / (e + 2.f);
}

// The sum over the threads that share a row. A block's needs MAX_WARPS floats of shared memory,
// not those of its previous call.
template <int LANES>
__device__ __forceinline__ float row_sum(float x, float* shared) {
#pragma unroll
  for (int distance = (LANES > 0 ? LANES : 32) / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(~0u, x, distance);
  if constexpr (LANES > 0) {
    __syncwarp();  // like the block's: what follows reads its inputs anew, which saves registers
  } else {
    const int lane = threadIdx.x % 32;
    if (lane == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < static_cast<int>(blockDim.x) / 32 ? shared[lane] : 0.f;
#pragma unroll
    for (int distance = MAX_WARPS / 2; distance > 0; distance /= 2)
      x += __shfl_xor_sync(~0u, x, distance);
  }
  return x;
}

// Rows of at most 256 elements: 2 vectors per thread, so that 4 to 32 neighbours have a row and a
// block of 256 threads has several. Wider rows: one block each, 2 vectors per thread again. A row
// stays in registers while the sum of its squares is formed.
template <typename Layout>
__global__ void __launch_bounds__(Layout::MAX_THREADS, Layout::MIN_BLOCKS)
    normalize(const __grid_constant__ NormForward x) {
  constexpr int VECTORS = Layout::VECTORS, COUNT = Layout::COUNT;
  const Share<Layout> share(x, blockIdx.x * Layout::rows_per_block(blockDim.x));

  typename Layout::Vector residual[VECTORS], branch[VECTORS];
  share.read(x.residual, residual);
  share.read(x.branch, branch);
  const float gate = x.gate ? exact_tanh(*x.gate) : 0.f;

  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    float sum[COUNT];
    unpack(residual[i], sum);
    if (x.gate) {
      float addend[COUNT];
      unpack(branch[i], addend);
#pragma unroll
      for (int j = 0; j < COUNT; ++j) sum[j] += gate * addend[j];
      share.write(x.sum, i, sum);
      residual[i] = pack(sum);
      unpack(residual[i], sum);  // as it was rounded
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) squares += sum[j] * sum[j];
  }
  squares = row_sum<Layout::LANES>(squares, reinterpret_cast<float*>(dynamic_shared()));
  const float inverse_rms = rsqrtf(squares / x.width + x.epsilon);
  if (share.first()) x.inverse_rms[share.row()] = inverse_rms;

#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    float normed[COUNT], weight[COUNT];
    unpack(residual[i], normed);
    share.read_weight(x.weight, i, weight);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) normed[j] *= inverse_rms * weight[j];
    share.write(x.normed, i, normed);
  }
}

// A thread's copies of its shares of the backward pass's inputs, in shared memory.
template <typename Layout>
struct Copies {
  using Vector = typename Layout::Vector;
  enum Input { SUM, GRAD_NORMED, GRAD_SUM, BRANCH, INPUTS };
  static constexpr int BYTES = INPUTS * Layout::VECTORS * sizeof(Vector);  // per thread

  Vector* first;

  __device__ Vector& at(Input input, int vector) const {
    return first[(input * Layout::VECTORS + vector) * blockDim.x];
  }
  __device__ void read(Input input, int vector, float (&to)[Layout::COUNT]) const {
    unpack(at(input, vector), to);
  }
  // Starts to copy.
  __device__ void fill(const NormBackward& x, const Share<Layout>& share) const {
#pragma unroll
    for (int i = 0; i < Layout::VECTORS; ++i) {
      share.copy(x.residual, i, &at(SUM, i));
      share.copy(x.grad_normed, i, &at(GRAD_NORMED, i));
      if (x.gate) {
        share.copy(x.grad_sum, i, &at(GRAD_SUM, i));
        share.copy(x.branch, i, &at(BRANCH, i));
      }
    }
    sm80::copy_commit();
  }
};

// Rows are dealt to threads as in the forward pass, and to blocks in turn. The next row's inputs
// are copied to shared memory as soon as this row's have been read; no thread reads another's
// share. Each thread adds up its columns' grad_weight in registers. In the end the block writes
// its own row of `partials`, width + 8 floats: grad_weight, then sum(branch * grad_residual).
template <typename Layout>
__global__ void __launch_bounds__(Layout::MAX_THREADS, Layout::MIN_BLOCKS)
    differentiate(const __grid_constant__ NormBackward x, float* partials) {
  using Copies = Copies<Layout>;
  constexpr int VECTORS = Layout::VECTORS, COUNT = Layout::COUNT, LANES = Layout::LANES;
  const int rows = x.rows, width = x.width;
  const int rows_per_block = Layout::rows_per_block(blockDim.x);
  const int stride = gridDim.x * rows_per_block;
  const float gate = x.gate ? exact_tanh(*x.gate) : 0.f;
  auto* sums = reinterpret_cast<float*>(dynamic_shared());  // row_sum's, two sets in turn
  const Copies copies = {reinterpret_cast<typename Layout::Vector*>(sums + 2 * MAX_WARPS) +
                         threadIdx.x};

  float grad_weight[VECTORS][COUNT] = {}, grad_gate = 0.f;
  int turn = 0;
  int first_row = blockIdx.x * rows_per_block;
  Share<Layout> share(x, first_row);
  copies.fill(x, share);
  float next_inverse_rms = share.row() < rows ? x.inverse_rms[share.row()] : 0.f;
  for (; first_row < rows; first_row += stride) {
    const float inverse_rms = next_inverse_rms;
    sm80::copy_wait<0>();

    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      float sum[COUNT], grad_normed[COUNT], weight[COUNT];
      copies.read(Copies::SUM, i, sum);
      copies.read(Copies::GRAD_NORMED, i, grad_normed);
      share.read_weight(x.weight, i, weight);
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        const float product = grad_normed[j] * sum[j];
        dot += weight[j] * product;
        grad_weight[i][j] += inverse_rms * product;
      }
    }
    dot = row_sum<LANES>(dot, sums + turn * MAX_WARPS);
    turn ^= 1;
    const float slope = dot / width * inverse_rms * inverse_rms * inverse_rms;

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      float sum[COUNT], grad_normed[COUNT], weight[COUNT], grad[COUNT] = {};
      copies.read(Copies::SUM, i, sum);
      copies.read(Copies::GRAD_NORMED, i, grad_normed);
      share.read_weight(x.weight, i, weight);
      if (x.gate) copies.read(Copies::GRAD_SUM, i, grad);
#pragma unroll
      for (int j = 0; j < COUNT; ++j)
        grad[j] += inverse_rms * weight[j] * grad_normed[j] - slope * sum[j];
      share.write(x.grad_residual, i, grad);
      if (x.gate) {
        float branch[COUNT];
        copies.read(Copies::BRANCH, i, branch);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
          grad_gate += branch[j] * grad[j];
          grad[j] *= gate;
        }
        share.write(x.grad_branch, i, grad);
      }
    }

    share = Share<Layout>(x, first_row + stride);
    copies.fill(x, share);
    next_inverse_rms = share.row() < rows ? x.inverse_rms[share.row()] : 0.f;
  }
  sm80::copy_wait<0>();

  float* partial = partials + static_cast<int64_t>(blockIdx.x) * (width + 8);
  if (x.gate) {
    grad_gate = row_sum<0>(grad_gate, sums + turn * MAX_WARPS);
    if (threadIdx.x == 0) partial[width] = grad_gate;
  }
  float* columns = sums + 2 * MAX_WARPS;  // (warps, MAX_WIDTH)
  const int warp = threadIdx.x / 32;
  if constexpr (LANES > 0) __syncthreads();  // the copies lay there
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const int column = share.column(i) + j;
      if constexpr (LANES > 0) {
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2)
          grad_weight[i][j] += __shfl_xor_sync(~0u, grad_weight[i][j], distance);
        if (threadIdx.x % 32 < LANES)
          columns[warp * Layout::MAX_WIDTH + column] = grad_weight[i][j];
      } else if (column < width) {
        partial[column] = grad_weight[i][j];
      }
    }
  }
  if constexpr (LANES > 0) {
    __syncthreads();
    for (int column = threadIdx.x; column < width; column += Layout::MAX_THREADS) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < Layout::MAX_THREADS / 32; ++i)
        sum += columns[i * Layout::MAX_WIDTH + column];
      partial[column] = sum;
    }
  }
}

// Adds up the `count` rows of `partials`, always in the same order. A block has 32 columns, one
// per lane; its 32 warps share the rows.
__global__ void __launch_bounds__(32 * REDUCTION_ROWS)
    reduce(const __grid_constant__ NormBackward x, const float* partials, int count) {
  const int width = x.width, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane, columns = x.gate ? width + 1 : width;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int i = warp; i < count; i += REDUCTION_ROWS)
      sum += partials[static_cast<int64_t>(i) * (width + 8) + column];
  }
  auto* sums = reinterpret_cast<float*>(dynamic_shared());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int i = 1; i < REDUCTION_ROWS; ++i) sum += sums[32 * i + lane];
  if (column < width) {
    x.grad_weight[column] = sum;
  } else {
    const float gate = exact_tanh(*x.gate);
    *x.grad_gate = (1.f - gate) * (1.f + gate) * sum;
  }
}

// Calls function(Layout) with the layout for the rows.
template <typename T, typename Function>
auto with_layout(int64_t width, const Function& function) {
  constexpr int WIDTH = Layout<T, 0>::WIDTH;
  if (width <= 64) return function(Layout<T, 64 / WIDTH>());
  if (width <= 128) return function(Layout<T, 128 / WIDTH>());
  if (width <= 256) return function(Layout<T, 256 / WIDTH>());
  return function(Layout<T, 0>());
}

template <typename Function>
auto with_layout(const Norm& x, const Function& function) {
  return x.element == Element::float32 ? with_layout<float>(x.width, function)
                                       : with_layout<__nv_bfloat16>(x.width, function);
}

template <typename Layout>
int64_t block_count(const Norm& x) {
  const int64_t rows = Layout::rows_per_block(Layout::threads(x.width));
  return (x.rows + rows - 1) / rows;
}

// Blocks of the backward pass, and so rows of partial sums: what the device holds at once.
template <typename Layout>
int64_t partial_count(const Norm& x) {
  const int per_multiprocessor = Layout::THREADS_PER_MULTIPROCESSOR / Layout::threads(x.width);
  return std::min<int64_t>(block_count<Layout>(x),
                           current_device().multiprocessors * per_multiprocessor);
}

const char* refusal(const Norm& x) {
  if (x.width % 8 != 0) return "norm: the width must be a multiple of 8";
  if (x.width > (x.element == Element::float32 ? Layout<float, 0>::MAX_WIDTH
                                               : Layout<__nv_bfloat16, 0>::MAX_WIDTH))
    return "norm: a row must not exceed 32 KiB";
  if (x.rows >= INT_MAX / 2) return "norm: too many rows";
  return nullptr;
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                   void* stream, const Arguments&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaErrorInvalidValue)
    return "this GPU's multiprocessors have too little shared memory for a norm of this width";
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* norm(const NormForward& x, void* stream) {
  if (const char* error = refusal(x)) return error;
  return with_layout(x, [&](auto layout) {
    using Layout = decltype(layout);
    return launch(normalize<Layout>, block_count<Layout>(x), Layout::threads(x.width),
                  MAX_WARPS * sizeof(float), stream, x);
  });
}

int64_t workspace_bytes(const NormBackward& x) {
  if (refusal(x)) return 0;
  return with_layout(x, [&](auto layout) {
    return partial_count<decltype(layout)>(x) * (x.width + 8) * int64_t{sizeof(float)};
  });
}

const char* norm_backward(const NormBackward& x, void* workspace, void* stream) {
  if (const char* error = refusal(x)) return error;
  auto* partials = static_cast<float*>(workspace);
  return with_layout(x, [&](auto layout) {
    using Layout = decltype(layout);
    const int64_t count = partial_count<Layout>(x);
    const int threads = Layout::threads(x.width);
    if (const char* error = launch(differentiate<Layout>, count, threads,
                                   2 * MAX_WARPS * sizeof(float) + threads * Copies<Layout>::BYTES,
                                   stream, x, partials))
      return error;
    const int64_t columns = x.gate ? x.width + 1 : x.width;
    return launch(reduce, (columns + 31) / 32, 32 * REDUCTION_ROWS,
                  32 * REDUCTION_ROWS * sizeof(float), stream, x, partials,
                  static_cast<int>(count));
  });
}

}  // namespace megavlm::cuda
