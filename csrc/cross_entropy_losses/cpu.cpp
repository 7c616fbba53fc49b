// CPU kernels of the cross-entropy; compiled once per CPU capability.
//
// The samples are walked in one of two ways, both with one read of the logits:
//
// by sample  where the classes of a sample lie together: tile by tile along the classes, with the
//            maximum m and the sum of exp(x - m) so far, which is rescaled when m grows.
// by class   where samples lie together (images) or classes are few: a tile of samples at a time,
//            class after class, with m and the sum of each. One exp(-|x - m|) for each logit serves
//            both cases: it is the new term, or the rescaling of the sum if x is the new m.
//
// backward   softmax = exp(x - log_sum_exp), of the samples with gradient alone; by class these are
//            picked out of the tile, where they are few. The gradient of probabilities is one more
//            pass over these samples' logits, and has no exp.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/tile.h"
#include "core/vector_math.h"
#include "cross_entropy_losses/cross_entropy_losses.h"
#include "cross_entropy_losses/cross_entropy_losses_math.h"

namespace sqloss::cross_entropy_losses::CPU_CAPABILITY {
namespace {

using core::for_dtype;
using core::Strided;
using namespace core::CPU_CAPABILITY;

// Fewer logits than this are not worth another thread.
constexpr int64_t kGrain = 16384;
// Fewer classes than this do not fill a vector.
constexpr int64_t kFewClasses = 16;

bool walk_by_sample(const Inputs& in) {
  if (in.classes < kFewClasses) return false;
  return in.samples == 1 || in.input.stride <= in.input.first.strides.back();
}

// --- loops ---------------------------------------------------------------------------------------
// Functions of their own: the compiler believes __restrict of parameters alone.

// kLowest of no or only -inf logits; does not see NaN.
template <typename T>
[[gnu::noinline]] T maximum(const T* __restrict x, int64_t count) {
  constexpr int64_t kWidth = 32;
  T lanes[kWidth];
  std::fill_n(lanes, kWidth, kLowest<T>);
  const int64_t whole = count - count % kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  for (int64_t i = whole; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + kWidth);
}

template <typename T>
[[gnu::noinline]] void exps(const T* __restrict x, T maximum, int64_t count, T* __restrict e) {
  for (int64_t i = 0; i < count; ++i) e[i] = exp_small(x[i] - maximum);
}

// m and sum of a tile of samples, with their first class and with each further one.
template <typename T>
[[gnu::noinline]] void start(const T* __restrict x, int64_t count, T* __restrict m,
                             T* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) {
    m[i] = x[i] < kLowest<T> ? kLowest<T> : x[i];
    sum[i] = x[i] < kLowest<T> ? T(0) : T(1);
  }
}
template <typename T>
[[gnu::noinline]] void update(const T* __restrict x, int64_t count, T* __restrict m,
                              T* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) {
    const T difference = x[i] - m[i];
    const T e = exp_small(-std::abs(difference));
    const T rescaled = sum[i] * e + T(1), added = sum[i] + e;
    sum[i] = difference > T(0) ? rescaled : added;
    m[i] = difference > T(0) ? x[i] : m[i];
  }
}

template <typename T>
[[gnu::noinline]] void logs(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = log(x[i]);
}

// The coefficients of classes that are not the target.
template <typename T>
[[gnu::noinline]] void coefficients(const T* __restrict probabilities, const T* __restrict weight,
                                    T kept, T smoothing, int64_t count, T* __restrict t) {
  for (int64_t i = 0; i < count; ++i) {
    t[i] = coefficient(probabilities[i], weight[i], kept, smoothing);
  }
}

