// CPU kernels of Student-t and normal samples with their KL; compiled once per CPU capability.
//
// forward   reads the parameters once, tile by tile, and asks memory for the next tile's before the
//           work on one. All else of a tile stays in the caches: for each sample random words,
//           noise, t, z and the KL of the elements, and their sums.
// backward  draws the same samples again, which takes no memory. One read of the parameters and of
//           the outputs' gradients, one write of each gradient wanted.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "core/philox.h"
#include "core/scratch.h"
#include "core/tile.h"
#include "core/vector_math.h"
#include "student_t/student_t.h"
#include "student_t/student_t_math.h"

namespace sqloss::student_t::CPU_CAPABILITY {
namespace {

using core::Strided;
using core::CPU_CAPABILITY::kLanes;
using core::CPU_CAPABILITY::OrderedSum;
using core::CPU_CAPABILITY::Words;

// Elements that are worked on at a time: 17 arrays of them are read and written in turns, and 32
// KiB of first-level cache hold those.
constexpr int64_t kElements = 256;
// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 4096;
constexpr int64_t kWordLanes = sizeof(Words) / sizeof(uint64_t);
// Vectors of Philox blocks at a time, which wait for a multiplication in turns: three are 1.05
// to 1.1 times as fast as two with AVX2, and four need more registers than there are. With AVX-512
// three would draw 12 % more words than a tile has elements.
constexpr int kAtOnce = kWordLanes == 8 ? 2 : 3;
constexpr int64_t kBlocks = kAtOnce * kWordLanes;

// --- tiles ---------------------------------------------------------------------------------------

// Rows that share a tile, or a part of one row.
struct Extent {
  int64_t row, rows, column, columns;  // columns of each of the rows

  int64_t count() const { return rows * columns; }
  int64_t begin(const Inputs& in) const { return row * in.columns + column; }
};

struct Tiling {
  int64_t rows_per_tile, parts_per_row, tiles;

  explicit Tiling(const Inputs& in)
      : rows_per_tile(std::max<int64_t>(1, kElements / std::max<int64_t>(1, in.columns))),
        parts_per_row(std::max<int64_t>(1, (in.columns + kElements - 1) / kElements)),
        tiles((in.rows + rows_per_tile - 1) / rows_per_tile * parts_per_row) {}

  Extent whole(const Inputs& in) const {
    return {0, std::min(rows_per_tile, in.rows), 0, std::min(kElements, in.columns)};
  }
  Extent extent(const Inputs& in, int64_t tile) const {
    const int64_t row = tile / parts_per_row * rows_per_tile;
    const int64_t column = tile % parts_per_row * kElements;
    return {row, std::min(rows_per_tile, in.rows - row), column,
            std::min(kElements, in.columns - column)};
  }

  template <typename F>
  void for_tiles(const Inputs& in, const F& f) const {
    const int64_t per_tile = std::max<int64_t>(1, in.rows * in.columns / tiles);
    const int64_t grain = kGrain / (per_tile * std::max<int64_t>(1, in.num_samples)) + 1;
    at::parallel_for(0, tiles, grain, f);
  }
};

// A cache line longer than its elements: a CPU takes a load for one of what was just stored if the
// lowest 12 bits of both addresses agree, as at the same index of arrays of a power of two bytes.
template <typename T>
using Array = T[kElements + 16];

template <typename T>
struct Densities {
  Array<T> df, inverse, root, half_power;

