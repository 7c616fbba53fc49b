// CUDA kernels of Student-t and normal samples with their KL.
//
// A thread owns 16 bytes' worth of a row's columns (kColumns: four floats or two doubles, one
// access where memory allows), whose parameters it holds in registers for all samples. `lanes`
// threads share a row, a power of two that covers its columns, at most a block; longer rows are cut
// into parts of a block each. What depends on degrees of freedom that hold for all rows is computed
// once per thread, which takes several rows one after another.
//
// forward   one read of the parameters; for each sample random words, noise, t, z and the KL in
//           registers. Rows are summed in double: over a thread's columns and samples, then over
//           the row's threads by shuffles; parts, if there are several, by another kernel.
// backward  draws the same samples again, which takes no memory. One read of the parameters and of
//           the outputs' gradients, one write of each gradient wanted. Degrees of freedom that
//           several elements share have their gradients summed in double per block, and the blocks'
//           sums in their order by another kernel.
//
// A Philox block has the words of two adjacent elements, an even one and the next. Where a row
// begins with an even element, a thread's elements take whole blocks and each is drawn once; else
// one block more is drawn for each thread.
#define CPU_CAPABILITY CUDA

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/cuda.h"
#include "core/philox.h"
#include "core/vector_math.h"
#include "student_t/student_t.h"
#include "student_t/student_t_math.h"

namespace sqloss::student_t::CUDA {
namespace {

using core::Strided;
using core::cuda::divide_up;
using core::cuda::kAllLanes;
using core::cuda::kWarp;
using core::cuda::Memory;
using core::cuda::Sequence;
using core::cuda::Vector;

constexpr int kThreads = 128;
// Blocks that rows are dealt to: enough to fill a device several times over, few enough that each
// thread has several rows and that the blocks' sums are few.
constexpr int64_t kRowBlocks = 2048;

template <typename T>
constexpr int kColumns = 16 / sizeof(T);

// How rows and columns are dealt to threads: by sizes alone.
struct Grid {
  int lanes;             // threads that share a row
  int64_t parts;         // of a row
  int64_t rows_at_once;  // of a block
  int64_t rows_per_block, row_blocks;

  Grid(int64_t rows, int64_t columns, int columns_per_thread) : lanes(1) {
    while (lanes < kThreads && lanes * columns_per_thread < columns) lanes *= 2;
    parts = divide_up(columns, lanes * columns_per_thread);
    rows_at_once = kThreads / lanes;
    const int64_t turns = divide_up(rows, rows_at_once);
    rows_per_block = divide_up(turns, std::max<int64_t>(1, kRowBlocks / parts)) * rows_at_once;
    row_blocks = divide_up(rows, rows_per_block);
  }

  int64_t blocks() const { return row_blocks * parts; }
};

// Rows of columns that are one stride apart.
struct Matrix {
  Sequence rows;  // their first elements
  int64_t stride = 0;
  bool vectors = false;  // a thread's columns are adjacent, from an aligned address on

  Matrix() = default;
  Matrix(const Strided& sequence, int64_t columns, int columns_per_thread) {
    if (sequence.data == nullptr) return;
    Strided first = sequence;
    stride = first.strides.back();
    first.sizes.back() /= columns;
    first.strides.back() *= columns;
    if (first.sizes.back() == 1 && first.sizes.size() > 1) {
      first.sizes.pop_back();
      first.strides.pop_back();
    }
    rows = Sequence(first);
    const auto whole = [&](int64_t elements) { return elements % columns_per_thread == 0; };
    vectors = stride == 1 && whole(columns) &&
              std::all_of(first.strides.begin(), first.strides.end(), whole) &&
              reinterpret_cast<uintptr_t>(first.data) % Sequence::kAlignment == 0;
  }
};

struct Arguments {
  Parameterization parameterization;
  Kl kl;
  bool mean;
  DfShape df_shape, prior_df_shape;
  int64_t rows, columns, num_samples;
  Matrix df, loc, scale, prior_df;
  Sequence seeds, row_ids;
  Grid grid;

