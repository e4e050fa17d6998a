// mbarriers, the tensor copy engine and wgmma.

#include "block.h"

namespace emulator {
namespace {

constexpr uint64_t BARRIER_MAGIC = 0xba881e8000000000;  // what an mbarrier's memory holds

MemoryBarrier& as_barrier(uint64_t* address) {
  const uint32_t offset = shared_address(address, 8);
  const auto found = block->barriers.find(offset);
  if (found == block->barriers.end() || *address != (BARRIER_MAGIC | offset))
    fail("no initialised mbarrier at offset %u", offset);
  return found->second;
}

// Ends the phase if nothing is missing.
void update(MemoryBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  barrier.completed = barrier.gathered;
  for (Fiber* fiber : barrier.parked) fiber->clock.merge(barrier.completed);
  wake_all(barrier.parked);
}

}  // namespace

void barrier_init(uint64_t* address, int arrivals) {
  const uint32_t offset = shared_address(address, 8);
  if (offset % 8) fail("an mbarrier is not 8-byte aligned");
  if (arrivals < 1 || arrivals > 1024) fail("an mbarrier of %d arrivals", arrivals);
  if (block->barriers.size() == Block::MAX_BARRIERS) fail("more mbarriers than the emulator has");
  MemoryBarrier barrier;
  barrier.slot = block_threads() + block->barriers.size();
  barrier.expected = barrier.pending = arrivals;
  *address = BARRIER_MAGIC | offset;
  if (!block->barriers.emplace(offset, std::move(barrier)).second)
    fail("an mbarrier is initialised twice");
  block->barriers_unfenced = true;
}

void barrier_init_fence() { block->barriers_unfenced = false; }

void barrier_arrive(uint64_t* address, uint32_t expected_bytes) {
  MemoryBarrier& barrier = as_barrier(address);
  if (barrier.pending == 0)
    fail("the mbarrier at offset %u gets more than its %d arrivals", shared_address(address),
         barrier.expected);
  current->release(barrier.gathered);
  barrier.bytes += expected_bytes;
  barrier.pending -= 1;
  update(barrier);
  maybe_switch();
}

void barrier_wait(uint64_t* address, int parity) {
  MemoryBarrier& barrier = as_barrier(address);
  if (parity & ~1) fail("mbarrier parity %d", parity);
  if (barrier.phase == parity) {
    barrier.parked.push_back(current);
    return park("mbarrier (offset, parity)", shared_address(address), parity);
  }
  current->clock.merge(barrier.completed);
  maybe_switch();
}

// ---- The copy engine

namespace {

// Fills `bytes` of shared memory from `offset` on by `copy`, later.
void load(uint32_t offset, uint32_t bytes, uint64_t* address, const Operation& copy) {
  MemoryBarrier& barrier = as_barrier(address);
  if (block->barriers_unfenced) fail("a copy before barrier_init_fence");
  const Actor engine{barrier.slot, ++barrier.copies};
  touch(offset, bytes, true, current->clock, {engine, false, nullptr});
  std::memset(block->shared + offset, 0xff, bytes);
  block->loads.push_back([=, &barrier] {
    copy();
    barrier.gathered.steps.resize(block->threads.size() + Block::MAX_BARRIERS);
    uint32_t& done = barrier.gathered.steps[engine.slot];
    done = std::max(done, engine.step);
    barrier.bytes -= bytes;
    update(barrier);
  });
  maybe_switch();
}

// Reads `bytes` of shared memory from `offset` on by `copy`, now or at the wait.
void store(uint32_t offset, uint32_t bytes, const Operation& copy) {
  const auto operation = [=, known = current->clock] {
    touch(offset, bytes, false, known, {current->actor(), false, nullptr});
    copy();
  };
  if (random_below(4) == 0)
    operation();
  else
    current->bulk.open.push_back(operation);
  maybe_switch();
}

// Calls f(element, offset) for each element of the box: `element` is null outside the tensor,
// `offset` that in shared memory.
template <class F>
void for_elements(const TensorMap& map, const std::array<int, 5>& start, uint32_t row_offset,
                  F&& f) {
  std::array<int, 5> at{};
  const auto position = [&](int axis) { return int64_t{start[axis]} + at[axis]; };
  const auto inside = [&](int axis) {
    return position(axis) >= 0 && position(axis) < map.sizes[axis];
  };
  for (at[4] = 0; at[4] < map.box[4]; ++at[4])
    for (at[3] = 0; at[3] < map.box[3]; ++at[3])
      for (at[2] = 0; at[2] < map.box[2]; ++at[2])
        for (at[1] = 0; at[1] < map.box[1]; ++at[1], row_offset += 128) {
          const bool row_inside = inside(1) && inside(2) && inside(3) && inside(4);
          int64_t row = 0;
          for (int axis = 1; axis < 5; ++axis) row += position(axis) * map.strides[axis];
          for (at[0] = 0; at[0] < 64; ++at[0]) {
            const uint32_t linear = row_offset + 2 * at[0];
            f(row_inside && inside(0) ? map.data + row + position(0) : nullptr,
              linear ^ (linear >> 7 & 7) << 4);
          }
        }
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = 2;
  for (int size : map.box) bytes *= size;
  return bytes;
}

uint32_t box_offset(const TensorMap& map, const void* shared) {
  const uint32_t offset = shared_address(shared, box_bytes(map));
  if (offset % 128) fail("a tensor copy's shared address is not 128-byte aligned");
  return offset;
}

uint32_t bulk_offset(const void* shared, const void* global, uint32_t bytes) {
  const uint32_t offset = shared_address(shared, bytes);
  if (offset % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail("a bulk copy's addresses or size are not multiples of 16 bytes");
  return offset;
}

}  // namespace

void tensor_load(void* shared, const TensorMap& map, uint64_t* barrier,
                 const std::array<int, 5>& start) {
  const uint32_t offset = box_offset(map, shared);
  load(offset, box_bytes(map), barrier, [=] {
    for_elements(map, start, offset, [](const uint16_t* global, uint32_t at) {
      const uint16_t value = global ? *global : 0;
      std::memcpy(block->shared + at, &value, 2);
    });
  });
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  load(bulk_offset(shared, global, bytes), bytes, barrier,
       [=] { std::memcpy(shared, global, bytes); });
}

void tensor_store(const TensorMap& map, const void* shared, const std::array<int, 5>& start) {
  const uint32_t offset = box_offset(map, shared);
  store(offset, box_bytes(map), [=] {
    for_elements(map, start, offset, [](uint16_t* global, uint32_t at) {
      if (global) std::memcpy(global, block->shared + at, 2);
    });
  });
}

void bulk_add(float* global, const float* shared, uint32_t bytes) {
  store(bulk_offset(shared, global, bytes), bytes, [=] {
    for (uint32_t i = 0; i < bytes / 4; ++i) global[i] += shared[i];
  });
}

void bulk_commit() { current->bulk.commit(); }
void bulk_wait_read(size_t groups) { current->bulk.finish_but(groups); }

void async_proxy_fence() {
  current->next_step();
  current->proxy_fences.push_back(current->actor().step);
}

// ---- wgmma

namespace {

constexpr uint32_t IN_FLIGHT = 0x7fadbadb;  // NaN: accumulators of a wgmma not waited for

// Where element (row, k) of an operand is: `row` counts M or N.
uint32_t operand_offset(uint64_t descriptor, bool transposed, int row, int k) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t linear =
      transposed ? start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                 : start + row / 8 * stride + row % 8 * 128 + k * 2;
  return linear ^ (linear >> 7 & 7) << 4;
}

void check_descriptor(uint64_t descriptor, bool transposed) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a wgmma descriptor without the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("a wgmma descriptor with a base offset");
  if (start % 1024 && (transposed || (start & ~0x60) % 1024))
    fail("a wgmma descriptor's address %u is not at a 1,024-byte boundary%s", start,
         transposed ? "" : " plus 0, 32, 64 or 96 bytes");
  if ((descriptor >> 32 & 0x3fff) % 64 || (transposed && (descriptor >> 16 & 0x3fff) % 64))
    fail("a wgmma descriptor's steps are not multiples of 1,024 bytes");
}

float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// As floats, (k, row).
std::vector<float> read_operand(uint64_t descriptor, bool transposed, int rows) {
  std::vector<float> matrix(16 * rows);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; ++k) {
      const uint32_t offset = operand_offset(descriptor, transposed, row, k);
      shared_address(block->shared + offset, 2);
      uint16_t bits;
      std::memcpy(&bits, block->shared + offset, 2);
      matrix[k * rows + row] = from_bf16(bits);
    }
  return matrix;
}

