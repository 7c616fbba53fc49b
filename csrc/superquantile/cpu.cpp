// CPU kernels of the superquantile, one thread per row; compiled once per CPU capability.
//
// forward   gathers the losses that count into scratch (one read), selects the threshold there,
//           then sums and counts against it (one pass over the scratch). Selection is by bisection
//           of the ordered keys for short rows, std::nth_element for long ones, and a sort by loss
//           where weights decide the rank.
// backward  one read of the losses, one write of the gradient.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/total_order.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CPU_CAPABILITY {
namespace {

// Fewer losses than this are not worth another thread (torch's own grain for elementwise work).
constexpr int64_t kGrain = 32768;

int64_t rows_per_task(int64_t n) { return std::max<int64_t>(1, kGrain / n); }

// One row of a Matrix.
template <typename T>
struct Row {
  T* data;
  int64_t stride;

  Row(const Matrix& matrix, int64_t row)
      : data(matrix.data == nullptr ? nullptr
                                    : static_cast<T*>(matrix.data) + row * matrix.row_stride),
        stride(matrix.stride) {}
  T& operator[](int64_t i) const { return data[i * stride]; }
};

// Which losses of a row count: all without a mask. Bytes, because a bool tensor may hold others
// than 0 and 1 (a view of uint8, say), which C++'s bool must not.
struct Mask : Row<const uint8_t> {
  using Row<const uint8_t>::Row;
  bool keeps(int64_t i) const { return data == nullptr || (*this)[i] != 0; }
};

// Selection and arithmetic of a dtype: itself, or float for the halves.
template <typename scalar_t>
using loss_t = at::opmath_type<scalar_t>;

template <typename T>
struct Weighted {
  T loss;
  double weight;
};

struct Tail {
  double value;
  double threshold;
  Counts counts;
};

template <typename T>
T loss_of(T loss) {
  return loss;
}
template <typename T>
T loss_of(const Weighted<T>& item) {
  return item.loss;
}
template <typename T>
double weight_of(T) {
  return 1.0;
}
template <typename T>
double weight_of(const Weighted<T>& item) {
  return item.weight;
}

// Sums and counts the items against the threshold, kLanes independent partial sums at a time: the
// order of additions is the same for every vector width.
template <typename Item, typename T>
Tail tail_at(const Item* items, int64_t count, T threshold, double k) {
  constexpr int64_t kLanes = 16;
  double sum[kLanes] = {}, above[kLanes] = {}, at[kLanes] = {};
  const auto add = [&](const Item& item, int64_t lane) {
    const T loss = loss_of(item);
    const double weight = weight_of(item);
    const bool is_above = core::above(loss, threshold);
    above[lane] += is_above ? weight : 0.0;
    sum[lane] += is_above ? weight * static_cast<double>(loss) : 0.0;
    at[lane] += core::compare(loss, threshold) == 0 ? weight : 0.0;
  };
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(items[i + lane], lane);
  }
  for (int64_t i = whole; i < count; ++i) add(items[i], i - whole);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      sum[lane] += sum[lane + half];
      above[lane] += above[lane + half];
      at[lane] += at[lane + half];
    }
  }
  // The threshold was reached, so that a larger k is rounding; as is a smaller one than above.
  const Counts counts{above[0], at[0], std::clamp(k, above[0], above[0] + at[0])};
  const double t = static_cast<double>(threshold);
  const double rest = counts.tail - counts.above;
  double value = (sum[0] + (rest > 0 ? rest * t : 0.0)) / counts.tail;  // not 0 * -inf
  if (counts.above == 0) value = t;  // the tail is the threshold alone: the maximum, exactly
  if (sum[0] == std::numeric_limits<double>::infinity()) value = sum[0];  // even with t = -inf
  return {value, t, counts};
}

// The largest key that at least `rank` keys reach: settles one bit of it in a pass, from the top.
// A pass is a vectorised count without branches, so that no order of the losses can be slow, where
// nth_element mispredicts on every fresh sample.
template <typename Key>
Key bisect(const Key* keys, int64_t count, int64_t rank) {
  Key found = 0;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
    const Key trial = found | bit;
    Key reached = 0;  // of the width of the keys, for full vectors; count fits
    for (int64_t i = 0; i < count; ++i) reached += keys[i] >= trial;
    if (static_cast<int64_t>(reached) >= rank) found = trial;
  }
  return found;
}

