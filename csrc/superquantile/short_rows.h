// Selection in short rows on the CPU: the thresholds of kLanes rows and the sums above them at
// once, one row in each lane. No branch depends on the losses, and a row costs no call.
//
//   1. Losses become integers in the total order, as many bits wide.
//   2. Batcher's odd-even merge sort orders each lane, the worst loss first; weights move along.
//      Its comparators are the same whatever the losses are.
//   3. The masses, added from the top, reach the target at the threshold: without weights, at the
//      rank that the target rounds up to.
//   4. One pass sums what lies above the threshold and counts what lies at it, from the top: the
//      order of the losses in memory does not matter, nor which rows are neighbours, nor, since
//      every lane is on its own, how many lanes a vector has.
//
// A comparator costs two instructions for each vector. Beyond kShort losses their number, which
// grows like n log^2 n, exceeds what bisection of one row after another takes.
//
// Included by cpu.cpp alone; compiled once per CPU capability, in its namespace.
#pragma once

#include <c10/util/bit_cast.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/inline.h"
#include "core/total_order.h"
#include "superquantile/panel.h"
#include "superquantile/selection.h"

namespace sqloss::superquantile::CPU_CAPABILITY {

constexpr int64_t kShort = kPanel;

// The larger of two goes to `upper`.
struct Comparator {
  uint8_t upper;
  uint8_t lower;
};

struct Comparators {
  std::array<Comparator, 543> list{};
  int64_t size = 0;

  constexpr void add(int64_t upper, int64_t lower) {
    list[size++] = {static_cast<uint8_t>(upper), static_cast<uint8_t>(lower)};
  }
  // Sorts `n` items from `first` on, a power of two. The first half comes first: the list begins
  // with that of half as many items.
  constexpr void sort(int64_t first, int64_t n) {
    if (n < 2) return;
    sort(first, n / 2);
    sort(first + n / 2, n / 2);
    merge(first, n, 1);
  }
  constexpr void merge(int64_t first, int64_t n, int64_t step) {
    if (2 * step >= n) return add(first, first + step);
    merge(first, n, 2 * step);
    merge(first + step, n, 2 * step);
    for (int64_t i = first + step; i + step < first + n; i += 2 * step) add(i, i + step);
  }
};

constexpr Comparators sorting(int64_t n) {
  Comparators comparators;
  comparators.sort(0, n);
  return comparators;
}

inline constexpr Comparators kSorting = sorting(kShort);
static_assert(kSorting.size == static_cast<int64_t>(kSorting.list.size()));

// Those that sort `n` <= kShort items: the same without the ones that reach beyond n, where items
// below all others would lie, which no comparator moves.
inline Comparators comparators_of(int64_t n) {
  const auto rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
  Comparators chosen;
  for (const Comparator& c : kSorting.list) {
    if (c.upper >= rounded) break;  // the first of those that sort the other half
    if (c.lower < n) chosen.list[chosen.size++] = c;
  }
  return chosen;
}

// Signed integers in the total order, which vectors of all capabilities compare: all bits of a
// negative number but the sign flipped; NaN is the largest.
template <typename T>
using SignedKey = std::make_signed_t<ordered_key_t<T>>;

template <typename Key>
SQLOSS_INLINE Key flipped(Key bits) {
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
}
template <typename T>
SQLOSS_INLINE SignedKey<T> to_signed_key(T loss) {
  const T number = loss + T(0);  // never -0
  const auto key = flipped(c10::bit_cast<SignedKey<T>>(number));
  return core::is_nan(number) ? std::numeric_limits<SignedKey<T>>::max() : key;
}
template <typename T>
SQLOSS_INLINE T from_signed_key(SignedKey<T> key) {
  return c10::bit_cast<T>(flipped(key));
}

// Rows side by side, and what each weighs.
template <typename T, typename W>
struct ShortRows {
  Panel<T> losses;      // -inf where they weigh nothing
  Panel<W> weights;     // if weighted
  double kept[kLanes];  // how many count, if not weighted
};

struct ShortTails {
  double total[kLanes];
  double threshold[kLanes];
  double sum[kLanes];  // of mass * loss above
  double above[kLanes];
  double at[kLanes];
};

// The larger keys of two vectors of lanes to the upper ones, with their weights.
template <typename Key, typename W>
SQLOSS_INLINE void compare_exchange(Key* upper, Key* lower, W* upper_weights, W* lower_weights) {
  constexpr int64_t kBytes = 32;
  constexpr int64_t kCount = kBytes / std::max(sizeof(Key), kWeighted<W> ? sizeof(W) : 1);
  using Keys = VectorOf<Key, kCount>;
  for (int64_t lane = 0; lane < kLanes; lane += kCount) {
    const auto a = load<Keys>(upper + lane), b = load<Keys>(lower + lane);
    const Keys exchanged = a < b;
    const Keys larger = exchanged ? b : a, smaller = exchanged ? a : b;
    store(larger, upper + lane);
    store(smaller, lower + lane);
    if constexpr (kWeighted<W>) {
      using Weights = VectorOf<W, kCount>;
      using Mask = VectorOf<std::conditional_t<sizeof(W) == 8, int64_t, int32_t>, kCount>;
      const auto mask = __builtin_convertvector(exchanged, Mask);
      const auto v = load<Weights>(upper_weights + lane), w = load<Weights>(lower_weights + lane);
      const Weights of_larger = mask ? w : v, of_smaller = mask ? v : w;
      store(of_larger, upper_weights + lane);
      store(of_smaller, lower_weights + lane);
    }
  }
}

// The keys of `n` losses of each row, the largest first, with their weights.
template <typename T, typename W = Unweighted>
void to_sorted_keys(const Panel<T>& losses, int64_t n, const Comparators& comparators,
                    Panel<SignedKey<T>>& keys, W* weights = nullptr) {
  for (int64_t i = 0; i < n * kLanes; ++i) keys.data[i] = to_signed_key(losses.data[i]);
  for (int64_t c = 0; c < comparators.size; ++c) {
    const int64_t upper = comparators.list[c].upper * kLanes;
    const int64_t lower = comparators.list[c].lower * kLanes;
    compare_exchange(keys.data + upper, keys.data + lower, kWeighted<W> ? weights + upper : nullptr,
                     kWeighted<W> ? weights + lower : nullptr);
  }
}

// Bounds of the thresholds of longer rows that hold them all but surely, from `size` <= kShort
// losses of each, of which about `share` are in the tail.
template <typename T>
void guess_brackets(const Panel<T>& sample, int64_t size, const Comparators& comparators,
                    double share, Bracket<T> (&brackets)[kLanes]) {
  constexpr double kDeviations = 2.5;  // a wrong guess costs two steps of bisection
  Panel<SignedKey<T>> keys;
  to_sorted_keys(sample, size, comparators, keys);
  const double expected = share * static_cast<double>(size);
  const double margin = kDeviations * std::sqrt(expected * (1 - share)) + 1;
  const auto bound = [&](double rank, int64_t lane, T none) {
    if (rank < 0 || rank >= static_cast<double>(size)) return none;
    const T loss = from_signed_key<T>(keys.data[static_cast<int64_t>(rank) * kLanes + lane]);
    return core::is_nan(loss) ? kInfinity<T> : loss;
  };
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    brackets[lane] = {bound(expected + margin, lane, -kInfinity<T>),
                      bound(expected - margin, lane, kInfinity<T>)};
  }
}

