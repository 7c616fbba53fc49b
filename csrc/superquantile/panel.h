// Panels: how the CPU kernels of the superquantile read and write kLanes rows of a matrix at once,
// side by side, of any dtype and strides. Element i of all rows of a panel is one vector.
//
// Rows that are neighbours in memory (a reduction over the first dimension) are such vectors
// already; those that lie one after the other are transposed on the way.
//
// Included by cpu.cpp alone; compiled once per CPU capability, in its namespace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"
#include "core/simd.h"
#include "core/tile.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CPU_CAPABILITY {

using core::for_dtype;
using core::CPU_CAPABILITY::kLanes;

// Elements of each row: as many numbers as a tile has.
constexpr int64_t kPanel = core::CPU_CAPABILITY::kTile / kLanes;

template <typename T>
struct alignas(64) Panel {
  T data[kPanel * kLanes];
};

// An element of a matrix.
inline const void* at(const Matrix& matrix, int64_t row, int64_t i) {
  const int64_t offset = row * matrix.row_stride + i * matrix.stride;
  return static_cast<const char*>(matrix.data) + offset * core::element_size(matrix.dtype);
}

// Elements [begin, begin + count) of `rows` <= kLanes rows from `row` on, count <= kPanel; 0 in the
// lanes beyond them.
template <typename T, typename scalar_t>
void read_panel(const Matrix& from, int64_t row, int64_t rows, int64_t begin, int64_t count,
                T* panel) {
  const auto* source = static_cast<const scalar_t*>(at(from, row, begin));
  const int64_t row_stride = from.row_stride, stride = from.stride;
  if (rows < kLanes) std::fill_n(panel, count * kLanes, T(0));
  if (row_stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* numbers = source + i * stride;
      T* to = panel + i * kLanes;
      if (rows == kLanes) {  // a constant count is whole vectors
        core::CPU_CAPABILITY::gather(numbers, 1, kLanes, to);
      } else {
        core::CPU_CAPABILITY::gather(numbers, 1, rows, to);
      }
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const scalar_t* numbers = source + r * row_stride;
    for (int64_t i = 0; i < count; ++i) panel[i * kLanes + r] = static_cast<T>(numbers[i * stride]);
  }
}
template <typename T>
void read_panel(const Matrix& from, int64_t row, int64_t rows, int64_t begin, int64_t count,
                Panel<T>& panel) {
  for_dtype(from.dtype, [&](auto zero) {
    read_panel<T, decltype(zero)>(from, row, rows, begin, count, panel.data);
  });
}

// The converse.
template <typename T>
void write_panel(const Panel<T>& panel, const Matrix& to, int64_t row, int64_t rows, int64_t begin,
                 int64_t count) {
  for_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* target = static_cast<scalar_t*>(const_cast<void*>(at(to, row, begin)));
    if (to.row_stride == 1) {
      for (int64_t i = 0; i < count; ++i) {
        const T* numbers = panel.data + i * kLanes;
        scalar_t* row_of_them = target + i * to.stride;
        if (rows == kLanes) {
          core::CPU_CAPABILITY::scatter(numbers, kLanes, row_of_them, 1);
        } else {
          core::CPU_CAPABILITY::scatter(numbers, rows, row_of_them, 1);
        }
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      scalar_t* numbers = target + r * to.row_stride;
      for (int64_t i = 0; i < count; ++i) {
        numbers[i * to.stride] = static_cast<scalar_t>(panel.data[i * kLanes + r]);
      }
    }
  });
}

}  // namespace sqloss::superquantile::CPU_CAPABILITY
