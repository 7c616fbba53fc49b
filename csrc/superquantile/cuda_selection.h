// The tail of a row that a group of threads holds, a warp or a block, in registers or in shared
// memory. Included by csrc/superquantile/cuda.cu and by kernels that end in such a row.
//
// Losses are held as ordered keys (core/total_order.h), kAbsent where there is none, and the
// threshold is found between the smallest and the largest by halving: the group weighs the losses
// from a middle on, half way in value and half way in keys by turns. The first soon finds a place
// among ordinary numbers, the second never takes more than the bits of a key. Without weights, the
// last 32 that are left are ranked by one comparison with each of them. A last pass adds up what
// lies above the threshold, in double.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>

#include "core/cuda.h"
#include "core/total_order.h"
#include "superquantile/fused_tail.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CUDA {

using namespace core::cuda;

// Below the key of any loss.
constexpr unsigned kAbsent = 0;

template <typename T>
__device__ __forceinline__ core::ordered_key_t<T> key_of(T loss) {
  return core::to_ordered_key(loss + T(0));  // no -0
}

// What weighs losses: their number, or the sum of their weights.
struct Counted {
  using Mass = unsigned;
};
struct Weighted {
  using Mass = double;
};

// The place half way between two losses, in (low, high].
template <typename T, typename Key>
__device__ __forceinline__ Key middle_of(Key low, Key high, bool by_value) {
  if (by_value) {
    const T middle = core::from_ordered_key<T>(low) / 2 + core::from_ordered_key<T>(high) / 2;
    if (middle - middle == 0) {  // finite
      const Key key = key_of(middle);
      return key <= low ? low + 1 : (key > high ? high : key);
    }
  }
  return low + (high - low) / 2 + 1;
}

// --- groups of threads ---------------------------------------------------------------------------

struct WarpGroup {
  static constexpr int kMostWarps = 4;  // of a block

  template <typename T, typename Operation>
  static __device__ __forceinline__ T reduce(T value, T, Operation operation) {
    return warp_reduce(value, operation);
  }
  // Puts a key into the next free slot, in any order. All threads call it together.
  template <typename Key>
  static __device__ __forceinline__ void append(bool wanted, Key key, Key* slots, unsigned& used) {
    const unsigned wanting = __ballot_sync(kAllLanes, wanted);
    if (wanted) slots[used + __popc(wanting & ((1u << lane()) - 1))] = key;
    used += __popc(wanting);
  }
  // Memory for kWarp keys of this group.
  template <typename Key>
  static __device__ __forceinline__ Key* slots() {
    __shared__ Key of_warps[kMostWarps][kWarp];
    return of_warps[warp()];
  }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
};

struct BlockGroup {
  template <typename T, typename Operation>
  static __device__ __forceinline__ T reduce(T value, T neutral, Operation operation) {
    return block_reduce(value, neutral, operation);
  }
  template <typename Key>
  static __device__ __forceinline__ void append(bool wanted, Key key, Key* slots, unsigned&) {
    if (wanted) slots[atomicAdd(counter(), 1u)] = key;
  }
  template <typename Key>
  static __device__ __forceinline__ Key* slots() {
    __shared__ Key of_block[kWarp];
    if (threadIdx.x == 0) *counter() = 0;
    __syncthreads();
    return of_block;
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }

 private:
  static __device__ __forceinline__ unsigned* counter() {
    __shared__ unsigned used;
    return &used;
  }
};

// --- items ---------------------------------------------------------------------------------------

// The mass of item i, whose key this is: counted ones have none in memory.
template <typename Kind, typename Key>
__device__ __forceinline__ typename Kind::Mass mass_of(Key key, const typename Kind::Mass* masses,
                                                       int i) {
  if constexpr (std::is_same_v<Kind, Weighted>) {
    return masses[i];
  } else {
    return key != kAbsent ? 1u : 0u;
  }
}

// What a thread holds of a row. for_each calls f(key, mass) for each item.
template <typename Key, typename Kind, int kItems>
struct InRegisters {
  Key keys[kItems];
  typename Kind::Mass masses[kItems];  // of weighted ones

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) f(keys[i], mass_of<Kind>(keys[i], masses, i));
  }
};

// A row of the block's shared memory, of which a thread takes every blockDim.x-th item.
template <typename Key, typename Kind>
struct InShared {
  const Key* keys;                    // [n]
  const typename Kind::Mass* masses;  // [n] of weighted ones
  int n;

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      f(keys[i], mass_of<Kind>(keys[i], masses, i));
    }
  }
};

// --- selection -----------------------------------------------------------------------------------

