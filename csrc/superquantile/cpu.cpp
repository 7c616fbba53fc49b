// CPU kernels of the superquantile; compiled once per CPU capability.
//
// forward   short rows, up to kShort losses: short_rows.h tells the algorithm, for sixteen at once.
//           Longer ones: selection.h. Rows are read through tiles that convert, gather and mask on
//           the fly; threads take rows or, where there are fewer rows than threads, chunks of a
//           row. Rows in cache are taken by sixteen: a sample of each, sorted like short rows,
//           gives its selection a first guess; rows that lie side by side in memory are transposed
//           first.
// backward  one read of the losses, one write of the gradient, by the same tiles: of one row or,
//           where rows are few losses long or lie side by side, of one loss each of many rows.
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "core/inline.h"
#include "core/tile.h"
#include "superquantile/panel.h"
#include "superquantile/selection.h"
#include "superquantile/short_rows.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CPU_CAPABILITY {
namespace {

using core::CPU_CAPABILITY::kTile;
using core::CPU_CAPABILITY::read_tile;
using core::CPU_CAPABILITY::Tile;
using core::CPU_CAPABILITY::tile_to_write;
using core::CPU_CAPABILITY::write_tile;

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
    const bool in_place = in_.losses.dtype == core::kDtypeOf<T> && in_.losses.stride == 1 &&
                          in_.mask.data == nullptr && !kWeighted<W>;
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

// Raises where the weights of some rows add up to nothing or to infinity.
void check_totals(const Losses& in, const double* totals, int64_t rows) {
  bool valid = true;
  for (int64_t r = 0; r < rows; ++r) valid &= totals[r] > 0 && totals[r] < kInfinity<double>;
  for (int64_t r = 0; r < (valid ? 0 : rows); ++r) {
    TORCH_CHECK_VALUE(std::isfinite(totals[r]), in.caller.function,
                      ": weight: expected a finite sum in every reduction, got ", totals[r]);
    TORCH_CHECK_VALUE(totals[r] > 0, in.caller.function, ": ", in.caller.none_counts);
  }
}

// How far sums that reach k can be off, as a share of the total: with weights they are rounded,
// too.
template <typename W>
double rounding_of(const Losses& in) {
  return kAlphaRounding + (kWeighted<W> ? static_cast<double>(in.n) * kSumRounding : 0.0);
}

// The results of up to kLanes adjacent rows.
struct Results {
  double value[kLanes];
  double threshold[kLanes];
  double above[kLanes];
  double at[kLanes];
  double tail[kLanes];

  SQLOSS_INLINE void set(int64_t r, const Result& result) {
    value[r] = result.value;
    threshold[r] = result.threshold;
    above[r] = result.counts.above;
    at[r] = result.counts.at;
    tail[r] = result.counts.tail;
  }

  void write(const Tails& tails, core::Dtype dtype, int64_t row, int64_t rows) const {
    for_dtype(dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      auto* const values = static_cast<scalar_t*>(tails.value) + row;
      auto* const thresholds = static_cast<scalar_t*>(tails.threshold) + row;
      const auto write = [&](int64_t size) {
        for (int64_t r = 0; r < size; ++r) values[r] = static_cast<scalar_t>(value[r]);
        for (int64_t r = 0; r < size; ++r) thresholds[r] = static_cast<scalar_t>(threshold[r]);
      };
      rows == kLanes ? write(kLanes) : write(rows);  // a constant count is whole vectors
    });
    for (int64_t r = 0; r < rows; ++r) tails.counts[row + r] = {above[r], at[r], tail[r]};
  }
};

template <typename T, typename W>
Result tail_of(const Losses& in, int64_t row, double tail_fraction, Bracket<T> guess,
               Room<T, W>& room) {
  const auto target = [&](double total) {
    check_totals(in, &total, 1);
    return tail_target(tail_fraction, total, rounding_of<W>(in));
  };
  const Tail<T> tail = select(Row<T, W>(in, row), tail_fraction, target, guess, room);
  return tail_result(tail_fraction, tail.total, static_cast<double>(tail.threshold), tail.above,
                     tail.at, tail.sum);
}