// The loss of a rank, 1 the largest. May reorder the losses.
template <typename T>
T loss_of_rank(T* losses, int64_t count, int64_t rank) {
  constexpr int64_t kBisected = 4096;  // 16 KiB of float keys stay in the first-level cache
  if (count > kBisected) {
    std::nth_element(losses, losses + rank - 1, losses + count,
                     [](T a, T b) { return core::above(a, b); });
    return losses[rank - 1];
  }
  core::ordered_key_t<T> keys[kBisected];
  for (int64_t i = 0; i < count; ++i) keys[i] = core::to_ordered_key(losses[i]);
  return core::from_ordered_key<T>(bisect(keys, count, rank));
}

// Every loss weighs 1: the threshold has rank ceil(k).
template <typename T>
Tail select(T* losses, int64_t count, double tail_fraction) {
  const double total = static_cast<double>(count);
  const double k = tail_fraction * total;
  const double rank = std::ceil(k - total * kAlphaRounding);
  const T threshold =
      loss_of_rank(losses, count, std::clamp<int64_t>(static_cast<int64_t>(rank), 1, count));
  return tail_at(losses, count, threshold, k);
}

// From the top, the threshold is the first loss at which the weight reaches k.
template <typename T>
Tail select(Weighted<T>* items, int64_t count, double tail_fraction) {
  std::sort(items, items + count,
            [](const Weighted<T>& a, const Weighted<T>& b) { return core::above(a.loss, b.loss); });
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += items[i].weight;
  TORCH_CHECK_VALUE(std::isfinite(total),
                    "superquantile: weight: expected a finite sum in every reduction, got ", total);
  const double k = tail_fraction * total;
  const double rounding = total * (kAlphaRounding + static_cast<double>(count) * kSumRounding);
  double reached = 0;
  int64_t index = 0;
  while (index < count - 1 && (reached += items[index].weight) < k - rounding) ++index;
  return tail_at(items, count, items[index].loss, k);
}

template <typename scalar_t>
void put(const Tail& tail, const Tails& tails, int64_t row) {
  static_cast<scalar_t*>(tails.value)[row] = static_cast<scalar_t>(tail.value);
  static_cast<scalar_t*>(tails.threshold)[row] = static_cast<scalar_t>(tail.threshold);
  tails.counts[row] = tail.counts;
}

template <typename scalar_t>
void forward_unweighted(const Losses& in, double tail_fraction, const Tails& tails) {
  using T = loss_t<scalar_t>;
  at::parallel_for(0, in.rows, rows_per_task(in.n), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[in.n]);
    for (const int64_t r : c10::irange(begin, end)) {
      const Row<const scalar_t> losses(in.losses, r);
      const Mask mask(in.mask, r);
      int64_t count = 0;
      for (const int64_t i : c10::irange(in.n)) {
        scratch[count] = static_cast<T>(losses[i]) + T(0);  // + 0: a threshold of -0 reads 0
        count += mask.keeps(i);
      }
      TORCH_CHECK_VALUE(count > 0,
                        "superquantile: weight, mask: expected a positive sum of weights in every "
                        "reduction, got 0");
      put<scalar_t>(select(scratch.get(), count, tail_fraction), tails, r);
    }
  });
}

template <typename scalar_t, typename weight_t>
void forward_weighted(const Losses& in, double tail_fraction, const Tails& tails) {
  using T = loss_t<scalar_t>;
  at::parallel_for(0, in.rows, rows_per_task(in.n), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Weighted<T>[]> scratch(new Weighted<T>[in.n]);
    for (const int64_t r : c10::irange(begin, end)) {
      const Row<const scalar_t> losses(in.losses, r);
      const Row<const weight_t> weight(in.weight, r);
      const Mask mask(in.mask, r);
      int64_t count = 0;
      for (const int64_t i : c10::irange(in.n)) {
        const double w = mask.keeps(i) ? static_cast<double>(weight[i]) : 0.0;
        TORCH_CHECK_VALUE(w >= 0 && std::isfinite(w),
                          "superquantile: weight: expected finite values >= 0, got ", w);
        scratch[count] = {static_cast<T>(losses[i]) + T(0), w};
        count += w > 0;
      }
      TORCH_CHECK_VALUE(count > 0,
                        "superquantile: weight, mask: expected a positive sum of weights in every "
                        "reduction, got 0");
      put<scalar_t>(select(scratch.get(), count, tail_fraction), tails, r);
    }
  });
}

