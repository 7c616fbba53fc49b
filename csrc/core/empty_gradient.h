// Memory for a gradient that a kernel is about to write in full.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sqloss::core {

// A large allocation comes fresh from the kernel each time, and paging it in 4 KiB at a time costs
// several times what writing it does; threads that page in together also wait for each other. So
// ask for huge pages, which most machines give only when asked.
inline void prefer_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  constexpr uintptr_t kWorthwhile = 4 * kHugePage;  // smaller ones malloc keeps for the next call
  // Only advice: nothing depends on its success
  if (last >= first + kWorthwhile)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised, with the sizes, strides and dtype of empty_like(of).
inline at::Tensor empty_gradient(const at::Tensor& of) {
  if (!of.is_cpu()) return at::empty_like(of);
  const at::Tensor gradient =
      of.is_contiguous() ? at::detail::empty_cpu(of.sizes(), of.scalar_type())  // no dispatcher
                         : at::empty_like(of);
  prefer_huge_pages(gradient);
  return gradient;
}

}  // namespace sqloss::core
