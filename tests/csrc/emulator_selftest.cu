// Tests of the emulator itself: products against plain loops, and mistakes that must be noticed.

#include <sys/wait.h>
#include <unistd.h>

#include <random>
#include <sm90.cuh>
#include <string>
#include <vector>

using namespace megavlm;

namespace {

int failures = 0;

void expect(bool good, const std::string& what) {
  if (!good) ++failures;
  std::printf("%s: %s\n", good ? "ok" : "FAILED", what.c_str());
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int threads, int shared_bytes, A... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess)
    expect(false, "a launch failed");
}

// The message the function dies with, in a process of its own; empty if it lives.
template <class F>
std::string message_of(F&& function) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    function();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[1000];
  for (ssize_t got; (got = read(ends[0], part, sizeof(part))) > 0;) text.append(part, got);
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? text : "";
}

template <class F>
void expect_death(const char* message, const char* what, F&& function) {
  expect(message_of(function).find(message) != std::string::npos, what);
}

using Matrix = std::vector<__nv_bfloat16>;

Matrix random_matrix(int size) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  Matrix made(size);
  for (auto& one : made) one = normal(generator);
  return made;
}

bool close_to(float x, double y) { return std::abs(x - y) < 1e-4 * (1 + std::abs(y)); }

// ---- ldmatrix, stmatrix, mma.sync, cp.async

