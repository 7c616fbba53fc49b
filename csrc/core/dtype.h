// The dtypes of what kernels read and write, and the C++ types of their elements. Torch's own enum
// comes with complex numbers, for which every CUDA file would read all of thrust.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace sqloss::core {

enum class Dtype : int8_t { kHalf, kBFloat16, kFloat, kDouble, kInt64, kBool };

// The dtype of elements of a C++ type.
template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<c10::Half> {
  static constexpr Dtype value = Dtype::kHalf;
};
template <>
struct DtypeOf<c10::BFloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kDouble;
};
template <>
struct DtypeOf<bool> {
  static constexpr Dtype value = Dtype::kBool;
};
template <typename T>
inline constexpr Dtype kDtypeOf = DtypeOf<T>::value;

// In bytes.
inline int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kHalf:
    case Dtype::kBFloat16:
      return 2;
    case Dtype::kFloat:
      return 4;
    case Dtype::kDouble:
    case Dtype::kInt64:
      return 8;
    case Dtype::kBool:
      return 1;
  }
  __builtin_unreachable();
}

// Raises the error of a dtype that is no floating one, where kernels expect that.
[[noreturn]] void refuse_dtype(Dtype dtype);

// f(zero of the C++ type) for a floating dtype, on the host.
template <typename F>
void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float());
    case Dtype::kDouble:
      return f(double());
    case Dtype::kHalf:
      return f(c10::Half());
    case Dtype::kBFloat16:
      return f(c10::BFloat16());
    default:
      refuse_dtype(dtype);
  }
}

}  // namespace sqloss::core