// In double, so that what large logits have in common cancels later.
template <typename T>
[[gnu::noinline]] void products(const T* __restrict a, const T* __restrict b, int64_t count,
                                double* __restrict product) {
  for (int64_t i = 0; i < count; ++i) {
    product[i] = static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
}

// sum += t, dot += t * x
template <typename T>
[[gnu::noinline]] void accumulate(const T* __restrict t, const T* __restrict x, int64_t count,
                                  double* __restrict sum, double* __restrict dot) {
  for (int64_t i = 0; i < count; ++i) {
    const double coefficient = static_cast<double>(t[i]);
    sum[i] += coefficient;
    dot[i] += coefficient * static_cast<double>(x[i]);
  }
}

// What is known of a tile of samples once their logits were read.
template <typename T>
struct Sums {
  Tile<T> m, log_sum;         // log_sum_exp = m + log_sum
  Tile<T> logit, weight;      // of the target class: weight 0 without one
  Tile<T> counts;             // 0 where ignored, else 1
  Tile<double> sum_t, dot_t;  // of the other coefficients, and of them and the logits
};

template <typename T>
[[gnu::noinline]] void finish(const Sums<T>& sums, int64_t count, T* __restrict losses,
                              double* __restrict log_sum_exp) {
  for (int64_t i = 0; i < count; ++i) {
    const double m = static_cast<double>(sums.m.data[i]);
    const double log_sum = static_cast<double>(sums.log_sum.data[i]);
    const double total = log_sum_exp_of(m, log_sum);
    const double of_target = loss_of_target(static_cast<double>(sums.weight.data[i]),
                                            static_cast<double>(sums.logit.data[i]), m, log_sum);
    const double loss = of_target + (total * sums.sum_t.data[i] - sums.dot_t.data[i]);
    losses[i] = sums.counts.data[i] == T(0) ? T(0) : static_cast<T>(loss);
    log_sum_exp[i] = total;
  }
}

// Of classes of one sample.
template <typename T>
[[gnu::noinline]] void gradients(const T* __restrict x, const T* __restrict t, Scale<T> scale,
                                 int64_t count, T* __restrict grad) {
  for (int64_t i = 0; i < count; ++i)
    grad[i] = scale.gradient(exp_small(scale.exponent(x[i])), t[i]);
}

template <typename T>
struct Scales {
  Tile<T> grad, sum, high, low;

  void put(int64_t i, const Scale<T>& scale) {
    grad.data[i] = scale.grad;
    sum.data[i] = scale.sum;
    high.data[i] = scale.high;
    low.data[i] = scale.low;
  }
  SQLOSS_INLINE Scale<T> get(int64_t i) const {
    Scale<T> scale;
    scale.grad = grad.data[i];
    scale.sum = sum.data[i];
    scale.high = high.data[i];
    scale.low = low.data[i];
    return scale;
  }
};

// Of samples, one class of each.
template <typename T>
[[gnu::noinline]] void gradients(const T* __restrict x, const T* __restrict t,
                                 const Scales<T>& scales, int64_t count, T* __restrict grad) {
  for (int64_t i = 0; i < count; ++i) {
    const Scale<T> scale = scales.get(i);
    const T gradient = scale.gradient(exp_small(scale.exponent(x[i])), t[i]);
    grad[i] = scale.grad == T(0) ? T(0) : gradient;
  }
}

// The same of the gradients of probabilities.
template <typename T>
[[gnu::noinline]] void target_gradients(const T* __restrict x, const T* __restrict weight, T kept,
                                        Scale<T> scale, int64_t count, T* __restrict grad) {
  for (int64_t i = 0; i < count; ++i) grad[i] = scale.target_gradient(x[i], kept * weight[i]);
}
template <typename T>
[[gnu::noinline]] void target_gradients(const T* __restrict x, T factor, const Scales<T>& scales,
                                        int64_t count, T* __restrict grad) {
  for (int64_t i = 0; i < count; ++i) {
    const Scale<T> scale = scales.get(i);
    const T gradient = scale.target_gradient(x[i], factor);
    grad[i] = scale.grad == T(0) ? T(0) : gradient;
  }
}

// --- what the walks share ------------------------------------------------------------------------

// The values at these offsets.
template <typename T>
void gather_at(const Strided& source, const int64_t* offsets, int64_t count, T* values,
               int64_t shift = 0) {
  for_dtype(source.dtype, [&](auto zero) {
    const auto* const from = reinterpret_cast<const decltype(zero)*>(source.at(shift));
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(from[offsets[i]]);
  });
}
template <typename T>
void scatter_at(const T* values, int64_t count, const Strided& target, const int64_t* offsets,
                int64_t shift = 0) {
  for_dtype(target.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* const to = reinterpret_cast<scalar_t*>(target.at(shift));
    for (int64_t i = 0; i < count; ++i) to[offsets[i]] = static_cast<scalar_t>(values[i]);
  });
}

