#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace megavlm::cpu {

#define MEGAVLM_DECLARE(isa)                              \
  namespace isa {                                         \
  extern const Kernels float32_kernels, bfloat16_kernels; \
  }
MEGAVLM_DECLARE(baseline)
#if defined(__x86_64__)
MEGAVLM_DECLARE(avx2)
MEGAVLM_DECLARE(avx512)
MEGAVLM_DECLARE(avx512bf16)
#endif
#undef MEGAVLM_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  bool available;
  const Kernels *float32, *bfloat16;
};

InstructionSet choose() {
  const InstructionSet sets[] = {
#if defined(__x86_64__)
      // The best first.
      {"avx512bf16", __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"),
       &avx512bf16::float32_kernels, &avx512bf16::bfloat16_kernels},
      {"avx512", bool(__builtin_cpu_supports("x86-64-v4")), &avx512::float32_kernels,
       &avx512::bfloat16_kernels},
      {"avx2", bool(__builtin_cpu_supports("x86-64-v3")), &avx2::float32_kernels,
       &avx2::bfloat16_kernels},
#endif
      {"baseline", true, &baseline::float32_kernels, &baseline::bfloat16_kernels},
  };
  const char* wanted = std::getenv("MEGAVLM_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  std::string names;
  for (const auto& set : sets) {
    if (set.available && (!wanted || set.name == std::string(wanted))) return set;
    if (set.available) names += std::string(names.empty() ? "" : ", ") + set.name;
  }
  throw std::runtime_error("MEGAVLM_CPU_ISA is '" + std::string(wanted) +
                           "'; this machine has: " + names);
}

}  // namespace

const Kernels& kernels(Element element) {
  static const InstructionSet chosen = choose();
  return element == Element::float32 ? *chosen.float32 : *chosen.bfloat16;
}

}  // namespace megavlm::cpu
