// The order in which losses are ranked: the usual one with every NaN tied above +inf, and -0 = +0.
#pragma once

#include <c10/macros/Macros.h>

namespace sqloss::core {

template <typename T>
C10_HOST_DEVICE inline bool is_nan(T x) {
  return x != x;
}

// -1 below, 0 tied, 1 above
template <typename T>
C10_HOST_DEVICE inline int compare(T x, T threshold) {
  if (is_nan(threshold)) return is_nan(x) ? 0 : -1;
  return !(x <= threshold) ? 1 : (x == threshold ? 0 : -1);
}

template <typename T>
C10_HOST_DEVICE inline bool above(T x, T threshold) {
  return !(x <= threshold) && !is_nan(threshold);
}

}  // namespace sqloss::core
