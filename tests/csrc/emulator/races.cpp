#include "block.h"

namespace emulator {

void Clock::merge(const Clock& other) {
  if (steps.size() < other.steps.size()) steps.resize(other.steps.size());
  for (size_t i = 0; i < other.steps.size(); ++i) steps[i] = std::max(steps[i], other.steps[i]);
}

namespace {

bool knows(const Clock& clock, Actor of) {
  return of.slot < clock.steps.size() && clock.steps[of.slot] >= of.step;
}

// The writer's async_proxy_fence comes after the write, and before what the clock knows.
bool fenced(const Clock& known, Actor writer) {
  for (uint32_t fence : block->threads[writer.slot]->proxy_fences)
    if (fence > writer.step) return known.steps[writer.slot] >= fence;
  return false;
}

[[noreturn]] void report(const char* what, uint32_t offset, const Access& earlier,
                         const Access& later) {
  std::fprintf(stderr, "%s: offset %u of shared memory\n", what, offset);
  for (const Access* one : {&earlier, &later}) {
    if (one->by.slot < block->threads.size())
      std::fprintf(stderr, "  thread %u", one->by.slot);
    else
      std::fprintf(stderr, "  mbarrier %u's copies", one->by.slot - block_threads());
    if (one->ordinary)
      std::fprintf(stderr, ", addr2line -Cfipe PROGRAM %p\n", one->code);
    else
      std::fprintf(stderr, ", asynchronously\n");
  }
  fail("%s", what);
}

void touch_cell(uint32_t offset, bool write, const Clock& known, const Access& access) {
  Cell& cell = block->cells[offset / 2];
  const Access& last = cell.written;
  if (last.by.step > 0 && last.by.slot != access.by.slot && !knows(known, last.by))
    report(write ? "race of two writes" : "race of a write and a read", offset, last, access);
  if (last.by.step > 0 && !access.ordinary && last.ordinary && !fenced(known, last.by))
    report("missing async_proxy_fence", offset, last, access);
  if (write) {
    for (const Access& one : cell.read)
      if (one.by.slot != access.by.slot && !knows(known, one.by))
        report("race of a read and a write", offset, one, access);
    cell.read.clear();
    cell.written = access;
    return;
  }
  std::erase_if(cell.read, [&](const Access& one) {
    return one.by.slot == access.by.slot || knows(known, one.by);
  });
  cell.read.push_back(access);
}

// A thread's own access, told by code compiled with -fsanitize=thread.
void ordinary(const void* address, uint32_t bytes, bool write, const void* code) {
  if (!block || !current) return;
  const uint64_t offset = static_cast<const uint8_t*>(address) - block->shared;
  if (offset < block->shared_bytes)
    touch(offset, bytes, write, current->clock, {current->actor(), true, code});
}

}  // namespace

void touch(uint32_t offset, uint32_t bytes, bool write, const Clock& known, const Access& access) {
  shared_address(block->shared + offset, bytes);
  for (uint32_t at = offset & ~1u; at < offset + bytes; at += 2)
    touch_cell(at, write, known, access);
}

}  // namespace emulator

// What such code calls (GCC's names); linked without the sanitizer's own library.
#define ACCESSES(bytes)                                                     \
  void __tsan_read##bytes(void* address) {                                  \
    emulator::ordinary(address, bytes, false, __builtin_return_address(0)); \
  }                                                                         \
  void __tsan_write##bytes(void* address) {                                 \
    emulator::ordinary(address, bytes, true, __builtin_return_address(0));  \
  }                                                                         \
  void __tsan_unaligned_read##bytes(void* address) {                        \
    emulator::ordinary(address, bytes, false, __builtin_return_address(0)); \
  }                                                                         \
  void __tsan_unaligned_write##bytes(void* address) {                       \
    emulator::ordinary(address, bytes, true, __builtin_return_address(0));  \
  }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, unsigned long bytes) {
  emulator::ordinary(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  emulator::ordinary(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
char __tsan_atomic8_load(const volatile char* address, int) { return *address; }
}
