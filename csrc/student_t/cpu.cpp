// CPU kernels of Student-t and normal samples with their KL; compiled once per CPU capability.
//
// forward   one read of the parameters, tile by tile; per sample of a tile, all in the caches:
// random
//           words, noise, t, z and the KL of the elements, which are summed from there.
// backward  draws the same samples again, which costs less than reading them back from memory would
//           save, and no memory: one read of the parameters and of the gradients, one write of each
//           gradient wanted.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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

// Elements that are worked on at a time. A dozen arrays of them have to stay in the caches.
constexpr int64_t kElements = 512;
// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 4096;
// Philox blocks at a time: two vectors, which wait for a multiplication in turns.
constexpr int kAtOnce = 2;
constexpr int64_t kWordLanes = sizeof(Words) / sizeof(uint64_t);
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
    return {0, rows_per_tile, 0, std::min(kElements, in.columns)};
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

template <typename T>
using Array = T[kElements];

// What depends on the degrees of freedom alone. 1 / df is 0 for infinite ones, whose terms are then
// those of the normal distribution.
template <typename T>
struct Density {
  Array<T> df, inverse,
      half_power;  // df, 1 / df, (df + 1) / 2; the last two 0 where it is infinite
};

template <typename T>
struct alignas(64) Tile {
  Array<T> loc, scale, log_scale;  // scale itself, whatever the parameterization
  Density<T> posterior, prior;
  Array<T> constant;  // of the KL of an element, and its derivatives:
  Array<T> constant_in_df, constant_in_prior_df;
  Array<T> energy, cosine, t, root_of_g;  // of a sample
  Array<T> z, kl;                         // and backward their gradients
  Array<T> in_loc, in_scale, in_df, in_prior_df;
  Array<double> kl_sum;  // over samples
  // Random words: those of the lower bits are drawn for double only.
  uint32_t u[2][kElements], v[2][kElements];
  uint32_t block_u[kElements + 4 * kBlocks], block_v[kElements + 4 * kBlocks];
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

// The words of `count` adjacent elements from `first` on, to tile.u and tile.v from `position` on.
template <typename T>
void draw_run(Tile<T>& tile, uint64_t key, uint64_t first, int64_t count, uint32_t sample, int part,
              int64_t position) {
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
      const Words u = (words[0][i] & kLow) | (words[2][i] << 32);
      const Words v = (words[1][i] & kLow) | (words[3][i] << 32);
      std::memcpy(tile.block_u + drawn + 2 * i * kWordLanes, &u, sizeof(u));
      std::memcpy(tile.block_v + drawn + 2 * i * kWordLanes, &v, sizeof(v));
    }
  }
  std::memcpy(tile.u[part] + position, tile.block_u + odd, count * sizeof(uint32_t));
  std::memcpy(tile.v[part] + position, tile.block_v + odd, count * sizeof(uint32_t));
}

template <typename T>
void draw(const Inputs& in, const Extent& extent, uint32_t sample, Tile<T>& tile) {
  const bool together = !in.row_ids.data && is_constant(in.seeds);
  const int64_t runs = together ? 1 : extent.rows, count = extent.count() / runs;
  for (int part = 0; part < (sizeof(T) == 4 ? 1 : 2); ++part) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t row = extent.row + run;
      const auto key = static_cast<uint64_t>(int64_of(in.seeds, row));
      const int64_t id = in.row_ids.data ? int64_of(in.row_ids, row) : row;
      const auto first = static_cast<uint64_t>(id) * in.columns + extent.column;
      draw_run(tile, key, first, count, sample, part, run * count);
    }
  }
}

// The work on a sample is cut into loops so short that a CPU overlaps several of their iterations,
// which are long chains each.
template <typename T>
__attribute__((noinline)) void noise_of_words(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    Noise<T> drawn;
    if constexpr (sizeof(T) == 4) {
      drawn = noise(tile.u[0][i], tile.v[0][i]);
    } else {
      drawn = noise(tile.u[0][i], tile.v[0][i], tile.u[1][i], tile.v[1][i]);
    }
    tile.energy[i] = drawn.energy;
    tile.cosine[i] = drawn.cosine;
  }
}

