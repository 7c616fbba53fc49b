// A tensor as a sequence: its elements in the order of dimensions that the caller names, wherever
// in memory they lie. Read and written tile by tile through core/tile.h.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

namespace sqloss::core {

struct Strided {
  char* data = nullptr;  // null: absent
  at::ScalarType dtype = at::kFloat;
  // Outermost first, merged where memory allows; at least one. Strides in elements, 0 where
  // expanded.
  at::DimVector sizes, strides;

  Strided() = default;
  Strided(const at::Tensor& tensor, at::IntArrayRef order)
      : data(static_cast<char*>(tensor.data_ptr())), dtype(tensor.scalar_type()) {
    for (const int64_t d : order) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (size == 1) continue;
      if (!sizes.empty() && strides.back() == size * stride) {
        sizes.back() *= size;
        strides.back() = stride;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      strides.push_back(1);
    }
  }

  // `repeats` times the elements of a tensor of at most one dimension, as an expanded one lies.
  static Strided repeated(const at::Tensor& tensor, int64_t repeats) {
    Strided sequence;
    sequence.data = static_cast<char*>(tensor.data_ptr());
    sequence.dtype = tensor.scalar_type();
    sequence.sizes.push_back(std::max<int64_t>(repeats, 1));
    sequence.strides.push_back(0);
    if (tensor.dim() > 0) {
      sequence.sizes.push_back(std::max<int64_t>(tensor.size(0), 1));
      sequence.strides.push_back(tensor.stride(0));
    }
    return sequence;
  }

  // Where an element of offset `offset` lies.
  char* at(int64_t offset) const {
    return data + offset * static_cast<int64_t>(c10::elementSize(dtype));
  }

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