void offsets_of(const Strided& sequence, int64_t begin, int64_t count, int64_t* offsets) {
  const int64_t stride = sequence.strides.back();
  sequence.for_runs(begin, count, [&](int64_t position, int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; ++i) offsets[position + i] = offset + i * stride;
  });
}

// The coefficients t, of the target class and of the others.
template <typename T>
struct Coefficients {
  const Inputs& in;
  double kept, smoothing;
  bool any;           // of classes that are not the target
  double others = 0;  // their sum, where no probabilities are given
  Tile<T> zeros, ones;

  explicit Coefficients(const Inputs& inputs)
      : in(inputs),
        kept(1 - inputs.label_smoothing),
        smoothing(inputs.label_smoothing / static_cast<double>(inputs.classes)),
        any(smoothing > 0 || probabilities()) {
    std::fill_n(zeros.data, kTile, T(0));
    std::fill_n(ones.data, kTile, T(1));
    if (smoothing > 0 && !probabilities()) {
      for (int64_t c = 0; c < in.classes; ++c) others += smoothing * weight(c);
    }
  }

  bool probabilities() const { return in.probabilities.first.data != nullptr; }

  double weight(int64_t c) const {
    return in.weight == nullptr ? 1.0 : static_cast<double>(static_cast<const T*>(in.weight)[c]);
  }

  bool is_ignored(int64_t target) const { return target == in.ignore_index; }

  // Of the sample at this offset of the target.
  int64_t target(int64_t offset) const {
    const int64_t c = *reinterpret_cast<const int64_t*>(in.target.at(offset));
    TORCH_CHECK_INDEX(is_ignored(c) || (0 <= c && c < in.classes), in.function,
                      ": target: expected class indices in [0, ", in.classes, ") or ignore_index (",
                      in.ignore_index, "), got ", c);
    return c;
  }

  // Of at most kTile adjacent classes.
  const T* weights(int64_t c) const {
    return in.weight == nullptr ? ones.data : static_cast<const T*>(in.weight) + c;
  }

  // Of adjacent classes of one sample, the target apart.
  const T* of_classes(const T* probabilities, int64_t c, int64_t count, Tile<T>& buffer) const {
    if (!any) return zeros.data;
    coefficients(probabilities, weights(c), static_cast<T>(kept), static_cast<T>(smoothing), count,
                 buffer.data);
    return buffer.data;
  }

  // Of one class of samples, the target apart.
  const T* of_samples(const T* probabilities, int64_t c, int64_t count, Tile<T>& buffer) const {
    if (!any) return zeros.data;
    coefficients(probabilities, ones.data, static_cast<T>(kept * weight(c)),
                 static_cast<T>(smoothing * weight(c)), count, buffer.data);
    return buffer.data;
  }
};

// --- by sample -----------------------------------------------------------------------------------

// Logits and probabilities of a run of classes of one sample.
template <typename T>
class SampleTiles {
 public:
  const T *input, *t;

  SampleTiles(const Inputs& in, const Coefficients<T>& coefficients)
      : in_(in), coefficients_(coefficients) {}

  void read(int64_t sample, int64_t c, int64_t count) {
    input = read_input(sample, c, count);
    t = read_t(sample, c, count);
  }

  const T* read_input(int64_t sample, int64_t c, int64_t count) {
    return read(in_.input, sample, c, count, buffers_[0]);
  }

  const T* read_t(int64_t sample, int64_t c, int64_t count) {
    const T* const probabilities = coefficients_.probabilities()
                                       ? read(in_.probabilities, sample, c, count, buffers_[1])
                                       : coefficients_.zeros.data;
    return coefficients_.of_classes(probabilities, c, count, buffers_[2]);
  }

