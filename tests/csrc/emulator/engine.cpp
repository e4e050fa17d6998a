// Threads, their scheduling and their barriers; launches; the runtime's functions.

#include "engine.h"

#include <sys/mman.h>

#include <cstdarg>

#include "block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Block* block;
Fiber* current;

namespace {

// ---- Contexts: stacks to switch between.

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr size_t STACK_BYTES = 128 << 10;
#endif

#ifdef __x86_64__
// Pushes what a function must preserve, leaves the stack pointer at *from, goes on with `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// The next switch to the context calls the function, which never returns.
void start(Context& context, void (*function)()) {
  if (!context.stack) {
    void* pages = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) fail("no memory for a stack");
    mprotect(pages, 4096, PROT_NONE);
    context.stack = static_cast<uint8_t*>(pages);
  }
  context.bottom = context.stack;
  context.bytes = STACK_BYTES;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(context.stack + STACK_BYTES) - 2;
  *top = reinterpret_cast<void*>(function);  // emulator_switch returns to it
  context.pointer = top - 6;
#else
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = context.stack;
  context.saved.uc_stack.ss_size = STACK_BYTES;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, function, 0);
#endif
}

Context* previous;  // the context switched from

// Called first by whatever a switch goes on with.
void arrived([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom, &previous->bytes);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
  void* fake_stack = nullptr;
  previous = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  emulator_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
  arrived(fake_stack);
}

int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

Context scheduler;
const Operation* kernel_thread;
uint64_t random_state = 1;

}  // namespace

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 32) * n >> 32;
}

// ---- Scheduling

static void wake(Fiber* fiber) {
  fiber->waits_for = nullptr;
  block->runnable.push_back(fiber);
}

void wake_all(std::vector<Fiber*>& parked) {
  for (Fiber* fiber : parked) wake(fiber);
  parked.clear();
}

void park(const char* waits_for, uint32_t detail0, uint32_t detail1) {
  current->waits_for = waits_for;
  current->detail[0] = detail0;
  current->detail[1] = detail1;
  switch_context(current->context, scheduler);
}

void maybe_switch() {
  if (random_below(8) != 0) return;
  wake(current);
  switch_context(current->context, scheduler);
}

