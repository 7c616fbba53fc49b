// Selection on the CPU: the threshold of a row and the sum above it, in one read of a long row.
//
// Items are losses with a mass: 1, or their weight. The threshold for a target mass is the largest
// t such that the items >= t hold at least that mass.
//
//   in cache   (up to kInCache items) bisection of the ordered keys, in every other step at the key
//              of an item: a step is one vectorised count without branches, so that no order of the
//              losses is slow; every few steps the items outside the remaining range are dropped,
//              and the last few are each tried. Where there is a guessed bracket, the first read
//              counts what lies above it and keeps what lies in it: the guess changes how long the
//              threshold is looked for, and no bit of the result. Then one pass sums above the
//              threshold.
//   long rows  1. a sample at hashed positions gives a bracket [lo, hi] that holds the threshold
//                 all but surely;
//              2. one read of the row sums and counts what lies above hi, and notes the blocks that
//                 have items in the bracket, ends included. While a group of blocks is in the
//                 first-level cache, those noted are read again: ties with hi are counted, and the
//                 candidates between the ends are kept. Where the bracket is narrow few blocks are
//                 noted, and no branch depends on which;
//              3. the counts certify the bracket, and the threshold is hi, or bisected among the
//                 candidates. Uncertified: another bracket, on the side that the counts tell and
//                 with lo as the next hi; at last bisection of the row.
//              Ties with a bound are counted and not kept, so that constant or two-valued rows
//              leave no candidates. Rows are cut into chunks of kChunk, whatever the number of
//              threads; chunks are summed, and candidates joined, in their order.
//
// Included by cpu.cpp alone; compiled once per CPU capability, in its namespace.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/inline.h"
#include "core/scratch.h"
#include "core/simd.h"
#include "core/total_order.h"

namespace sqloss::superquantile::CPU_CAPABILITY {

using core::ordered_key_t;
using core::Scratch;
using core::CPU_CAPABILITY::any;
using core::CPU_CAPABILITY::Block;
using core::CPU_CAPABILITY::count;
using core::CPU_CAPABILITY::Counts;
using core::CPU_CAPABILITY::kLanes;
using core::CPU_CAPABILITY::Lanes;
using core::CPU_CAPABILITY::of_doubles;
using core::CPU_CAPABILITY::without;

// Losses of which bisection is faster than sampling first: 32 KiB of floats.
constexpr int64_t kInCache = 8192;
// What a row is cut into, whatever the number of threads: enough work to outweigh starting a
// thread.
constexpr int64_t kChunk = 32768;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The type of the weights: float or double, never narrower than the losses', or this.
struct Unweighted {};
template <typename W>
constexpr bool kWeighted = !std::is_same_v<W, Unweighted>;

// The mask of losses for their weights.
template <typename W, typename Mask>
decltype(auto) mask_of_weights(const Mask& mask) {
  if constexpr (std::is_same_v<W, double>) {
    return of_doubles(mask);
  } else {
    return (mask);
  }
}

// The masses of items: counted, or the sum of their weights.
template <typename T, typename W>
struct Mass {
  Lanes weights;

  template <typename Mask>
  void add(const Mask& mask, const W* weight) {
    weights.add(Block<W>::load(weight), mask);
  }
  double total() const { return weights.total(); }
};
template <typename T>
struct Mass<T, Unweighted> {
  Counts<T> items;

  template <typename Mask>
  void add(const Mask& mask, const Unweighted*) {
    items.add(mask);
  }
  double total() const { return static_cast<double>(items.total()); }
};

// Adjacent items, filled up to a whole number of blocks by losses of -inf and no mass. Masked
// losses are such, too: only the mass at -inf cannot be counted, and has to be known.
template <typename T, typename W>
struct Run {
  const T* losses;
  const W* weights;  // null if not weighted
  int64_t positions;
  int64_t kept;  // items that count, if not weighted

  // f(block of losses, their weights)
  template <typename F>
  void for_blocks(const F& f) const {
    for (int64_t i = 0; i < positions; i += kLanes) {
      f(Block<T>::load(losses + i), kWeighted<W> ? weights + i : nullptr);
    }
  }