 private:
  static const T* read(const Classes& classes, int64_t sample, int64_t c, int64_t count,
                       Tile<T>& buffer) {
    const int64_t offset = classes.first.offset(sample) + c * classes.stride;
    return read_tile<T>(classes.first.at(offset), classes.first.dtype, classes.stride, count,
                        buffer);
  }

  const Inputs& in_;
  const Coefficients<T>& coefficients_;
  Tile<T> buffers_[3];
};

template <typename T>
void forward_by_sample(const Inputs& in, const Coefficients<T>& coefficients, T* losses,
                       double* log_sum_exp) {
  const int64_t grain = std::max<int64_t>(1, kGrain / in.classes);
  at::parallel_for(0, in.samples, grain, [&](int64_t begin, int64_t end) {
    SampleTiles<T> tiles(in, coefficients);
    Tile<T> values;
    Tile<double> logits_by_t;
    Sums<T> sums;  // of the one sample
    for (int64_t sample = begin; sample < end; ++sample) {
      T m = kLowest<T>;
      double sum = 0;
      OrderedSum sum_t, dot_t;
      for (int64_t c = 0; c < in.classes; c += kTile) {
        const int64_t count = std::min(kTile, in.classes - c);
        tiles.read(sample, c, count);
        const T tile_m = maximum(tiles.input, count);
        if (tile_m > m) {
          sum *= exp_small(static_cast<double>(m) - static_cast<double>(tile_m));
          m = tile_m;
        }
        exps(tiles.input, m, count, values.data);
        OrderedSum lanes;
        lanes.add(values.data, count);
        sum += lanes.total();
        if (coefficients.any) {
          sum_t.add(tiles.t, count);
          products(tiles.t, tiles.input, count, logits_by_t.data);
          dot_t.add(logits_by_t.data, count);
        }
      }
      sums.m.data[0] = m;
      sums.log_sum.data[0] = static_cast<T>(log(sum));
      sums.sum_t.data[0] = sum_t.total();
      sums.dot_t.data[0] = dot_t.total();
      sums.counts.data[0] = T(1);
      sums.weight.data[0] = sums.logit.data[0] = T(0);
      if (!coefficients.probabilities()) {
        const int64_t c = coefficients.target(in.target.offset(sample));
        if (coefficients.is_ignored(c)) {
          sums.counts.data[0] = T(0);
        } else {
          const int64_t offset = in.input.first.offset(sample) + c * in.input.stride;
          gather_at(in.input.first, &offset, 1, sums.logit.data);
          sums.weight.data[0] = static_cast<T>(coefficients.kept * coefficients.weight(c));
        }
      }
      finish(sums, 1, losses + sample, log_sum_exp + sample);
    }
  });
}

template <typename T>
void backward_by_sample(const Inputs& in, const Coefficients<T>& coefficients, const T* grad_losses,
                        const double* log_sum_exp, const Classes& grad_input) {
  const int64_t grain = std::max<int64_t>(1, kGrain / in.classes);
  at::parallel_for(0, in.samples, grain, [&](int64_t begin, int64_t end) {
    SampleTiles<T> tiles(in, coefficients);
    Tile<T> buffer;
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t grad_offset = grad_input.first.offset(sample);
      const auto grad_at = [&](int64_t c) {
        return grad_input.first.at(grad_offset + c * grad_input.stride);
      };
      const int64_t target =
          coefficients.probabilities() ? -1 : coefficients.target(in.target.offset(sample));
      const bool has_target = !coefficients.probabilities();
      if (grad_losses[sample] == T(0) || (has_target && coefficients.is_ignored(target))) {
        write_zeros(grad_at(0), grad_input.first.dtype, grad_input.stride, in.classes);
        continue;
      }
      double sum_t = coefficients.others;
      if (has_target) {
        sum_t += coefficients.kept * coefficients.weight(target);
      } else {
        OrderedSum lanes;
        for (int64_t c = 0; c < in.classes; c += kTile) {
          const int64_t count = std::min(kTile, in.classes - c);
          lanes.add(tiles.read_t(sample, c, count), count);
        }
        sum_t = lanes.total();
      }
      const Scale<T> scale(grad_losses[sample], sum_t, log_sum_exp[sample]);
      for (int64_t c = 0; c < in.classes; c += kTile) {
        const int64_t count = std::min(kTile, in.classes - c);
        tiles.read(sample, c, count);
        T* const grad =
            tile_to_write<T>(grad_at(c), grad_input.first.dtype, grad_input.stride, buffer);
        gradients(tiles.input, tiles.t, scale, count, grad);
        if (has_target && c <= target && target < c + count) {
          const T t = static_cast<T>((coefficients.kept + coefficients.smoothing) *
                                     coefficients.weight(target));
          const T softmax = exp_small(scale.exponent(tiles.input[target - c]));
          grad[target - c] = scale.gradient(softmax, t);
        }
        write_tile(grad, grad_at(c), grad_input.first.dtype, grad_input.stride, count);
      }
    }
  });
}

