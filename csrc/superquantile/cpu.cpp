// CPU kernels of the superquantile; compiled once per CPU capability.
//
// forward   selection.h tells the algorithm. Rows are read through tiles that convert, gather and
//           mask on the fly; threads take rows or, where there are fewer rows than threads, chunks
//           of a row.
// backward  one read of the losses, one write of the gradient, by the same tiles.
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/tile.h"
#include "superquantile/selection.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CPU_CAPABILITY {
namespace {

using core::for_dtype;
using core::CPU_CAPABILITY::kTile;
using core::CPU_CAPABILITY::read_tile;
using core::CPU_CAPABILITY::Tile;
using core::CPU_CAPABILITY::tile_to_write;
using core::CPU_CAPABILITY::write_tile;

// An element of a matrix.
const void* at(const Matrix& matrix, int64_t row, int64_t i) {
  const int64_t offset = row * matrix.row_stride + i * matrix.stride;
  return static_cast<const char*>(matrix.data) + offset * at::elementSize(matrix.dtype);
}

// Masks are read as bytes: a bool tensor may hold others than 0 and 1 (a view of uint8, say), which
// C++'s bool must not.
const uint8_t* mask_at(const Matrix& mask, int64_t row, int64_t i) {
  return static_cast<const uint8_t*>(at(mask, row, i));
}

template <typename W>
void check_weights(const W* weights, int64_t count, const Caller& caller) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(weights[i] >= 0 && std::isfinite(weights[i]), caller.function,
                      ": weight: expected finite values >= 0, got ",
                      static_cast<double>(weights[i]));
  }
}

// values[i] = 0 (or what `masked` is) where the mask is False. Returns how many it leaves.
template <typename T>
int64_t apply_mask(const uint8_t* mask, int64_t stride, int64_t count, T* values, T masked) {
  int32_t kept = 0;
  const auto apply = [&](int64_t step) {
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = mask[i * step] != 0;
      values[i] = keep ? values[i] : masked;
      kept += keep;
    }
  };
  stride == 1 ? apply(1) : apply(stride);  // a constant 1 vectorises
  return kept;
}

// The weights of up to kTile losses of a row, 0 where masked: in place or in the buffer.
template <typename W>
const W* read_weights(const Losses& in, int64_t row, int64_t begin, int64_t count,
                      Tile<W>& buffer) {
  const W* weights =
      read_tile<W>(at(in.weight, row, begin), in.weight.dtype, in.weight.stride, count, buffer);
  if (in.mask.data == nullptr) return weights;
  if (weights != buffer.data) std::copy_n(weights, count, buffer.data);
  apply_mask(mask_at(in.mask, row, begin), in.mask.stride, count, buffer.data, W(0));
  return buffer.data;
}

// A row of losses, where they are.
template <typename T, typename W>
class Row {
 public:
  using Loss = T;
  using Weight = W;
  struct Buffer {
    Tile<T> losses;
    Tile<W> weights;
  };

  Row(const Losses& in, int64_t row) : in_(in), row_(row) {}
  int64_t size() const { return in_.n; }

  // The items from `begin` on, as many as there are in one piece before `end`.
  Run<T, W> run_at(int64_t begin, int64_t end, Buffer& buffer) const {
    const int64_t whole_blocks = (end - begin) / kLanes * kLanes;
    const bool in_place = in_.losses.dtype == c10::CppTypeToScalarType<T>::value &&
                          in_.losses.stride == 1 && in_.mask.data == nullptr && !kWeighted<W>;
    if (in_place && whole_blocks > 0) {
      const auto* losses = static_cast<const T*>(at(in_.losses, row_, begin));
      return {losses, nullptr, whole_blocks, whole_blocks};
    }
    const int64_t count = std::min(kTile, end - begin);
    return read(begin, count, buffer);
  }

  // The whole row, of any size: in place, or read into `room`.
  Run<T, W> whole(Items<T, W>& room) const {
    Buffer buffer;
    Run<T, W> run = run_at(0, size(), buffer);
    const bool in_place =
        run.losses != buffer.losses.data && (!kWeighted<W> || run.weights != buffer.weights.data);
    if (run.positions == size() && in_place) return run;
    room.reserve(size());
    int64_t kept = 0;
    for (int64_t begin = 0; begin < size(); begin += run.positions) {
      run = run_at(begin, size(), buffer);
      std::copy_n(run.losses, run.positions, room.losses.data() + begin);
      if (kWeighted<W>) std::copy_n(run.weights, run.positions, room.weights.data() + begin);
      kept += run.kept;
    }
    room.size = size();
    run = room.run();
    run.kept = kept;
    return run;
  }

