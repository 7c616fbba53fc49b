// The superquantile of rows of losses: what its kernels take and promise.
//
// For losses l with weights w (1 if there are none, 0 where masked) and W = sum w, the tail is the
// worst share `tail_fraction` = 1 - alpha of the weight, k = tail_fraction * W:
//
//   threshold  the largest t such that the losses >= t weigh at least k (the value-at-risk)
//   value      (sum of w * l above t  +  (k - weight above t) * t) / k
//   counts     {weight above t, weight at t, k}
//
// The subgradient in l_i is w_i / k above t, w_i * (k - above) / (k * at) at t, and 0 below.
// Losses rank in the total order of core/total_order.h, NaN above +inf; with +inf and no NaN above
// t the value is +inf, even where t is -inf. k is never rounded; only where it exceeds a
// sum of weights by no more than rounding does (kAlphaRounding and, with weights, that of the sums)
// is it taken for that sum, so that alpha = 0.7 of ten losses is three of them. Sums are in double
// and have the same bits on every repetition: on the CPU in an order that depends on the data
// alone, for any number of threads and capability; on CUDA in one that also depends on the shape of
// the batch and on how much shared memory the kind of GPU has.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <limits>
#include <string_view>

#include "core/dtype.h"
#include "core/kernels.h"

namespace sqloss::superquantile {

// How far alpha in [0, 1) and 1 - alpha can be from the decimal that was meant, as a share of W.
constexpr double kAlphaRounding = 0x1p-52;
// How far a sum of n weights can be from their true sum, as a share of it: n times this.
constexpr double kSumRounding = 0x1p-53;

// A matrix [rows, n] anywhere in memory, strides in elements (0 where expanded).
struct Matrix {
  void* data = nullptr;  // null: absent
  core::Dtype dtype = core::Dtype::kFloat;
  int64_t row_stride = 0;
  int64_t stride = 0;
};

// The public function that was called, as errors on the CPU name it, and what they say of its
// arguments where no loss counts.
constexpr std::string_view kNoneCounts =
    "weight, mask: expected a positive sum of weights in every reduction, got 0";
struct Caller {
  std::string_view function = "superquantile";
  std::string_view none_counts = kNoneCounts;
};

struct Losses {
  int64_t rows;
  int64_t n;  // at least 1
  Matrix losses;
  Matrix weight;  // float or double, or absent
  Matrix mask;    // bool, true: the loss counts; or absent
  Caller caller = {};
};

// {weight above the threshold, weight at it, weight of the tail}
struct Counts {
  double above;
  double at;
  double tail;
};

struct Result {
  double value;
  double threshold;
  Counts counts;
};

// What the losses of a tail have to weigh, out of a total weight. `rounding` is how far the sums
// can be off, as a share of it. Some weight, however small the tail: a normal number where one is
// little enough, since a processor may take denormals for 0.
C10_HOST_DEVICE inline double tail_target(double tail_fraction, double total, double rounding) {
  using Limits = std::numeric_limits<double>;
  const double some = total > Limits::min() ? Limits::min() : Limits::denorm_min();
  const double target = tail_fraction * total - total * rounding;
  return target > some ? target : some;
}

// The tail of losses of weight `total`, with `sum` the weighted sum of the losses above the
// threshold, which was reached: a larger k is rounding, as is a smaller one than above.
C10_HOST_DEVICE inline Result tail_result(double tail_fraction, double total, double threshold,
                                          double above, double at, double sum) {
  const double wanted = tail_fraction * total;
  const double k = wanted < above ? above : (wanted > above + at ? above + at : wanted);
  const double t = threshold + 0.0;  // a threshold of -0 reads 0
  const double rest = k - above;
  double value = (sum + (rest > 0 ? rest * t : 0.0)) / k;  // not 0 * -inf
  if (above == 0) value = t;  // the tail is the threshold alone: the maximum, exactly
  if (sum == std::numeric_limits<double>::infinity()) value = sum;  // even with t = -inf
  return {value, t, {above, at, k}};
}

// One per row. value and threshold have the dtype of the losses.
struct Tails {
  void* value;
  void* threshold;
  Counts* counts;
};

// What a loss gets per unit of its weight.
struct Density {
  double above;
  double at;
};

// The gradient of grad_value * value + grad_threshold * threshold in the losses, per unit of
// weight. The threshold moves with the losses at it, in equal shares.
C10_HOST_DEVICE inline Density gradient_density(double grad_value, double grad_threshold,
                                                const Counts& c) {
  const double share_at = (c.tail - c.above) / c.tail;
  return {grad_value / c.tail, (grad_value * share_at + grad_threshold) / c.at};
}

// Gradients of the outputs, one per row, null where there is none; dtype of the losses.
struct Gradients {
  const void* value;
  const void* threshold;
};

// 1 - alpha, from the host or, as compiled graphs compute it, from the memory of a device, which
// the host does not wait for.
class TailFraction {
 public:
  TailFraction(double known) : known_(known) {}
  explicit TailFraction(const double* on_device) : on_device_(on_device) {}

  bool known() const { return on_device_ == nullptr; }

  // On the host of what is known only.
  C10_HOST_DEVICE operator double() const {
    if (on_device_ == nullptr) return known_;
    // superquantile: tail_fraction: expected a number in (0, 1]
    CUDA_KERNEL_ASSERT(*on_device_ > 0 && *on_device_ <= 1);
    return *on_device_;
  }

 private:
  double known_ = 0;
  const double* on_device_ = nullptr;
};

// The kernels of one CPU capability, or of CUDA: on the current stream of the current device.
// Weights that are no weights are a ValueError, on CUDA a device-side assertion.
struct Kernels {
  void (*forward)(const Losses&, const TailFraction&, const Tails&);
  // Writes every element of grad_losses [rows, n], zeros outside the tail.
  void (*backward)(const Losses&, const Tails&, const Gradients&, const Matrix& grad_losses);
};

SQLOSS_DECLARE_KERNELS

}  // namespace sqloss::superquantile