template <typename T>
void target_backward_by_sample(const Inputs& in, const Coefficients<T>& coefficients,
                               const T* grad_losses, const double* log_sum_exp,
                               const Classes& grad_target) {
  const int64_t grain = std::max<int64_t>(1, kGrain / in.classes);
  at::parallel_for(0, in.samples, grain, [&](int64_t begin, int64_t end) {
    SampleTiles<T> tiles(in, coefficients);
    Tile<T> buffer;
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t grad_offset = grad_target.first.offset(sample);
      const auto grad_at = [&](int64_t c) {
        return grad_target.first.at(grad_offset + c * grad_target.stride);
      };
      if (grad_losses[sample] == T(0)) {
        write_zeros(grad_at(0), grad_target.first.dtype, grad_target.stride, in.classes);
        continue;
      }
      const Scale<T> scale(grad_losses[sample], /*sum_t=*/0, log_sum_exp[sample]);
      for (int64_t c = 0; c < in.classes; c += kTile) {
        const int64_t count = std::min(kTile, in.classes - c);
        const T* const x = tiles.read_input(sample, c, count);
        T* const grad =
            tile_to_write<T>(grad_at(c), grad_target.first.dtype, grad_target.stride, buffer);
        target_gradients(x, coefficients.weights(c), static_cast<T>(coefficients.kept), scale,
                         count, grad);
        write_tile(grad, grad_at(c), grad_target.first.dtype, grad_target.stride, count);
      }
    }
  });
}

// --- by class ------------------------------------------------------------------------------------

template <typename T>
void forward_by_class(const Inputs& in, const Coefficients<T>& coefficients, T* losses,
                      double* log_sum_exp) {
  at::parallel_for(0, (in.samples + kTile - 1) / kTile, 1, [&](int64_t from, int64_t to) {
    Tile<T> buffers[3];
    Tile<int64_t> offsets;  // of the target's logits
    Sums<T> sums;
    std::fill_n(sums.sum_t.data, kTile, 0.0);
    std::fill_n(sums.dot_t.data, kTile, 0.0);
    std::fill_n(sums.counts.data, kTile, T(1));
    std::fill_n(sums.logit.data, kTile, T(0));
    std::fill_n(sums.weight.data, kTile, T(0));
    for (int64_t begin = from * kTile; begin < std::min(to * kTile, in.samples); begin += kTile) {
      const int64_t count = std::min(kTile, in.samples - begin);
      if (coefficients.any) {
        std::fill_n(sums.sum_t.data, count, 0.0);
        std::fill_n(sums.dot_t.data, count, 0.0);
      }
      for (int64_t c = 0; c < in.classes; ++c) {
        const T* const x = read_tile(in.input.first, begin, count, buffers[0], c * in.input.stride);
        if (in.input.stride >= kTile) {
          prefetch_tile(in.input.first, begin, count, (c + 1) * in.input.stride);
        }
        c == 0 ? start(x, count, sums.m.data, sums.log_sum.data)
               : update(x, count, sums.m.data, sums.log_sum.data);
        if (!coefficients.any) continue;
        const T* const probabilities = coefficients.probabilities()
                                           ? read_tile(in.probabilities.first, begin, count,
                                                       buffers[1], c * in.probabilities.stride)
                                           : coefficients.zeros.data;
        const T* const t = coefficients.of_samples(probabilities, c, count, buffers[2]);
        accumulate(t, x, count, sums.sum_t.data, sums.dot_t.data);
      }
      logs(sums.log_sum.data, count);

      if (!coefficients.probabilities()) {
        offsets_of(in.input.first, begin, count, offsets.data);
        const int64_t stride = in.target.strides.back();
        in.target.for_runs(begin, count, [&](int64_t position, int64_t offset, int64_t run) {
          for (int64_t i = 0; i < run; ++i) {
            const int64_t c = coefficients.target(offset + i * stride);
            const bool counts = !coefficients.is_ignored(c);
            offsets.data[position + i] += counts ? c * in.input.stride : 0;
            sums.counts.data[position + i] = static_cast<T>(counts);
            sums.weight.data[position + i] =
                counts ? static_cast<T>(coefficients.kept * coefficients.weight(c)) : T(0);
          }
        });
        gather_at(in.input.first, offsets.data, count, sums.logit.data);
      }
      finish(sums, count, losses + begin, log_sum_exp + begin);
    }
  });
}