  SQLOSS_INLINE Density<T> at(int64_t i) const {
    return {df[i], inverse[i], root[i], half_power[i]};
  }
};

template <typename T>
struct alignas(64) Tile {
  Array<T> loc, scale, log_scale;  // scale itself, whatever the parameterization
  Densities<T> posterior, prior;
  Array<T> constant;  // of the KL of an element, and its derivatives:
  Array<T> constant_in_df, constant_in_prior_df;
  Array<T> energy, cosine, t;  // of a sample
  Array<T> z, kl;              // and backward their gradients
  Array<T> in_loc, in_scale, in_df, in_prior_df;
  Array<double> kl_sum;  // over samples
  // Random words, of the elements from first_word on; part 1, of the lower bits, for double only.
  int64_t first_word;
  uint32_t u[2][kElements + 4 * kBlocks], v[2][kElements + 4 * kBlocks];
  uint32_t run_u[kElements + 4 * kBlocks], run_v[kElements + 4 * kBlocks];
  core::CPU_CAPABILITY::Tile<T> buffer;
};

// Loops are over whole vectors: what they do beyond count is harmless and not stored.
inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <typename T>
void load(const Strided& source, int64_t begin, int64_t count, Tile<T>& tile, Array<T>& values) {
  const T* read = core::CPU_CAPABILITY::read_tile<T>(source, begin, count, tile.buffer);
  std::memcpy(values, read, count * sizeof(T));
  std::fill(values + count, values + padded(count), T(1));
}

template <typename T>
void store(const Array<T>& values, const Strided& target, int64_t begin, int64_t count) {
  if (target.data) core::CPU_CAPABILITY::write_tile<T>(values, target, begin, count);
}

// --- random words --------------------------------------------------------------------------------

int64_t int64_of(const Strided& sequence, int64_t index) {
  int64_t number;
  std::memcpy(&number, sequence.at(sequence.offset(index)), sizeof(number));
  return number;
}

bool is_constant(const Strided& sequence) {
  return std::all_of(sequence.strides.begin(), sequence.strides.end(),
                     [](int64_t stride) { return stride == 0; }) ||
         (sequence.sizes.size() == 1 && sequence.sizes[0] == 1);
}

// The words of `count` adjacent elements from `first` on, and before them that of an even one which
// shares a block with `first`.
__attribute__((noinline)) void draw_run(uint64_t key, uint64_t first, int64_t count,
                                        uint32_t sample, int part, uint32_t* u, uint32_t* v) {
  const int64_t odd = static_cast<int64_t>(first % 2);
  for (int64_t drawn = 0; drawn < odd + count; drawn += 2 * kBlocks) {
    const uint64_t block = (first - odd + drawn) / 2;
    Words words[4][kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      Words index;
      for (int64_t lane = 0; lane < kWordLanes; ++lane) index[lane] = block + i * kWordLanes + lane;
      words[0][i] = index;
      words[1][i] = index >> 32;
      words[2][i] = Words{} + sample;
      words[3][i] = Words{} + static_cast<uint64_t>(part);
    }
    core::CPU_CAPABILITY::philox(key, words);
    for (int i = 0; i < kAtOnce; ++i) {
      // Lanes of two words each: in memory, those of an even and of the next odd element.
      constexpr uint64_t kLow = 0xffffffff;
      const Words us = (words[0][i] & kLow) | (words[2][i] << 32);
      const Words vs = (words[1][i] & kLow) | (words[3][i] << 32);
      std::memcpy(u + drawn + 2 * i * kWordLanes, &us, sizeof(us));
      std::memcpy(v + drawn + 2 * i * kWordLanes, &vs, sizeof(vs));
    }
  }
}

template <typename T>
void draw(const Inputs& in, const Extent& extent, uint32_t sample, Tile<T>& tile) {
  const auto key = [&](int64_t row) { return static_cast<uint64_t>(int64_of(in.seeds, row)); };
  const auto first = [&](int64_t row) {
    return static_cast<uint64_t>(row) * in.columns + extent.column;
  };
  for (int part = 0; part < (sizeof(T) == 4 ? 1 : 2); ++part) {
    if (!in.row_ids.data && is_constant(in.seeds)) {
      const uint64_t begin = first(extent.row);
      draw_run(key(0), begin, extent.count(), sample, part, tile.u[part], tile.v[part]);
      tile.first_word = static_cast<int64_t>(begin % 2);
      continue;
    }
    for (int64_t i = 0; i < extent.rows; ++i) {
      const int64_t row = extent.row + i;
      const uint64_t begin = first(in.row_ids.data ? int64_of(in.row_ids, row) : row);
      draw_run(key(row), begin, extent.columns, sample, part, tile.run_u, tile.run_v);
      const auto keep = [&](const uint32_t* run, uint32_t* words) {
        std::memcpy(words + i * extent.columns, run + begin % 2, extent.columns * sizeof(*run));
      };
      keep(tile.run_u, tile.u[part]);
      keep(tile.run_v, tile.v[part]);
    }
    tile.first_word = 0;
  }
}

// The work on a sample is cut into loops so short that a CPU overlaps several of their iterations,
// which are long chains each.
template <typename T>
__attribute__((noinline)) void noise_of_words(int64_t count, Tile<T>& tile) {
  const uint32_t *u = tile.u[0] + tile.first_word, *u_more = tile.u[1] + tile.first_word;
  const uint32_t *v = tile.v[0] + tile.first_word, *v_more = tile.v[1] + tile.first_word;
  for (int64_t i = 0; i < count; ++i) {
    Noise<T> drawn;
    if constexpr (sizeof(T) == 4) {
      drawn = noise(u[i], v[i]);
    } else {
      drawn = noise(u[i], v[i], u_more[i], v_more[i]);
    }
    tile.energy[i] = drawn.energy;
    tile.cosine[i] = drawn.cosine;
  }
}

template <typename T>
__attribute__((noinline)) void student_t_samples(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.t[i] = student_t_sample(Noise<T>{tile.energy[i], tile.cosine[i]}, tile.posterior.df[i],
                                 tile.posterior.inverse[i]);
  }
}

template <typename T>
__attribute__((noinline)) void normal_samples(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.t[i] = normal_sample(Noise<T>{tile.energy[i], tile.cosine[i]});
  }
}