void forward(const Losses& in, double tail_fraction, const Tails& tails) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.losses.dtype, "superquantile", [&] {
    if (in.weight.data == nullptr) {
      forward_unweighted<scalar_t>(in, tail_fraction, tails);
    } else if (in.weight.dtype == at::kFloat) {
      forward_weighted<scalar_t, float>(in, tail_fraction, tails);
    } else {
      forward_weighted<scalar_t, double>(in, tail_fraction, tails);
    }
  });
}

// Every loss of the row counts and weighs 1. kStride 1 is a constant, so that the loop vectorises.
template <typename scalar_t, int64_t kStride>
void backward_row(const Losses& in, int64_t r, loss_t<scalar_t> threshold, Density density,
                  const Row<scalar_t>& grad) {
  using T = loss_t<scalar_t>;
  const Row<const scalar_t> losses(in.losses, r);
  const int64_t stride = kStride == 1 ? 1 : losses.stride;
  const int64_t grad_stride = kStride == 1 ? 1 : grad.stride;
  const scalar_t above = static_cast<scalar_t>(density.above);
  const scalar_t at = static_cast<scalar_t>(density.at);
  for (int64_t i = 0; i < in.n; ++i) {
    const T loss = static_cast<T>(losses.data[i * stride]);
    const scalar_t below = core::compare(loss, threshold) == 0 ? at : scalar_t(0);
    grad.data[i * grad_stride] = core::above(loss, threshold) ? above : below;
  }
}

// weight_at(i): the weight of loss i
template <typename scalar_t, typename Weight>
void backward_row(const Losses& in, int64_t r, loss_t<scalar_t> threshold, Density density,
                  const Row<scalar_t>& grad, const Weight& weight_at) {
  using T = loss_t<scalar_t>;
  const Row<const scalar_t> losses(in.losses, r);
  const Mask mask(in.mask, r);
  for (const int64_t i : c10::irange(in.n)) {
    const int order = core::compare(static_cast<T>(losses[i]), threshold);
    const double d = order > 0 ? density.above : density.at;
    const double w = mask.keeps(i) ? weight_at(i) : 0.0;
    // No product outside of the tail: 0 whatever gradient comes in
    grad[i] = static_cast<scalar_t>(order >= 0 && w > 0 ? d * w : 0.0);
  }
}

template <typename scalar_t>
double read(const void* data, int64_t row) {
  return data == nullptr ? 0.0 : static_cast<double>(static_cast<const scalar_t*>(data)[row]);
}

template <typename scalar_t>
void backward_typed(const Losses& in, const Tails& tails, const Gradients& gradients,
                    const Matrix& grad_losses) {
  at::parallel_for(0, in.rows, rows_per_task(in.n), [&](int64_t begin, int64_t end) {
    for (const int64_t r : c10::irange(begin, end)) {
      const auto threshold =
          static_cast<loss_t<scalar_t>>(static_cast<const scalar_t*>(tails.threshold)[r]);
      const Density density =
          gradient_density(read<scalar_t>(gradients.value, r),
                           read<scalar_t>(gradients.threshold, r), tails.counts[r]);
      const Row<scalar_t> grad(grad_losses, r);
      if (in.weight.data == nullptr && in.mask.data == nullptr) {
        if (in.losses.stride == 1 && grad.stride == 1) {
          backward_row<scalar_t, 1>(in, r, threshold, density, grad);
        } else {
          backward_row<scalar_t, 0>(in, r, threshold, density, grad);
        }
      } else if (in.weight.data == nullptr) {
        backward_row<scalar_t>(in, r, threshold, density, grad, [](int64_t) { return 1.0; });
      } else if (in.weight.dtype == at::kFloat) {
        const Row<const float> weight(in.weight, r);
        backward_row<scalar_t>(in, r, threshold, density, grad,
                               [&](int64_t i) { return static_cast<double>(weight[i]); });
      } else {
        const Row<const double> weight(in.weight, r);
        backward_row<scalar_t>(in, r, threshold, density, grad,
                               [&](int64_t i) { return weight[i]; });
      }
    }
  });
}

void backward(const Losses& in, const Tails& tails, const Gradients& gradients,
              const Matrix& grad_losses) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.losses.dtype, "superquantile_backward",
      [&] { backward_typed<scalar_t>(in, tails, gradients, grad_losses); });
}

}  // namespace

const CpuKernels kernels{forward, backward};

}  // namespace sqloss::superquantile::CPU_CAPABILITY