// Zeros for all classes of `count` samples.
void write_zeros(const Classes& target, int64_t classes, int64_t begin, int64_t count) {
  const Strided& first = target.first;
  if (target.stride == 1 && first.sizes.size() == 1 && first.strides.back() == classes) {
    core::CPU_CAPABILITY::write_zeros(first.at(begin * classes), first.dtype, 1, count * classes);
    return;
  }
  for (int64_t c = 0; c < classes; ++c) {
    core::CPU_CAPABILITY::write_zeros(first, begin, count, c * target.stride);
  }
}

// Which samples of a tile have a gradient. Where they are at most half of it they are picked out;
// else the others come along, with a gradient of 0.
struct Tail {
  int64_t begin, size;  // of the tile
  int64_t count;        // of the samples dealt with, at these positions in the tile
  bool picked;
  Tile<int64_t> positions;

  template <typename F>
  void find(int64_t tile_begin, int64_t tile_size, const F& has_gradient) {
    begin = tile_begin;
    size = tile_size;
    count = 0;
    for (int64_t i = 0; i < size; ++i) {
      positions.data[count] = i;
      count += has_gradient(i);
    }
    picked = count <= size / 2;
    if (picked) return;
    count = size;
    std::iota(positions.data, positions.data + size, 0);
  }
};

// The numbers of the tail's samples, one class of each at a time.
class Columns {
 public:
  explicit Columns(const Classes& classes) : classes_(classes) {}

  void point_at(const Tail& tail) {
    Tile<int64_t> all;
    offsets_of(classes_.first, tail.begin, tail.size, all.data);
    for (int64_t j = 0; j < tail.count; ++j) offsets_.data[j] = all.data[tail.positions.data[j]];
  }

  template <typename T>
  const T* read(const Tail& tail, int64_t c, Tile<T>& buffer) const {
    const int64_t shift = c * classes_.stride;
    if (!tail.picked) return read_tile(classes_.first, tail.begin, tail.size, buffer, shift);
    for (int64_t j = 0; j < tail.count; ++j) {  // the next class, which no hardware foresees
      __builtin_prefetch(classes_.first.at(offsets_.data[j] + shift + classes_.stride));
    }
    gather_at(classes_.first, offsets_.data, tail.count, buffer.data, shift);
    return buffer.data;
  }

  // Where to put a class, and put(), which leaves the samples that were not picked.
  template <typename T>
  T* place(const Tail& tail, int64_t c, Tile<T>& buffer) const {
    if (tail.picked) return buffer.data;
    return tile_to_write(classes_.first, tail.begin, tail.size, buffer, c * classes_.stride);
  }
  template <typename T>
  void put(const T* values, const Tail& tail, int64_t c) const {
    const int64_t shift = c * classes_.stride;
    if (tail.picked) {
      scatter_at(values, tail.count, classes_.first, offsets_.data, shift);
    } else {
      write_tile(values, classes_.first, tail.begin, tail.size, shift);
    }
  }

