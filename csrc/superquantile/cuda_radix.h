// The tail of rows longer than a block holds, by blocks that each take a chunk of a row.
//
// radix      The threshold's key is found digit by digit, from the highest: each round weighs the
//            losses that begin with the digits found so far by their next one, and the last block
//            of a row to finish looks up in which digit the tail's weight is reached. The last
//            round also adds up the losses above those digits, so that every loss is read once per
//            round: 3 times for 32-bit keys without weights. Numbers of losses are counted by
//            integer atomics. Weights are added in an order of their own: by each warp into bins
//            that no other touches, and those of warps and chunks in their order.
// bracket    For rows that no cache holds, without weights, one reading instead of three: a sample
//            of n^(2/3) losses at hashed positions (a regular sample would miss on periodic data)
//            gives two losses between which the threshold lies with high probability; one pass
//            counts and adds up what is above them and keeps the few between them; radix finds the
//            threshold among those. The counts prove the bracket right. Where it is not, or holds
//            too many losses, the same last rounds read the whole row instead.
//
// Which losses are kept is certain, but not in which order. So that the sum of those above the
// threshold is the same every time, it is one of integers: of their distances from a loss that
// shares all but its last digit with the threshold, in steps of a power of 2, so fine that the sum
// is up to 2^61 of them.
#pragma once

#include <cstdint>

#include "superquantile/cuda_selection.h"

namespace sqloss::superquantile::CUDA {

using Count = unsigned long long;

constexpr int kRadixThreads = 256;
constexpr int kRadixWarps = kRadixThreads / kWarp;

// 2^11 counters or 2^8 sums for each of 8 warps: 8 and 18 KB of shared memory.
template <typename Kind>
constexpr int kDigitBits = std::is_same_v<Kind, Counted> ? 11 : 8;
template <typename Kind>
constexpr int kBins = 1 << kDigitBits<Kind>;

template <typename Key, typename Kind>
constexpr int kRounds = (8 * sizeof(Key) + kDigitBits<Kind> - 1) / kDigitBits<Kind>;

// Which bits of a key a round looks at.
template <typename Key, typename Kind>
struct Digit {
  int width, shift;

  __host__ __device__ explicit Digit(int round) {
    constexpr int kBits = 8 * sizeof(Key);
    const int left = kBits - round * kDigitBits<Kind>;
    width = left < kDigitBits<Kind> ? left : kDigitBits<Kind>;
    shift = left - width;
  }
  // What precedes the digit: nothing in the first round.
  __device__ __forceinline__ Key before(Key key) const {
    return shift + width == 8 * sizeof(Key) ? Key(0) : key >> (shift + width);
  }
  __device__ __forceinline__ int of(Key key) const {
    return static_cast<int>((key >> shift) & ((Key(1) << width) - 1));
  }
};

// How rows are cut: functions of their length alone, so that sums have one order.
struct Chunks {
  int64_t size, per_row;

  explicit Chunks(int64_t n) {
    // At most kMost, of whole tiles of a block, none smaller than kLeast
    constexpr int64_t kMost = 1024, kLeast = 8192;
    size = std::max<int64_t>(divide_up(divide_up(n, kMost), kLeast), 1) * kLeast;
    per_row = divide_up(n, size);
  }
};

// What a row's rounds know. Masses are counts or sums of weights.
template <typename Key, typename Mass>
struct Search {
  Key prefix;  // the digits found so far, at their places
  Mass above;  // of losses above all that begin with them
  double total, wanted;
  unsigned ticket;
};

// What the pass over a row found of the bracket [low, high].
template <typename Key>
struct Bracket {
  Key low, high;
  Key not_first, last;                 // the smallest loss kept, all bits flipped, and the largest
  Count total;                         // losses that count
  Count above, at_high, at_low, kept;  // above high; at the ends; between them
  enum : unsigned { kUnproven, kDone, kKept } state;
  // For kKept: among the kept losses, on top of those above them
  double wanted, sum_above;
  unsigned ticket;
};

constexpr double kDeviations = 5;  // of a sample's ranks, that a bracket is wide to either side

// --- weighing ------------------------------------------------------------------------------------

// The mass of each digit, added up by a block.
template <typename Kind>
struct Histogram;

template <>
struct Histogram<Counted> {
  unsigned bins[kBins<Counted>];

  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kBins<Counted>; i += kRadixThreads) bins[i] = 0;
  }
  // Ones, which the hardware counts together where lanes have the same bin.
  __device__ __forceinline__ void add(bool wanted, int bin, unsigned) {
    if (wanted) atomicAdd(&bins[bin], 1u);
  }
};