  Arguments(const Inputs& in, int columns_per_thread)
      : parameterization(in.parameterization),
        kl(in.kl),
        mean(in.mean),
        df_shape(in.df_shape),
        prior_df_shape(in.prior_df_shape),
        rows(in.rows),
        columns(in.columns),
        num_samples(in.num_samples),
        df(in.df, columns, columns_per_thread),
        loc(in.loc, columns, columns_per_thread),
        scale(in.scale, columns, columns_per_thread),
        prior_df(in.prior_df, columns, columns_per_thread),
        seeds(in.seeds),
        row_ids(in.row_ids),
        grid(in.rows, in.columns, columns_per_thread) {}
};

// The degrees of freedom of a thread's elements: none, one for all of them, or one each.
enum class Df { kNone, kOne, kEach };

// Blocks that a multiprocessor is to hold at once: as many as leave the registers that are needed.
template <typename T>
constexpr int kNormalBlocks = sizeof(T) == 4 ? 6 : 5;
template <typename T, Df kDf>
constexpr int kForwardBlocks = kDf == Df::kNone  ? kNormalBlocks<T>
                               : kDf == Df::kOne ? 5
                                                 : 4;
template <typename T, Df kDf>
constexpr int kBackwardBlocks = kDf == Df::kNone  ? kNormalBlocks<T>
                                : kDf == Df::kOne ? 4
                                                  : 3;

// --- a thread's elements -------------------------------------------------------------------------

// A thread's columns: the same in all its rows.
__device__ __forceinline__ int64_t first_column(const Arguments& in, int columns_per_thread) {
  const int64_t part = blockIdx.x % in.grid.parts;
  return (part * in.grid.lanes + threadIdx.x % in.grid.lanes) * columns_per_thread;
}

// A thread's elements of one row. `count` of kColumns exist: the others, and all where the row does
// not exist, are computed, but not stored.
struct Place {
  int64_t row, column;
  int count;

  // Ones where there are no elements.
  template <typename T>
  __device__ __forceinline__ void load(const Matrix& from, int64_t row,
                                       T (&values)[kColumns<T>]) const {
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) values[i] = T(1);
    if (count == 0) return;
    const int64_t begin = from.rows.offset(row) + column * from.stride;
    core::cuda::for_dtype(from.rows.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      const scalar_t* const data = from.rows.as<const scalar_t>() + begin;
      if (from.vectors) {
        const auto vector = *reinterpret_cast<const Vector<scalar_t, kColumns<T>>*>(data);
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) values[i] = static_cast<T>(vector.values[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) {
          if (i < count) values[i] = static_cast<T>(data[i * from.stride]);
        }
      }
    });
  }

  template <typename T>
  __device__ __forceinline__ void store(const T (&values)[kColumns<T>], const Matrix& to,
                                        int64_t row) const {
    if (to.rows.data == nullptr || count == 0) return;
    const int64_t begin = to.rows.offset(row) + column * to.stride;
    core::cuda::for_dtype(to.rows.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      scalar_t* const data = to.rows.as<scalar_t>() + begin;
      if (to.vectors) {
        Vector<scalar_t, kColumns<T>> vector;
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) vector.values[i] = static_cast<scalar_t>(values[i]);
        *reinterpret_cast<Vector<scalar_t, kColumns<T>>*>(data) = vector;
      } else {
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) {
          if (i < count) data[i * to.stride] = static_cast<scalar_t>(values[i]);
        }
      }
    });
  }

  template <typename T>
  __device__ __forceinline__ double sum(const T (&values)[kColumns<T>]) const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      sum += static_cast<double>(i < count ? values[i] : T(0));
    }
    return sum;
  }
};

// f(place, whether it is the first) for the rows of a thread; in all threads of a block as often.
template <typename T, typename F>
__device__ __forceinline__ void for_places(const Arguments& in, const F& f) {
  const int64_t column = first_column(in, kColumns<T>), rest = in.columns - column;
  const int count = rest < 0 ? 0 : rest < kColumns<T> ? static_cast<int>(rest) : kColumns<T>;
  int64_t row = blockIdx.x / in.grid.parts * in.grid.rows_per_block + threadIdx.x / in.grid.lanes;
  for (int64_t done = 0; done < in.grid.rows_per_block; done += in.grid.rows_at_once) {
    f(Place{row, column, row < in.rows ? count : 0}, done == 0);
    row += in.grid.rows_at_once;
  }
}