  double total() const {
    if constexpr (kWeighted<W>) {
      Lanes sum;
      for (int64_t i = 0; i < positions; i += kLanes) sum.add(Block<W>::load(weights + i));
      return sum.total();
    } else {
      return static_cast<double>(kept);
    }
  }
};

// A growing array of items.
template <typename T, typename W>
struct Items {
  Scratch<T> losses;
  Scratch<W> weights;
  int64_t size = 0;

  void reserve(int64_t more) {
    losses.reserve(size + more + kLanes, size);
    if (kWeighted<W>) weights.reserve(size + more + kLanes, size);
  }
  // Expects room for a block.
  template <typename Mask>
  void append(const Block<T>& block, const W* weight, const Mask& mask) {
    block.compress(mask, losses.data() + size);
    if constexpr (kWeighted<W>) {
      Block<W>::load(weight).compress(mask_of_weights<W>(mask), weights.data() + size);
    }
    size += count(mask);
  }
  void append(Items& items) {
    reserve(items.size);
    std::copy_n(items.losses.data(), items.size, losses.data() + size);
    if (kWeighted<W>) std::copy_n(items.weights.data(), items.size, weights.data() + size);
    size += items.size;
  }
  Run<T, W> run() {
    reserve(0);
    std::fill_n(losses.data() + size, kLanes, -kInfinity<T>);
    if (kWeighted<W>) std::fill_n(weights.data() + size, kLanes, W{});
    return {losses.data(), kWeighted<W> ? weights.data() : nullptr, size, size};
  }
};

// A range of thresholds by their ordered keys, both ends included; every key above that of +inf is
// NaN.
template <typename T>
struct KeyRange {
  using Key = ordered_key_t<T>;
  static Key key(T loss) { return core::to_ordered_key(loss + T(0)); }
  static T loss(Key key) { return core::from_ordered_key<T>(key); }
  static bool is_nan(Key k) { return k > key(kInfinity<T>); }