// The weights of some rows, 0 where masked.
template <typename W>
void read_weights(const Losses& in, int64_t row, int64_t rows, int64_t begin, int64_t count,
                  Panel<W>& weights) {
  read_panel(in.weight, row, rows, begin, count, weights);
  if (in.mask.data == nullptr) return;
  Panel<uint8_t> mask;
  read_panel<uint8_t, uint8_t>(in.mask, row, rows, begin, count, mask.data);
  apply_mask(mask.data, 1, count * kLanes, weights.data, W(0));
}

// Whole rows of up to kShort losses.
template <typename T, typename W>
void read_short_rows(const Losses& in, int64_t row, int64_t rows, ShortRows<T, W>& to) {
  const int64_t size = in.n * kLanes;
  T* const losses = to.losses.data;
  read_panel(in.losses, row, rows, 0, in.n, to.losses);
  if constexpr (kWeighted<W>) {
    W* const weights = to.weights.data;
    read_weights(in, row, rows, 0, in.n, to.weights);
    bool valid = true;
    for (int64_t i = 0; i < size; ++i) valid &= weights[i] >= 0 && weights[i] < kInfinity<W>;
    if (!valid) check_weights(weights, size, in.caller);
    for (int64_t i = 0; i < size; ++i) losses[i] = weights[i] > 0 ? losses[i] : -kInfinity<T>;
  } else if (in.mask.data != nullptr) {
    Panel<uint8_t> mask;
    read_panel<uint8_t, uint8_t>(in.mask, row, rows, 0, in.n, mask.data);
    std::fill_n(to.kept, kLanes, 0.0);
    for (int64_t i = 0; i < size; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool keep = mask.data[i + lane] != 0;
        losses[i + lane] = keep ? losses[i + lane] : -kInfinity<T>;
        to.kept[lane] += keep ? 1.0 : 0.0;
      }
    }
  } else {
    std::fill_n(to.kept, kLanes, static_cast<double>(in.n));
  }
}

template <typename T, typename W>
void forward_short_rows(const Losses& in, double tail_fraction, const Tails& tails) {
  const Comparators comparators = comparators_of(in.n);
  const double rounding = rounding_of<W>(in);
  const int64_t panels = (in.rows + kLanes - 1) / kLanes;
  const int64_t grain = std::max<int64_t>(1, kChunk / (in.n * kLanes));
  at::parallel_for(0, panels, grain, [&](int64_t first, int64_t last) {
    ShortRows<T, W> side_by_side;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t row = panel * kLanes, rows = std::min(kLanes, in.rows - row);
      read_short_rows(in, row, rows, side_by_side);
      const auto targets = [&](const double* totals, double* targets) {
        check_totals(in, totals, rows);
        for (int64_t r = 0; r < kLanes; ++r) {
          targets[r] = tail_target(tail_fraction, totals[r], rounding);
        }
      };
      const ShortTails found = short_tails(side_by_side, in.n, comparators, targets);
      Results results;
      for (int64_t r = 0; r < kLanes; ++r) {
        results.set(r, tail_result(tail_fraction, found.total[r], found.threshold[r],
                                   found.above[r], found.at[r], found.sum[r]));
      }
      results.write(tails, in.losses.dtype, row, rows);
    }
  });
}

// Guesses the brackets of the thresholds of kLanes rows in cache from the same positions of each.
template <typename T>
class Guess {
 public:
  Guess(int64_t n, double tail_fraction)
      : share_(tail_fraction), comparators_(comparators_of(kSample)) {
    for (int64_t i = 0; i < kSample; ++i) positions_[i] = sampled_position(i, kSample, n);
  }