template <typename T>
void draw_samples(const Inputs& in, const Extent& extent, int64_t sample, Tile<T>& tile) {
  const int64_t count = padded(extent.count());
  draw(in, extent, static_cast<uint32_t>(sample), tile);
  noise_of_words(count, tile);
  in.df.data ? student_t_samples(count, tile) : normal_samples(count, tile);
}

// --- the parameters of a tile --------------------------------------------------------------------

template <typename T>
__attribute__((noinline)) void complete(int64_t count, Densities<T>& densities) {
  for (int64_t i = 0; i < count; ++i) {
    const Density<T> of = density(densities.df[i]);
    densities.df[i] = of.df;
    densities.inverse[i] = of.inverse;
    densities.root[i] = of.root;
    densities.half_power[i] = of.half_power;
  }
}

// sign: 1 for the prior, -1 for the posterior.
template <bool kEntropy, bool kDerivative, typename T>
__attribute__((noinline)) void add_constant(const Densities<T>& densities, int64_t count, T sign,
                                            Array<T>& constant, Array<T>& derivative) {
  for (int64_t i = 0; i < count; ++i) {
    const Constant<T> of = constant_of<kEntropy, kDerivative>(densities.at(i));
    constant[i] += sign * of.value;
    if constexpr (kDerivative) derivative[i] = sign * of.in_df;
  }
}

// df and what follows from it.
template <bool kDerivative, typename T>
void load_df(const Inputs& in, const Extent& extent, Tile<T>& tile) {
  const int64_t count = extent.count(), whole = padded(count);
  std::fill_n(tile.constant, whole, T(0));
  if (!in.df.data) return;
  Densities<T>&posterior = tile.posterior, &prior = tile.prior;
  load(in.df, extent.begin(in), count, tile, posterior.df);
  complete(whole, posterior);
  if (in.kl == Kl::kNone) return;
  if (!in.prior_df.data) {
    prior = posterior;
  } else {
    load(in.prior_df, extent.begin(in), count, tile, prior.df);
    complete(whole, prior);
  }
  if (in.kl == Kl::kMc && !in.prior_df.data) {  // the two constants cancel
    std::fill_n(tile.constant_in_df, whole, T(0));
    std::fill_n(tile.constant_in_prior_df, whole, T(0));
    return;
  }
  const bool entropy = in.kl == Kl::kAnalyticEntropy;
  const auto add_posterior =
      entropy ? add_constant<true, kDerivative, T> : add_constant<false, kDerivative, T>;
  add_posterior(posterior, whole, T(-1), tile.constant, tile.constant_in_df);
  add_constant<false, kDerivative>(prior, whole, T(1), tile.constant, tile.constant_in_prior_df);
}

template <typename T>
__attribute__((noinline)) void scale_and_log(Parameterization parameterization, int64_t count,
                                             Tile<T>& tile) {
  if (parameterization == Parameterization::kScale) {
    for (int64_t i = 0; i < count; ++i) {
      tile.log_scale[i] = core::CPU_CAPABILITY::log(tile.scale[i]);
    }
    return;
  }
  const T factor = parameterization == Parameterization::kLogvar ? T(0.5) : T(1);
  for (int64_t i = 0; i < count; ++i) {
    const T log_scale = factor * tile.scale[i];
    tile.log_scale[i] = log_scale;
    tile.scale[i] = core::CPU_CAPABILITY::exp(log_scale);
  }
}