  // The same of a class that each sample has of its own.
  template <typename T>
  void read_each(const Tail& tail, const int64_t* c, Tile<T>& buffer) const {
    const Tile<int64_t> offsets = shifted(tail, c);
    gather_at(classes_.first, offsets.data, tail.count, buffer.data);
  }
  template <typename T>
  void put_each(const T* values, const Tail& tail, const int64_t* c) const {
    const Tile<int64_t> offsets = shifted(tail, c);
    scatter_at(values, tail.count, classes_.first, offsets.data);
  }

 private:
  Tile<int64_t> shifted(const Tail& tail, const int64_t* c) const {
    Tile<int64_t> offsets;
    for (int64_t j = 0; j < tail.count; ++j) {
      offsets.data[j] = offsets_.data[j] + c[j] * classes_.stride;
    }
    return offsets;
  }

  const Classes& classes_;
  Tile<int64_t> offsets_;
};

template <typename T>
void backward_by_class(const Inputs& in, const Coefficients<T>& coefficients, const T* grad_losses,
                       const double* log_sum_exp, const Classes& grad_input) {
  at::parallel_for(0, (in.samples + kTile - 1) / kTile, 1, [&](int64_t from, int64_t to) {
    const bool has_target = !coefficients.probabilities();
    Tile<T> buffers[3], grads, t_of_target;
    Tile<double> sum_t;
    Tile<int64_t> targets;  // -1: ignored
    Tail tail;
    Scales<T> scales;
    Columns input(in.input), probabilities(in.probabilities), gradient(grad_input);
    for (int64_t begin = from * kTile; begin < std::min(to * kTile, in.samples); begin += kTile) {
      const int64_t size = std::min(kTile, in.samples - begin);
      if (has_target) {
        const int64_t stride = in.target.strides.back();
        in.target.for_runs(begin, size, [&](int64_t position, int64_t offset, int64_t run) {
          for (int64_t i = 0; i < run; ++i) {
            const int64_t c = coefficients.target(offset + i * stride);
            targets.data[position + i] = coefficients.is_ignored(c) ? -1 : c;
          }
        });
      }
      tail.find(begin, size, [&](int64_t i) {
        return grad_losses[begin + i] != T(0) && (!has_target || targets.data[i] >= 0);
      });
      if (tail.count == 0) {
        write_zeros(grad_input, in.classes, begin, size);
        continue;
      }
      if (tail.picked) write_zeros(grad_input, in.classes, begin, size);
      input.point_at(tail);
      gradient.point_at(tail);

      const auto read_t = [&](int64_t c) {
        const T* const given =
            has_target ? coefficients.zeros.data : probabilities.read(tail, c, buffers[1]);
        return coefficients.of_samples(given, c, tail.count, buffers[2]);
      };
      std::fill_n(sum_t.data, tail.count, coefficients.others);
      if (!has_target) {
        probabilities.point_at(tail);
        for (int64_t c = 0; c < in.classes; ++c) {
          const T* const t = read_t(c);
          for (int64_t j = 0; j < tail.count; ++j) sum_t.data[j] += static_cast<double>(t[j]);
        }
      }
      for (int64_t j = 0; j < tail.count; ++j) {
        const int64_t i = tail.positions.data[j];
        const bool ignored = has_target && targets.data[i] < 0;
        if (has_target) {
          targets.data[j] = ignored ? 0 : targets.data[i];  // i >= j: not yet overwritten
          const double weight = coefficients.weight(targets.data[j]);
          sum_t.data[j] += coefficients.kept * weight;
          t_of_target.data[j] =
              static_cast<T>((coefficients.kept + coefficients.smoothing) * weight);
        }
        scales.put(j, Scale<T>(ignored ? T(0) : grad_losses[begin + i], sum_t.data[j],
                               log_sum_exp[begin + i]));
      }

      for (int64_t c = 0; c < in.classes; ++c) {
        const T* const x = input.read(tail, c, buffers[0]);
        T* const grad = gradient.place(tail, c, grads);
        gradients(x, read_t(c), scales, tail.count, grad);
        gradient.put(grad, tail, c);
      }
      if (has_target) {  // the class of each sample once more, with its own coefficient
        input.read_each(tail, targets.data, buffers[0]);
        gradients(buffers[0].data, t_of_target.data, scales, tail.count, grads.data);
        gradient.put_each(grads.data, tail, targets.data);
      }
    }
  });
}

