// The CUDA language and runtime, as far as the kernels use them, in plain C++: a launch runs the
// grid at once, on the calling thread (engine.h).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#include "engine.h"

// ---- The runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);

namespace emulator {
cudaError_t allow_shared_bytes(const void* kernel, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread);
}  // namespace emulator

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  return emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  const std::tuple<std::remove_const_t<P>...> parameters(std::forward<A>(arguments)...);
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                          [&] { std::apply(kernel, parameters); });
}

// ---- Barriers, votes and shuffles

inline void __syncthreads() { emulator::named_barrier(0, emulator::block_threads(), true); }

inline void __syncwarp(unsigned mask = ~0u) {
  emulator::meet_warp("__syncwarp", mask, &mask, emulator::Order::all, [](void* const*) {});
}

namespace emulator {

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  struct Payload {
    T value, result;
    int source;
  } mine{value, value, source};
  meet_warp(name, mask, &mine, Order::none, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* payload = static_cast<Payload*>(lanes[lane]);
      if (!payload) continue;
      const auto* other = static_cast<const Payload*>(lanes[payload->source]);
      if (!other) fail("a shuffle reads lane %d, which is not in its mask", payload->source);
      payload->result = other->value;
    }
  });
  return mine.result;
}

// Of the lanes in the mask, those whose predicate is true.
inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
  struct Payload {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet_warp(name, mask, &mine, Order::none, [](void* const* lanes) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] && static_cast<Payload*>(lanes[lane])->predicate) result |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane]) static_cast<Payload*>(lanes[lane])->result = result;
  });
  return mine.result;
}

// `source` where it is in the lane's segment of `width` lanes, else the lane itself.
inline int within(int source, int width) {
  const int first = lane() & ~(width - 1);
  return source >= first && source < first + width ? source : lane();
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulator::lane() & ~(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulator::shuffle("__shfl_xor_sync", mask, value,
                           emulator::within(emulator::lane() ^ bits, width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulator::shuffle("__shfl_down_sync", mask, value,
                           emulator::within(emulator::lane() + delta, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulator::shuffle("__shfl_up_sync", mask, value,
                           emulator::within(emulator::lane() - delta, width));
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return emulator::ballot("__ballot_sync", mask, predicate);
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return emulator::ballot("__any_sync", mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return emulator::ballot("__all_sync", mask, predicate) == mask;
}

// ---- Memory: one block runs at a time, and its threads in turns.

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline void __threadfence() {}

// ---- Arithmetic

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
