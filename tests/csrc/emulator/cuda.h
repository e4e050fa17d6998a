// The driver interface, as far as the kernels use it; sm90.cuh makes and reads tensor maps.
#pragma once

#include <cstdint>

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};