// Of `slots`, kWarp keys or fewer that lie in the bracket: the largest from which on, with the
// `above` ones, there are `wanted` losses. One key in each lane.
template <typename Key>
__device__ __forceinline__ Key rank_few(const Key* slots, unsigned used, unsigned above,
                                        double wanted) {
  const Key mine = static_cast<unsigned>(lane()) < used ? slots[lane()] : Key(kAbsent);
  unsigned at_least = above;
#pragma unroll
  for (int other = 0; other < kWarp; ++other) {
    at_least += __shfl_sync(kAllLanes, mine, other) >= mine ? 1u : 0u;
  }
  const bool reached = mine != kAbsent && static_cast<double>(at_least) >= wanted;
  return warp_max(reached ? mine : Key(kAbsent));
}

// The tail of the group's row, in every thread. Losses whose mass is 0 must be absent.
template <typename T, typename Kind, typename Group, typename Items>
__device__ __forceinline__ Result tail_of(const Items& items, double tail_fraction,
                                          double rounding) {
  using Key = core::ordered_key_t<T>;
  using Mass = typename Kind::Mass;
  Mass total = 0;
  Key low = ~Key(0), high = kAbsent;
  items.for_each([&](Key key, Mass mass) {
    total += mass;
    low = key != kAbsent && key < low ? key : low;
    high = key > high ? key : high;
  });
  total = Group::reduce(total, Mass(0), Sum());
  low = Group::reduce(low, ~Key(0), Minimum());
  high = Group::reduce(high, Key(kAbsent), Maximum());
  const double total_weight = static_cast<double>(total);
  // superquantile: weight, mask: expected a positive and finite sum in every reduction
  CUDA_KERNEL_ASSERT(total_weight > 0 && total_weight - total_weight == 0);
  const double wanted = tail_target(tail_fraction, total_weight, rounding);

  Mass at_least_low = total, above_high = 0;
  for (bool by_value = true; low < high; by_value = !by_value) {
    if constexpr (std::is_same_v<Kind, Counted>) {
      if (at_least_low - above_high <= kWarp) {
        Key* const slots = Group::template slots<Key>();
        unsigned used = 0;
        items.for_each(
            [&](Key key, Mass) { Group::append(low <= key && key <= high, key, slots, used); });
        Group::sync();
        low = rank_few(slots, at_least_low - above_high, above_high, wanted);
        break;
      }
    }
    const Key middle = middle_of<T>(low, high, by_value);
    Mass at_least = 0;
    items.for_each([&](Key key, Mass mass) { at_least += key >= middle ? mass : Mass(0); });
    at_least = Group::reduce(at_least, Mass(0), Sum());
    if (static_cast<double>(at_least) >= wanted) {
      low = middle;
      at_least_low = at_least;
    } else {
      high = middle - 1;
      above_high = at_least;
    }
  }

  const Key threshold = low;
  Mass above = 0, at = 0;
  double sum = 0;
  items.for_each([&](Key key, Mass mass) {
    at += key == threshold ? mass : Mass(0);
    if (key > threshold) {
      above += mass;
      sum += static_cast<double>(core::from_ordered_key<T>(key)) * static_cast<double>(mass);
    }
  });
  above = Group::reduce(above, Mass(0), Sum());
  at = Group::reduce(at, Mass(0), Sum());
  sum = Group::reduce(sum, 0.0, Sum());
  return tail_result(tail_fraction, total_weight,
                     static_cast<double>(core::from_ordered_key<T>(threshold)),
                     static_cast<double>(above), static_cast<double>(at), sum);
}

// --- rows in memory ------------------------------------------------------------------------------

// An element of a matrix.
template <typename T>
__device__ __forceinline__ T element(const Matrix& matrix, int64_t offset) {
  T value;
  for_dtype<T>(matrix.dtype, [&](auto zero) {
    value = static_cast<T>(static_cast<const decltype(zero)*>(matrix.data)[offset]);
  });
  return value;
}

// The weight of a loss: 0 where masked, 1 if there are neither weights nor masks.
__device__ __forceinline__ double weight_at(const Losses& in, int64_t row, int64_t i) {
  // bytes: a bool tensor may hold others than 0 and 1
  const auto* mask = static_cast<const uint8_t*>(in.mask.data);
  if (mask != nullptr && mask[row * in.mask.row_stride + i * in.mask.stride] == 0) return 0.0;
  if (in.weight.data == nullptr) return 1.0;
  const double weight =
      element<double>(in.weight, row * in.weight.row_stride + i * in.weight.stride);
  // superquantile: weight: expected finite values >= 0
  CUDA_KERNEL_ASSERT(weight >= 0 && weight - weight == 0);
  return weight;
}

// kRun losses that one thread takes from adjacent places, `i` a multiple of it.
constexpr int kRun = 4;

// Whether a matrix consists of aligned runs of so many numbers.
inline bool in_runs(const Matrix& matrix, int64_t rows, int64_t n, int64_t run) {
  const int64_t bytes = run * core::element_size(matrix.dtype);
  return matrix.stride == 1 && n % run == 0 && (rows == 1 || matrix.row_stride % run == 0) &&
         reinterpret_cast<uintptr_t>(matrix.data) % std::min<int64_t>(bytes, 16) == 0;
}