  void brackets(const Losses& in, int64_t row, int64_t rows, Bracket<T> (&brackets)[kLanes]) const {
    Panel<T> sample;
    if (rows < kLanes) std::fill_n(sample.data, kSample * kLanes, T(0));
    for_dtype(in.losses.dtype, [&](auto zero) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* losses = static_cast<const decltype(zero)*>(at(in.losses, row + r, 0));
        for (int64_t i = 0; i < kSample; ++i) {
          sample.data[i * kLanes + r] = static_cast<T>(losses[positions_[i] * in.losses.stride]);
        }
      }
    });
    guess_brackets(sample, kSample, comparators_, share_, brackets);
  }

 private:
  static constexpr int64_t kSample = kShort;

  double share_;
  Comparators comparators_;
  int64_t positions_[kSample];
};

// Copies of up to kLanes rows, each in one piece.
template <typename T, typename W>
class RowsInOnePiece {
 public:
  Losses copy(const Losses& in, int64_t row, int64_t rows) {
    Losses copies{rows, in.n, {}, {}, {}, in.caller};
    copies.losses = copy<T>(in.losses, row, rows, in.n, losses_);
    if constexpr (kWeighted<W>) copies.weight = copy<W>(in.weight, row, rows, in.n, weights_);
    if (in.mask.data != nullptr) copies.mask = copy<bool>(in.mask, row, rows, in.n, mask_);
    return copies;
  }

 private:
  template <typename V, typename Stored>
  Matrix copy(const Matrix& from, int64_t row, int64_t rows, int64_t n, Scratch<Stored>& room) {
    static_assert(sizeof(V) == sizeof(Stored));
    // Rows of 2^i numbers would lie in few sets of the cache
    const int64_t row_stride = n + kLanes;
    Stored* const copies = room.reserve(kLanes * row_stride);
    Panel<Stored> panel;
    for (int64_t begin = 0; begin < n; begin += kPanel) {
      const int64_t count = std::min(kPanel, n - begin);
      if constexpr (std::is_same_v<V, bool>) {
        read_panel<Stored, Stored>(from, row, rows, begin, count, panel.data);
      } else {
        read_panel(from, row, rows, begin, count, panel);
      }
      for (int64_t r = 0; r < rows; ++r) {
        Stored* const to = copies + r * row_stride + begin;
        for (int64_t i = 0; i < count; ++i) to[i] = panel.data[i * kLanes + r];
      }
    }
    return {copies, core::kDtypeOf<V>, row_stride, 1};
  }

  Scratch<T> losses_;
  Scratch<std::conditional_t<kWeighted<W>, W, uint8_t>> weights_;
  Scratch<uint8_t> mask_;
};

// Whether the rows of a matrix lie side by side in memory, rather than each in one piece.
bool side_by_side(const Matrix& matrix) { return matrix.row_stride < matrix.stride; }