  // Those of `size` positions whose losses count.
  void sample(const int64_t* positions, int64_t size, Items<T, W>& items) const {
    T* losses = items.losses.data();
    for_dtype(in_.losses.dtype, [&](auto zero) {
      const auto* row = static_cast<const decltype(zero)*>(at(in_.losses, row_, 0));
      const int64_t stride = in_.losses.stride;
      for (int64_t i = 0; i < size; ++i) losses[i] = static_cast<T>(row[positions[i] * stride]);
    });
    if constexpr (kWeighted<W>) {
      W* weights = items.weights.data();
      for_dtype(in_.weight.dtype, [&](auto zero) {
        const auto* row = static_cast<const decltype(zero)*>(at(in_.weight, row_, 0));
        const int64_t stride = in_.weight.stride;
        for (int64_t i = 0; i < size; ++i) {
          weights[i] = static_cast<W>(row[positions[i] * stride]);
        }
      });
    }
    items.size = size;
    if (in_.mask.data != nullptr) drop_masked(positions, items);
    if constexpr (kWeighted<W>) {
      check_weights(items.weights.data(), items.size, in_.caller);
    }
  }

 private:
  void drop_masked(const int64_t* positions, Items<T, W>& items) const {
    T* losses = items.losses.data();
    W* weights = items.weights.data();
    const auto* mask = mask_at(in_.mask, row_, 0);
    int64_t kept = 0;
    for (int64_t i = 0; i < items.size; ++i) {
      losses[kept] = losses[i];
      if constexpr (kWeighted<W>) weights[kept] = weights[i];
      kept += mask[positions[i] * in_.mask.stride] != 0;
    }
    items.size = kept;
  }

  // In place where nothing has to change. Losses of no weight become -inf, so that their product
  // with it is never added.
  Run<T, W> read(int64_t begin, int64_t count, Buffer& buffer) const {
    const T* losses = read_tile<T>(at(in_.losses, row_, begin), in_.losses.dtype, in_.losses.stride,
                                   count, buffer.losses);
    const W* weights = nullptr;
    bool some_weigh_nothing = false;
    if constexpr (kWeighted<W>) {
      weights = read_weights(in_, row_, begin, count, buffer.weights);
      if (count % kLanes != 0) weights = padded(weights, count, buffer.weights, W(0));
      some_weigh_nothing = some_are_zero(weights, count);
    }
    const bool masked = !kWeighted<W> && in_.mask.data != nullptr;
    if (count % kLanes != 0 || masked || some_weigh_nothing) {
      losses = padded(losses, count, buffer.losses, -kInfinity<T>);
    }
    int64_t kept = count;
    T* l = buffer.losses.data;
    if constexpr (kWeighted<W>) {
      for (int64_t i = 0; i < (some_weigh_nothing ? count : 0); ++i) {
        l[i] = weights[i] > 0 ? l[i] : -kInfinity<T>;
      }
    } else if (masked) {
      kept = apply_mask(mask_at(in_.mask, row_, begin), in_.mask.stride, count, l, -kInfinity<T>);
    }
    return {losses, weights, count, kept};
  }

  // The numbers in the buffer, followed by a block of `padding`.
  template <typename V>
  static const V* padded(const V* numbers, int64_t count, Tile<V>& buffer, V padding) {
    if (numbers != buffer.data) std::copy_n(numbers, count, buffer.data);
    std::fill_n(buffer.data + count, kLanes, padding);
    return buffer.data;
  }

  // Whether some are 0; raises for those that are no weights. By their bits, which order as the
  // numbers do, with all negative ones and NaN above +inf.
  bool some_are_zero(const W* weights, int64_t count) const {
    using Bits = std::conditional_t<sizeof(W) == 8, uint64_t, uint32_t>;
    Bits least = ~Bits(0), largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = c10::bit_cast<Bits>(weights[i]);
      least = std::min(least, bits);
      largest = std::max(largest, bits);
    }
    if (largest < c10::bit_cast<Bits>(kInfinity<W>)) return least == 0;
    check_weights(weights, count, in_.caller);
    return true;  // -0
  }

  const Losses& in_;
  int64_t row_;
};

template <typename T, typename W>
Result tail_of(const Losses& in, int64_t row, double tail_fraction) {
  // With weights, the sums that reach k are rounded as well
  const double rounding =
      kAlphaRounding + (kWeighted<W> ? static_cast<double>(in.n) * kSumRounding : 0.0);
  const auto target = [&](double total) {
    TORCH_CHECK_VALUE(std::isfinite(total), in.caller.function,
                      ": weight: expected a finite sum in every reduction, got ", total);
    TORCH_CHECK_VALUE(total > 0, in.caller.function, ": ", in.caller.none_counts);
    return tail_target(tail_fraction, total, rounding);
  };
  const Tail<T> tail = select(Row<T, W>(in, row), tail_fraction, target);
  return tail_result(tail_fraction, tail.total, static_cast<double>(tail.threshold), tail.above,
                     tail.at, tail.sum);
}