// The sum of the threads that share a row, in each of them. All threads of a block have to call it.
__device__ __forceinline__ double row_sum(double value, int lanes) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < lanes) value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  if (lanes <= kWarp) return value;
  __shared__ double of_warps[kThreads / kWarp];
  __syncthreads();  // of_warps may still be read from the call before
  if (core::cuda::lane() == 0) of_warps[core::cuda::warp()] = value;
  __syncthreads();
  const int warps = lanes / kWarp, first = core::cuda::warp() / warps * warps;
  value = of_warps[first];
  for (int i = 1; i < warps; ++i) value += of_warps[first + i];
  return value;
}

// --- random numbers ------------------------------------------------------------------------------

// Philox blocks of one key.
template <int kCount>
struct Words {
  uint32_t words[4][kCount];

  __device__ __forceinline__ Words(uint64_t key, const uint64_t (&blocks)[kCount], uint32_t sample,
                                   const uint32_t (&parts)[kCount]) {
    uint64_t counters[4][kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      counters[0][i] = blocks[i];
      counters[1][i] = blocks[i] >> 32;
      counters[2][i] = sample;
      counters[3][i] = parts[i];
    }
    core::CUDA::philox(key, counters);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k][i] = static_cast<uint32_t>(counters[k][i]);
    }
  }
};

// Where the random words of a thread's elements come from.
struct Source {
  uint64_t key, block;
  bool odd;  // the first element is the second one of its block

  __device__ __forceinline__ Source(const Arguments& in, const Place& place)
      : key(0), block(0), odd(false) {
    if (place.count == 0) return;
    const auto number = [&](const Sequence& sequence) {
      return static_cast<uint64_t>(sequence.as<const int64_t>()[sequence.offset(place.row)]);
    };
    key = number(in.seeds);
    const uint64_t row = in.row_ids.data ? number(in.row_ids) : static_cast<uint64_t>(place.row);
    const uint64_t first = row * static_cast<uint64_t>(in.columns) + place.column;
    block = first / 2;
    odd = first % 2 != 0;
  }

  __device__ __forceinline__ void draw(uint32_t sample, Noise<float> (&drawn)[4]) const {
    const Words<2> of_pairs(key, {block, block + 1}, sample, {0, 0});
    const auto& words = of_pairs.words;
    uint32_t u[4] = {words[0][0], words[2][0], words[0][1], words[2][1]};
    uint32_t v[4] = {words[1][0], words[3][0], words[1][1], words[3][1]};
    if (odd) {
      const Words<1> more(key, {block + 2}, sample, {0});
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        u[i] = u[i + 1];
        v[i] = v[i + 1];
      }
      u[3] = more.words[0][0];
      v[3] = more.words[1][0];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[i] = noise(u[i], v[i]);
  }

  __device__ __forceinline__ void draw(uint32_t sample, Noise<double> (&drawn)[2]) const {
    const Words<2> of_pair(key, {block, block}, sample, {0, 1});
    const auto of_even = [](const Words<2>& from) {
      const auto& words = from.words;
      return noise(words[0][0], words[1][0], words[0][1], words[1][1]);
    };
    const auto of_odd = [](const Words<2>& from) {
      const auto& words = from.words;
      return noise(words[2][0], words[3][0], words[2][1], words[3][1]);
    };
    drawn[1] = of_odd(of_pair);
    if (odd) {
      drawn[0] = drawn[1];
      drawn[1] = of_even(Words<2>(key, {block + 1, block + 1}, sample, {0, 1}));
    } else {
      drawn[0] = of_even(of_pair);
    }
  }
};

// --- parameters ----------------------------------------------------------------------------------