namespace {

void fiber_main() {
  arrived(nullptr);
  (*kernel_thread)();
  Fiber& fiber = *current;
  fiber.copies.commit();
  fiber.copies.finish_but(0);
  if (!fiber.bulk.open.empty()) fail("a thread ended without bulk_commit");
  fiber.bulk.finish_but(0);
  if (!fiber.committed.empty()) fail("a thread ended without wgmma_wait");
  fiber.done = true;
  switch_context(fiber.context, scheduler, true);
}

[[noreturn]] void report_deadlock() {
  std::fprintf(stderr, "deadlock: no thread can go on\n");
  for (size_t first = 0; first < block->threads.size(); first += 32) {
    uint32_t told = 0;
    for (size_t lane = 0; lane < 32 && first + lane < block->threads.size(); ++lane) {
      if (told >> lane & 1) continue;
      const Fiber& one = *block->threads[first + lane];
      uint32_t alike = 0;
      for (size_t other = lane; other < 32 && first + other < block->threads.size(); ++other) {
        const Fiber& fiber = *block->threads[first + other];
        if (fiber.done == one.done && fiber.waits_for == one.waits_for &&
            fiber.detail[0] == one.detail[0] && fiber.detail[1] == one.detail[1])
          alike |= 1u << other;
      }
      told |= alike;
      std::fprintf(stderr, "  warp %zu, lanes %08x: ", first / 32, alike);
      if (one.done)
        std::fprintf(stderr, "ended\n");
      else
        std::fprintf(stderr, "wait at %s (%u, %u)\n", one.waits_for, one.detail[0], one.detail[1]);
    }
  }
  fail("deadlock");
}

// One of a few random candidates, the one whose warp has the highest priority: with many
// candidates some warps run far ahead of others, with one all mix.
Fiber* take_runnable() {
  auto& runnable = block->runnable;
  if (random_below(512) == 0) block->priority[random_below(32)] = random_below(1024);
  const auto priority = [&](size_t i) { return block->priority[runnable[i]->index / 32]; };
  size_t best = random_below(runnable.size());
  for (uint32_t i = 1; i < block->candidates; ++i) {
    const size_t other = random_below(runnable.size());
    if (priority(other) > priority(best)) best = other;
  }
  std::swap(runnable[best], runnable.back());
  Fiber* fiber = runnable.back();
  runnable.pop_back();
  return fiber;
}

void run_block() {
  size_t left = block->threads.size();
  while (left > 0) {
    auto& loads = block->loads;
    if (!loads.empty() && (block->runnable.empty() || random_below(block->load_delay) == 0)) {
      std::swap(loads[random_below(loads.size())], loads.back());
      const Operation load = std::move(loads.back());
      loads.pop_back();
      load();
      continue;
    }
    if (block->runnable.empty()) report_deadlock();
    current = take_runnable();
    threadIdx = current->thread;
    switch_context(scheduler, current->context);
    if (current->done) --left;
  }
  for (const Warpgroup& group : block->warpgroups)
    if (!group.products.empty()) fail("a block ended with a wgmma that was not waited for");
  for (const NamedBarrier& barrier : block->named)
    if (barrier.arrived) fail("a block ended with an incomplete named barrier");
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulator: ");
  if (current)
    std::fprintf(stderr, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z,
                 current->index);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::fflush(nullptr);
  std::abort();
}

void reseed(uint64_t seed) {
  random_state = (seed + environment("EMULATOR_SEED", 0) + 1) * 0x9e3779b97f4a7c15 | 1;
}

int lane() { return current->index % 32; }
int block_threads() { return block->threads.size(); }
uint8_t* dynamic_shared() { return block->shared; }

uint32_t shared_address(const void* shared, uint32_t bytes) {
  const int64_t offset = static_cast<const uint8_t*>(shared) - block->shared;
  if (offset < 0 || offset + bytes > block->shared_bytes)
    fail("%u bytes at offset %lld of %u bytes of dynamic shared memory", bytes,
         static_cast<long long>(offset), block->shared_bytes);
  return offset;
}

// ---- Barriers

void meet(Meeting& meeting, const char* name, uint32_t key, int expected, int place, void* payload,
          Order order, Perform perform) {
  if (meeting.present.empty()) {
    meeting.name = name;
    meeting.key = key;
  } else if (std::strcmp(meeting.name, name) != 0 || meeting.key != key) {
    fail("threads that must act together do not: %s (%x) and %s (%x)", meeting.name, meeting.key,
         name, key);
  }
  meeting.payloads[place] = payload;
  if (meeting.present.size() + 1 < static_cast<size_t>(expected)) {
    meeting.present.push_back(current);
    return park(name, key);
  }
  if (order == Order::all) {
    for (const Fiber* fiber : meeting.present) current->clock.merge(fiber->clock);
    for (Fiber* fiber : meeting.present) fiber->clock = current->clock;
  }
  perform(meeting.payloads);
  std::fill_n(meeting.payloads, std::size(meeting.payloads), nullptr);
  for (Fiber* fiber : meeting.present) {
    if (order == Order::own) fiber->learn(current->actor());
    fiber->next_step();
  }
  current->next_step();
  wake_all(meeting.present);
}

void meet_warp(const char* name, uint32_t mask, void* payload, Order order, Perform perform) {
  if (!(mask >> lane() & 1)) fail("%s: the lane is not in its mask %08x", name, mask);
  const int warp = current->index / 32;
  const uint32_t lanes = std::min(32, block_threads() - 32 * warp);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  meet(block->meetings[warp][std::countr_zero(mask)], name, mask, std::popcount(mask), lane(),
       payload, order, perform);
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 0 || id > 15 || (id > 0 && threads % 32) || threads > block_threads())
    fail("named barrier %d of %d threads", id, threads);
  NamedBarrier& barrier = block->named[id];
  if (barrier.arrived == 0)
    barrier.threads = threads;
  else if (barrier.threads != threads)
    fail("named barrier %d of both %d and %d threads", id, barrier.threads, threads);
  current->release(barrier.gathered);
  if (wait) barrier.waiting.push_back(current);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    for (Fiber* fiber : barrier.waiting) fiber->clock.merge(barrier.gathered);
    if (wait) barrier.waiting.pop_back();  // this thread
    wake_all(barrier.waiting);
  } else if (wait) {
    return park("named barrier (id, threads)", id, threads);
  }
  maybe_switch();
}