// Operand a's registers of all threads, likewise.
std::vector<float> read_registers(const Product& product) {
  std::vector<float> matrix(16 * 64);
  for (int t = 0; t < 128; ++t) {
    const auto& of = product.registers[t];
    if (!std::equal(of.a_copy.begin(), of.a_copy.end(), of.a))
      fail(
          "operand a's registers of the warpgroup's thread %d changed before wgmma_wait (they "
          "must exist until then, too)",
          t);
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half)
        matrix[(t % 4 * 2 + j / 2 * 8 + half) * 64 + t / 32 * 16 + t % 32 / 4 + j % 2 * 8] =
            from_bf16(of.a_copy[j] >> 16 * half);
  }
  return matrix;
}

// Records that each warp reads an operand: its own 16 rows of `a`, all of `b`.
void touch_operand(const Product& product, Fiber* const* leaders, uint64_t descriptor,
                   bool transposed, int rows, bool own_rows) {
  for (int warp = 0; warp < 4; ++warp) {
    const Access access{leaders[warp]->actor(), false, nullptr};
    const int first = own_rows ? 16 * warp : 0, last = own_rows ? first + 16 : rows;
    for (int row = first; row < last; row += transposed ? 8 : 1)
      for (int k = 0; k < 16; k += transposed ? 1 : 8)
        touch(operand_offset(descriptor, transposed, row, k), 16, false, product.known[warp],
              access);
  }
}