// What depends on the degrees of freedom of a thread's elements.
template <typename T, Df kDf>
struct Densities {
  static constexpr int kCount = kDf == Df::kEach ? kColumns<T> : 1;
  Density<T> posterior[kCount], prior[kCount];
  // of the KL of an element: its value forward, its derivatives backward
  T constant[kCount], constant_in_df[kCount], constant_in_prior_df[kCount];

  static __device__ __forceinline__ constexpr int of(int i) { return kDf == Df::kEach ? i : 0; }

  // Whether they differ from row to row.
  static __device__ __forceinline__ bool of_rows(const Arguments& in) {
    return in.df_shape == DfShape::kFull ||
           (in.prior_df.rows.data && in.prior_df_shape == DfShape::kFull);
  }

  template <bool kDerivative>
  __device__ __forceinline__ void load(const Arguments& in, const Place& place) {
    const auto read = [&](const Matrix& from, Density<T>(&densities)[kCount]) {
      T given[kCount];
      if constexpr (kDf == Df::kOne) {
        given[0] = core::cuda::read<T>(from.rows, 0);
      } else {
        place.load(from, place.row, given);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) densities[i] = density(given[i]);
    };
    read(in.df, posterior);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      prior[i] = posterior[i];
      constant[i] = constant_in_df[i] = constant_in_prior_df[i] = T(0);
    }
    if (in.kl == Kl::kNone) return;
    if (in.prior_df.rows.data) read(in.prior_df, prior);
    if (in.kl == Kl::kMc && !in.prior_df.rows.data) return;  // the two constants cancel
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Constant<T> of_posterior = in.kl == Kl::kAnalyticEntropy
                                           ? constant_of<true, kDerivative>(posterior[i])
                                           : constant_of<false, kDerivative>(posterior[i]);
      const Constant<T> of_prior = constant_of<false, kDerivative>(prior[i]);
      constant[i] = of_prior.value - of_posterior.value;
      constant_in_df[i] = -of_posterior.in_df;
      constant_in_prior_df[i] = of_prior.in_df;
    }
  }
};

template <typename T>
struct Parameters {
  T loc[kColumns<T>], scale[kColumns<T>];
  T log_scale[kColumns<T>];  // for a KL

  __device__ __forceinline__ Parameters(const Arguments& in, const Place& place) {
    place.load(in.loc, place.row, loc);
    place.load(in.scale, place.row, scale);
    if (in.parameterization == Parameterization::kScale) {
      if (in.kl == Kl::kNone) return;
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) log_scale[i] = core::CUDA::log(scale[i]);
      return;
    }
    const T factor = log_factor(in.parameterization);
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      log_scale[i] = factor * scale[i];
      scale[i] = core::CUDA::exp(log_scale[i]);
    }
  }

  // d log(scale) / d parameter of the logarithmic parameterizations
  static __device__ __forceinline__ T log_factor(Parameterization parameterization) {
    return parameterization == Parameterization::kLogvar ? T(0.5) : T(1);
  }
};

// A standard sample of an element.
template <Df kDf, typename T>
__device__ __forceinline__ T sample_of(const Noise<T>& noise, const Density<T>& posterior) {
  if constexpr (kDf == Df::kNone) return normal_sample(noise);
  return student_t_sample(noise, posterior.df, posterior.inverse);
}

// --- forward -------------------------------------------------------------------------------------

struct OutputRows {
  Matrix z;       // [num_samples, rows, columns]
  void* kl;       // [num_samples or 1, rows] of T, or null
  double* parts;  // [num_samples or 1, rows, parts], if there are several
};

