// Hopper's instructions: the tensor copy engine (TMA), mbarriers, wgmma and what goes with them,
// one function each. Names follow the PTX ISA 9.0 manual's, chapter 9.7.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "sm80.cuh"
#include "wgmma.cuh"

namespace megavlm::sm90 {

// ---- mbarriers: a phase ends when `arrivals` threads arrived and all expected bytes came.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// After barrier_init, before any other thread or the copy engine uses the barriers.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives once, and makes the phase wait for so many bytes of tensor copies besides.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns when the phase of this parity has ended; a new barrier is in phase 0, so that parity 1
// returns at once.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra end;\n"
      "bra again;\n"
      "end:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting; the others must sync on it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- The tensor copy engine. Coordinates count elements, innermost axis first; what lies outside
// the tensor reads as zero and is not written. One thread calls.

// A bf16 tensor of up to 5 axes, innermost first (stride 1), copied box by box; the innermost box
// axis is 64 elements, that is 128 bytes, swizzled: 16-byte chunk c of 128-byte row r lies at
// chunk c ^ (r % 8), r counted from a 1,024-byte boundary. Returns null or what went wrong.
// strides: of axes 1 to rank - 1, in elements.
inline const char* make_tensor_map(CUtensorMap* map, const void* data, int rank,
                                   const int64_t* sizes, const int64_t* strides, const int* box) {
  static void* entry = nullptr;  // of the driver, found at run time: importing needs no driver
  if (!entry) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (!entry) return "the CUDA driver has no cuTensorMapEncodeTiled";
  }
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  cuuint64_t size[5], stride_bytes[4];
  cuuint32_t box_size[5], step[5];
  for (int axis = 0; axis < rank; ++axis) {
    size[axis] = sizes[axis];
    box_size[axis] = box[axis];
    step[axis] = 1;
    if (axis > 0) stride_bytes[axis - 1] = strides[axis - 1] * 2;
  }
  const CUresult result = encode(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data), size, stride_bytes,
      box_size, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  switch (result) {
    case CUDA_SUCCESS:
      return nullptr;
    case CUDA_ERROR_INVALID_VALUE:
      return "cuTensorMapEncodeTiled refused the tensor's layout";
    default:
      return "cuTensorMapEncodeTiled failed: an earlier CUDA call has an error, or none made a "
             "context";
  }
}

__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* shared, int c0,
                                             int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Contiguous bytes (a multiple of 16) between 16-byte aligned addresses.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// global[i] += shared[i], fp32, for `bytes` (a multiple of 16) from 16-byte aligned addresses.
__device__ __forceinline__ void bulk_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared_address(shared)), "r"(bytes)
      : "memory");
}

// Of tensor_store and bulk_add of this thread.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// At most N of this thread's latest groups still read shared memory.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// This thread's ordinary writes to shared memory come before what the copy engine or wgmma reads
// after the next barrier.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma: 128 threads multiply; see wgmma.cuh for the products.

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads or writes of these registers over this point.
template <class T, int N>
__device__ __forceinline__ void hold(T (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 4 && T(0.5f) != T(0))
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// A matrix in shared memory, in blocks of 64 elements (128 bytes, swizzled as tensor_load writes).
// Along K ("K-major"): rows are M or N; 8 rows take 1,024 bytes; step 16 elements of K by adding 32
//   bytes to the address; the next 64 lie in another block. leading_bytes is unused there.
// Along M or N ("MN-major"): rows are K; 8 rows take 1,024 bytes; step 16 of K by adding 2,048
//   bytes; the next 64 elements of M or N lie `leading_bytes` further.
__device__ __forceinline__ uint64_t descriptor(const void* shared, uint32_t leading_bytes = 16,
                                               uint32_t stride_bytes = 1024) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(shared)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         uint64_t{1} << 62;
}

// The same matrix `bytes` further (a multiple of 16).
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Registers per thread of this warpgroup from here on.
template <int N>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Four 8 x 8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace megavlm::sm90