template <typename T, typename W>
void forward_rows(const Losses& in, double tail_fraction, const Tails& tails) {
  if (in.n <= kShort) return forward_short_rows<T, W>(in, tail_fraction, tails);
  const bool in_cache = in.n <= kInCache;
  // Not worth it for fewer losses; of no use where they weigh unlike each other
  const bool alike = !kWeighted<W> && in.mask.data == nullptr;
  std::optional<Guess<T>> guess;
  if (in_cache && alike && in.rows * in.n >= kInCache) guess.emplace(in.n, tail_fraction);
  const bool gathered = in_cache && side_by_side(in.losses) && in.rows >= kLanes;
  const auto rows = [&](int64_t begin, int64_t end) {
    RowsInOnePiece<T, W> pieces;
    Room<T, W> room;
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t count = std::min(kLanes, end - row);
      const Losses nearby = gathered ? pieces.copy(in, row, count) : in;
      const int64_t first = gathered ? 0 : row;
      Bracket<T> brackets[kLanes];
      if (guess) guess->brackets(nearby, first, count, brackets);
      Results results;
      for (int64_t r = 0; r < count; ++r) {
        results.set(r, tail_of<T, W>(nearby, first + r, tail_fraction, brackets[r], room));
      }
      results.write(tails, in.losses.dtype, row, count);
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
  if (in.losses.dtype == core::Dtype::kDouble) {
    weighted ? f(double(), double()) : f(double(), Unweighted());
  } else if (!weighted) {
    f(float(), Unweighted());
  } else {
    in.weight.dtype == core::Dtype::kFloat ? f(float(), float()) : f(float(), double());
  }
}

void forward(const Losses& in, const TailFraction& tail_fraction, const Tails& tails) {
  for_types(in, [&](auto loss, auto weight) {
    forward_rows<decltype(loss), decltype(weight)>(in, tail_fraction, tails);
  });
}

// What the losses of a row get by their rank, per unit of weight: those above the threshold, which
// is no NaN, those at it; the others get 0.
template <typename T, typename W>
struct Slope {
  using Number = std::conditional_t<kWeighted<W>, double, T>;  // double if weights multiply it
  T threshold;
  Number above, at;
};

// Those of up to kTile adjacent rows.
template <typename T, typename W>
class Slopes {
 public:
  using Number = typename Slope<T, W>::Number;

  void read(const Tails& tails, const Gradients& gradients, core::Dtype dtype, int64_t row,
            int64_t rows) {
    const auto numbers = [&](const void* source, Tile<double>& room) {
      if (source == nullptr) std::fill_n(room.data, rows, 0.0);
      return source == nullptr ? room.data
                               : read_tile(at({const_cast<void*>(source), dtype, 1, 0}, row, 0),
                                           dtype, 1, rows, room);
    };
    const double* const of_value = numbers(gradients.value, of_value_);
    const double* const of_threshold = numbers(gradients.threshold, of_threshold_);
    const double* const thresholds = numbers(tails.threshold, thresholds_);
    T* __restrict threshold = threshold_.data;
    Number* __restrict above = above_.data;
    Number* __restrict at_threshold = at_.data;
    for (int64_t r = 0; r < rows; ++r) {
      const Density density = gradient_density(of_value[r], of_threshold[r], tails.counts[row + r]);
      // Above +inf are the NaNs alone, which a threshold of NaN means
      const bool nan = core::is_nan(thresholds[r]);
      threshold[r] = nan ? kInfinity<T> : static_cast<T>(thresholds[r]);
      above[r] = static_cast<Number>(nan ? density.at : density.above);
      at_threshold[r] = static_cast<Number>(nan ? 0.0 : density.at);
    }
  }

  Slope<T, W> operator[](int64_t r) const {
    return {threshold_.data[r], above_.data[r], at_.data[r]};
  }

 private:
  Tile<double> of_value_, of_threshold_, thresholds_;
  Tile<T> threshold_;
  Tile<Number> above_, at_;
};

// The gradient of `count` losses; slope_of(i) is that of the row of loss i. With weights, a loss
// below the threshold, or of weight 0, gets 0 whatever gradient comes in, and losses at the
// threshold, which are rare in long rows, take a loop of their own.
template <typename T, typename W, typename SlopeOf>
void backward_tile(const T* losses, const W* weights, int64_t count, const SlopeOf& slope_of,
                   T* __restrict grad) {
  if constexpr (kWeighted<W>) {
    const auto product = [&](double density, int64_t i) {
      return static_cast<T>(density * static_cast<double>(weights[i]));
    };
    int32_t ties = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Slope<T, W> slope = slope_of(i);
      const T above = product(slope.above, i);
      grad[i] = !(losses[i] <= slope.threshold) && weights[i] > 0 ? above : T(0);
      ties |= losses[i] == slope.threshold;
    }
    for (int64_t i = 0; i < (ties ? count : 0); ++i) {
      const Slope<T, W> slope = slope_of(i);
      const T at = product(slope.at, i);
      grad[i] = losses[i] == slope.threshold && weights[i] > 0 ? at : grad[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const Slope<T, W> slope = slope_of(i);
      const T reached = losses[i] == slope.threshold ? slope.at : T(0);
      grad[i] = !(losses[i] <= slope.threshold) ? slope.above : reached;
    }
  }
}

// Reads and writes tiles of rows.
template <typename T, typename W>
class BackwardTiles {
 public:
  BackwardTiles(const Losses& in, const Matrix& grad_losses) : in_(in), grad_losses_(grad_losses) {}

  // Up to kTile losses of a row.
  template <typename SlopeOf>
  void write(int64_t row, int64_t begin, int64_t count, const SlopeOf& slope_of) {
    const Matrix& from = in_.losses;
    const T* losses = read_tile(at(from, row, begin), from.dtype, from.stride, count, losses_);
    void* target = const_cast<void*>(at(grad_losses_, row, begin));
    T* grad = tile_to_write(target, grad_losses_.dtype, grad_losses_.stride, grad_);
    const W* weights = nullptr;
    if constexpr (kWeighted<W>) weights = read_weights(in_, row, begin, count, weights_);
    backward_tile(losses, weights, count, slope_of, grad);
    if (!kWeighted<W> && in_.mask.data != nullptr) {
      apply_mask(mask_at(in_.mask, row, begin), in_.mask.stride, count, grad, T(0));
    }
    write_tile(grad, target, grad_losses_.dtype, grad_losses_.stride, count);
  }

 private:
  Losses in_;
  Matrix grad_losses_;
  Tile<T> losses_, grad_;
  Tile<W> weights_;
};

template <typename T, typename W>
void backward_rows(const Losses& in, const Tails& tails, const Gradients& gradients,
                   const Matrix& grad_losses) {
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kChunk / in.n);
  at::parallel_for(0, in.rows * chunks, grain, [&](int64_t first, int64_t last) {
    BackwardTiles<T, W> tiles(in, grad_losses);
    Slopes<T, W> slopes;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / chunks, chunk = task % chunks;
      slopes.read(tails, gradients, in.losses.dtype, row, 1);
      const int64_t end = std::min(in.n, (chunk + 1) * kChunk);
      for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
        tiles.write(row, begin, std::min(kTile, end - begin),
                    [slope = slopes[0]](int64_t) { return slope; });
      }
    }
  });
}