// Asks for elements of these sequences, but for absent ones. The work on a tile takes several times
// as long as memory does, which would otherwise be waited for at every load, and at every store to
// what has left the second-level cache.
void prefetch(std::initializer_list<const Strided*> sequences, int64_t begin, int64_t count) {
  for (const Strided* sequence : sequences) {
    if (sequence->data) core::CPU_CAPABILITY::prefetch_tile(*sequence, begin, count, 0);
  }
}
void prefetch(std::initializer_list<const Strided*> sequences, const Inputs& in,
              const Extent& extent) {
  prefetch(sequences, extent.begin(in), extent.count());
}

template <typename T>
void load_location_and_scale(const Inputs& in, const Extent& extent, Tile<T>& tile) {
  load(in.loc, extent.begin(in), extent.count(), tile, tile.loc);
  load(in.scale, extent.begin(in), extent.count(), tile, tile.scale);
  scale_and_log(in.parameterization, padded(extent.count()), tile);
}

// Degrees of freedom that are the same in every tile are loaded once, for a whole tile: no stride
// leads out of them.
bool same_in_all_tiles(const Inputs& in, const Tiling& tiling) {
  const auto same = [&](DfShape shape) {
    return shape == DfShape::kScalar || (shape == DfShape::kColumns && tiling.parts_per_row == 1);
  };
  return (!in.df.data || same(in.df_shape)) && (!in.prior_df.data || same(in.prior_df_shape));
}

// --- forward -------------------------------------------------------------------------------------

// Of its own, because the compiler keeps these sums in memory where they are a part of more.
template <typename Number>
__attribute__((noinline)) double ordered_sum(const Number* values, int64_t count) {
  OrderedSum sum;
  sum.add(values, count);
  return sum.total();
}

template <typename T>
__attribute__((noinline)) void student_t_cross_term(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T cross_term = minus_log_kernel(tile.prior.at(i), tile.z[i]);
    tile.kl[i] = cross_term - tile.log_scale[i] + tile.constant[i];
  }
}

template <typename T>
__attribute__((noinline)) void subtract_own_term(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i)
    tile.kl[i] -= minus_log_kernel(tile.posterior.at(i), tile.t[i]);
}

template <typename T>
__attribute__((noinline)) void closed_form(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.kl[i] = normal_kl_in_closed_form(tile.loc[i], tile.scale[i], tile.log_scale[i]);
  }
}

template <typename T>
__attribute__((noinline)) void forward_sample(const Inputs& in, int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) tile.z[i] = tile.loc[i] + tile.scale[i] * tile.t[i];
  if (in.kl == Kl::kNone || in.kl == Kl::kClosedForm) return;
  if (in.df.data) {
    student_t_cross_term(count, tile);
    if (in.kl == Kl::kMc) subtract_own_term(count, tile);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      tile.kl[i] = normal_kl(tile.z[i], tile.t[i], tile.log_scale[i]);
    }
  }
}

template <typename T>
void forward(const Inputs& in, const Outputs& out) {
  const Tiling tiling(in);
  const bool same_df = same_in_all_tiles(in, tiling);
  const int64_t kl_samples = in.mean ? 1 : in.num_samples;
  auto* const kl = static_cast<T*>(out.kl);
  const bool sampled_kl = kl && in.kl != Kl::kClosedForm;
  // Rows of several tiles: the sums of each, [kl_samples, rows, parts].
  std::vector<double> parts;
  if (kl && tiling.parts_per_row > 1) parts.resize(kl_samples * tiling.tiles);

  tiling.for_tiles(in, [&](int64_t begin, int64_t end) {
    core::Scratch<Tile<T>> memory;
    Tile<T>& tile = *memory.reserve(1);
    for (int64_t index = begin; index < end; ++index) {
      const Extent extent = tiling.extent(in, index);
      const int64_t count = extent.count(), whole = padded(count);
      if (index == begin || !same_df) {
        load_df<false>(in, same_df ? tiling.whole(in) : extent, tile);
      }
      load_location_and_scale(in, extent, tile);
      if (index + 1 < end) prefetch({&in.loc, &in.scale}, in, tiling.extent(in, index + 1));

      const auto finish = [&](const auto& elements, int64_t sample, double divisor) {
        for (int64_t r = 0; r < extent.rows; ++r) {
          const double total = ordered_sum(elements + r * extent.columns, extent.columns) / divisor;
          const int64_t row = sample * in.rows + extent.row + r;
          if (parts.empty()) {
            kl[row] = static_cast<T>(total);
          } else {
            parts[row * tiling.parts_per_row + index % tiling.parts_per_row] = total;
          }
        }
      };

      if (kl && in.kl == Kl::kClosedForm) {
        closed_form(whole, tile);
        for (int64_t sample = 0; sample < kl_samples; ++sample) finish(tile.kl, sample, 1.0);
      }
      const bool sum_samples = sampled_kl && in.mean && in.num_samples > 1;
      if (sum_samples) std::fill_n(tile.kl_sum, whole, 0.0);
      for (int64_t sample = 0; (out.z.data || sampled_kl) && sample < in.num_samples; ++sample) {
        const int64_t first = sample * in.rows * in.columns + extent.begin(in);
        prefetch({&out.z}, first, count);
        draw_samples(in, extent, sample, tile);
        forward_sample(in, whole, tile);
        store(tile.z, out.z, first, count);
        if (!sampled_kl) continue;
        if (sum_samples) {
          for (int64_t i = 0; i < whole; ++i) tile.kl_sum[i] += static_cast<double>(tile.kl[i]);
        } else {
          finish(tile.kl, sample, 1.0);
        }
      }
      if (sum_samples) finish(tile.kl_sum, 0, static_cast<double>(in.num_samples));
    }
  });

  for (size_t row = 0; row * tiling.parts_per_row < parts.size(); ++row) {
    kl[row] = static_cast<T>(
        ordered_sum(parts.data() + row * tiling.parts_per_row, tiling.parts_per_row));
  }
}

