// From tensors to what kernels take. Kernels do not include it: torch's tensors take seconds to
// compile, in every file and for every CPU capability or GPU architecture.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "core/dtype.h"
#include "core/strided.h"

namespace sqloss::core {

inline bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat ||
         dtype == at::kDouble;
}

inline Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kLong:
      return Dtype::kInt64;
    case at::kBool:
      return Dtype::kBool;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for ", dtype);
  }
}

// The elements of a tensor in the order of these dimensions, outermost first.
inline Strided strided(const at::Tensor& tensor, at::IntArrayRef order) {
  Strided sequence;
  sequence.data = static_cast<char*>(tensor.data_ptr());
  sequence.dtype = dtype_of(tensor.scalar_type());
  for (const int64_t d : order) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (!sequence.sizes.empty() && sequence.strides.back() == size * stride) {
      sequence.sizes.back() *= size;
      sequence.strides.back() = stride;
    } else {
      sequence.sizes.push_back(size);
      sequence.strides.push_back(stride);
    }
  }
  if (sequence.sizes.empty()) {
    sequence.sizes.push_back(1);
    sequence.strides.push_back(1);
  }
  return sequence;
}

// `repeats` times the elements of a tensor of at most one dimension, as an expanded one lies.
inline Strided repeated(const at::Tensor& tensor, int64_t repeats) {
  Strided sequence;
  sequence.data = static_cast<char*>(tensor.data_ptr());
  sequence.dtype = dtype_of(tensor.scalar_type());
  sequence.sizes.push_back(std::max<int64_t>(repeats, 1));
  sequence.strides.push_back(0);
  if (tensor.dim() > 0) {
    sequence.sizes.push_back(std::max<int64_t>(tensor.size(0), 1));
    sequence.strides.push_back(tensor.stride(0));
  }
  return sequence;
}

}  // namespace sqloss::core