template <>
struct Histogram<Weighted> {
  double bins[kRadixWarps][kBins<Weighted>];
  double of_lanes[kRadixWarps][kWarp];

  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kRadixWarps * kBins<Weighted>;
         i += kRadixThreads) {
      bins[i / kBins<Weighted>][i % kBins<Weighted>] = 0;
    }
  }
  // All lanes of a warp call it together: the first one of each digit adds up those of its like, in
  // their order.
  __device__ __forceinline__ void add(bool wanted, int bin, double mass) {
    const unsigned wanting = __ballot_sync(kAllLanes, wanted);
    if (wanting == 0) return;
    of_lanes[warp()][lane()] = mass;
    const unsigned alike = __match_any_sync(kAllLanes, bin) & wanting;
    __syncwarp();
    if (wanted && lane() == __ffs(static_cast<int>(alike)) - 1) {
      double sum = 0;
      for (unsigned left = alike; left != 0; left &= left - 1) {
        sum += of_lanes[warp()][__ffs(static_cast<int>(left)) - 1];
      }
      bins[warp()][bin] += sum;
    }
    __syncwarp();  // before masses and bins change again
  }
};

// The sum of the values of all threads before this one, in the order of threads; and of all.
template <typename T>
__device__ __forceinline__ T sum_before(T value, T& total) {
  __shared__ T of_warps[kRadixWarps];
  T through = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, through, distance);
    if (lane() >= distance) through += other;
  }
  __syncthreads();
  if (lane() == kWarp - 1) of_warps[warp()] = through;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int i = 0; i < kRadixWarps; ++i) {
    if (i == warp()) before = total;
    total += of_warps[i];
  }
  const T in_warp = __shfl_up_sync(kAllLanes, through, 1);
  return lane() == 0 ? before : before + in_warp;
}

// --- sources -------------------------------------------------------------------------------------

// Keys and masses of a chunk: f(key, mass), by all threads together, absent past the end.
template <typename T, typename Kind>
struct RowSource {
  using Key = core::ordered_key_t<T>;
  Losses in;
  bool runs;

  template <typename F>
  __device__ __forceinline__ void for_each(int64_t row, int64_t begin, int64_t end,
                                           const F& f) const {
    constexpr int64_t kStep = kRadixThreads * kRun;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kRun;
         i - static_cast<int64_t>(threadIdx.x) * kRun < end; i += kStep) {
      Key keys[kRun];
      typename Kind::Mass masses[kRun];
      // Chunks end at multiples of the step or with the row
      read_run<T, Kind>(in, runs, row, i, keys, masses);
#pragma unroll
      for (int j = 0; j < kRun; ++j) f(keys[j], mass_of<Kind>(keys[j], masses, j));
    }
  }
};

template <typename Key, typename F>
__device__ __forceinline__ void for_each_key(const Key* keys, int64_t begin, int64_t end,
                                             const F& f) {
  for (int64_t first = begin; first < end; first += kRadixThreads) {
    const int64_t i = first + static_cast<int64_t>(threadIdx.x);
    f(i < end ? keys[i] : Key(kAbsent), 1u);
  }
}

// --- rounds --------------------------------------------------------------------------------------