  Key lo = key(-kInfinity<T>);
  Key hi = ~Key(0);
};

// The mass of the items whose key is at least `key` > that of -inf.
template <typename T, typename W>
double mass_from(const Run<T, W>& run, ordered_key_t<T> key) {
  Mass<T, W> mass;
  if (KeyRange<T>::is_nan(key)) {
    run.for_blocks([&](const Block<T>& block, const W* weight) {
      mass.add(block.above(kInfinity<T>), weight);
    });
  } else {
    const T loss = KeyRange<T>::loss(key);
    run.for_blocks(
        [&](const Block<T>& block, const W* weight) { mass.add(block.reaches(loss), weight); });
  }
  return mass.total();
}

// The compilers' own vectors, of which a loop over lanes would not make use here.
template <typename V, int64_t kCount>
using VectorOf __attribute__((vector_size(kCount * sizeof(V)))) = V;

template <typename Vector, typename V>
SQLOSS_INLINE Vector load(const V* numbers) {
  Vector vector;
  std::memcpy(&vector, numbers, sizeof(vector));
  return vector;
}
template <typename Vector, typename V>
SQLOSS_INLINE void store(const Vector& vector, V* numbers) {
  std::memcpy(numbers, &vector, sizeof(vector));
}

// So few items that each is tried as the threshold.
constexpr int64_t kFew = 2 * kLanes;

// The threshold among at most kFew items, none of them NaN. A vector of items is compared with one
// item after the other, so that masses add up in lanes and in the order of the items.
template <typename T, typename W>
T try_each(const Run<T, W>& run, double target) {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Mass = std::conditional_t<kWeighted<W>, double, Count>;
  constexpr int64_t kCount = 32 / sizeof(Mass);
  using Losses = VectorOf<T, kCount>;
  using Masses = VectorOf<Mass, kCount>;
  Mass wanted = static_cast<Mass>(std::ceil(target));
  if constexpr (kWeighted<W>) {
    // All of them reached it, which sums that round in another order must not deny
    const double total = std::accumulate(run.weights, run.weights + run.positions, 0.0);
    wanted = std::min(target, total);
  }
  const Losses none = -kInfinity<T> - Losses{};
  Losses threshold = none;
  for (int64_t i = 0; i < run.positions; i += kCount) {
    const auto losses = load<Losses>(run.losses + i);
    Masses masses{};
    for (int64_t j = 0; j < run.positions; ++j) {
      const auto reached = losses <= run.losses[j];
      if constexpr (kWeighted<W>) {
        const auto mask = __builtin_convertvector(reached, VectorOf<int64_t, kCount>);
        masses += mask ? static_cast<double>(run.weights[j]) - Masses{} : Masses{};
      } else {
        masses -= reached;
      }
    }
    const auto reached = __builtin_convertvector(masses >= wanted, decltype(losses <= losses));
    const auto larger = reached & (losses > threshold);
    threshold = larger ? losses : threshold;
  }
  T largest = -kInfinity<T>;
  for (int64_t i = 0; i < kCount; ++i) largest = std::max<T>(largest, threshold[i]);
  return largest;
}

// The threshold, known to be in `range`. `above` is the mass of the items above the range.
template <typename T, typename W>
T bisect(Run<T, W> run, double target, KeyRange<T> range, double above, Items<T, W>& left) {
  constexpr int64_t kStepsToDrop = 2;
  using Keys = KeyRange<T>;
  int64_t steps = 0;  // since items were dropped
  for (bool at_item = true; range.lo < range.hi && !Keys::is_nan(range.lo); at_item = !at_item) {
    const bool due = steps >= kStepsToDrop || run.positions <= kFew;
    if (due && range.hi < Keys::key(kInfinity<T>)) {
      // By the comparison that counted `above`: `beyond` may tie with hi (0 and -0, or denormals
      // where the processor takes them for 0)
      const T lo = Keys::loss(range.lo), beyond = Keys::loss(range.hi + 1);
      left.size = 0;
      left.reserve(run.positions);  // in place from the second time on
      run.for_blocks([&](const Block<T>& block, const W* weight) {
        left.append(block, weight, without(block.reaches(lo), block.reaches(beyond)));
      });
      run = left.run();
      target -= above;
      above = 0;
      // lo was reached, which sums that round in another order must not deny
      if (kWeighted<W>) target = std::min(target, run.total());
      if (run.positions <= kFew) return try_each(run, target) + T(0);
      steps = 0;
    }
    // Keys are dense near 0, and losses elsewhere: halving the keys alone leaves all items in the
    // range for many steps
    const auto item = Keys::key(run.losses[run.positions / 2]);
    const bool to_item = at_item && range.lo < item && item <= range.hi;
    const auto middle = to_item ? item : range.lo + (range.hi - range.lo) / 2 + 1;
    const double mass = mass_from(run, middle);
    const bool reached = mass >= target;
    range.lo = reached ? middle : range.lo;
    range.hi = reached ? range.hi : middle - 1;
    above = reached ? above : mass;
    ++steps;
  }
  return Keys::loss(range.lo) + T(0);  // never -0, nor a denormal that ties with 0
}

// Bounds of the threshold, lo <= hi, that are never NaN: where it is NaN, hi is +inf.
template <typename T>
struct Bracket {
  T lo = -kInfinity<T>, hi = kInfinity<T>;
};

// The threshold, which is likely to be in the bracket: one read of the items tells, and keeps those
// in it. How long it takes depends on the guess, and no bit of the result does.
template <typename T, typename W>
T bisect(const Run<T, W>& run, double target, Bracket<T> guess, Items<T, W>& left) {
  using Keys = KeyRange<T>;
  const Keys all;
  const bool guessed = guess.lo > -kInfinity<T> || guess.hi < kInfinity<T>;
  if (!guessed || guess.hi == -kInfinity<T>) return bisect(run, target, all, 0.0, left);
  Mass<T, W> reaching_hi;
  left.size = 0;
  left.reserve(run.positions);
  run.for_blocks([&](const Block<T>& block, const W* weight) {
    const auto reached = block.reaches(guess.hi);
    reaching_hi.add(reached, weight);
    left.append(block, weight, without(block.reaches(guess.lo), reached));
  });
  const double beyond = reaching_hi.total();
  const auto lo = Keys::key(guess.lo), hi = Keys::key(guess.hi);
  if (beyond >= target) {
    // Most often it is hi, with which many tie
    if (mass_from(run, hi + 1) < target) return guess.hi + T(0);
    return bisect(run, target, {hi + 1, all.hi}, 0.0, left);
  }
  const Run<T, W> between = left.run();
  const double reaching_lo = beyond + between.total();
  if (reaching_lo >= target || guess.lo == -kInfinity<T>) {
    return bisect(between, target - beyond, {lo, hi - 1}, 0.0, left);
  }
  return bisect(run, target, {all.lo, lo - 1}, reaching_lo, left);
}

// What lies above the threshold and at it, and everything.
template <typename T>
struct Tail {
  T threshold;
  double sum;  // of mass * loss above
  double above;
  double at;
  double total;
};

// Adds the losses of a mask to a sum, by their mass, and that mass.
template <typename T, typename W>
void add_losses(Lanes& sum, Mass<T, W>& mass, const Block<T>& block, const W* weight,
                const auto& mask) {
  if constexpr (kWeighted<W>) {
    sum.add_products(mass.weights, block, Block<W>::load(weight), mask);
  } else {
    mass.add(mask, weight);
    sum.add(block, mask);
  }
}

template <typename T, typename W>
Tail<T> tail_at(const Run<T, W>& run, T threshold, double total) {
  const bool nan = core::is_nan(threshold);
  const T bound = nan ? kInfinity<T> : threshold;
  Lanes lanes;
  Mass<T, W> above, at;
  run.for_blocks([&](const Block<T>& block, const W* weight) {
    const auto is_above = block.above(bound);
    add_losses(lanes, above, block, weight, is_above);
    at.add(without(block.reaches(bound), is_above), weight);
  });
  if (nan) return {threshold, 0.0, 0.0, above.total(), total};
  const bool all = bound == -kInfinity<T>;
  return {threshold, lanes.total(), above.total(), all ? total - above.total() : at.total(), total};
}

// The masses of a row by a bracket, and the sum above it.
struct Partition {
  double sum = 0;
  double above = 0;  // of hi
  double ties = 0;   // with hi
  double total = 0;