// --- noise alone ---------------------------------------------------------------------------------

template <typename T>
void noise_only(const Inputs& in, const NoiseOutputs& out) {
  const Tiling tiling(in);
  tiling.for_tiles(in, [&](int64_t begin, int64_t end) {
    core::Scratch<Tile<T>> memory;
    Tile<T>& tile = *memory.reserve(1);
    for (int64_t index = begin; index < end; ++index) {
      const Extent extent = tiling.extent(in, index);
      for (int64_t sample = 0; sample < in.num_samples; ++sample) {
        draw(in, extent, static_cast<uint32_t>(sample), tile);
        noise_of_words(padded(extent.count()), tile);
        const int64_t first = sample * in.rows * in.columns + extent.begin(in);
        store(tile.energy, out.energy, first, extent.count());
        store(tile.cosine, out.cosine, first, extent.count());
      }
    }
  });
}

// --- sums of gradients ---------------------------------------------------------------------------

// The gradient of degrees of freedom that hold for several rows or elements: each tile's sum, and
// then that of all, in one order.
template <typename T>
class Summed {
 public:
  Summed(const Inputs& in, const Tiling& tiling, const Strided& target, DfShape shape)
      : in_(in), tiling_(tiling), target_(target), shape_(shape) {
    if (shape == DfShape::kFull || !target.data) return;
    width_ = shape == DfShape::kScalar ? 1 : std::min(kElements, in.columns);
    sums_.resize(tiling.tiles * width_);
  }

  void add(int64_t index, const Extent& extent, const Array<T>& values) {
    if (shape_ == DfShape::kFull) return store(values, target_, extent.begin(in_), extent.count());
    if (!target_.data) return;
    double* const sums = sums_.data() + index * width_;
    if (shape_ == DfShape::kScalar) {
      *sums = ordered_sum(values, extent.count());
      return;
    }
    for (int64_t row = 0; row < extent.rows; ++row) {
      for (int64_t i = 0; i < extent.columns; ++i) {
        sums[i] += static_cast<double>(values[row * extent.columns + i]);
      }
    }
  }

  void finish() {
    if (sums_.empty()) return;
    if (shape_ == DfShape::kScalar) {
      const T total = static_cast<T>(ordered_sum(sums_.data(), tiling_.tiles));
      core::CPU_CAPABILITY::write_tile<T>(&total, target_, 0, 1);
      return;
    }
    const int64_t parts = tiling_.parts_per_row;
    for (int64_t index = parts; index < tiling_.tiles; ++index) {
      double* const total = sums_.data() + index % parts * width_;
      for (int64_t i = 0; i < width_; ++i) total[i] += sums_[index * width_ + i];
    }
    const std::vector<T> totals(sums_.begin(), sums_.begin() + in_.columns);
    core::CPU_CAPABILITY::write_tile<T>(totals.data(), target_, 0, in_.columns);
  }