// Weighs a chunk by digits, into `histogram`, and calls add_above(key, mass) for the losses above
// the prefix.
template <typename Key, typename Kind, typename Source, typename AddAbove>
__device__ __forceinline__ void weigh(const Digit<Key, Kind>& digit, Key prefix,
                                      Histogram<Kind>& histogram, const Source& for_each_of_chunk,
                                      const AddAbove& add_above) {
  histogram.clear();
  __syncthreads();
  const Key before = digit.before(prefix);
  for_each_of_chunk([&](Key key, typename Kind::Mass mass) {
    const Key mine = digit.before(key);
    histogram.add(key != kAbsent && mine == before, digit.of(key), mass);
    if (key != kAbsent && mine > before) add_above(key, mass);
  });
  __syncthreads();
}

// Adds a chunk's histogram to its row's: counts [kBins] into one, weights [chunks, kBins] apart.
__device__ __forceinline__ void flush(const Histogram<Counted>& histogram, Count* row_bins,
                                      int64_t) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins<Counted>; i += kRadixThreads) {
    const unsigned count = histogram.bins[i];
    if (count > 0) atomicAdd(&row_bins[i], static_cast<Count>(count));
  }
}
__device__ __forceinline__ void flush(const Histogram<Weighted>& histogram, double* row_bins,
                                      int64_t chunk) {
  static_assert(kBins<Weighted> == kRadixThreads);
  double sum = 0;
  for (int w = 0; w < kRadixWarps; ++w) sum += histogram.bins[w][threadIdx.x];
  row_bins[chunk * kBins<Weighted> + threadIdx.x] = sum;
}

// The mass of kBins / kRadixThreads digits of a thread, the highest first.
template <typename Mass, int kPerThread>
struct ThreadBins {
  Mass masses[kPerThread];
  Mass total = 0;

  static __device__ __forceinline__ int bin(int i) {
    return kRadixThreads * kPerThread - 1 - (static_cast<int>(threadIdx.x) * kPerThread + i);
  }
};
// From what flush() left, which is cleared for the next round.
__device__ __forceinline__ auto gather(Count* row_bins, int64_t) {
  ThreadBins<Count, kBins<Counted> / kRadixThreads> bins;
#pragma unroll
  for (int i = 0; i < kBins<Counted> / kRadixThreads; ++i) {
    Count* const place = row_bins + bins.bin(i);
    bins.masses[i] = __ldcg(place);
    bins.total += bins.masses[i];
    *place = 0;
  }
  return bins;
}
__device__ __forceinline__ auto gather(double* row_bins, int64_t chunks) {
  ThreadBins<double, 1> bins;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    bins.total += __ldcg(row_bins + chunk * kBins<Weighted> + bins.bin(0));
  }
  bins.masses[0] = bins.total;
  return bins;
}

// What one round finds, the same in all threads.
template <typename Mass>
struct Found {
  int bin;
  Mass above, at;  // of higher digits, `base` included, and of this one
};

// The highest digit with which the tail's weight is reached, or the lowest there is; bin -1: none.
template <typename Mass, int kPerThread>
__device__ __forceinline__ Found<Mass> find(const ThreadBins<Mass, kPerThread>& bins, Mass base,
                                            Mass before, double wanted) {
  __shared__ Found<Mass> found;
  Found<Mass> mine{-1, base + before, 0};
  bool reached = false;
  Mass above = base + before;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (bins.masses[i] > 0 && !reached) {
      mine = {bins.bin(i), above, bins.masses[i]};
      reached = static_cast<double>(above + bins.masses[i]) >= wanted;
    }
    above += bins.masses[i];
  }
  const int highest = block_reduce(reached ? mine.bin : -1, -1, Maximum());
  const int last = block_reduce(mine.bin >= 0 ? mine.bin : INT32_MAX, INT32_MAX, Minimum());
  const int bin = highest >= 0 ? highest : last;
  if (mine.bin == bin || (bin == INT32_MAX && threadIdx.x == 0)) found = mine;
  __syncthreads();
  return found;
}

// The sum of what chunks added up, in their order.
template <typename T>
__device__ __forceinline__ T sum_of_chunks(const T* sums, int64_t chunks) {
  T sum = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < chunks; i += kRadixThreads) {
    sum += __ldcg(sums + i);
  }
  return block_sum(sum);
}