template <typename T, Df kDf>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kDf>)
    forward_kernel(Arguments in, OutputRows out) {
  Densities<T, kDf> df;
  const bool has_kl = out.kl != nullptr, closed_form = in.kl == Kl::kClosedForm;
  const bool sampled_kl = has_kl && !closed_form;
  const double of_each_sample = 1.0 / static_cast<double>(in.num_samples);

  const auto finish = [&](double sum, double weight, const Place& place, int64_t index) {
    const double total = row_sum(sum, in.grid.lanes) * weight;
    if (threadIdx.x % in.grid.lanes != 0 || place.count == 0) return;
    if (in.grid.parts > 1) {
      out.parts[index * in.grid.parts + blockIdx.x % in.grid.parts] = total;
    } else {
      static_cast<T*>(out.kl)[index] = static_cast<T>(total);
    }
  };

  for_places<T>(in, [&](const Place& place, bool is_first) {
    if constexpr (kDf != Df::kNone) {
      if (is_first || df.of_rows(in)) df.template load<false>(in, place);
    }
    const Parameters<T> given(in, place);
    if (has_kl && closed_form) {
      T kl[kColumns<T>];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        kl[i] = normal_kl_in_closed_form(given.loc[i], given.scale[i], given.log_scale[i]);
      }
      const double sum = place.sum(kl);
      for (int64_t sample = 0; sample < (in.mean ? 1 : in.num_samples); ++sample) {
        finish(sum, 1.0, place, sample * in.rows + place.row);
      }
    }
    if (out.z.rows.data == nullptr && !sampled_kl) return;

    const Source source(in, place);
    double sum = 0;  // of all samples
    for (int64_t sample = 0; sample < in.num_samples; ++sample) {
      Noise<T> noise[kColumns<T>];
      source.draw(static_cast<uint32_t>(sample), noise);
      T t[kColumns<T>], z[kColumns<T>];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        t[i] = sample_of<kDf>(noise[i], df.posterior[df.of(i)]);
        z[i] = given.loc[i] + given.scale[i] * t[i];
      }
      const int64_t index = sample * in.rows + place.row;
      place.store(z, out.z, index);
      if (!sampled_kl) continue;
      T kl[kColumns<T>];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        if constexpr (kDf == Df::kNone) {
          kl[i] = normal_kl(z[i], t[i], given.log_scale[i]);
        } else {
          const int d = df.of(i);
          kl[i] = minus_log_kernel(df.prior[d], z[i]) - given.log_scale[i] + df.constant[d];
        }
      }
      if (kDf != Df::kNone && in.kl == Kl::kMc) {
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) {
          kl[i] -= minus_log_kernel(df.posterior[df.of(i)], t[i]);
        }
      }
      const double of_sample = place.sum(kl);
      sum += of_sample;
      if (!in.mean) finish(of_sample, 1.0, place, index);
    }
    if (sampled_kl && in.mean) {
      finish(sum, of_each_sample, place, place.row);
    }
  });
}

// --- noise alone ---------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(Arguments in, Matrix energy, Matrix cosine) {
  for_places<T>(in, [&](const Place& place, bool is_first) {
    const Source source(in, place);
    for (int64_t sample = 0; sample < in.num_samples; ++sample) {
      Noise<T> noise[kColumns<T>];
      source.draw(static_cast<uint32_t>(sample), noise);
      T energies[kColumns<T>], cosines[kColumns<T>];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        energies[i] = noise[i].energy;
        cosines[i] = noise[i].cosine;
      }
      place.store(energies, energy, sample * in.rows + place.row);
      place.store(cosines, cosine, sample * in.rows + place.row);
    }
  });
}

// --- sums ----------------------------------------------------------------------------------------

// Sums of partial sums: target[i] = the sum of the i-th of `count` rows of `terms`.
struct Sums {
  const double* partial;  // [count, terms]
  int64_t count, terms;
  Sequence target;
};

// The sums of a, then those of b, each by `lanes` threads.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(Sums a, Sums b, int lanes) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const bool of_a = number < a.count;
  const int64_t index = of_a ? number : number - a.count;
  const bool exists = of_a || index < b.count;
  const int64_t terms = !exists ? 0 : of_a ? a.terms : b.terms;
  const double* const partial = (of_a ? a.partial : b.partial) + index * terms;
  double sum = 0;
  for (int64_t i = threadIdx.x % lanes; i < terms; i += lanes) sum += partial[i];
  sum = row_sum(sum, lanes);
  if (threadIdx.x % lanes != 0 || !exists) return;
  core::cuda::write(of_a ? a.target : b.target, index, static_cast<T>(sum));
}

