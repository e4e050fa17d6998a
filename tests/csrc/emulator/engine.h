// What runs the kernels. Every CUDA thread is a fiber with a stack of its own; the blocks run one
// after another, in random order, and which runnable thread runs next is random as well
// (environment: EMULATOR_SEED). What many threads do together parks them until all are there.
// Asynchronous work is carried out as late as a program may count on, or at a random moment before.
// Misuse, races on shared memory (races.cpp) and deadlocks end the process with a message.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace emulator {

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Starts the random order anew; EMULATOR_SEED is added.
void reseed(uint64_t seed);

int lane();
int block_threads();

uint8_t* dynamic_shared();
// Offset in the block's dynamic shared memory; fails unless all `bytes` are inside it.
uint32_t shared_address(const void* shared, uint32_t bytes = 1);

// What comes before the shared-memory accesses that threads make after an operation they do
// together: nothing, the operation's own accesses, or all that they did so far.
enum class Order { none, own, all };

// Called by all lanes in `mask`, each with its own payload: the last to come calls `perform` once,
// with the payloads by lane (null outside the mask), before any returns.
using Perform = void (*)(void* const* payloads);
void meet_warp(const char* name, uint32_t mask, void* payload, Order order, Perform perform);

void named_barrier(int id, int threads, bool wait);

// A point where another thread may go on first.
void maybe_switch();

// cp.async
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(size_t groups);

// mbarriers
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);

// The tensor copy engine
struct TensorMap {
  uint16_t* data;
  int64_t sizes[5], strides[5];  // in elements
  int box[5];
  int rank;
};
void tensor_load(void* shared, const TensorMap& map, uint64_t* barrier,
                 const std::array<int, 5>& start);
void tensor_store(const TensorMap& map, const void* shared, const std::array<int, 5>& start);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_add(float* global, const float* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait_read(size_t groups);
void async_proxy_fence();

// wgmma: d has `columns` / 2 elements; `a` is null where operand A is in shared memory.
struct Wgmma {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  int columns;
  bool a_transposed, b_transposed, accumulate;
};
void wgmma_fence();
void wgmma(const Wgmma& product);
void wgmma_commit();
void wgmma_wait(size_t groups);

}  // namespace emulator