// c (16 x 8) = a (16 x 16) . b, which is (8, 16) in memory, or (16, 8) where TRANSPOSED. `wait`:
// wait for the copies.
template <bool TRANSPOSED>
__global__ void small_product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, bool wait) {
  auto* shared_a = reinterpret_cast<__nv_bfloat16*>(dynamic_shared());
  __nv_bfloat16* shared_b = shared_a + 16 * 16;
  const int lane = threadIdx.x;
  sm80::copy_async(shared_a + 8 * lane, a + 8 * lane, true);
  sm80::copy_async(shared_b + 8 * lane, b + 8 * lane, lane < 16);
  sm80::copy_commit();
  if (wait) sm80::copy_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  sm80::load_matrices(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
  if (TRANSPOSED)
    sm80::load_matrices_transposed(right, shared_b + lane * 8);
  else
    sm80::load_matrices(right, shared_b + lane % 8 * 16 + lane / 8 * 8);
  float sum[4] = {};
  sm80::multiply_add(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <bool TRANSPOSED>
void test_small_product() {
  const Matrix a = random_matrix(256), b = random_matrix(128);
  std::vector<float> c(128);
  launch(small_product<TRANSPOSED>, 32, 1024, a.data(), b.data(), c.data(), true);
  bool good = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += double(a[i * 16 + k]) * double(b[TRANSPOSED ? k * 8 + j : j * 16 + k]);
      good &= close_to(c[i * 8 + j], sum);
    }
  expect(good, TRANSPOSED ? "ldmatrix.trans and mma.sync" : "ldmatrix and mma.sync");
  launch(small_product<TRANSPOSED>, 32, 1024, a.data(), b.data(), c.data(), false);
  expect(std::isnan(c[0]), "a missing copy_wait gives NaN");
}

template <bool TRANSPOSED>
__global__ void move_tile(const __nv_bfloat16* from, __nv_bfloat16* to) {
  auto* shared = reinterpret_cast<__nv_bfloat16*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = from[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  sm80::load_matrices(r, shared + lane * 8);
  __syncwarp();
  if (TRANSPOSED)
    sm90::store_matrices_transposed(shared + lane * 8, r);
  else
    sm90::store_matrices(shared + lane * 8, r);
  __syncwarp();
  for (int i = 0; i < 8; ++i) to[lane * 8 + i] = shared[lane * 8 + i];
}

template <bool TRANSPOSED>
void test_store_matrices() {
  const Matrix from = random_matrix(256);
  Matrix to(256);
  launch(move_tile<TRANSPOSED>, 32, 1024, from.data(), to.data());
  bool good = true;
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column)
        good &= float(to[64 * j + 8 * row + column]) ==
                float(from[64 * j + (TRANSPOSED ? 8 * column + row : 8 * row + column)]);
  expect(good, TRANSPOSED ? "stmatrix.trans" : "stmatrix");
}

// ---- wgmma, tensor copies and mbarriers

enum class Mistake { none, no_wait, no_barrier_wait, changed, no_fence, no_init_fence };

struct Product {
  CUtensorMap a, b;  // (64, 64) and (N, 64), or transposed
  const __nv_bfloat16* a_rows;
  float* d;
  Mistake mistake;
};

// d (64 x N) = a (64 x 64) . b (64 x N), a from registers where FROM_REGISTERS.
template <int N, int A_TRANSPOSED, int B_TRANSPOSED, bool FROM_REGISTERS>
__global__ void product(const __grid_constant__ Product x) {
  constexpr int N_BLOCKS = (N + 63) / 64;
  uint8_t* a = dynamic_shared();
  uint8_t* b = a + 64 * 128;
  auto* full = reinterpret_cast<uint64_t*>(b + N_BLOCKS * 64 * 128);
  if (threadIdx.x == 0) {
    sm90::barrier_init(full, 1);
    if (x.mistake != Mistake::no_init_fence) sm90::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sm90::barrier_arrive_expect(full, (1 + N_BLOCKS) * 64 * 128);
    sm90::tensor_load(a, &x.a, full, 0, 0, 0);
    for (int block = 0; block < N_BLOCKS; ++block)
      sm90::tensor_load(b + block * 64 * 128, &x.b, full, B_TRANSPOSED ? block * 64 : 0,
                        B_TRANSPOSED ? 0 : block * 64, 0);
  }
  if (x.mistake != Mistake::no_barrier_wait) sm90::barrier_wait(full, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[N / 2];
  uint32_t registers[4][4];
  for (int k = 0; k < 4; ++k)
    for (int j = 0; j < 4; ++j)
      registers[k][j] =
          reinterpret_cast<const uint32_t&>(x.a_rows[(16 * warp + lane / 4 + 8 * (j % 2)) * 64 +
                                                     16 * k + 2 * (lane % 4) + 8 * (j / 2)]);
  const uint64_t of_a = sm90::descriptor(a, 64 * 128), of_b = sm90::descriptor(b, 64 * 128);
  if (x.mistake != Mistake::no_fence) sm90::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t b_step = sm90::advance(of_b, k * (B_TRANSPOSED ? 2048 : 32));
    if constexpr (FROM_REGISTERS)
      sm90::wgmma<B_TRANSPOSED>(d, registers[k], b_step, k > 0);
    else
      sm90::wgmma<A_TRANSPOSED, B_TRANSPOSED>(
          d, sm90::advance(of_a, k * (A_TRANSPOSED ? 2048 : 32)), b_step, k > 0);
  }
  sm90::wgmma_commit();
  if (x.mistake == Mistake::changed) registers[1][2] += 1;
  if (x.mistake == Mistake::no_wait)
    sm90::wgmma_wait<1>();
  else
    sm90::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i)
    x.d[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
  sm90::wgmma_wait<0>();
}

// A (rows, columns) matrix, in boxes of 64 x 64.
CUtensorMap map_of(const Matrix& matrix, int rows, int columns) {
  CUtensorMap map;
  const int64_t sizes[] = {columns, rows, 1}, strides[] = {columns, int64_t{rows} * columns};
  const int box[] = {64, 64, 1};
  if (const char* error = sm90::make_tensor_map(&map, matrix.data(), 3, sizes, strides, box))
    expect(false, error);
  return map;
}

template <int N, int A_TRANSPOSED, int B_TRANSPOSED, bool FROM_REGISTERS>
std::vector<float> run_product(const Matrix& a, const Matrix& b, Mistake mistake) {
  std::vector<float> d(64 * N);
  const Product x{map_of(a, 64, 64), B_TRANSPOSED ? map_of(b, 64, N) : map_of(b, N, 64), a.data(),
                  d.data(), mistake};
  launch(product<N, A_TRANSPOSED, B_TRANSPOSED, FROM_REGISTERS>, 128,
         (1 + (N + 63) / 64) * 64 * 128 + 8, x);
  return d;
}

template <int N, int A_TRANSPOSED, int B_TRANSPOSED, bool FROM_REGISTERS>
void test_product() {
  const Matrix a = random_matrix(64 * 64), b = random_matrix(N * 64);
  const auto d = run_product<N, A_TRANSPOSED, B_TRANSPOSED, FROM_REGISTERS>(a, b, Mistake::none);
  bool good = true;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      double sum = 0;
      for (int k = 0; k < 64; ++k)
        sum += double(a[A_TRANSPOSED ? k * 64 + i : i * 64 + k]) *
               double(b[B_TRANSPOSED ? k * N + j : j * 64 + k]);
      good &= close_to(d[i * N + j], sum);
    }
  expect(good, "wgmma of " + std::to_string(N) + " columns, a " +
                   (FROM_REGISTERS ? "in registers"
                    : A_TRANSPOSED ? "MN-major"
                                   : "K-major") +
                   ", b " + (B_TRANSPOSED ? "MN-major" : "K-major"));
}

void test_product_mistakes() {
  const Matrix a = random_matrix(64 * 64), b = random_matrix(64 * 64);
  const auto run = [&](Mistake mistake) { return run_product<64, 0, 0, true>(a, b, mistake); };
  expect(std::isnan(run(Mistake::no_wait)[0]), "a missing wgmma_wait gives NaN");
  expect_death("race of a write and a read", "a missing barrier_wait is noticed",
               [&] { run(Mistake::no_barrier_wait); });
  expect_death("changed before wgmma_wait", "a changed register operand is noticed",
               [&] { run(Mistake::changed); });
  expect_death("without wgmma_fence", "a missing wgmma_fence is noticed",
               [&] { run(Mistake::no_fence); });
  expect_death("before barrier_init_fence", "a missing barrier_init_fence is noticed",
               [&] { run(Mistake::no_init_fence); });
}

// Copies a box of 64 x 2 x 3 x 1 x 1 elements at (c0, c1, ...) in and out, as it lies in shared
// memory to `raw`.
__global__ void copy_box(const __grid_constant__ CUtensorMap from,
                         const __grid_constant__ CUtensorMap to, int c0, int c1, int c2,
                         uint16_t* raw, bool fence) {
  uint8_t* box = dynamic_shared();
  auto* full = reinterpret_cast<uint64_t*>(box + 1024);
  if (threadIdx.x == 0) {
    sm90::barrier_init(full, 1);
    sm90::barrier_init_fence();
    sm90::barrier_arrive_expect(full, 6 * 128);
    sm90::tensor_load(box, &from, full, c0, c1, c2, 0, 0);
  }
  __syncthreads();
  sm90::barrier_wait(full, 0);
  for (int i = threadIdx.x; i < 6 * 64; i += 32) {
    auto* element = reinterpret_cast<uint16_t*>(box) + i;
    raw[i] = *element;
    *element += 1;
  }
  if (fence) sm90::async_proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    sm90::tensor_store(&to, box, c0, c1, c2, 0, 0);
    sm90::bulk_commit();
    sm90::bulk_wait_read<0>();
  }
}