// The keys of losses i, i + 1, ... of a row, absent from n on and where they weigh nothing.
template <typename T, typename Kind>
__device__ __forceinline__ void read_run(const Losses& in, bool runs, int64_t row, int64_t i,
                                         core::ordered_key_t<T> (&keys)[kRun],
                                         typename Kind::Mass (&masses)[kRun]) {
  for_dtype<T>(in.losses.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* losses = static_cast<const scalar_t*>(in.losses.data) + row * in.losses.row_stride;
    if (runs && i < in.n) {
      const auto run = *reinterpret_cast<const Vector<scalar_t, kRun>*>(losses + i);
#pragma unroll
      for (int j = 0; j < kRun; ++j) keys[j] = key_of(static_cast<T>(run.values[j]));
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        keys[j] = kAbsent;
        if (i + j < in.n) keys[j] = key_of(static_cast<T>(losses[(i + j) * in.losses.stride]));
      }
    }
  });
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const bool present = i + j < in.n;
    if constexpr (std::is_same_v<Kind, Weighted>) {
      masses[j] = present ? weight_at(in, row, i + j) : 0.0;
      if (!(masses[j] > 0)) keys[j] = kAbsent;
    } else if (in.mask.data != nullptr) {
      if (present && !(weight_at(in, row, i + j) > 0)) keys[j] = kAbsent;
    }
  }
}

// A thread's share of a row that `threads` of them hold: runs that are `threads` runs apart.
template <typename T, typename Kind, int kItems>
__device__ __forceinline__ auto read_items(const Losses& in, bool runs, int64_t row, int thread,
                                           int threads) {
  static_assert(kItems % kRun == 0);
  InRegisters<core::ordered_key_t<T>, Kind, kItems> items;
#pragma unroll
  for (int first = 0; first < kItems; first += kRun) {
    core::ordered_key_t<T> keys[kRun];
    typename Kind::Mass masses[kRun];
    read_run<T, Kind>(in, runs, row, static_cast<int64_t>(first) * threads + thread * kRun, keys,
                      masses);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      items.keys[first + j] = keys[j];
      if constexpr (std::is_same_v<Kind, Weighted>) items.masses[first + j] = masses[j];
    }
  }
  return items;
}

__device__ __forceinline__ void write_result(const Result& result, core::Dtype dtype, int64_t row,
                                             const Tails& tails) {
  core::cuda::for_dtype(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    static_cast<scalar_t*>(tails.value)[row] = static_cast<scalar_t>(result.value);
    static_cast<scalar_t*>(tails.threshold)[row] = static_cast<scalar_t>(result.threshold);
  });
  tails.counts[row] = result.counts;
}

// The tail of losses that other kernels compute, by the last of their blocks: one launch less.
struct Finish {
  unsigned* ticket = nullptr;  // null: no tail is wanted
  double tail_fraction = 0;
  Sequence extra;
  Tails tails{};
};

// The same for a launch, until which it is to be kept.
template <typename T>
struct FinishOfLaunch {
  Finish finish;
  size_t shared_bytes = 0;  // that the block needs of dynamic shared memory

  FinishOfLaunch(const FusedTail* tail, int64_t losses) {  // null: none is wanted
    if (tail == nullptr) return;
    ticket_.emplace();
    finish = {ticket_->get(), tail->tail_fraction, Sequence(tail->extra), tail->tails};
    shared_bytes = static_cast<size_t>(losses) * sizeof(T);
  }

 private:
  std::optional<Ticket> ticket_;
};

// Called by all threads of all `blocks` blocks of a kernel, if a tail is wanted, once they have
// written their losses, of which those count for which present(i) holds.
template <typename T, typename Present>
__device__ __forceinline__ void finish_tail(const Finish& finish, unsigned blocks, T* losses,
                                            int64_t size, const Present& present) {
  using Key = core::ordered_key_t<T>;
  if (!last_block(finish.ticket, blocks)) return;
  Key* const keys = reinterpret_cast<Key*>(dynamic_shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    T loss = __ldcg(losses + i);
    if (finish.extra.data != nullptr) {
      loss += read<T>(finish.extra, i);
      losses[i] = loss;
    }
    keys[i] = present(i) ? key_of(loss) : Key(kAbsent);
  }
  __syncthreads();
  const InShared<Key, Counted> items{keys, nullptr, static_cast<int>(size)};
  const Result result =
      tail_of<T, Counted, BlockGroup>(items, finish.tail_fraction, kAlphaRounding);
  if (threadIdx.x == 0) {
    write_result(result, core::kDtypeOf<T>, 0, finish.tails);
  }
}

}  // namespace sqloss::superquantile::CUDA