  void add(const Partition& part) {
    sum += part.sum;
    above += part.above;
    ties += part.ties;
    total += part.total;
  }
};

template <typename T, typename W>
struct PartitionSums {
  Lanes sum;
  Mass<T, W> above, ties;
  Lanes weights;
  int64_t kept = 0;
};

// What is read at once for its sums, and again for its candidates; and how far ahead memory is
// asked for, so that it goes on arriving while candidates are taken: 4 KiB of floats.
constexpr int64_t kGroup = 1024;

// Adds what lies above the bracket of up to kGroup items to the sums. Writes the positions of the
// blocks that have items in the bracket, ends included, and returns how many. Two comparisons for
// every item; ties with hi are left to take_candidates, which looks at few.
template <typename T, typename W>
C10_NOINLINE int64_t sum_above(const Run<T, W>& run, Bracket<T> bracket, PartitionSums<T, W>& sums,
                               uint16_t* noted) {
  // Copies that stay in registers: no call spills them, and no store can alias them
  Lanes sum = sums.sum;
  Mass<T, W> above = sums.above;
  int64_t found = 0;
  for (int64_t i = 0; i < run.positions; i += kLanes) {
    const auto block = Block<T>::load(run.losses + i);
    const W* weight = kWeighted<W> ? run.weights + i : nullptr;
    __builtin_prefetch(run.losses + i + kGroup);
    if constexpr (kWeighted<W>) __builtin_prefetch(weight + kGroup);
    const auto is_above = block.above(bracket.hi);
    // First, which leaves more registers to the sums
    noted[found] = static_cast<uint16_t>(i);
    found += any(without(block.reaches(bracket.lo), is_above));
    add_losses(sum, above, block, weight, is_above);
  }
  sums.sum = sum;
  sums.above = above;
  return found;
}

// Of the blocks noted: counts ties with hi, and appends the candidates.
template <typename T, typename W>
C10_NOINLINE void take_candidates(const Run<T, W>& run, Bracket<T> bracket, const uint16_t* noted,
                                  int64_t size, PartitionSums<T, W>& sums,
                                  Items<T, W>& candidates) {
  Mass<T, W> ties = sums.ties;
  T* losses_out = candidates.losses.data() + candidates.size;
  W* weights_out = kWeighted<W> ? candidates.weights.data() + candidates.size : nullptr;
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto block = Block<T>::load(run.losses + noted[i]);
    const W* weight = kWeighted<W> ? run.weights + noted[i] : nullptr;
    const auto reached = block.reaches(bracket.hi);
    const auto between = without(block.above(bracket.lo), reached);
    const auto tied = without(reached, block.above(bracket.hi));
    if (!kWeighted<W> || any(tied)) ties.add(tied, weight);  // weights are added at a cost
    block.compress(between, losses_out + found);
    if constexpr (kWeighted<W>) {
      Block<W>::load(weight).compress(mask_of_weights<W>(between), weights_out + found);
    }
    found += count(between);
  }
  candidates.size += found;
  sums.ties = ties;
}

