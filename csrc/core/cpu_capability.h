// Which compilation of the CPU kernels serves this machine.
//
// setup.py compiles every csrc/*/cpu.cpp once for each capability, with CPU_CAPABILITY as the
// namespace of its kernels. The choice is torch's own (ATEN_CPU_CAPABILITY=default|avx2|avx512
// narrows it), so that torch's kernels and ours always agree about the machine.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace sqloss::core {

// `portable` exists on every architecture, the others on x86-64 only.
template <typename Kernels>
const Kernels& for_this_cpu(const Kernels& portable, [[maybe_unused]] const Kernels* avx2,
                            [[maybe_unused]] const Kernels* avx512) {
  const std::string capability = at::get_cpu_capability();
  if (avx512 != nullptr && capability == "AVX512") return *avx512;
  if (avx2 != nullptr && (capability == "AVX512" || capability == "AVX2")) return *avx2;
  return portable;
}

}  // namespace sqloss::core