template <typename T>
__attribute__((noinline)) void student_t_samples(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const auto sample = student_t_sample(Noise<T>{tile.energy[i], tile.cosine[i]},
                                         tile.posterior.df[i], tile.posterior.inverse[i]);
    tile.t[i] = sample.t;
    tile.root_of_g[i] = sample.root_of_g;
  }
}

template <typename T>
__attribute__((noinline)) void normal_samples(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.t[i] = normal_sample(Noise<T>{tile.energy[i], tile.cosine[i]});
  }
}

template <typename T>
SQLOSS_INLINE Sample<T> sample_at(const Tile<T>& tile, int64_t i) {
  return {tile.t[i], tile.energy[i] * tile.posterior.inverse[i], tile.cosine[i], tile.root_of_g[i]};
}

template <typename T>
void draw_samples(const Inputs& in, const Extent& extent, int64_t sample, Tile<T>& tile) {
  const int64_t count = padded(extent.count());
  draw(in, extent, static_cast<uint32_t>(sample), tile);
  noise_of_words(count, tile);
  in.df.data ? student_t_samples(count, tile) : normal_samples(count, tile);
}

// --- the parameters of a tile --------------------------------------------------------------------

// NaN where the degrees of freedom are not positive.
template <typename T>
SQLOSS_INLINE T inverse_df(T df) {
  const T inverse = T(1) / df;
  return df > T(0) ? inverse : std::numeric_limits<T>::quiet_NaN();
}
template <typename T>
SQLOSS_INLINE T half_power(T df, T inverse) {
  const T finite = T(0.5) * df + T(0.5);
  return inverse == T(0) ? T(0) : finite;
}

template <typename T>
__attribute__((noinline)) void complete(int64_t count, Density<T>& density) {
  for (int64_t i = 0; i < count; ++i) {
    const T inverse = inverse_df(density.df[i]);
    density.inverse[i] = inverse;
    density.half_power[i] = half_power(density.df[i], inverse);
  }
}

// The part of the KL that depends on the degrees of freedom alone, and its derivatives. sign: 1 for
// the prior, -1 for the posterior of the same kind of term.
template <bool kEntropy, bool kDerivative, typename T>
__attribute__((noinline)) void add_constant(const Density<T>& density, int64_t count, T sign,
                                            Array<T>& constant, Array<T>& derivative) {
  constexpr bool kSecond = kEntropy && kDerivative;
  for (int64_t i = 0; i < count; ++i) {
    const T df = density.df[i], inverse = density.inverse[i];
    const auto r = rho<kSecond>(T(0.5) * df);
    T value = r.value, in_df = T(0.5) * r.first;
    if constexpr (kEntropy) {
      // The entropy: (df + 1) / 2 * (digamma((df + 1) / 2) - digamma(df / 2)) + log Z
      const T finite_product = df * r.first, finite_curvature = (df + T(1)) * r.second;
      const T product = inverse == T(0) ? T(0) : finite_product;
      const T curvature = inverse == T(0) ? T(0) : finite_curvature;
      value += T(0.5) * (T(1) + inverse) * (T(1) - product);
      in_df = T(-0.5) * inverse * inverse - T(0.25) * curvature;
    }
    constant[i] += sign * value;
    if constexpr (kDerivative) derivative[i] = sign * in_df;
  }
}

