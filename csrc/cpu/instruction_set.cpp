// Compiled once per instruction set, with -DMEGAVLM_ISA= its name and the flags that enable it.
#include "cross_attention_kernels.h"
#include "norm_kernels.h"

namespace megavlm::cpu::MEGAVLM_ISA {

#if defined(__AVX512BF16__)
using BFloat16Math = Pair;
#else
using BFloat16Math = Single;
#endif

template <class Math, class T>
static constexpr Kernels kernels_of = {cross_attention<Math, T>,
                                       cross_attention_backward<Math, T>,
                                       finish_queries<T>,
                                       finish_keys_and_values<T>,
                                       norm<T>,
                                       norm_backward<T>};

extern const Kernels float32_kernels, bfloat16_kernels;
const Kernels float32_kernels = kernels_of<Single, float>;
const Kernels bfloat16_kernels = kernels_of<BFloat16Math, BFloat16>;

}  // namespace megavlm::cpu::MEGAVLM_ISA