// The sum of losses that share all digits but the last, of digits above `bin`.
template <typename T, typename Bins>
__device__ __forceinline__ double sum_of_bins(const Bins& bins, core::ordered_key_t<T> prefix,
                                              int bin) {
  using Key = core::ordered_key_t<T>;
  double sum = 0;
  for (auto i = 0; i < static_cast<int>(sizeof(bins.masses) / sizeof(bins.masses[0])); ++i) {
    if (bins.bin(i) > bin && bins.masses[i] > 0) {
      const Key key = prefix | static_cast<Key>(bins.bin(i));
      sum +=
          static_cast<double>(core::from_ordered_key<T>(key)) * static_cast<double>(bins.masses[i]);
    }
  }
  return block_sum(sum);
}

// Memory of a search over `rows` rows.
template <typename Key, typename Kind>
struct Workspace {
  using Mass = std::conditional_t<std::is_same_v<Kind, Counted>, Count, double>;
  Search<Key, Mass>* searches;  // [rows], zero at first
  Mass* bins;    // [rows, kBins] counts, zero at first; [rows, chunks, kBins] weights
  double* sums;  // [rows, chunks]
};

// The integers that kept losses above a prefix are added up as: distances from its last key, which
// no loss below the tail can make coarse.
struct Steps {
  double origin, size;
};
template <typename T, typename Key, typename Kind>
__device__ __forceinline__ Steps steps_above(const Digit<Key, Kind>& digit, Key prefix, Key last,
                                             Count kept) {
  const Key end = prefix | ((Key(1) << (digit.shift + digit.width)) - 1);
  const double origin = static_cast<double>(core::from_ordered_key<T>(end));
  const double range = static_cast<double>(core::from_ordered_key<T>(last)) - origin;
  // range / size * kept < 2^62, in steps of a power of 2: then all of a float's digits count
  const double exponent = range > 0 ? ceil(log2(range * static_cast<double>(kept))) - 61 : 0.0;
  return {origin, exp2(exponent > -1022 ? exponent : -1022.0)};
}