template <typename T>
void add_up(const Sums& a, const Sums& b) {
  constexpr int64_t kTerms = 4;  // of a thread, if there are threads enough
  int lanes = 1;
  while (lanes < kThreads && lanes * kTerms < std::max(a.terms, b.terms)) lanes *= 2;
  const int64_t blocks = divide_up((a.count + b.count) * lanes, kThreads);
  core::cuda::launch(sum_kernel<T>, core::cuda::grid(blocks), kThreads, 0, a, b, lanes);
}

// --- backward ------------------------------------------------------------------------------------

// The gradient of degrees of freedom of each element, or the blocks' partial sums of those that
// elements share; or none.
struct DfGradient {
  Matrix target;
  double* partial;  // [1 or columns, blocks that have to do with it]

  __device__ __forceinline__ bool is_wanted() const { return target.rows.data || partial; }
};

struct GradientRows {
  Matrix z, loc, scale;
  Sequence kl;
  DfGradient df, prior_df;

  __device__ __forceinline__ bool in_df() const { return df.is_wanted() || prior_df.is_wanted(); }
};

// Sums in double of a thread's elements over its rows.
template <typename T>
struct ElementSums {
  double values[kColumns<T>] = {};

  __device__ __forceinline__ void add(const Place& place, const T (&more)[kColumns<T>]) {
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      values[i] += i < place.count ? static_cast<double>(more[i]) : 0.0;
    }
  }

  // Over the block, into the partial sums. All threads of a block have to call it.
  __device__ __forceinline__ void finish(const Arguments& in, DfShape shape,
                                         double* partial) const {
    if (shape == DfShape::kScalar) {
      double sum = values[0];
#pragma unroll
      for (int i = 1; i < kColumns<T>; ++i) sum += values[i];
      sum = core::cuda::block_sum(sum);
      if (threadIdx.x == 0) partial[blockIdx.x] = sum;
      return;
    }
    __shared__ double of_threads[kThreads][kColumns<T>];
    __syncthreads();  // of_threads may still be read from the call before
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) of_threads[threadIdx.x][i] = values[i];
    __syncthreads();
    if (threadIdx.x >= in.grid.lanes) return;
    const int64_t column = first_column(in, kColumns<T>), row_block = blockIdx.x / in.grid.parts;
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      if (column + i >= in.columns) return;
      double sum = 0;
      for (int thread = threadIdx.x; thread < kThreads; thread += in.grid.lanes) {
        sum += of_threads[thread][i];
      }
      partial[(column + i) * in.grid.row_blocks + row_block] = sum;
    }
  }
};

