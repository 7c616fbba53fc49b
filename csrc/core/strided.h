// A tensor as a sequence: its elements in the order of dimensions that the caller names, wherever
// in memory they lie. Made by core/tensors.h, read and written tile by tile through core/tile.h.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"

namespace sqloss::core {

struct Strided {
  char* data = nullptr;  // null: absent
  Dtype dtype = Dtype::kFloat;
  // Outermost first, merged where memory allows; at least one. Strides in elements, 0 where
  // expanded.
  c10::SmallVector<int64_t, 5> sizes, strides;

  // Where an element of offset `offset` lies.
  char* at(int64_t offset) const { return data + offset * element_size(dtype); }

  // f(position, offset, run) for the runs of adjacent elements, strides.back() apart, that make up
  // `count` elements from `begin` on; position counts from 0.
  template <typename F>
  void for_runs(int64_t begin, int64_t count, const F& f) const {
    const int64_t inner = sizes.back();
    int64_t outer = begin / inner, i = begin % inner;
    for (int64_t position = 0; position < count;) {
      const int64_t run = std::min(count - position, inner - i);
      f(position, outer_offset(outer) + i * strides.back(), run);
      position += run;
      ++outer;
      i = 0;
    }
  }

  int64_t offset(int64_t index) const {
    return outer_offset(index / sizes.back()) + index % sizes.back() * strides.back();
  }

 private:
  int64_t outer_offset(int64_t index) const {
    int64_t offset = 0;
    for (size_t d = sizes.size() - 1; d-- > 0;) {
      const int64_t above = d == 0 ? 0 : index / sizes[d];
      offset += (index - above * sizes[d]) * strides[d];
      index = above;
    }
    return offset;
  }
};

}  // namespace sqloss::core
