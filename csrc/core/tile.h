// Tiles: how the CPU kernels read a run of any floating dtype and stride, and write one, through a
// buffer that stays in the first-level cache instead of a converted copy of the tensor.
//
// Included by csrc/*/cpu.cpp alone; compiled once per CPU capability, in its namespace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "core/simd.h"
#include "core/strided.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace sqloss::core::CPU_CAPABILITY {

// 4 KiB of floats: several tiles at once fit a first-level cache.
constexpr int64_t kTile = 1024;

// Room for one tile, on the stack; a few elements more, so that whole vectors may be stored.
template <typename T>
struct alignas(64) Tile {
  T data[kTile + 16];
};

template <typename T, typename scalar_t>
void gather(const scalar_t* source, int64_t stride, int64_t count, T* values) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(source[i * stride]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      _mm256_storeu_ps(values + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < count; ++i) values[i] = static_cast<T>(source[i]);
}

template <typename T, typename scalar_t>
void scatter(const T* values, int64_t count, scalar_t* target, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = static_cast<scalar_t>(values[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      const auto halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
    }
  }
#endif
  for (; i < count; ++i) target[i] = static_cast<scalar_t>(values[i]);
}

// `count` <= kTile elements of `dtype`, `stride` apart: where they lie if they are adjacent Ts,
// else in the buffer.
template <typename T>
const T* read_tile(const void* source, Dtype dtype, int64_t stride, int64_t count,
                   Tile<T>& buffer) {
  if (stride == 1 && dtype == kDtypeOf<T>) {
    return static_cast<const T*>(source);
  }
  for_dtype(dtype, [&](auto zero) {
    gather(static_cast<const decltype(zero)*>(source), stride, count, buffer.data);
  });
  return buffer.data;
}

// The converse: where to put `count` <= kTile values, and write_tile to take them from there.
template <typename T>
T* tile_to_write(void* target, Dtype dtype, int64_t stride, Tile<T>& buffer) {
  const bool in_place = stride == 1 && dtype == kDtypeOf<T>;
  return in_place ? static_cast<T*>(target) : buffer.data;
}

template <typename T>
void write_tile(const T* values, void* target, Dtype dtype, int64_t stride, int64_t count) {
  if (values == target) return;
  for_dtype(dtype, [&](auto zero) {
    scatter(values, count, static_cast<decltype(zero)*>(target), stride);
  });
}

// The same for `count` <= kTile elements of a Strided from `begin` on, `shift` elements further in
// memory: without the buffer where they are adjacent Ts.
template <typename T>
const T* read_tile(const Strided& source, int64_t begin, int64_t count, Tile<T>& buffer,
                   int64_t shift = 0) {
  const T* values = buffer.data;
  source.for_runs(begin, count, [&](int64_t position, int64_t offset, int64_t run) {
    const void* from = source.at(offset + shift);
    if (run == count) {
      values = read_tile<T>(from, source.dtype, source.strides.back(), run, buffer);
    } else {
      for_dtype(source.dtype, [&](auto zero) {
        gather(static_cast<const decltype(zero)*>(from), source.strides.back(), run,
               buffer.data + position);
      });
    }
  });
  return values;
}

// Asks for a tile that is read soon. Worth it where tiles lie pages apart, which the hardware does
// not foresee.
inline void prefetch_tile(const Strided& source, int64_t begin, int64_t count, int64_t shift) {
  const int64_t stride = source.strides.back();
  const int64_t per_line = 64 / element_size(source.dtype);
  const int64_t step = std::max<int64_t>(1, per_line / std::max<int64_t>(1, stride));
  source.for_runs(begin, count, [&](int64_t, int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; i += step) {
      __builtin_prefetch(source.at(offset + shift + i * stride));
    }
  });
}

template <typename T>
T* tile_to_write(const Strided& target, int64_t begin, int64_t count, Tile<T>& buffer,
                 int64_t shift = 0) {
  const int64_t inner = target.sizes.back();
  if (begin % inner + count > inner) return buffer.data;  // in several runs
  return tile_to_write<T>(target.at(target.offset(begin) + shift), target.dtype,
                          target.strides.back(), buffer);
}

template <typename T>
void write_tile(const T* values, const Strided& target, int64_t begin, int64_t count,
                int64_t shift = 0) {
  target.for_runs(begin, count, [&](int64_t position, int64_t offset, int64_t run) {
    write_tile(values + position, target.at(offset + shift), target.dtype, target.strides.back(),
               run);
  });
}

// Zeros, any count of them.
inline void write_zeros(void* target, Dtype dtype, int64_t stride, int64_t count) {
  for_dtype(dtype, [&](auto zero) {
    auto* const to = static_cast<decltype(zero)*>(target);
    if (stride == 1) {
      std::memset(target, 0, count * sizeof(zero));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i * stride] = zero;
    }
  });
}
inline void write_zeros(const Strided& target, int64_t begin, int64_t count, int64_t shift = 0) {
  target.for_runs(begin, count, [&](int64_t, int64_t offset, int64_t run) {
    write_zeros(target.at(offset + shift), target.dtype, target.strides.back(), run);
  });
}

// Sums in the order of core/simd.h's Lanes, which on tiles were slower than what the compiler makes
// of this.
struct OrderedSum {
  double sum[kLanes] = {};

  template <typename T>
  void add(const T* values, int64_t count) {
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) add_lanes(values + i);
    if (whole == count) return;
    T rest[kLanes] = {};  // adding zeros changes nothing
    std::copy_n(values + whole, count - whole, rest);
    add_lanes(rest);
  }

  double total() const {
    double lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = sum[lane];
    return fold(lanes);
  }

 private:
  template <typename T>
  void add_lanes(const T* values) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += static_cast<double>(values[lane]);
  }
};

}  // namespace sqloss::core::CPU_CAPABILITY