// One round over rows of losses.
template <typename T, typename Kind>
__global__ void __launch_bounds__(kRadixThreads, 4)
    rows_round(RowSource<T, Kind> source, TailFraction tail_fraction, double rounding,
               Chunks chunks, int round, Workspace<core::ordered_key_t<T>, Kind> workspace,
               Tails tails,
               const Bracket<core::ordered_key_t<T>>* brackets,  // [rows], or null: none taken
               const core::ordered_key_t<T>* kept,               // [rows, capacity], or null
               int64_t capacity) {
  using Key = core::ordered_key_t<T>;
  using Mass = typename Workspace<Key, Kind>::Mass;
  __shared__ Histogram<Kind> histogram;
  const int64_t row = blockIdx.y, chunk = blockIdx.x;
  Search<Key, Mass>& search = workspace.searches[row];
  const Digit<Key, Kind> digit(round);
  const bool is_last_round = digit.shift == 0;
  const Key prefix = round == 0 ? Key(0) : search.prefix;
  Mass* const bins_of_row =
      workspace.bins + row * (std::is_same_v<Kind, Counted> ? 1 : chunks.per_row) * kBins<Kind>;
  double* const sums_of_row = workspace.sums + row * chunks.per_row;

  // What the pass over the row left to do
  using State = Bracket<Key>;
  const State* const bracket = brackets == nullptr ? nullptr : brackets + row;
  if (bracket != nullptr && bracket->state == State::kDone) return;
  const bool among_kept = bracket != nullptr && bracket->state == State::kKept;

  double sum = 0;
  long long steps = 0;
  if (among_kept) {
    if constexpr (std::is_same_v<Kind, Counted>) {
      const int64_t count = static_cast<int64_t>(bracket->kept);
      const int64_t share = divide_up(count, chunks.per_row);
      const int64_t begin = chunk * share, end = begin + share < count ? begin + share : count;
      const Steps steps_of =
          is_last_round ? steps_above<T>(digit, prefix, bracket->last, bracket->kept) : Steps{0, 1};
      weigh(
          digit, prefix, histogram,
          [&](const auto& f) { for_each_key(kept + row * capacity, begin, end, f); },
          [&](Key key, unsigned) {
            if (!is_last_round) return;
            const double loss = static_cast<double>(core::from_ordered_key<T>(key));
            steps += __double2ll_rn((loss - steps_of.origin) * (1 / steps_of.size));
          });
    }
  } else {
    const int64_t begin = chunk * chunks.size;
    const int64_t end = begin + chunks.size < source.in.n ? begin + chunks.size : source.in.n;
    weigh(
        digit, prefix, histogram, [&](const auto& f) { source.for_each(row, begin, end, f); },
        [&](Key key, typename Kind::Mass mass) {
          if (!is_last_round) return;
          sum += static_cast<double>(core::from_ordered_key<T>(key)) * static_cast<double>(mass);
        });
  }
  flush(histogram, bins_of_row, chunk);
  if (is_last_round) {
    // Integers up to 2^62 and doubles are both numbers of 64 bits
    const double total = block_sum(sum);
    const long long total_steps = block_sum(steps);
    if (threadIdx.x == 0) {
      sums_of_row[chunk] = among_kept ? __longlong_as_double(total_steps) : total;
    }
  }
  if (!last_block(&search.ticket, static_cast<unsigned>(chunks.per_row))) return;

  const auto bins = gather(bins_of_row, chunks.per_row);
  Mass total = 0;
  const Mass before = sum_before(bins.total, total);
  double wanted = search.wanted, total_weight = search.total;
  Mass base = search.above;
  if (round == 0) {
    if (among_kept) {
      wanted = bracket->wanted;
      total_weight = static_cast<double>(bracket->total);
    } else {
      total_weight = static_cast<double>(total);
      // superquantile: weight, mask: expected a positive and finite sum in every reduction
      CUDA_KERNEL_ASSERT(total_weight > 0 && total_weight - total_weight == 0);
      wanted = tail_target(tail_fraction, total_weight, rounding);
    }
    base = 0;
  }
  const Found<Mass> found = find(bins, base, before, wanted);
  const Key new_prefix = prefix | (static_cast<Key>(found.bin) << digit.shift);
  if (!is_last_round) {
    if (threadIdx.x == 0) {
      search.prefix = new_prefix;
      search.above = found.above;
      search.total = total_weight;
      search.wanted = wanted;
    }
    return;
  }

  double above = static_cast<double>(found.above);
  double sum_above = sum_of_bins<T>(bins, prefix, found.bin);
  if (among_kept) {
    const auto* const all_steps = reinterpret_cast<const long long*>(sums_of_row);
    const long long distance = sum_of_chunks(all_steps, chunks.per_row);
    // The losses added up as steps: those above the digits before the last
    const double counted = static_cast<double>(base);
    const Steps steps_of = steps_above<T>(digit, prefix, bracket->last, bracket->kept);
    sum_above += counted * steps_of.origin + static_cast<double>(distance) * steps_of.size;
    sum_above += bracket->sum_above;
    above += static_cast<double>(bracket->above + bracket->at_high);
  } else {
    sum_above += sum_of_chunks(sums_of_row, chunks.per_row);
  }
  if (threadIdx.x == 0) {
    const double threshold = static_cast<double>(core::from_ordered_key<T>(new_prefix));
    write_result(tail_result(tail_fraction, total_weight, threshold, above,
                             static_cast<double>(found.at), sum_above),
                 source.in.losses.dtype, row, tails);
  }
}

// --- bracket -------------------------------------------------------------------------------------

