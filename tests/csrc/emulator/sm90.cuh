// csrc/cuda/sm90.cuh, emulated.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "sm80.cuh"
#include "wgmma.cuh"

namespace megavlm::sm90 {

inline void barrier_init(uint64_t* barrier, int arrivals) {
  emulator::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::barrier_arrive(barrier, bytes);
}
inline void barrier_wait(uint64_t* barrier, int parity) { emulator::barrier_wait(barrier, parity); }
inline void named_barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) {
  emulator::named_barrier(id, threads, false);
}

// What cuTensorMapEncodeTiled checks.
inline const char* make_tensor_map(CUtensorMap* map, const void* data, int rank,
                                   const int64_t* sizes, const int64_t* strides, const int* box) {
  if (rank < 3 || rank > 5) return "tensor map: rank not 3 to 5";
  if (reinterpret_cast<uintptr_t>(data) % 16) return "tensor map: address not 16-byte aligned";
  if (box[0] != 64) return "tensor map: the innermost box axis is not 64 elements";
  emulator::TensorMap made{};
  made.data = static_cast<uint16_t*>(const_cast<void*>(data));
  made.rank = rank;
  for (int axis = 0; axis < 5; ++axis) {
    const bool used = axis < rank;
    made.sizes[axis] = used ? sizes[axis] : 1;
    made.strides[axis] = axis == 0 ? 1 : used ? strides[axis - 1] : 0;
    made.box[axis] = used ? box[axis] : 1;
    if (made.sizes[axis] < 1 || made.sizes[axis] > int64_t{1} << 32)
      return "tensor map: a size is not 1 to 2^32";
    if (made.box[axis] < 1 || made.box[axis] > 256) return "tensor map: a box size is not 1 to 256";
    if (axis > 0 && (made.strides[axis] * 2 % 16 || made.strides[axis] < 0 ||
                     made.strides[axis] * 2 >= int64_t{1} << 40))
      return "tensor map: a stride is not a multiple of 16 bytes below 2^40";
  }
  static_assert(sizeof(made) <= sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return nullptr;
}

inline void tensor_map_prefetch(const CUtensorMap*) {}

inline emulator::TensorMap read_tensor_map(const CUtensorMap* map, int rank) {
  emulator::TensorMap made;
  std::memcpy(&made, map, sizeof(made));
  if (made.rank != rank) emulator::fail("a copy of rank %d from a map of rank %d", rank, made.rank);
  return made;
}

inline void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                        int c2) {
  emulator::tensor_load(shared, read_tensor_map(map, 3), barrier, {c0, c1, c2});
}

inline void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                        int c2, int c3, int c4) {
  emulator::tensor_load(shared, read_tensor_map(map, 5), barrier, {c0, c1, c2, c3, c4});
}

inline void tensor_store(const CUtensorMap* map, const void* shared, int c0, int c1, int c2, int c3,
                         int c4) {
  emulator::tensor_store(read_tensor_map(map, 5), shared, {c0, c1, c2, c3, c4});
}

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_add(float* global, const float* shared, uint32_t bytes) {
  emulator::bulk_add(global, shared, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int N>
void bulk_wait_read() {
  emulator::bulk_wait_read(N);
}
inline void async_proxy_fence() { emulator::async_proxy_fence(); }

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int N>
void wgmma_wait() {
  emulator::wgmma_wait(N);
}

template <class T, int N>
void hold(T (&)[N]) {}

inline uint64_t descriptor(const void* shared, uint32_t leading_bytes = 16,
                           uint32_t stride_bytes = 1024) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(shared)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         uint64_t{1} << 62;
}

inline uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

template <int N>
void registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

inline void store_matrices(void* row, const uint32_t (&r)[4]) {
  sm80::move_matrices<true, false>("stmatrix", row, const_cast<uint32_t*>(r));
}
inline void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
  sm80::move_matrices<true, true>("stmatrix.trans", row, const_cast<uint32_t*>(r));
}

}  // namespace megavlm::sm90