template <typename T, typename W>
void forward_rows(const Losses& in, double tail_fraction, const Tails& tails) {
  const auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Result result = tail_of<T, W>(in, r, tail_fraction);
      for_dtype(in.losses.dtype, [&](auto zero) {
        using scalar_t = decltype(zero);
        static_cast<scalar_t*>(tails.value)[r] = static_cast<scalar_t>(result.value);
        static_cast<scalar_t*>(tails.threshold)[r] = static_cast<scalar_t>(result.threshold);
      });
      tails.counts[r] = result.counts;
    }
  };
  // Threads over rows; over the chunks of a row where rows would leave threads without work.
  if (in.rows < at::get_num_threads() && in.n > kChunk) {
    rows(0, in.rows);
  } else {
    at::parallel_for(0, in.rows, std::max<int64_t>(1, kChunk / in.n), rows);
  }
}

// f(loss, weight) of the types that selection and arithmetic are in: float for the halves.
template <typename F>
void for_types(const Losses& in, const F& f) {
  const bool weighted = in.weight.data != nullptr;
  if (in.losses.dtype == at::kDouble) {
    weighted ? f(double(), double()) : f(double(), Unweighted());
  } else if (!weighted) {
    f(float(), Unweighted());
  } else {
    in.weight.dtype == at::kFloat ? f(float(), float()) : f(float(), double());
  }
}

void forward(const Losses& in, const TailFraction& tail_fraction, const Tails& tails) {
  for_types(in, [&](auto loss, auto weight) {
    forward_rows<decltype(loss), decltype(weight)>(in, tail_fraction, tails);
  });
}

// The gradient of losses that count and weigh 1.
template <typename T>
void backward_tile(const T* losses, int64_t count, T threshold, Density density, T* grad) {
  const T above = static_cast<T>(density.above), at = static_cast<T>(density.at);
  if (core::is_nan(threshold)) {
    for (int64_t i = 0; i < count; ++i) grad[i] = core::is_nan(losses[i]) ? at : T(0);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const T reached = losses[i] == threshold ? at : T(0);
    grad[i] = !(losses[i] <= threshold) ? above : reached;
  }
}

// The same times their weights, as doubles. A loss below the threshold, or of weight 0, gets 0
// whatever gradient comes in. Losses at the threshold are rare, and take a loop of their own.
template <typename T, typename W>
void backward_tile(const T* losses, const W* weights, int64_t count, T threshold, Density density,
                   T* grad) {
  const bool nan = core::is_nan(threshold);
  const T bound = nan ? kInfinity<T> : threshold;
  const double above = nan ? density.at : density.above;
  int32_t ties = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T product = static_cast<T>(above * static_cast<double>(weights[i]));
    grad[i] = !(losses[i] <= bound) && weights[i] > 0 ? product : T(0);
    ties |= losses[i] == bound;
  }
  if (nan || ties == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const T product = static_cast<T>(density.at * static_cast<double>(weights[i]));
    grad[i] = losses[i] == bound && weights[i] > 0 ? product : grad[i];
  }
}

double read(const void* data, at::ScalarType dtype, int64_t row) {
  double number = 0;
  if (data == nullptr) return number;
  for_dtype(dtype, [&](auto zero) {
    number = static_cast<double>(static_cast<const decltype(zero)*>(data)[row]);
  });
  return number;
}

template <typename T, typename W>
void backward_rows(const Losses& in, const Tails& tails, const Gradients& gradients,
                   const Matrix& grad_losses) {
  const at::ScalarType dtype = in.losses.dtype;
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kChunk / in.n);
  at::parallel_for(0, in.rows * chunks, grain, [&](int64_t first, int64_t last) {
    Tile<T> losses_room, grad_room;
    Tile<W> weights_room;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / chunks, chunk = task % chunks;
      const T threshold = static_cast<T>(read(tails.threshold, dtype, row));
      const Density density =
          gradient_density(read(gradients.value, dtype, row), read(gradients.threshold, dtype, row),
                           tails.counts[row]);
      const int64_t end = std::min(in.n, (chunk + 1) * kChunk);
      for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
        const int64_t count = std::min(kTile, end - begin);
        const T* losses =
            read_tile(at(in.losses, row, begin), dtype, in.losses.stride, count, losses_room);
        void* target = const_cast<void*>(at(grad_losses, row, begin));
        T* grad = tile_to_write(target, dtype, grad_losses.stride, grad_room);
        if constexpr (kWeighted<W>) {
          const W* weights = read_weights(in, row, begin, count, weights_room);
          backward_tile(losses, weights, count, threshold, density, grad);
        } else {
          backward_tile(losses, count, threshold, density, grad);
          if (in.mask.data != nullptr) {
            apply_mask(mask_at(in.mask, row, begin), in.mask.stride, count, grad, T(0));
          }
        }
        write_tile(grad, target, dtype, grad_losses.stride, count);
      }
    }
  });
}

void backward(const Losses& in, const Tails& tails, const Gradients& gradients,
              const Matrix& grad_losses) {
  for_types(in, [&](auto loss, auto weight) {
    backward_rows<decltype(loss), decltype(weight)>(in, tails, gradients, grad_losses);
  });
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::superquantile::CPU_CAPABILITY