// A mixture of the bits of a number (the finaliser of SplitMix64, Steele, Lea & Flood 2014).
__device__ __forceinline__ uint64_t hashed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// sample[row, i] = the key of a loss, absent where it is masked.
template <typename T>
__global__ void __launch_bounds__(kRadixThreads)
    take_sample(Losses in, int64_t size,
                core::ordered_key_t<T>* __restrict__ sample) {  // [rows, size]
  const int64_t row = blockIdx.y;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRadixThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t place =
      static_cast<int64_t>(hashed(static_cast<uint64_t>(i)) % static_cast<uint64_t>(in.n));
  const T loss = element<T>(in.losses, row * in.losses.row_stride + place * in.losses.stride);
  sample[row * size + i] = weight_at(in, row, place) > 0 ? key_of(loss) : kAbsent;
}

// One round of the searches for both ends of each row's bracket: blockIdx.y = 2 * row + end, the
// high end first.
template <typename T>
__global__ void __launch_bounds__(kRadixThreads)
    sample_round(const core::ordered_key_t<T>* __restrict__ sample,  // [rows, size]
                 int64_t size, TailFraction tail_fraction, Chunks chunks, int round,
                 Workspace<core::ordered_key_t<T>, Counted> workspace,  // of 2 * rows
                 Bracket<core::ordered_key_t<T>>* brackets) {           // [rows]
  using Key = core::ordered_key_t<T>;
  __shared__ Histogram<Counted> histogram;
  const int64_t row = blockIdx.y / 2, chunk = blockIdx.x;
  const bool high_end = blockIdx.y % 2 == 0;
  Search<Key, Count>& search = workspace.searches[blockIdx.y];
  const Digit<Key, Counted> digit(round);
  const Key prefix = round == 0 ? Key(0) : search.prefix;
  Count* const bins_of_row = workspace.bins + static_cast<int64_t>(blockIdx.y) * kBins<Counted>;
  const int64_t begin = chunk * chunks.size;
  const int64_t end = begin + chunks.size < size ? begin + chunks.size : size;
  weigh(
      digit, prefix, histogram,
      [&](const auto& f) { for_each_key(sample + row * size, begin, end, f); },
      [](Key, unsigned) {});
  flush(histogram, bins_of_row, chunk);
  if (!last_block(&search.ticket, static_cast<unsigned>(chunks.per_row))) return;

  const auto bins = gather(bins_of_row, chunks.per_row);
  Count total = 0;
  const Count before = sum_before(bins.total, total);
  if (round == 0) {
    const double size_of_tail = tail_fraction * static_cast<double>(total);
    const double deviation = kDeviations * sqrt(size_of_tail * (1 - tail_fraction)) + 2;
    const double rank = high_end ? floor(size_of_tail - deviation) : ceil(size_of_tail + deviation);
    if (threadIdx.x == 0) {
      search.total = static_cast<double>(total);
      search.wanted = rank;
    }
    __syncthreads();
  }
  const double wanted = search.wanted;
  const Found<Count> found = find(bins, round == 0 ? Count(0) : search.above, before, wanted);
  __syncthreads();  // all have read what changes now
  if (threadIdx.x != 0) return;
  if (found.bin >= 0) {
    search.prefix = prefix | (static_cast<Key>(found.bin) << digit.shift);
    search.above = found.above;
  }
  if (digit.shift > 0) return;
  Bracket<Key>& bracket = brackets[row];
  // Past the ends of the sample: past all losses
  if (high_end) {
    bracket.high = wanted < 1 ? ~Key(0) : search.prefix;
  } else {
    bracket.low = wanted > search.total ? Key(kAbsent + 1) : search.prefix;
  }
}

// The pass. Kept keys gather in shared memory, a region for each warp, which goes to `kept` when
// half full: one atomic addition for hundreds of them.
// 64 bytes per thread are in flight, if losses have the size of keys; the regions take 32 KB.
template <typename Key>
constexpr int kLoads = 16 / sizeof(Key);
template <typename Key>
constexpr int kTake = kLoads<Key> * kRun;
template <typename Key>
constexpr unsigned kRegion = 2 * kTake<Key> * kWarp;  // keys: twice what an iteration adds