// df and what follows from it.
template <bool kDerivative, typename T>
void load_df(const Inputs& in, const Extent& extent, Tile<T>& tile) {
  const int64_t count = extent.count(), whole = padded(count);
  std::fill_n(tile.constant, whole, T(0));
  if (!in.df.data) return;
  Density<T>&posterior = tile.posterior, &prior = tile.prior;
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

template <typename T>
void load_location_and_scale(const Inputs& in, const Extent& extent, Tile<T>& tile) {
  load(in.loc, extent.begin(in), extent.count(), tile, tile.loc);
  load(in.scale, extent.begin(in), extent.count(), tile, tile.scale);
  scale_and_log(in.parameterization, padded(extent.count()), tile);
}

// Degrees of freedom that are the same in every tile are loaded once, for a whole tile: no stride
// leads out of them.
bool same_in_all_tiles(const Inputs& in, const Tiling& tiling) {
  const auto same = [&](const Strided& df) {
    if (!df.data || is_constant(df)) return true;
    // [rows, columns] with the rows expanded
    return tiling.parts_per_row == 1 && df.sizes.size() == 2 && df.strides[0] == 0 &&
           df.sizes[1] == in.columns;
  };
  return same(in.df) && same(in.prior_df);
}

// --- forward -------------------------------------------------------------------------------------

// -log of the density of t(0, 1, df) at x without its constant; of infinite df, of the normal.
template <typename T>
SQLOSS_INLINE T energy(const Sample<T>& sample, T x, const Density<T>& density, int64_t i) {
  const T inverse = density.inverse[i], half_square = T(0.5) * x * x;
  const T log1p = log1p_of_square(square_over_df(sample, x, inverse));
  return density.half_power[i] * log1p + (inverse == T(0) ? half_square : T(0));
}

template <typename T>
__attribute__((noinline)) void student_t_cross_term(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.kl[i] =
        energy(sample_at(tile, i), tile.z[i], tile.prior, i) - tile.log_scale[i] + tile.constant[i];
  }
}

template <typename T>
__attribute__((noinline)) void subtract_own_term(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    tile.kl[i] -= energy(sample_at(tile, i), tile.t[i], tile.posterior, i);
  }
}

template <typename T>
__attribute__((noinline)) void closed_form(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T loc = tile.loc[i], scale = tile.scale[i];
    tile.kl[i] = T(0.5) * (loc * loc + scale * scale - T(1)) - tile.log_scale[i];
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
      const T z = tile.z[i], t = tile.t[i];
      tile.kl[i] = T(0.5) * (z * z - t * t) - tile.log_scale[i];
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

      const auto finish = [&](const auto& elements, int64_t sample, double divisor) {
        for (int64_t r = 0; r < extent.rows; ++r) {
          OrderedSum sum;
          sum.add(elements + r * extent.columns, extent.columns);
          const double total = sum.total() / divisor;
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
        draw_samples(in, extent, sample, tile);
        forward_sample(in, whole, tile);
        const int64_t first = sample * in.rows * in.columns + extent.begin(in);
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
    OrderedSum sum;
    sum.add(parts.data() + row * tiling.parts_per_row, tiling.parts_per_row);
    kl[row] = static_cast<T>(sum.total());
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

// --- backward ------------------------------------------------------------------------------------

// Adds to the gradients in loc, scale, df and prior_df what one sample gives, with tile.z and
// tile.kl the gradients of its z and of its part of the KL.
template <bool kKl, typename T>
__attribute__((noinline)) void student_t_backward(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T t = tile.t[i];
    T in_z = tile.z[i];
    if constexpr (kKl) {
      const T z = tile.loc[i] + tile.scale[i] * t, inverse_prior = tile.prior.inverse[i];
      const auto square = square_over_df(sample_at(tile, i), z, inverse_prior);
      const T falls = (T(1) + inverse_prior) * over_1_plus_square(square);
      in_z += tile.kl[i] * (inverse_prior == T(0) ? z : falls);
    }
    tile.z[i] = in_z;
    tile.in_loc[i] += in_z;
    tile.in_scale[i] += in_z * t;
  }
}

// With tile.z the whole gradient of z.
template <typename T>
__attribute__((noinline)) void through_z_in_df(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T t_in_df = in_df(sample_at(tile, i), tile.posterior.inverse[i]);
    tile.in_df[i] += tile.z[i] * tile.scale[i] * t_in_df;
  }
}

template <typename T>
__attribute__((noinline)) void own_term_in_df(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T inverse = tile.posterior.inverse[i];
    const auto sample = sample_at(tile, i);
    const T log1p = log1p_of_square(square_over_df(sample, sample.t, inverse));
    const T falls = log1p_of_square_falls(sample, inverse);
    tile.in_df[i] += tile.kl[i] * (tile.posterior.half_power[i] * falls - T(0.5) * log1p);
  }
}