// The tails of rows of `n` losses; find_targets(total weights, what the tails have to weigh).
template <typename T, typename W, typename FindTargets>
ShortTails short_tails(ShortRows<T, W>& rows, int64_t n, const Comparators& comparators,
                       const FindTargets& find_targets) {
  using Key = SignedKey<T>;
  constexpr int64_t kCount = 4;  // lanes of a vector of doubles
  using Doubles = VectorOf<double, kCount>;
  using Keys = VectorOf<Key, kCount>;
  Panel<Key> keys;
  W* const weights = rows.weights.data;
  to_sorted_keys(rows.losses, n, comparators, keys, weights);
  T* const losses = rows.losses.data;
  for (int64_t i = 0; i < n * kLanes; ++i) losses[i] = from_signed_key<T>(keys.data[i]);
  const auto masses = [&](int64_t i) {
    if constexpr (kWeighted<W>) {
      return __builtin_convertvector(load<VectorOf<W, kCount>>(weights + i), Doubles);
    } else {
      return Doubles{1, 1, 1, 1};
    }
  };

  ShortTails tails;
  Key threshold[kLanes];
  double targets[kLanes];
  if constexpr (kWeighted<W>) {
    Panel<double> reached;
    for (int64_t lane = 0; lane < kLanes; lane += kCount) {
      Doubles total{};
      for (int64_t i = lane; i < n * kLanes; i += kLanes) {
        total += masses(i);
        store(total, reached.data + i);
      }
      store(total, tails.total + lane);
    }
    find_targets(tails.total, targets);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int64_t i = lane;
      while (i + kLanes < n * kLanes && !(reached.data[i] >= targets[lane])) i += kLanes;
      threshold[lane] = keys.data[i];
    }
  } else {
    std::copy_n(rows.kept, kLanes, tails.total);
    find_targets(tails.total, targets);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto rank = static_cast<int32_t>(std::ceil(targets[lane]));
      threshold[lane] = keys.data[std::clamp<int64_t>(rank - 1, 0, n - 1) * kLanes + lane];
    }
  }

  for (int64_t lane = 0; lane < kLanes; lane += kCount) {
    const auto bound = load<Keys>(threshold + lane);
    Doubles sum{}, above{}, at{};
    const Doubles none{};
    for (int64_t i = lane; i < n * kLanes; i += kLanes) {
      using Mask = VectorOf<int64_t, kCount>;
      const auto key = load<Keys>(keys.data + i);
      const auto is_above = __builtin_convertvector(key > bound, Mask);
      const auto is_at = __builtin_convertvector(key == bound, Mask);
      const auto loss = __builtin_convertvector(load<VectorOf<T, kCount>>(losses + i), Doubles);
      const Doubles mass = masses(i);
      sum += is_above ? loss * mass : none;
      above += is_above ? mass : none;
      at += is_at ? mass : none;
    }
    store(sum, tails.sum + lane);
    store(above, tails.above + lane);
    store(at, tails.at + lane);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    tails.threshold[lane] = static_cast<double>(from_signed_key<T>(threshold[lane]));
    // Masked losses are -inf and have no mass
    const double rest = tails.total[lane] - tails.above[lane];
    tails.at[lane] = threshold[lane] == to_signed_key(-kInfinity<T>) ? rest : tails.at[lane];
  }
  return tails;
}

}  // namespace sqloss::superquantile::CPU_CAPABILITY