template <typename T, typename scalar_t>
__global__ void __launch_bounds__(kRadixThreads, 3)
    take_pass(RowSource<T, Counted> source, TailFraction tail_fraction, double rounding,
              Chunks chunks,
              Bracket<core::ordered_key_t<T>>* brackets,  // [rows]
              double* sums,                               // [rows, chunks, 2]: above, between
              core::ordered_key_t<T>* kept,               // [rows, capacity]
              int64_t capacity, Tails tails) {
  using Key = core::ordered_key_t<T>;
  using Run = Vector<scalar_t, kRun>;
  Key* const region = reinterpret_cast<Key*>(dynamic_shared_memory()) + warp() * kRegion<Key>;
  const Losses& in = source.in;
  const int64_t row = blockIdx.y, chunk = blockIdx.x;
  Bracket<Key>& bracket = brackets[row];
  const Key low = bracket.low, high = bracket.high;
  Key* const kept_of_row = kept + row * capacity;
  unsigned used = 0;
  const auto empty_region = [&] {
    Count place = 0;
    if (lane() == 0) place = atomicAdd(&bracket.kept, static_cast<Count>(used));
    place = __shfl_sync(kAllLanes, place, 0);
    __syncwarp();
    for (unsigned i = static_cast<unsigned>(lane()); i < used; i += kWarp) {
      if (place + i < static_cast<Count>(capacity)) kept_of_row[place + i] = region[i];
    }
    __syncwarp();
    used = 0;
  };

  unsigned present = 0, above = 0, at_high = 0, at_low = 0;  // of a thread: 2^32 are not to come
  double sum_above = 0, sum_between = 0;
  Key first = ~Key(0), last = kAbsent;
  const auto take = [&](const Key(&keys)[kTake<Key>]) {
    unsigned inside = 0;  // a bit for each key in the bracket
#pragma unroll
    for (int i = 0; i < kTake<Key>; ++i) {
      present += keys[i] != kAbsent ? 1 : 0;
      above += keys[i] > high ? 1 : 0;
      if (keys[i] > high) sum_above += static_cast<double>(core::from_ordered_key<T>(keys[i]));
      inside |= low <= keys[i] && keys[i] <= high ? 1u << i : 0u;
    }
    if (!__any_sync(kAllLanes, inside != 0)) return;
    unsigned between = 0;
#pragma unroll
    for (int i = 0; i < kTake<Key>; ++i) {
      if (!(inside >> i & 1)) continue;
      const Key key = keys[i];
      at_high += key == high ? 1 : 0;
      at_low += key == low && low != high ? 1 : 0;
      if (key == low || key == high) continue;
      between |= 1u << i;
      sum_between += static_cast<double>(core::from_ordered_key<T>(key));
      first = key < first ? key : first;
      last = key > last ? key : last;
    }
    unsigned through = static_cast<unsigned>(__popc(between));
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, through, distance);
      if (lane() >= distance) through += other;
    }
    Key* place = region + used + through - __popc(between);