template <typename T>
__attribute__((noinline)) void cross_term_in_prior_df(int64_t count, Tile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const T z = tile.loc[i] + tile.scale[i] * tile.t[i], inverse = tile.prior.inverse[i];
    const auto square = square_over_df(sample_at(tile, i), z, inverse);
    const T falls = (T(1) + inverse) * (square.value / square.plus);
    tile.in_prior_df[i] += T(0.5) * tile.kl[i] * (log1p_of_square(square) - falls);
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
  through_z_in_df(count, tile);
  if (kl) cross_term_in_prior_df(count, tile);
  if (in.kl == Kl::kMc) own_term_in_df(count, tile);
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
    const T in_log = factor * (scale * through_z - grad);
    const T in_scale = has_kl ? through_z - grad / scale : through_z;
    tile.in_scale[i] = as_logarithm ? in_log : in_scale;
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
      for (Array<T>* sum : {&tile.in_loc, &tile.in_scale, &tile.in_df, &tile.in_prior_df}) {
        std::fill_n(*sum, whole, T(0));
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

      if (in.mean) load_grad_kl(0, static_cast<T>(in.num_samples));
      for (int64_t sample = 0; samples && sample < in.num_samples; ++sample) {
        draw_samples(in, extent, sample, tile);
        if (gradients.z.data) {
          load(gradients.z, sample * in.rows * in.columns + elements, count, tile, tile.z);
        } else {
          std::fill_n(tile.z, whole, T(0));
        }
        if (!in.mean) load_grad_kl(sample, T(1));
        backward_sample(sampled, in_df, whole, tile);
      }
      if (in.mean) {
        load_grad_kl(0, T(1));
      } else {
        // in no more need of tile.z
        std::fill_n(tile.z, whole, T(0));
        for (int64_t sample = 0; sample < in.num_samples; ++sample) {
          load_grad_kl(sample, T(1));
          for (int64_t i = 0; i < whole; ++i) tile.z[i] += tile.kl[i];
        }
        std::memcpy(tile.kl, tile.z, sizeof(tile.kl));
      }
      finish_gradients(sampled, whole, in_df, tile);
      if (!in.prior_df.data) {
        for (int64_t i = 0; i < whole; ++i) tile.in_df[i] += tile.in_prior_df[i];
      }
      store(tile.in_loc, gradients.loc, elements, count);
      store(tile.in_scale, gradients.scale, elements, count);
      store(tile.in_df, gradients.df, elements, count);
      store(tile.in_prior_df, gradients.prior_df, elements, count);
    }
  });
}

void forward_of(const Inputs& in, at::ScalarType dtype, const Outputs& out) {
  dtype == at::kDouble ? forward<double>(in, out) : forward<float>(in, out);
}

void noise_of(const Inputs& in, at::ScalarType dtype, const NoiseOutputs& out) {
  dtype == at::kDouble ? noise_only<double>(in, out) : noise_only<float>(in, out);
}

void backward_of(const Inputs& in, at::ScalarType dtype, const Gradients& gradients) {
  dtype == at::kDouble ? backward<double>(in, gradients) : backward<float>(in, gradients);
}

}  // namespace

const CpuKernels kernels{forward_of, backward_of, noise_of};

}  // namespace sqloss::student_t::CPU_CAPABILITY
