// The order in which losses are ranked: the usual one with every NaN tied above +inf, and -0 = +0.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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

// Unsigned integers in the same order: all bits of a negative number flipped, the sign bit of a
// positive one; NaN is the largest. Expects no -0 (add 0 to a number first).
template <typename T>
using ordered_key_t = std::conditional_t<sizeof(T) == 8, uint64_t,
                                         std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <typename T>
C10_HOST_DEVICE inline ordered_key_t<T> to_ordered_key(T x) {
  using Key = ordered_key_t<T>;
  static_assert(sizeof(Key) == sizeof(T));
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  Key bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Key key = (bits & sign) ? ~bits : bits | sign;
  constexpr Key nan = std::numeric_limits<Key>::max();
  return is_nan(x) ? nan : key;
}

template <typename T>
C10_HOST_DEVICE inline T from_ordered_key(ordered_key_t<T> key) {
  using Key = ordered_key_t<T>;
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  constexpr Key nan = std::numeric_limits<Key>::max();
  if (key == nan) return std::numeric_limits<T>::quiet_NaN();
  const Key bits = (key & sign) ? key & ~sign : ~key;
  T x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace sqloss::core
