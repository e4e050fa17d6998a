// csrc/cuda/wgmma.cuh, emulated.
#pragma once

#include <cstdint>

#include "engine.h"

namespace megavlm::sm90 {

template <int A_TRANSPOSED = 0, int B_TRANSPOSED = 0, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma({d, nullptr, a, b, 2 * R, A_TRANSPOSED == 1, B_TRANSPOSED == 1, accumulate});
}

template <int B_TRANSPOSED = 0, int R>
void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::wgmma({d, a, 0, b, 2 * R, false, B_TRANSPOSED == 1, accumulate});
}

}  // namespace megavlm::sm90