 private:
  const Inputs& in_;
  const Tiling& tiling_;
  const Strided& target_;
  DfShape shape_;
  int64_t width_ = 0;
  std::vector<double> sums_;  // [tiles, width_]
};

// --- backward ------------------------------------------------------------------------------------

// Adds to the gradients in loc, scale, df and prior_df what one sample gives, with tile.z and
// tile.kl the gradients of its z and of its part of the KL.
template <bool kKl, typename T>
__attribute__((noinline)) void student_t_backward(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T t = tile.t[i];
    T in_z = tile.z[i];
    if constexpr (kKl) {
      const T z = tile.loc[i] + tile.scale[i] * t;
      in_z += tile.kl[i] * cross_term_in_z(tile.prior.at(i), z);
    }
    tile.z[i] = in_z;
    tile.in_loc[i] += in_z;
    tile.in_scale[i] += in_z * t;
  }
}

// With tile.z the whole gradient of z.
template <bool kOwnTerm, typename T>
__attribute__((noinline)) void posterior_in_df(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.in_df[i] += gradient_of_df<kOwnTerm>(tile.posterior.at(i), tile.t[i], tile.energy[i],
                                              tile.scale[i], tile.z[i], tile.kl[i]);
  }
}

template <typename T>
__attribute__((noinline)) void cross_term_in_prior_df(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T z = tile.loc[i] + tile.scale[i] * tile.t[i];
    tile.in_prior_df[i] += gradient_of_prior_df(tile.prior.at(i), z, tile.kl[i]);
  }
}

template <typename T>
__attribute__((noinline)) void normal_backward(bool kl, int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T t = tile.t[i], z = tile.loc[i] + tile.scale[i] * t, through_kl = tile.kl[i] * z;
    const T in_z = tile.z[i] + (kl ? through_kl : T(0));
    tile.in_loc[i] += in_z;
    tile.in_scale[i] += in_z * t;
  }
}

template <typename T>
void backward_sample(const Inputs& in, bool in_df, int64_t count, Tile<T>& tile) {
  const bool kl = in.kl == Kl::kMc || in.kl == Kl::kAnalyticEntropy;
  if (!in.df.data) return normal_backward(kl, count, tile);
  kl ? student_t_backward<true>(count, tile) : student_t_backward<false>(count, tile);
  if (!in_df) return;
  in.kl == Kl::kMc ? posterior_in_df<true>(count, tile) : posterior_in_df<false>(count, tile);
  if (kl) cross_term_in_prior_df(count, tile);
}

// What does not depend on the sample, with tile.kl the whole gradient of a row's KL; and the
// gradient in scale becomes that in its parameter.
template <typename T>
__attribute__((noinline)) void finish_gradients(const Inputs& in, int64_t count, bool in_df,
                                                Tile<T>& tile) {
  const bool has_kl = in.kl != Kl::kNone, closed = in.kl == Kl::kClosedForm;
  const bool as_logarithm = in.parameterization != Parameterization::kScale;
  const T factor = in.parameterization == Parameterization::kLogvar ? T(0.5) : T(1);
  for (int64_t i = 0; i < count; ++i) {
    const T scale = tile.scale[i], grad = tile.kl[i];
    tile.in_loc[i] += closed ? grad * tile.loc[i] : T(0);
    const T through_z = tile.in_scale[i] + (closed ? grad * scale : T(0));
    tile.in_scale[i] = gradient_of_scale(as_logarithm, factor, has_kl, scale, through_z, grad);
  }
  if (!in_df || !has_kl) return;
  for (int64_t i = 0; i < count; ++i) {
    tile.in_df[i] += tile.kl[i] * tile.constant_in_df[i];
    tile.in_prior_df[i] += tile.kl[i] * tile.constant_in_prior_df[i];
  }
}