#pragma unroll
    for (int i = 0; i < kTake<Key>; ++i) {
      if (between >> i & 1) *place++ = keys[i];
    }
    used += __shfl_sync(kAllLanes, through, kWarp - 1);
  };

  const int64_t begin = chunk * chunks.size;
  const int64_t end = begin + chunks.size < in.n ? begin + chunks.size : in.n;
  constexpr int64_t kStep = static_cast<int64_t>(kRadixThreads) * kRun;
  const auto* const losses =
      static_cast<const scalar_t*>(in.losses.data) + row * in.losses.row_stride;
  for (int64_t tile = begin; tile < end; tile += kLoads<Key> * kStep) {
    const int64_t mine = tile + static_cast<int64_t>(threadIdx.x) * kRun;
    Key keys[kTake<Key>];
    if (source.runs && in.mask.data == nullptr && tile + kLoads<Key> * kStep <= end) {
      Run loads[kLoads<Key>];
#pragma unroll
      for (int i = 0; i < kLoads<Key>; ++i) {
        loads[i] = *reinterpret_cast<const Run*>(losses + mine + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kTake<Key>; ++i) {
        keys[i] = key_of(static_cast<T>(loads[i / kRun].values[i % kRun]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLoads<Key>; ++i) {
        Key run[kRun];
        unsigned masses[kRun];
        read_run<T, Counted>(in, source.runs, row, mine + i * kStep, run, masses);
#pragma unroll
        for (int j = 0; j < kRun; ++j) keys[i * kRun + j] = run[j];
      }
    }
    take(keys);
    if (used >= kRegion<Key> / 2) empty_region();
  }
  if (used > 0) empty_region();

  sum_above = block_sum(sum_above);
  sum_between = block_sum(sum_between);
  const Count all_present = block_sum<Count>(present), all_above = block_sum<Count>(above);
  const Count all_at_high = block_sum<Count>(at_high), all_at_low = block_sum<Count>(at_low);
  first = block_reduce(first, ~Key(0), Minimum());
  last = block_reduce(last, Key(kAbsent), Maximum());
  double* const sums_of_row = sums + row * chunks.per_row * 2;
  if (threadIdx.x == 0) {
    sums_of_row[chunk] = sum_above;
    sums_of_row[chunks.per_row + chunk] = sum_between;
    atomicAdd(&bracket.total, all_present);
    atomicAdd(&bracket.above, all_above);
    atomicAdd(&bracket.at_high, all_at_high);
    atomicAdd(&bracket.at_low, all_at_low);
    // Keys as the integers that atomics know; not_first, because all begins with 0
    using Atomic = std::conditional_t<sizeof(Key) == 8, Count, unsigned>;
    atomicMax(reinterpret_cast<Atomic*>(&bracket.not_first), static_cast<Atomic>(~first));
    atomicMax(reinterpret_cast<Atomic*>(&bracket.last), static_cast<Atomic>(last));
  }
  if (!last_block(&bracket.ticket, static_cast<unsigned>(chunks.per_row))) return;

  double sum = sum_of_chunks(sums_of_row, chunks.per_row);
  const double all_between = sum_of_chunks(sums_of_row + chunks.per_row, chunks.per_row);
  if (threadIdx.x != 0) return;
  const double total = static_cast<double>(__ldcg(&bracket.total));
  // superquantile: weight, mask: expected a positive and finite sum in every reduction
  CUDA_KERNEL_ASSERT(total > 0);
  const double wanted = tail_target(tail_fraction, total, rounding);
  const double higher = static_cast<double>(__ldcg(&bracket.above));
  const double highs = static_cast<double>(__ldcg(&bracket.at_high));
  const double between = static_cast<double>(__ldcg(&bracket.kept));
  const double lows = static_cast<double>(__ldcg(&bracket.at_low));
  const double high_loss = static_cast<double>(core::from_ordered_key<T>(high));
  const auto done = [&](Key threshold, double weight_above, double at) {
    write_result(
        tail_result(tail_fraction, total, static_cast<double>(core::from_ordered_key<T>(threshold)),
                    weight_above, at, sum),
        in.losses.dtype, row, tails);
    bracket.state = Bracket<Key>::kDone;
  };
  bracket.state = Bracket<Key>::kUnproven;
  if (higher >= wanted) return;
  if (higher + highs >= wanted) return done(high, higher, highs);
  if (highs > 0) sum += highs * high_loss;
  if (higher + highs + between < wanted) {
    sum += all_between;
    if (higher + highs + between + lows >= wanted) done(low, higher + highs + between, lows);
    return;
  }
  const double range =
      static_cast<double>(core::from_ordered_key<T>(__ldcg(&bracket.last))) -
      static_cast<double>(core::from_ordered_key<T>(Key(~__ldcg(&bracket.not_first))));
  const double sum_at_most = range * between;
  const bool countable = sum_at_most - sum_at_most == 0;
  if (!(between <= static_cast<double>(capacity)) || !countable) return;
  bracket.wanted = wanted - higher - highs;
  bracket.sum_above = sum;
  bracket.state = Bracket<Key>::kKept;
}

}  // namespace sqloss::superquantile::CUDA