// Keeps a thread's accumulators, and makes their registers unusable meanwhile.
void set_in_flight(Product::Registers& of, int count) {
  of.kept.assign(of.d, of.d + count);
  std::fill_n(of.d, count, std::bit_cast<float>(IN_FLIGHT));
}

// Adds one thread's part of the product, (64, columns), to its accumulators.
void accumulate(const Product& product, int t, const std::vector<float>& sum) {
  const auto& of = product.registers[t];
  const int columns = product.what.columns;
  if (!of.kept.empty()) {
    for (int i = 0; i < columns / 2; ++i)
      if (std::bit_cast<uint32_t>(of.d[i]) != IN_FLIGHT)
        fail("accumulators of the warpgroup's thread %d changed between wgmma and wgmma_wait", t);
    std::copy(of.kept.begin(), of.kept.end(), of.d);
  }
  for (int i = 0; i < columns / 2; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + t % 4 * 2 + i % 2;
    of.d[i] = (product.what.accumulate ? of.d[i] : 0) + sum[row * columns + column];
  }
}

// `leaders`: the first thread of each warp.
void multiply(Product& product, Fiber* const* leaders) {
  const Wgmma& what = product.what;
  if (product.issued != 128) fail("%d of 128 threads issued a wgmma", product.issued);
  touch_operand(product, leaders, what.b_descriptor, what.b_transposed, what.columns, false);
  if (!what.a) touch_operand(product, leaders, what.a_descriptor, what.a_transposed, 64, true);
  if (product.b.empty())
    product.b = read_operand(what.b_descriptor, what.b_transposed, what.columns);
  if (what.a)
    product.a = read_registers(product);
  else if (product.a.empty())
    product.a = read_operand(what.a_descriptor, what.a_transposed, 64);
  std::vector<float> sum(64 * what.columns);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < what.columns; ++column)
        sum[row * what.columns + column] +=
            product.a[k * 64 + row] * product.b[k * what.columns + column];
  for (int t = 0; t < 128; ++t) accumulate(product, t, sum);
}