template <typename T>
void backward(const Inputs& in, const Gradients& gradients) {
  const Tiling tiling(in);
  const bool same_df = same_in_all_tiles(in, tiling);
  const bool has_kl = gradients.kl.data != nullptr;
  const bool in_df = gradients.df.data || gradients.prior_df.data;
  Inputs sampled = in;
  if (!has_kl) sampled.kl = Kl::kNone;
  // The closed form alone depends on no sample.
  const bool samples =
      gradients.z.data || sampled.kl == Kl::kMc || sampled.kl == Kl::kAnalyticEntropy;

  Summed<T> of_df(in, tiling, gradients.df, in.df_shape);
  Summed<T> of_prior_df(in, tiling, gradients.prior_df, in.prior_df_shape);

  tiling.for_tiles(in, [&](int64_t begin, int64_t end) {
    core::Scratch<Tile<T>> memory;
    Tile<T>& tile = *memory.reserve(1);
    for (int64_t index = begin; index < end; ++index) {
      const Extent extent = tiling.extent(in, index);
      const int64_t count = extent.count(), whole = padded(count), elements = extent.begin(in);
      if (index == begin || !same_df) {
        const Extent of_df = same_df ? tiling.whole(in) : extent;
        in_df ? load_df<true>(sampled, of_df, tile) : load_df<false>(sampled, of_df, tile);
      }
      load_location_and_scale(in, extent, tile);
      if (index + 1 < end) {
        prefetch({&in.loc, &in.scale, &gradients.z}, in, tiling.extent(in, index + 1));
      }
      prefetch({&gradients.loc, &gradients.scale}, in, extent);
      std::fill_n(tile.in_loc, whole, T(0));
      std::fill_n(tile.in_scale, whole, T(0));
      if (in_df) {
        std::fill_n(tile.in_df, whole, T(0));
        std::fill_n(tile.in_prior_df, whole, T(0));
      }

      // The gradient of the KL of a sample's rows, for each of their elements.
      const auto load_grad_kl = [&](int64_t sample, T divisor) {
        std::fill_n(tile.kl, whole, T(0));
        if (!has_kl) return;
        core::CPU_CAPABILITY::Tile<T>& rows = tile.buffer;
        const T* grad = core::CPU_CAPABILITY::read_tile<T>(
            gradients.kl, sample * in.rows + extent.row, extent.rows, rows);
        for (int64_t r = 0; r < extent.rows; ++r) {
          std::fill_n(tile.kl + r * extent.columns, extent.columns, grad[r] / divisor);
        }
      };

      const bool one_grad_kl = in.mean || in.num_samples == 1;  // for every sample
      if (one_grad_kl) load_grad_kl(0, static_cast<T>(in.num_samples));
      for (int64_t sample = 0; samples && sample < in.num_samples; ++sample) {
        draw_samples(in, extent, sample, tile);
        if (gradients.z.data) {
          load(gradients.z, sample * in.rows * in.columns + elements, count, tile, tile.z);
        } else {
          std::fill_n(tile.z, whole, T(0));
        }
        if (!one_grad_kl) load_grad_kl(sample, T(1));
        backward_sample(sampled, in_df, whole, tile);
      }
      if (in.num_samples > 1 && in.mean) {
        load_grad_kl(0, T(1));
      } else if (in.num_samples > 1) {
        // tile.z, which no sample needs any more, takes the sum
        std::fill_n(tile.z, whole, T(0));
        for (int64_t sample = 0; sample < in.num_samples; ++sample) {
          load_grad_kl(sample, T(1));
          for (int64_t i = 0; i < whole; ++i) tile.z[i] += tile.kl[i];
        }
        std::memcpy(tile.kl, tile.z, sizeof(tile.kl));
      }
      finish_gradients(sampled, whole, in_df, tile);
      if (in_df && !in.prior_df.data) {
        for (int64_t i = 0; i < whole; ++i) tile.in_df[i] += tile.in_prior_df[i];
      }
      store(tile.in_loc, gradients.loc, elements, count);
      store(tile.in_scale, gradients.scale, elements, count);
      of_df.add(index, extent, tile.in_df);
      of_prior_df.add(index, extent, tile.in_prior_df);
    }
  });
  of_df.finish();
  of_prior_df.finish();
}

void forward_of(const Inputs& in, core::Dtype dtype, const Outputs& out) {
  dtype == core::Dtype::kDouble ? forward<double>(in, out) : forward<float>(in, out);
}

void noise_of(const Inputs& in, core::Dtype dtype, const NoiseOutputs& out) {
  dtype == core::Dtype::kDouble ? noise_only<double>(in, out) : noise_only<float>(in, out);
}

void backward_of(const Inputs& in, core::Dtype dtype, const Gradients& gradients) {
  dtype == core::Dtype::kDouble ? backward<double>(in, gradients) : backward<float>(in, gradients);
}

}  // namespace

const Kernels kernels{forward_of, backward_of, noise_of};

}  // namespace sqloss::student_t::CPU_CAPABILITY