template <typename T>
void target_backward_by_class(const Inputs& in, const Coefficients<T>& coefficients,
                              const T* grad_losses, const double* log_sum_exp,
                              const Classes& grad_target) {
  at::parallel_for(0, (in.samples + kTile - 1) / kTile, 1, [&](int64_t from, int64_t to) {
    Tile<T> buffer, grads;
    Tail tail;
    Scales<T> scales;
    Columns input(in.input), gradient(grad_target);
    for (int64_t begin = from * kTile; begin < std::min(to * kTile, in.samples); begin += kTile) {
      const int64_t size = std::min(kTile, in.samples - begin);
      tail.find(begin, size, [&](int64_t i) { return grad_losses[begin + i] != T(0); });
      if (tail.picked) write_zeros(grad_target, in.classes, begin, size);
      if (tail.count == 0) continue;
      input.point_at(tail);
      gradient.point_at(tail);
      for (int64_t j = 0; j < tail.count; ++j) {
        const int64_t i = begin + tail.positions.data[j];
        scales.put(j, Scale<T>(grad_losses[i], /*sum_t=*/0, log_sum_exp[i]));
      }
      for (int64_t c = 0; c < in.classes; ++c) {
        const T* const x = input.read(tail, c, buffer);
        T* const grad = gradient.place(tail, c, grads);
        const auto factor = static_cast<T>(coefficients.kept * coefficients.weight(c));
        target_gradients(x, factor, scales, tail.count, grad);
        gradient.put(grad, tail, c);
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------

template <typename T>
void forward_typed(const Inputs& in, T* losses, double* log_sum_exp) {
  const Coefficients<T> coefficients(in);
  walk_by_sample(in) ? forward_by_sample(in, coefficients, losses, log_sum_exp)
                     : forward_by_class(in, coefficients, losses, log_sum_exp);
}

template <typename T>
void backward_typed(const Inputs& in, const T* grad_losses, const double* log_sum_exp,
                    const Classes& grad_input) {
  const Coefficients<T> coefficients(in);
  walk_by_sample(in) ? backward_by_sample(in, coefficients, grad_losses, log_sum_exp, grad_input)
                     : backward_by_class(in, coefficients, grad_losses, log_sum_exp, grad_input);
}

template <typename T>
void target_backward_typed(const Inputs& in, const T* grad_losses, const double* log_sum_exp,
                           const Classes& grad_target) {
  const Coefficients<T> coefficients(in);
  const auto walk = walk_by_sample(in) ? target_backward_by_sample<T> : target_backward_by_class<T>;
  walk(in, coefficients, grad_losses, log_sum_exp, grad_target);
}

void forward(const Inputs& in, core::Dtype dtype, void* losses, double* log_sum_exp,
             const superquantile::FusedTail*) {
  dtype == core::Dtype::kDouble ? forward_typed(in, static_cast<double*>(losses), log_sum_exp)
                                : forward_typed(in, static_cast<float*>(losses), log_sum_exp);
}

void backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
              const double* log_sum_exp, const Classes& grad_input) {
  dtype == core::Dtype::kDouble
      ? backward_typed(in, static_cast<const double*>(grad_losses), log_sum_exp, grad_input)
      : backward_typed(in, static_cast<const float*>(grad_losses), log_sum_exp, grad_input);
}

void target_backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
                     const double* log_sum_exp, const Classes& grad_target) {
  dtype == core::Dtype::kDouble
      ? target_backward_typed(in, static_cast<const double*>(grad_losses), log_sum_exp, grad_target)
      : target_backward_typed(in, static_cast<const float*>(grad_losses), log_sum_exp, grad_target);
}

}  // namespace

const Kernels kernels{forward, backward, target_backward};

}  // namespace sqloss::cross_entropy_losses::CPU_CAPABILITY