void test_tensor_copies() {
  constexpr int SIZES[] = {80, 3, 5};  // innermost first
  alignas(16) static uint16_t from[5][3][80], to[5][3][80];
  uint16_t next = 0;
  for (auto& plane : from)
    for (auto& row : plane)
      for (uint16_t& element : row) element = ++next;
  const int64_t sizes[] = {80, 3, 5, 1, 1}, strides[] = {80, 3 * 80, 5 * 3 * 80, 5 * 3 * 80};
  const int box[] = {64, 2, 3, 1, 1};
  CUtensorMap from_map, to_map;
  expect(!sm90::make_tensor_map(&from_map, from, 5, sizes, strides, box) &&
             !sm90::make_tensor_map(&to_map, to, 5, sizes, strides, box),
         "make_tensor_map");
  bool good = true;
  for (const auto& start : {std::array{0, 0, 0}, {64, 2, 3}, {-8, -1, 4}}) {
    std::vector<uint16_t> raw(6 * 64);
    std::memset(to, 0, sizeof(to));
    launch(copy_box, 32, 1032, from_map, to_map, start[0], start[1], start[2], raw.data(), true);
    uint16_t expected[5][3][80] = {};
    for (int row = 0; row < 6; ++row)
      for (int i = 0; i < 64; ++i) {
        const int at[] = {start[0] + i, start[1] + row % 2, start[2] + row / 2};
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) inside &= at[axis] >= 0 && at[axis] < SIZES[axis];
        const uint16_t value = inside ? from[at[2]][at[1]][at[0]] : 0;
        good &= raw[row * 64 + (i / 8 ^ row % 8) * 8 + i % 8] == value;
        if (inside) expected[at[2]][at[1]][at[0]] = value + 1;
      }
    good &= std::memcmp(expected, to, sizeof(to)) == 0;
  }
  expect(good, "tensor copies swizzle, and stop at the tensor's bounds");
  std::vector<uint16_t> raw(6 * 64);