// The one read of a row: adds to the sums, appends to the candidates.
template <typename T, typename W>
void partition_run(const Run<T, W>& run, Bracket<T> bracket, Items<T, W>& candidates,
                   PartitionSums<T, W>& sums) {
  candidates.reserve(run.positions);
  uint16_t noted[kGroup / kLanes];
  for (int64_t i = 0; i < run.positions; i += kGroup) {
    const Run<T, W> group{run.losses + i, kWeighted<W> ? run.weights + i : nullptr,
                          std::min(kGroup, run.positions - i), 0};
    const int64_t found = sum_above(group, bracket, sums, noted);
    take_candidates(group, bracket, noted, found, sums, candidates);
  }
  if constexpr (kWeighted<W>) {
    Lanes weights = sums.weights;
    for (int64_t i = 0; i < run.positions; i += kLanes) {
      weights.add(Block<W>::load(run.weights + i));
    }
    sums.weights = weights;
  }
  sums.kept += run.kept;
}

template <typename Source, typename T = typename Source::Loss, typename W = typename Source::Weight>
Partition partition_chunk(const Source& source, int64_t begin, int64_t end, Bracket<T> bracket,
                          Items<T, W>& candidates) {
  PartitionSums<T, W> sums;
  typename Source::Buffer buffer;
  while (begin < end) {
    const Run<T, W> run = source.run_at(begin, end, buffer);
    partition_run(run, bracket, candidates, sums);
    begin += run.positions;
  }
  const double total = kWeighted<W> ? sums.weights.total() : static_cast<double>(sums.kept);
  const bool all = bracket.hi == -kInfinity<T>;
  const double above = sums.above.total();
  return {sums.sum.total(), above, all ? total - above : sums.ties.total(), total};
}

// A whole row. Chunks are summed, and candidates joined, in the order of the row.
template <typename Source, typename T = typename Source::Loss, typename W = typename Source::Weight>
Partition partition(const Source& source, Bracket<T> bracket, Items<T, W>& candidates) {
  const int64_t chunks = (source.size() + kChunk - 1) / kChunk;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tasks = std::min(chunks, threads);
  std::vector<Partition> parts(chunks);
  std::vector<Items<T, W>> found(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      for (int64_t c = chunks * task / tasks; c < chunks * (task + 1) / tasks; ++c) {
        const int64_t end = std::min((c + 1) * kChunk, source.size());
        parts[c] = partition_chunk(source, c * kChunk, end, bracket, found[task]);
      }
    }
  });
  Partition all;
  for (const Partition& part : parts) all.add(part);
  candidates = std::move(found[0]);
  for (int64_t task = 1; task < tasks; ++task) candidates.append(found[task]);
  return all;
}

// Scrambles a counter (the finaliser of SplitMix64): the positions follow no period of the data.
inline uint64_t hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The i-th of `size` positions in a row of n: anywhere in the i-th of as many equal pieces, so that
// a sample reads memory forwards.
inline int64_t sampled_position(int64_t i, int64_t size, int64_t n) {
  const double fraction = static_cast<double>(hash(i) >> 11) * 0x1p-53;
  const double piece = static_cast<double>(n) / static_cast<double>(size);
  const auto position = static_cast<int64_t>((static_cast<double>(i) + fraction) * piece);
  return std::min(position, n - 1);
}