// Carries out the warpgroup's products before number `end`.
void finish_products(Warpgroup& group, size_t end, Fiber* const* leaders) {
  for (; group.first < end; ++group.first) {
    const auto finished = std::move(group.products.front());
    group.products.pop_front();
    multiply(*finished, leaders);
    for (int t = 0; t < 128; ++t)
      for (auto& later : group.products) {
        if (later->registers[t].d != finished->registers[t].d) continue;
        set_in_flight(later->registers[t], later->what.columns / 2);
        break;
      }
  }
}

Warpgroup& warpgroup() { return block->warpgroups[current->index / 128]; }

}  // namespace

void wgmma_fence() { current->fenced = true; }

void wgmma(const Wgmma& what) {
  Fiber& fiber = *current;
  Warpgroup& group = warpgroup();
  const int t = fiber.index % 128;
  if (block_threads() < (fiber.index / 128 + 1) * 128) fail("wgmma by an incomplete warpgroup");
  if (!fiber.fenced) fail("wgmma without wgmma_fence (since wgmma_wait)");
  const size_t number = fiber.products++ - group.first;
  if (number == group.products.size()) {
    check_descriptor(what.b_descriptor, what.b_transposed);
    if (!what.a) check_descriptor(what.a_descriptor, what.a_transposed);
    group.products.emplace_back(std::make_unique<Product>())->what = what;
  }
  Product& product = *group.products[number];
  const Wgmma& first = product.what;
  if (first.columns != what.columns || first.accumulate != what.accumulate ||
      first.a_descriptor != what.a_descriptor || first.b_descriptor != what.b_descriptor ||
      !first.a != !what.a || first.a_transposed != what.a_transposed ||
      first.b_transposed != what.b_transposed)
    fail("the threads of a warpgroup issue different wgmmas");
  product.known[t / 32].merge(fiber.clock);
  auto& of = product.registers[t];
  of.d = what.d;
  of.a = what.a;
  if (what.a) std::copy_n(what.a, 4, of.a_copy.begin());
  const bool chained =
      std::any_of(group.products.begin(), group.products.begin() + number,
                  [&](const auto& earlier) { return earlier->registers[t].d == what.d; });
  if (!chained) set_in_flight(of, what.columns / 2);
  if (++product.issued == 128 && random_below(2)) {  // read shared memory now rather than later
    product.b = read_operand(what.b_descriptor, what.b_transposed, what.columns);
    if (!what.a) product.a = read_operand(what.a_descriptor, what.a_transposed, 64);
  }
  maybe_switch();
}

void wgmma_commit() { current->committed.push_back(current->products); }

void wgmma_wait(size_t groups) {
  meet(warpgroup().waiting, "wgmma_wait", groups, 128, current->index % 128, current, Order::none,
       [](void* const* payloads) {
         auto* const* fibers = reinterpret_cast<Fiber* const*>(payloads);
         const auto& committed = fibers[0]->committed;
         for (int t = 0; t < 128; ++t)
           if (fibers[t]->committed != committed)
             fail("the threads of a warpgroup committed different wgmma groups");
         Fiber* const leaders[] = {fibers[0], fibers[32], fibers[64], fibers[96]};
         const size_t groups = warpgroup().waiting.key;
         if (committed.size() > groups)
           finish_products(warpgroup(), committed[committed.size() - groups - 1], leaders);
         for (int t = 0; t < 128; ++t) fibers[t]->learn(leaders[t / 32]->actor());
       });
  while (current->committed.size() > groups) current->committed.pop_front();
  current->fenced = false;
}

}  // namespace emulator
