// Tensors for results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace sqloss::core {

// Uninitialised, where `like` lies: on the CPU without the dispatcher.
inline at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like) {
  return like.is_cpu() ? at::detail::empty_cpu(sizes, dtype)
                       : at::empty(sizes, like.options().dtype(dtype));
}

// The same with the sizes, dtype and, if its memory has no gaps, the strides of `like`.
inline at::Tensor empty_like(const at::Tensor& like) {
  return like.is_contiguous() ? empty(like.sizes(), like.scalar_type(), like)
                              : at::empty_like(like);
}

}  // namespace sqloss::core