template <typename T, Df kDf>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, kDf>)
    backward_kernel(Arguments in, GradientRows out) {
  Densities<T, kDf> df;
  ElementSums<T> sums_in_df, sums_in_prior_df;
  const bool has_kl = in.kl != Kl::kNone, closed_form = in.kl == Kl::kClosedForm;
  const bool sampled_kl = has_kl && !closed_form, in_df = kDf != Df::kNone && out.in_df();

  for_places<T>(in, [&](const Place& place, bool is_first) {
    if constexpr (kDf != Df::kNone) {
      if (is_first || df.of_rows(in)) df.template load<true>(in, place);
    }
    const Parameters<T> given(in, place);
    // The gradient of the KL of a sample's row, for each of its elements.
    const auto read_in_kl = [&](int64_t sample) {
      const bool read = has_kl && place.count > 0;
      return read ? core::cuda::read<T>(out.kl, sample * in.rows + place.row) : T(0);
    };
    T in_all_kl = T(0);  // of all samples
    for (int64_t sample = 0; sample < (in.mean ? 1 : in.num_samples); ++sample) {
      in_all_kl += read_in_kl(sample);
    }
    const T in_mean_kl = in_all_kl / static_cast<T>(in.num_samples);

    T in_loc[kColumns<T>] = {}, in_scale[kColumns<T>] = {};
    T in_posterior_df[kColumns<T>] = {}, in_prior_df[kColumns<T>] = {};
    const Source source(in, place);
    const bool samples = out.z.rows.data || sampled_kl;
    for (int64_t sample = 0; samples && sample < in.num_samples; ++sample) {
      T in_z[kColumns<T>] = {};
      if (out.z.rows.data) place.load(out.z, sample * in.rows + place.row, in_z);
      const T in_kl = !sampled_kl ? T(0) : in.mean ? in_mean_kl : read_in_kl(sample);
      Noise<T> noise[kColumns<T>];
      source.draw(static_cast<uint32_t>(sample), noise);
      T t[kColumns<T>], z[kColumns<T>];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        t[i] = sample_of<kDf>(noise[i], df.posterior[df.of(i)]);
        z[i] = given.loc[i] + given.scale[i] * t[i];
      }
      if (sampled_kl) {
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) {
          if constexpr (kDf == Df::kNone) {
            in_z[i] += in_kl * z[i];
          } else {
            in_z[i] += in_kl * cross_term_in_z(df.prior[df.of(i)], z[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        in_loc[i] += in_z[i];
        in_scale[i] += in_z[i] * t[i];
      }
      if constexpr (kDf != Df::kNone) {
        if (!in_df) continue;
        const auto add = [&](auto own_term) {
#pragma unroll
          for (int i = 0; i < kColumns<T>; ++i) {
            in_posterior_df[i] += gradient_of_df<own_term.value>(
                df.posterior[df.of(i)], t[i], noise[i].energy, given.scale[i], in_z[i], in_kl);
          }
        };
        in.kl == Kl::kMc ? add(std::true_type()) : add(std::false_type());
        if (!sampled_kl) continue;
#pragma unroll
        for (int i = 0; i < kColumns<T>; ++i) {
          in_prior_df[i] += gradient_of_prior_df(df.prior[df.of(i)], z[i], in_kl);
        }
      }
    }

    // What does not depend on the sample; and the gradient in scale becomes that in its parameter.
    const bool as_logarithm = in.parameterization != Parameterization::kScale;
    const T factor = given.log_factor(in.parameterization);
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      const T scale = given.scale[i];
      if (closed_form) {
        in_loc[i] += in_all_kl * given.loc[i];
        in_scale[i] += in_all_kl * scale;
      }
      in_scale[i] = gradient_of_scale(as_logarithm, factor, has_kl, scale, in_scale[i], in_all_kl);
    }
    place.store(in_loc, out.loc, place.row);
    place.store(in_scale, out.scale, place.row);
    if constexpr (kDf != Df::kNone) {
      if (!in_df) return;
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        const int d = df.of(i);
        if (has_kl) {
          in_posterior_df[i] += in_all_kl * df.constant_in_df[d];
          in_prior_df[i] += in_all_kl * df.constant_in_prior_df[d];
        }
        if (!in.prior_df.rows.data) in_posterior_df[i] += in_prior_df[i];
      }
      const auto give = [&](const T(&values)[kColumns<T>], const DfGradient& target,
                            ElementSums<T>& sums) {
        if (target.partial) {
          sums.add(place, values);
        } else {
          place.store(values, target.target, place.row);
        }
      };
      give(in_posterior_df, out.df, sums_in_df);
      give(in_prior_df, out.prior_df, sums_in_prior_df);
    }
  });
  if constexpr (kDf != Df::kNone) {
    if (out.df.partial) sums_in_df.finish(in, in.df_shape, out.df.partial);
    if (out.prior_df.partial) {
      sums_in_prior_df.finish(in, in.prior_df_shape, out.prior_df.partial);
    }
  }
}

// --- launches ------------------------------------------------------------------------------------

Df df_of(const Inputs& in) {
  if (!in.df.data) return Df::kNone;
  const bool one = in.df_shape == DfShape::kScalar &&
                   (!in.prior_df.data || in.prior_df_shape == DfShape::kScalar);
  return one ? Df::kOne : Df::kEach;
}