// The same by tiles of one loss each of many rows.
template <typename T, typename W>
void backward_columns(const Losses& in, const Tails& tails, const Gradients& gradients,
                      const Matrix& grad_losses) {
  constexpr int64_t kPositions = 128;  // share the slopes of their rows
  // Rows that lie one after the other must not fall out of the first-level cache between two
  const int64_t width = side_by_side(grad_losses) ? kTile : kTile / 8;
  const auto transposed = [](const Matrix& m) {
    return Matrix{m.data, m.dtype, m.stride, m.row_stride};
  };
  const Losses columns{
      in.n, in.rows, transposed(in.losses), transposed(in.weight), transposed(in.mask), in.caller};
  const int64_t strips = (in.rows + width - 1) / width;
  const int64_t chunks = (in.n + kPositions - 1) / kPositions;
  const int64_t grain = std::max<int64_t>(1, kChunk / (width * std::min(in.n, kPositions)));
  at::parallel_for(0, strips * chunks, grain, [&](int64_t first, int64_t last) {
    BackwardTiles<T, W> tiles(columns, transposed(grad_losses));
    Slopes<T, W> slopes;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task % strips * width, rows = std::min(width, in.rows - row);
      slopes.read(tails, gradients, in.losses.dtype, row, rows);
      const int64_t begin = task / strips * kPositions;
      for (int64_t i = begin; i < std::min(in.n, begin + kPositions); ++i) {
        tiles.write(i, row, rows, [&](int64_t r) { return slopes[r]; });
      }
    }
  });
}

void backward(const Losses& in, const Tails& tails, const Gradients& gradients,
              const Matrix& grad_losses) {
  constexpr int64_t kFewLosses = 32;  // a row of them is not worth a tile
  const bool by_columns = in.n <= kFewLosses || (side_by_side(grad_losses) && in.rows >= kLanes);
  for_types(in, [&](auto loss, auto weight) {
    using T = decltype(loss);
    using W = decltype(weight);
    by_columns ? backward_columns<T, W>(in, tails, gradients, grad_losses)
               : backward_rows<T, W>(in, tails, gradients, grad_losses);
  });
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::superquantile::CPU_CAPABILITY
