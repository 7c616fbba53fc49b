// Which compilation of the CPU kernels serves this machine.
//
// setup.py compiles every csrc/*/cpu.cpp once for each capability, with CPU_CAPABILITY as the
// namespace of its kernels. The choice is torch's own (the environment variable
// ATEN_CPU_CAPABILITY=default|avx2|avx512 narrows it), so that torch's kernels and ours always
// agree about the machine.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace sqloss::core {

inline const char* cpu_capability() {
#if defined(__x86_64__)
  static const std::string torchs = at::get_cpu_capability();
  if (torchs == "AVX512") return "AVX512";
  if (torchs == "AVX2") return "AVX2";
#endif
  return "DEFAULT";
}

// Of one operation's kernels; on other architectures than x86-64 all three are the portable ones.
template <typename Kernels>
const Kernels& for_this_cpu(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  const std::string capability = cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
  return portable;
}

}  // namespace sqloss::core