// Narrows the bracket to a share of the mass, give or take `deviations` standard deviations of the
// sample's.
template <typename Source, typename T = typename Source::Loss, typename W = typename Source::Weight>
Bracket<T> sampled_bracket(const Source& source, double share, int64_t sample_size,
                           double deviations, Bracket<T> bracket, Items<T, W>& left) {
  Scratch<int64_t> positions;
  positions.reserve(sample_size);
  for (int64_t i = 0; i < sample_size; ++i) {
    positions.data()[i] = sampled_position(i, sample_size, source.size());
  }
  Items<T, W> sample;
  sample.reserve(sample_size);
  source.sample(positions.data(), sample_size, sample);
  const Run<T, W> run = sample.run();

  double effective = static_cast<double>(sample.size);  // items of equal mass as good as these
  const double total = run.total();
  if constexpr (kWeighted<W>) {
    double squares = 0;  // of shares, which do not overflow
    for (int64_t i = 0; i < sample.size; ++i) {
      const double weight_share = run.weights[i] / total;
      squares += weight_share * weight_share;
    }
    effective = 1 / squares;
  }
  if (!(effective >= 1)) return bracket;
  const double margin =
      total * (deviations * std::sqrt(share * (1 - share) / effective) + 1 / effective);
  const auto bound = [](T loss) { return core::is_nan(loss) ? kInfinity<T> : loss; };
  if (share * total > margin) {
    const T hi = bisect(run, share * total - margin, KeyRange<T>(), 0.0, left);
    bracket.hi = std::min(bracket.hi, bound(hi));
  }
  if (share * total + margin <= total) {
    const T lo = bisect(run, share * total + margin, KeyRange<T>(), 0.0, left);
    bracket.lo = std::max(bracket.lo, bound(lo));
  }
  return bracket;
}

// The cost of the sample and that of the candidates it leaves balance at a multiple of n^(2/3). The
// minimum is flat: a quarter of it and all of it cost up to 15 % more than half.
inline int64_t sample_size(int64_t n) {
  const double size = std::cbrt(static_cast<double>(n) * static_cast<double>(n));
  return static_cast<int64_t>(size) / 2;
}

// Memory for the selection of one row after another.
template <typename T, typename W>
struct Room {
  Items<T, W> row;   // where it is not in one piece
  Items<T, W> left;  // of bisection
};

// The tail of a row that holds about `share` of its mass, and target(total mass) exactly. A row in
// cache begins with the guess.
template <typename Source, typename Target, typename T = typename Source::Loss,
          typename W = typename Source::Weight>
Tail<T> select(const Source& source, double share, const Target& target, Bracket<T> guess,
               Room<T, W>& room) {
  using Keys = KeyRange<T>;
  if (source.size() > kInCache) {
    Bracket<T> known;
    // The narrower, the fewer candidates: at 3.3 one row in a thousand is read again
    for (const double deviations : {3.3, 8.0, 16.0}) {
      const Bracket<T> bracket =
          sampled_bracket(source, share, sample_size(source.size()), deviations, known, room.left);
      Items<T, W> found;
      const Partition part = partition(source, bracket, found);
      const double wanted = target(part.total);
      if (wanted <= part.above) {
        if (bracket.hi == kInfinity<T>) {
          return {std::numeric_limits<T>::quiet_NaN(), 0.0, 0.0, part.above, part.total};
        }
        known = {bracket.hi, kInfinity<T>};
        continue;
      }
      const double reaches_hi = part.above + part.ties;
      if (wanted <= reaches_hi) return {bracket.hi, part.sum, part.above, part.ties, part.total};
      const Run<T, W> candidates = found.run();
      const double between = candidates.total();
      const double rest = wanted - reaches_hi;
      if (rest > between) {
        known = {-kInfinity<T>, bracket.lo};
        continue;
      }
      const KeyRange<T> range{Keys::key(bracket.lo), Keys::key(bracket.hi)};
      const T threshold = bisect(candidates, rest, range, 0.0, room.left);
      const Tail<T> tail = tail_at(candidates, threshold, between);
      const double sum_at_hi =
          part.ties > 0 ? part.ties * static_cast<double>(bracket.hi) : 0.0;  // no 0 * inf
      return {tail.threshold, part.sum + sum_at_hi + tail.sum, reaches_hi + tail.above, tail.at,
              part.total};
    }
  }
  const Run<T, W> run = source.whole(room.row);
  const double total = run.total();
  return tail_at(run, bisect(run, target(total), guess, room.left), total);
}

}  // namespace sqloss::superquantile::CPU_CAPABILITY