#ifdef __SANITIZE_THREAD__
  expect_death("missing async_proxy_fence", "a missing async_proxy_fence is noticed",
               [&] { launch(copy_box, 32, 1032, from_map, to_map, 0, 0, 0, raw.data(), false); });
#endif
  const int64_t odd[] = {81, 3 * 80, 5 * 3 * 80, 5 * 3 * 80};
  expect(sm90::make_tensor_map(&to_map, to, 5, sizes, odd, box), "make_tensor_map refuses");
}

// ---- Barriers

__global__ void sum_neighbours(int* out, bool synchronise) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  if (synchronise) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 128] + __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}

#ifdef __SANITIZE_THREAD__  // else the emulator does not see ordinary accesses
__global__ void overwrite() {
  auto* shared = reinterpret_cast<volatile int*>(dynamic_shared());
  if (threadIdx.x < 32) shared[threadIdx.x] = 0;
  __syncthreads();
  const int read = shared[threadIdx.x % 32];
  if (threadIdx.x < 32) __syncwarp();  // only among themselves
  if (threadIdx.x < 32) shared[threadIdx.x] = read;
}
#endif

void test_synchronisation() {
  std::vector<int> out(128);
  const auto right = [&] {
    for (int i = 0; i < 128; ++i)
      if (out[i] != (i + 32) % 128 + (i ^ 1)) return false;
    return true;
  };
  launch(sum_neighbours, 128, 512, out.data(), true);
  expect(right(), "__syncthreads and shuffles");
#ifdef __SANITIZE_THREAD__
  expect_death("race of", "a missing __syncthreads is noticed",
               [&] { launch(sum_neighbours, 128, 512, out.data(), false); });
  expect_death("race of a read and a write", "a barrier missing after reading is noticed",
               [&] { launch(overwrite, 64, 256); });
#endif
}

__global__ void never_ends() {
  auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
  if (threadIdx.x == 0) sm90::barrier_init(barrier, 2);
  sm90::named_barrier_sync(1, 64);
  if (threadIdx.x < 32)
    sm90::barrier_wait(barrier, 0);
  else
    sm90::named_barrier_sync(2, 64);
}

__global__ void writes_beyond(int bytes) { shared_address(dynamic_shared() + bytes); }

__global__ void adds(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  sm90::async_proxy_fence();
  __syncwarp();
  if (threadIdx.x == 0) {
    sm90::bulk_add(out, shared, 128);
    sm90::bulk_commit();
    sm90::bulk_wait_read<0>();
  }
}

void test_rest() {
  expect_death("deadlock", "a deadlock is noticed", [] { launch(never_ends, 64, 8); });
  expect_death("of dynamic shared memory", "a bad shared address is noticed",
               [] { launch(writes_beyond, 32, 64, 64); });
  alignas(16) float out[32] = {};
  for (int i = 0; i < 3; ++i) launch(adds, 32, 128, static_cast<float*>(out));
  expect(out[0] == 0 && out[31] == 93, "bulk_add");
  cudaLaunchConfig_t config{};
  config.blockDim = 32;
  config.dynamicSmemBytes = 100 << 10;
  expect(cudaLaunchKernelEx(&config, never_ends) == cudaErrorInvalidValue &&
             cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess,
         "more than 48 KiB of shared memory must be asked for");
  expect(cudaFuncSetAttribute(never_ends, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) ==
             cudaErrorInvalidValue,
         "more than 227 KiB of shared memory is refused");
}

}  // namespace

int main() {
  test_small_product<false>();
  test_small_product<true>();
  test_store_matrices<false>();
  test_store_matrices<true>();
  test_product<64, 0, 0, false>();
  test_product<80, 0, 0, false>();
  test_product<144, 0, 1, false>();
  test_product<256, 1, 0, false>();
  test_product<128, 1, 1, false>();
  test_product<64, 0, 0, true>();
  test_product<112, 0, 1, true>();
  test_product_mistakes();
  test_tensor_copies();
  test_synchronisation();
  test_rest();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
