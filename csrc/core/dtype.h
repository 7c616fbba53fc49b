// From a tensor's dtype to the C++ type of its elements, on the host.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace sqloss::core {

inline bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat ||
         dtype == at::kDouble;
}

// f(zero of the C++ type) for a dtype that has kernels.
template <typename F>
void for_dtype(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kHalf:
      return f(at::Half());
    case at::kBFloat16:
      return f(at::BFloat16());
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for ", dtype);
  }
}

}  // namespace sqloss::core
