// Which compilation of the CPU kernels serves this machine.
//
// setup.py compiles every csrc/*/cpu.cpp once for each capability, with CPU_CAPABILITY as the
// namespace of its kernels. The choice is the lesser of two: what torch takes for its own kernels,
// which the environment variable ATEN_CPU_CAPABILITY=default|avx2|avx512 names, and what the CPU
// runs. Torch takes the variable at its word, so it can name more than the CPU has.
#pragma once

#include <algorithm>
#include <array>
#include <string>

namespace sqloss::core {

// Torch's names, each capability wider than the one before.
inline constexpr std::array kCpuCapabilities = {"DEFAULT", "AVX2", "AVX512"};

// An index into kCpuCapabilities. Other names are those of other architectures, whose kernels are
// the portable ones.
inline std::size_t width(const std::string& capability) {
  const auto found = std::find(kCpuCapabilities.begin(), kCpuCapabilities.end(), capability);
  return found == kCpuCapabilities.end() ? 0 : found - kCpuCapabilities.begin();
}

inline std::string lesser_capability(const std::string& torchs, const std::string& cpus) {
  return kCpuCapabilities[std::min(width(torchs), width(cpus))];
}

// The widest capability that the CPU runs: it has every instruction set that setup.py lets the
// compiler use there, and the operating system saves the registers of it.
inline std::string capability_of_cpu() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))) {
    return "DEFAULT";
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return "AVX2";
  }
  return "AVX512";
#else
  return "DEFAULT";
#endif
}

// The capability in use.
const std::string& cpu_capability();

// Of one operation's kernels; on other architectures than x86-64 all three are the portable ones.
template <typename Kernels>
const Kernels& for_this_cpu(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  const std::array<const Kernels*, kCpuCapabilities.size()> kernels = {&portable, &avx2, &avx512};
  return *kernels[width(cpu_capability())];
}

}  // namespace sqloss::core