template <typename T>
void forward(const Inputs& in, const Outputs& out) {
  const Arguments arguments(in, kColumns<T>);
  const int64_t kl_rows = (in.mean ? 1 : in.num_samples) * in.rows, parts = arguments.grid.parts;
  const bool several = out.kl && parts > 1;
  Memory memory;
  const size_t of_parts = memory.reserve<double>(several ? kl_rows * parts : 0);
  memory.allocate();
  double* const partial = several ? memory.at<double>(of_parts) : nullptr;
  const auto kernel = [&] {
    switch (df_of(in)) {
      case Df::kNone:
        return forward_kernel<T, Df::kNone>;
      case Df::kOne:
        return forward_kernel<T, Df::kOne>;
      default:
        return forward_kernel<T, Df::kEach>;
    }
  }();
  core::cuda::launch(kernel, core::cuda::grid(arguments.grid.blocks()), kThreads, 0, arguments,
                     OutputRows{Matrix(out.z, in.columns, kColumns<T>), out.kl, partial});
  if (!several) return;
  Strided kl;
  kl.data = static_cast<char*>(out.kl);
  kl.dtype = core::kDtypeOf<T>;
  kl.sizes.push_back(kl_rows);
  kl.strides.push_back(1);
  add_up<T>({partial, kl_rows, parts, Sequence(kl)}, {});
}

template <typename T>
void noise_only(const Inputs& in, const NoiseOutputs& out) {
  const Arguments arguments(in, kColumns<T>);
  core::cuda::launch(noise_kernel<T>, core::cuda::grid(arguments.grid.blocks()), kThreads, 0,
                     arguments, Matrix(out.energy, in.columns, kColumns<T>),
                     Matrix(out.cosine, in.columns, kColumns<T>));
}

// Of one tensor of degrees of freedom: where its gradient goes, and the sums that make it if
// elements share it.
struct Gradient {
  Strided target;
  int64_t count = 0, terms = 0;  // of partial sums
  size_t offset = 0;

  Gradient(const Strided& target, DfShape shape, const Inputs& in, const Grid& grid, Memory& memory)
      : target(target) {
    if (!target.data || shape == DfShape::kFull) return;
    const bool scalar = shape == DfShape::kScalar;
    count = scalar ? 1 : in.columns;
    terms = scalar ? grid.blocks() : grid.row_blocks;
    offset = memory.reserve<double>(count * terms);
  }

  double* partial(const Memory& memory) const {
    return count > 0 ? memory.at<double>(offset) : nullptr;
  }
  Sums sums(const Memory& memory) const {
    return {partial(memory), count, terms, Sequence(target)};
  }
};

template <typename T>
void backward(const Inputs& in, const Gradients& gradients) {
  Arguments arguments(in, kColumns<T>);
  if (!gradients.kl.data) arguments.kl = Kl::kNone;
  Memory memory;
  const Gradient df(gradients.df, in.df_shape, in, arguments.grid, memory);
  const Gradient prior_df(gradients.prior_df, in.prior_df_shape, in, arguments.grid, memory);
  memory.allocate();
  const auto rows = [&](const Strided& sequence) {
    return Matrix(sequence, in.columns, kColumns<T>);
  };
  const auto of_df = [&](const Gradient& gradient) {
    double* const partial = gradient.partial(memory);
    return DfGradient{partial ? Matrix() : rows(gradient.target), partial};
  };
  const GradientRows out{rows(gradients.z),      rows(gradients.loc), rows(gradients.scale),
                         Sequence(gradients.kl), of_df(df),           of_df(prior_df)};
  const auto kernel = [&] {
    switch (df_of(in)) {
      case Df::kNone:
        return backward_kernel<T, Df::kNone>;
      case Df::kOne:
        return backward_kernel<T, Df::kOne>;
      default:
        return backward_kernel<T, Df::kEach>;
    }
  }();
  core::cuda::launch(kernel, core::cuda::grid(arguments.grid.blocks()), kThreads, 0, arguments,
                     out);
  add_up<T>(df.sums(memory), prior_df.sums(memory));
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

}  // namespace sqloss::student_t::CUDA
