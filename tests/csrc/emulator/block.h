// The state of the block that runs, shared by the emulator's own files.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
  uint8_t* stack = nullptr;  // null: the process's own
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t saved;
#endif
  const void* bottom = nullptr;  // for AddressSanitizer
  size_t bytes = 0;
};

using Operation = std::function<void()>;

// Asynchronous operations of one thread, in groups as it commits them.
struct Groups {
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> committed;

  void commit() { committed.push_back(std::exchange(open, {})); }
  void finish_but(size_t groups) {
    for (; committed.size() > groups; committed.pop_front())
      for (const Operation& operation : committed.front()) operation();
  }
};

// ---- Races on shared memory: two accesses, one a write, that no synchronisation orders.

// Steps that each actor is known to have done, by slot: the block's threads, then its mbarriers,
// on whose behalf the copy engine acts.
struct Clock {
  std::vector<uint32_t> steps;

  void merge(const Clock& other);
};

// Who makes an access, and at which of its steps.
struct Actor {
  uint32_t slot, step;
};

struct Access {
  Actor by;
  bool ordinary;     // not the copy engine's or a tensor core's
  const void* code;  // null for those
};

// Everything known about two bytes.
struct Cell {
  Access written;            // step 0: never
  std::vector<Access> read;  // since then, and not before another of these
};

// An access by `by`, who knows of what is in `known`.
// Fails if it races with an earlier one.
void touch(uint32_t offset, uint32_t bytes, bool write, const Clock& known, const Access& access);

// ---- Threads

struct Fiber {
  Context context;
  int index;
  uint3 thread;
  bool done;
  const char* waits_for;  // null: runnable
  uint32_t detail[2];
  Groups copies, bulk;
  size_t products;               // wgmma so far
  std::deque<size_t> committed;  // `products` at each wgmma_commit not waited for yet
  bool fenced;                   // wgmma_fence since wgmma_wait
  Clock clock;
  std::vector<uint32_t> proxy_fences;  // the steps they were at

  Actor actor() const { return {static_cast<uint32_t>(index), clock.steps[index]}; }
  void next_step() { clock.steps[index] += 1; }
  // What the other did until then comes before what this thread does from now on.
  void learn(Actor other) {
    clock.steps[other.slot] = std::max(clock.steps[other.slot], other.step);
  }
  // What this thread did so far comes before what others do after taking over the clock.
  void release(Clock& to) {
    to.merge(clock);
    next_step();
  }
};

struct Meeting {
  const char* name;
  uint32_t key;
  void* payloads[128] = {};
  std::vector<Fiber*> present;
};

// Returns when all `expected` threads, told apart by `place`, are at this point of their program;
// the last to come calls `perform`.
void meet(Meeting& meeting, const char* name, uint32_t key, int expected, int place, void* payload,
          Order order, Perform perform);

struct NamedBarrier {
  int threads, arrived = 0;
  std::vector<Fiber*> waiting;
  Clock gathered;  // of those that arrived
};

struct MemoryBarrier {  // an mbarrier
  uint32_t slot;
  int expected, pending, phase = 0;
  int64_t bytes = 0;
  uint32_t copies = 0;        // the copy engine's steps for it
  Clock gathered, completed;  // by arrivals so far; at the end of the last phase
  std::vector<Fiber*> parked;
};

// One wgmma instruction of a warpgroup.
struct Product {
  Wgmma what;
  std::vector<float> a, b;  // shared memory, if read at the issue
  int issued = 0;
  Clock known[4];  // by warp, at the issue
  struct Registers {
    float* d;
    const uint32_t* a;
    std::array<uint32_t, 4> a_copy;
    std::vector<float> kept;  // d as it was, of the first product in flight that writes it
  } registers[128];
};

struct Warpgroup {
  size_t first = 0;  // number of products.front()
  std::deque<std::unique_ptr<Product>> products;
  Meeting waiting;
};

struct Block {
  static constexpr uint32_t MAX_BARRIERS = 64;

  std::vector<Fiber*> threads, runnable;
  std::array<std::array<Meeting, 32>, 32> meetings;  // by warp and lowest lane
  std::array<NamedBarrier, 16> named;
  std::map<uint32_t, MemoryBarrier> barriers;  // by offset
  std::array<Warpgroup, 8> warpgroups;
  std::vector<Operation> loads;
  std::array<uint32_t, 32> priority;  // of warps
  uint32_t candidates, load_delay;
  bool barriers_unfenced = false;
  uint8_t* shared;
  uint32_t shared_bytes;
  std::vector<Cell> cells;
};

extern Block* block;    // null: no kernel runs
extern Fiber* current;  // null: none of its threads does

uint32_t random_below(uint32_t n);
void park(const char* waits_for, uint32_t detail0 = 0, uint32_t detail1 = 0);
void wake_all(std::vector<Fiber*>& parked);

}  // namespace emulator
