// csrc/cuda/sm80.cuh, emulated.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace megavlm {

inline uint8_t* dynamic_shared() { return emulator::dynamic_shared(); }

inline uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint32_t pack_bf16(float x, float y) {
  return std::bit_cast<uint32_t>(__floats2bfloat162_rn(x, y));
}

inline float2 unpack_bf16(uint32_t pair) {
  return __bfloat1622float2(std::bit_cast<__nv_bfloat162>(pair));
}

namespace sm80 {

inline void copy_async(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, valid);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int N>
void copy_wait() {
  emulator::copy_wait(N);
}

// Element (row, column) of the matrix j whose rows the lanes 8 j to 8 j + 7 point at.
struct MatrixRows {
  void* row;
  uint32_t* r;
  static uint16_t* element(void* const* lanes, int j, int row, int column) {
    return static_cast<uint16_t*>(static_cast<MatrixRows*>(lanes[8 * j + row])->row) + column;
  }
};

template <bool STORE, bool TRANSPOSED>
void move_matrices(const char* name, void* row, uint32_t* r) {
  if (emulator::shared_address(row, 16) % 16)
    emulator::fail("%s: address not 16-byte aligned", name);
  MatrixRows mine{row, r};
  emulator::meet_warp(name, ~0u, &mine, emulator::Order::own, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j)
        for (int half = 0; half < 2; ++half) {
          const int row = TRANSPOSED ? lane % 4 * 2 + half : lane / 4;
          const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + half;
          uint16_t* shared = MatrixRows::element(lanes, j, row, column);
          uint16_t* own =
              reinterpret_cast<uint16_t*>(static_cast<MatrixRows*>(lanes[lane])->r + j) + half;
          if (STORE)
            *shared = *own;
          else
            *own = *shared;
        }
  });
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  move_matrices<false, false>("ldmatrix", const_cast<void*>(row), r);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  move_matrices<false, true>("ldmatrix.trans", const_cast<void*>(row), r);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Payload {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::meet_warp("mma.sync", ~0u, &mine, emulator::Order::none, [](void* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Payload& of = *static_cast<Payload*>(lanes[lane]);
      const int row = lane / 4, column = lane % 4 * 2;
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack_bf16(of.a[j]);
        float* to = &a[row + j % 2 * 8][column + j / 2 * 8];
        to[0] = pair.x, to[1] = pair.y;
      }
      for (int j = 0; j < 2; ++j) {
        const float2 pair = unpack_bf16(of.b[j]);
        b[column + 8 * j][row] = pair.x, b[column + 8 * j + 1][row] = pair.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        static_cast<Payload*>(lanes[lane])->c[i] += sum;
      }
  });
}

}  // namespace sm80
}  // namespace megavlm