// ---- cp.async

void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t offset = shared_address(shared, 16);
  if (offset % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    fail("cp.async: an address is not 16-byte aligned");
  const auto write = [=, code = __builtin_return_address(0)] {
    touch(offset, 16, true, current->clock, {current->actor(), true, code});
  };
  write();
  std::memset(shared, 0xff, 16);
  current->copies.open.push_back([=] {
    write();
    if (valid)
      std::memcpy(shared, global, 16);
    else
      std::memset(shared, 0, 16);
  });
  maybe_switch();
}

void copy_commit() { current->copies.commit(); }
void copy_wait(size_t groups) { current->copies.finish_but(groups); }

// ---- Launches

namespace {

std::map<const void*, int> shared_limits;  // by kernel
cudaError_t last_error = cudaSuccess;

int capability() { return environment("EMULATED_CAPABILITY", 90); }

}  // namespace

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > (capability() == 80 ? 163 : 227) << 10)
    return last_error = cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Operation& thread) {
  const dim3 grid = config.gridDim, size = config.blockDim;
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return last_error = cudaErrorInvalidConfiguration;
  const size_t shared_bytes = config.dynamicSmemBytes;
  if (shared_bytes > static_cast<size_t>(std::max(48 << 10, shared_limits[kernel])))
    return last_error = cudaErrorInvalidValue;

  static std::deque<Fiber> fibers;
  while (fibers.size() < threads) fibers.emplace_back();
  void* memory = nullptr;  // exactly that many bytes, for AddressSanitizer
  if (posix_memalign(&memory, 1024, shared_bytes)) fail("no shared memory");
  const std::unique_ptr<uint8_t, decltype(&std::free)> shared(static_cast<uint8_t*>(memory),
                                                              &std::free);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) {
    order[i] = i;
    std::swap(order[i], order[random_below(i + 1)]);
  }
  gridDim = grid;
  blockDim = size;
  kernel_thread = &thread;
  for (unsigned number : order) {
    const auto state = std::make_unique<Block>();
    block = state.get();
    block->shared = shared.get();
    block->shared_bytes = shared_bytes;
    std::memset(block->shared, 0xff, shared_bytes);
    block->cells.resize(shared_bytes / 2 + 1);
    for (uint32_t& priority : block->priority) priority = random_below(1024);
    block->candidates = 1 << 2 * random_below(4);
    block->load_delay = 1 << 4 * random_below(4);
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      const Context context = fiber.context;
      fiber = Fiber{};
      fiber.context = context;
      start(fiber.context, fiber_main);
      fiber.index = i;
      fiber.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      fiber.clock.steps.resize(threads + Block::MAX_BARRIERS);
      fiber.next_step();
      block->threads.push_back(&fiber);
      block->runnable.push_back(&fiber);
    }
    run_block();
    current = nullptr;
  }
  block = nullptr;
  return cudaSuccess;
}

}  // namespace emulator

// ---- The runtime

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::environment("EMULATED_MULTIPROCESSORS", 8);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::capability() % 10;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
