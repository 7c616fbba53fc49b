// CUDA kernels of the superquantile.
//
// forward   A row is held by a warp up to 1,024 losses (512 of double, 128 with weights), by a
// block
//           up to 12,288 in registers (8,192; 8,192; 4,096 of both), or beyond in shared memory
//           where there are several rows (cuda_selection.h): one read, one launch. Longer rows are
//           taken by many blocks (cuda_radix.h): three reads from the cache, or one where no cache
//           holds them.
// backward  One read of the losses, one write of the gradient, 16 bytes at a time where they lie
//           together; the row's threshold and counts come from the cache. A block is kThreads
//           threads, x along a row by y rows: x is a power of two that leaves a thread up to
//           kPerThread accesses, so that short rows share a block, long rows are split over blocks
//           and the divisions of a row's density are made for many losses at once. Each element
//           is written by one thread from its own loss: nothing to synchronise, the same bits for
//           every grid.
#include <algorithm>
#include <cmath>

#include "core/cuda.h"
#include "core/dtype.h"
#include "core/total_order.h"
#include "superquantile/cuda_radix.h"
#include "superquantile/cuda_selection.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CUDA {
namespace {

template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// --- forward -------------------------------------------------------------------------------------

constexpr int kWarpsPerBlock = WarpGroup::kMostWarps;

template <typename T, typename Kind, int kItems>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    warp_forward(Losses in, bool runs, TailFraction tail_fraction, double rounding, Tails tails) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp();
  if (row >= in.rows) return;
  const auto items = read_items<T, Kind, kItems>(in, runs, row, lane(), kWarp);
  const Result result = tail_of<T, Kind, WarpGroup>(items, tail_fraction, rounding);
  if (lane() == 0) write_result(result, in.losses.dtype, row, tails);
}

template <typename T, typename Kind, int kItems>
__global__ void __launch_bounds__(kMaxThreads)
    block_forward(Losses in, bool runs, TailFraction tail_fraction, double rounding, Tails tails) {
  const int64_t row = blockIdx.x;
  const auto items = read_items<T, Kind, kItems>(in, runs, row, static_cast<int>(threadIdx.x),
                                                 static_cast<int>(blockDim.x));
  const Result result = tail_of<T, Kind, BlockGroup>(items, tail_fraction, rounding);
  if (threadIdx.x == 0) write_result(result, in.losses.dtype, row, tails);
}

template <typename T, typename Kind>
__global__ void __launch_bounds__(kMaxThreads)
    shared_forward(Losses in, bool runs, TailFraction tail_fraction, double rounding, Tails tails) {
  using Key = core::ordered_key_t<T>;
  using Mass = typename Kind::Mass;
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(in.n), padded = (n + kRun - 1) / kRun * kRun;
  // Masses first: they need the larger alignment
  Mass* const masses = reinterpret_cast<Mass*>(dynamic_shared_memory());
  Key* const keys = reinterpret_cast<Key*>(masses + (std::is_same_v<Kind, Weighted> ? padded : 0));
  for (int i = static_cast<int>(threadIdx.x) * kRun; i < n; i += kMaxThreads * kRun) {
    Key run[kRun];
    Mass run_masses[kRun];
    read_run<T, Kind>(in, runs, row, i, run, run_masses);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      keys[i + j] = run[j];
      if constexpr (std::is_same_v<Kind, Weighted>) masses[i + j] = run_masses[j];
    }
  }
  __syncthreads();
  const InShared<Key, Kind> items{keys, masses, n};
  const Result result = tail_of<T, Kind, BlockGroup>(items, tail_fraction, rounding);
  if (threadIdx.x == 0) write_result(result, in.losses.dtype, row, tails);
}

// Losses that a thread of a block holds in registers: as many as leave room for 1,024 threads.
template <typename T, typename Kind>
constexpr int kBlockItems = 16 - (sizeof(T) > 4 ? 4 : 0) - (std::is_same_v<Kind, Weighted> ? 8 : 4);

// Rows of more losses than this, 32 MB of floats, are read once; less is cached between rounds.
#ifndef SQLOSS_LONG_ROW  // the emulation of CUDA, which is slow, has a smaller one
#define SQLOSS_LONG_ROW (int64_t(1) << 23)
#endif
constexpr int64_t kLongRow = SQLOSS_LONG_ROW;

// Rows that blocks share are taken some at a time: no more than the cache holds between rounds, and
// of long rows what fills a device and needs little room for the losses kept.
int64_t rows_at_a_time(int64_t rows, int64_t n) {
  constexpr int64_t kMost = 256, kMostLong = 16;
  return std::min(rows, n > kLongRow ? kMostLong : std::clamp<int64_t>(kLongRow / n, 1, kMost));
}

// A part of the rows.
Losses rows_from(const Losses& in, int64_t begin, int64_t count) {
  Losses part = in;
  part.rows = count;
  for (Matrix* matrix : {&part.losses, &part.weight, &part.mask}) {
    if (matrix->data == nullptr) continue;
    matrix->data = static_cast<char*>(matrix->data) +
                   begin * matrix->row_stride * core::element_size(matrix->dtype);
  }
  return part;
}
Tails rows_from(const Tails& tails, int64_t begin, core::Dtype dtype) {
  const int64_t bytes = begin * core::element_size(dtype);
  return {static_cast<char*>(tails.value) + bytes, static_cast<char*>(tails.threshold) + bytes,
          tails.counts + begin};
}

// Reserves a search's memory: what has to be zero first, then the rest.
template <typename Key, typename Kind>
struct WorkspaceRoom {
  using Types = Workspace<Key, Kind>;
  size_t searches = 0, bins = 0, sums = 0;

  void reserve_zeros(Memory& memory, int64_t rows) {
    searches = memory.reserve<std::remove_pointer_t<decltype(Types::searches)>>(rows);
    if (std::is_same_v<Kind, Counted>) bins = memory.reserve<Count>(rows * kBins<Kind>);
  }
  void reserve_rest(Memory& memory, int64_t rows, int64_t chunks) {
    if (std::is_same_v<Kind, Weighted>) bins = memory.reserve<double>(rows * chunks * kBins<Kind>);
    sums = memory.reserve<double>(rows * chunks);
  }
  Types in(const Memory& memory) const {
    return {memory.at<std::remove_pointer_t<decltype(Types::searches)>>(searches),
            memory.at<typename Types::Mass>(bins), memory.at<double>(sums)};
  }
};

// The losses of a sample from n: about n^(2/3).
int64_t sample_size(int64_t n) {
  int64_t size = 1024;
  const double wanted = std::pow(static_cast<double>(n), 2.0 / 3);
  while (static_cast<double>(size) < wanted) size *= 2;
  return size;
}

// Twice as many as a bracket holds if the losses are different ones.
int64_t kept_capacity(int64_t n, const TailFraction& tail_fraction) {
  const double size = static_cast<double>(sample_size(n));
  const double f =
      tail_fraction.known() ? static_cast<double>(tail_fraction) : 0.5;  // which takes the most
  const double deviation = kDeviations * std::sqrt(size * f * (1 - f)) + 2;
  return std::min(n, static_cast<int64_t>(4 * deviation / size * static_cast<double>(n)) + 4096);
}

template <typename T, typename Kind>
void forward_rounds(const Losses& all, bool runs, const TailFraction& tail_fraction,
                    double rounding, const Tails& all_tails) {
  using Key = core::ordered_key_t<T>;
  const int64_t most_rows = rows_at_a_time(all.rows, all.n);
  const Chunks chunks(all.n);
  const bool bracketed = std::is_same_v<Kind, Counted> && all.n > kLongRow;
  const int64_t size = sample_size(all.n), capacity = kept_capacity(all.n, tail_fraction);
  const Chunks sample_chunks(size);

  Memory memory;
  WorkspaceRoom<Key, Kind> room;
  WorkspaceRoom<Key, Counted> sample_room;
  size_t brackets_at = 0, pass_sums_at = 0, sample_at = 0, kept_at = 0;
  room.reserve_zeros(memory, most_rows);
  if (bracketed) {
    sample_room.reserve_zeros(memory, 2 * most_rows);
    brackets_at = memory.reserve<Bracket<Key>>(most_rows);
  }
  const size_t zeros = memory.size();
  room.reserve_rest(memory, most_rows, chunks.per_row);
  if (bracketed) {
    pass_sums_at = memory.reserve<double>(most_rows * chunks.per_row * 2);
    sample_at = memory.reserve<Key>(most_rows * size);
    kept_at = memory.reserve<Key>(most_rows * capacity);
  }
  memory.allocate();
  Bracket<Key>* const brackets = bracketed ? memory.at<Bracket<Key>>(brackets_at) : nullptr;
  Key* const kept = bracketed ? memory.at<Key>(kept_at) : nullptr;

  for (int64_t begin = 0; begin < all.rows; begin += most_rows) {
    const int64_t rows = std::min(most_rows, all.rows - begin);
    const Losses in = rows_from(all, begin, rows);
    const Tails tails = rows_from(all_tails, begin, in.losses.dtype);
    memory.zero(0, zeros);
    if constexpr (std::is_same_v<Kind, Counted>) {
      if (bracketed) {
        Key* const sample = memory.at<Key>(sample_at);
        launch(take_sample<T>, grid(divide_up(size, kRadixThreads), rows), kRadixThreads, 0, in,
               size, sample);
        for (int round = 0; round < kRounds<Key, Counted>; ++round) {
          launch(sample_round<T>, grid(sample_chunks.per_row, 2 * rows), kRadixThreads, 0, sample,
                 size, tail_fraction, sample_chunks, round, sample_room.in(memory), brackets);
        }
        core::for_dtype(in.losses.dtype, [&](auto zero) {
          using scalar_t = decltype(zero);
          if constexpr (std::is_same_v<compute_t<scalar_t>, T>) {
            launch(take_pass<T, scalar_t>, grid(chunks.per_row, rows), kRadixThreads,
                   kRadixWarps * kRegion<Key> * sizeof(Key), RowSource<T, Counted>{in, runs},
                   tail_fraction, rounding, chunks, brackets, memory.at<double>(pass_sums_at), kept,
                   capacity, tails);
          }
        });
      }
    }
    for (int round = 0; round < kRounds<Key, Kind>; ++round) {
      launch(rows_round<T, Kind>, grid(chunks.per_row, rows), kRadixThreads, 0,
             RowSource<T, Kind>{in, runs}, tail_fraction, rounding, chunks, round, room.in(memory),
             tails, brackets, kept, capacity);
    }
  }
}

template <typename T, typename Kind>
void forward_of(const Losses& in, const TailFraction& tail_fraction, const Tails& tails) {
  using Key = core::ordered_key_t<T>;
  constexpr bool kIsWeighted = std::is_same_v<Kind, Weighted>;
  const double rounding =
      kAlphaRounding + (kIsWeighted ? static_cast<double>(in.n) * kSumRounding : 0.0);
  const bool runs = in_runs(in.losses, in.rows, in.n, kRun);

  const auto by_warps = [&](auto kernel) {
    launch(kernel, grid(divide_up(in.rows, kWarpsPerBlock)), kWarpsPerBlock * kWarp, 0, in, runs,
           tail_fraction, rounding, tails);
  };
  if (in.n <= 4 * kWarp) return by_warps(warp_forward<T, Kind, 4>);
  if constexpr (!kIsWeighted) {
    if (in.n <= 16 * kWarp) return by_warps(warp_forward<T, Kind, 16>);
    if constexpr (std::is_same_v<T, float>) {
      if (in.n <= 32 * kWarp) return by_warps(warp_forward<T, Kind, 32>);
    }
  }
  constexpr int kItems = kBlockItems<T, Kind>;
  if (in.n <= kItems * kMaxThreads) {
    int threads = 2 * kWarp;
    while (threads * kItems < in.n) threads *= 2;
    return launch(block_forward<T, Kind, kItems>, grid(in.rows), threads, 0, in, runs,
                  tail_fraction, rounding, tails);
  }
  // What the block's own variables take is below this
  constexpr int64_t kOtherShared = 2048;
  const int64_t padded = divide_up(in.n, kRun) * kRun;
  const int64_t bytes =
      padded * static_cast<int64_t>(sizeof(Key) + (kIsWeighted ? sizeof(double) : 0));
  if (in.rows > 1 && bytes <= static_cast<int64_t>(shared_memory_limit()) - kOtherShared) {
    return launch(shared_forward<T, Kind>, grid(in.rows), kMaxThreads, static_cast<size_t>(bytes),
                  in, runs, tail_fraction, rounding, tails);
  }
  forward_rounds<T, Kind>(in, runs, tail_fraction, rounding, tails);
}

void forward(const Losses& in, const TailFraction& tail_fraction, const Tails& tails) {
  const bool weighted = in.weight.data != nullptr;
  core::for_dtype(in.losses.dtype, [&](auto zero) {
    using T = compute_t<decltype(zero)>;
    weighted ? forward_of<T, Weighted>(in, tail_fraction, tails)
             : forward_of<T, Counted>(in, tail_fraction, tails);
  });
}

// --- backward ------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kPerThread = 8;

struct Tile {
  int x;                   // threads along a row
  int64_t chunks_per_row;  // blocks along a row
  int64_t chunk;           // accesses of one of them
};

template <typename scalar_t>
__device__ double gradient_at(const void* data, int64_t row) {
  return data == nullptr ? 0.0 : static_cast<double>(static_cast<const scalar_t*>(data)[row]);
}

// kCount losses for one access: more than one where neither weights nor masks nor strides are.
template <typename scalar_t, int kCount>
__global__ void __launch_bounds__(kThreads) backward_kernel(Losses in,            // [rows, n]
                                                            Tails tails,          // [rows]
                                                            Gradients gradients,  // [rows] or null
                                                            Matrix grad_losses,   // [rows, n]
                                                            Tile tile) {
  using T = compute_t<scalar_t>;
  const int x = static_cast<int>(threadIdx.x) % tile.x, y = static_cast<int>(threadIdx.x) / tile.x;
  const int64_t rows_before = divide(blockIdx.x, tile.chunks_per_row);
  const int64_t row = rows_before * (kThreads / tile.x) + y;
  if (row >= in.rows) return;
  const int64_t begin = (blockIdx.x - rows_before * tile.chunks_per_row) * tile.chunk;
  const int64_t accesses = in.n / kCount;
  const int64_t end = begin + tile.chunk < accesses ? begin + tile.chunk : accesses;

  const T threshold = static_cast<T>(static_cast<const scalar_t*>(tails.threshold)[row]);
  const Density density =
      gradient_density(gradient_at<scalar_t>(gradients.value, row),
                       gradient_at<scalar_t>(gradients.threshold, row), tails.counts[row]);
  const scalar_t* losses =
      static_cast<const scalar_t*>(in.losses.data) + row * in.losses.row_stride;
  scalar_t* grad = static_cast<scalar_t*>(grad_losses.data) + row * grad_losses.row_stride;

  if constexpr (kCount > 1) {
    using Access = Vector<scalar_t, kCount>;
    const scalar_t above = static_cast<scalar_t>(density.above),
                   at = static_cast<scalar_t>(density.at);
    for (int64_t i = begin + x; i < end; i += tile.x) {
      const Access loss = reinterpret_cast<const Access*>(losses)[i];
      Access gradient;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int order = core::compare(static_cast<T>(loss.values[j]), threshold);
        gradient.values[j] = order > 0 ? above : (order == 0 ? at : scalar_t(0));
      }
      reinterpret_cast<Access*>(grad)[i] = gradient;
    }
  } else {
    for (int64_t i = begin + x; i < end; i += tile.x) {
      const int order = core::compare(static_cast<T>(losses[i * in.losses.stride]), threshold);
      const double d = order > 0 ? density.above : density.at;
      const double w = weight_at(in, row, i);
      // No product outside of the tail: 0 whatever gradient comes in
      grad[i * grad_losses.stride] = static_cast<scalar_t>(order >= 0 && w > 0 ? d * w : 0.0);
    }
  }
}

Tile tile_for(int64_t accesses) {
  Tile tile{8, 1, accesses};
  while (tile.x < kThreads && tile.x * kPerThread < accesses) tile.x *= 2;
  tile.chunk = tile.x * kPerThread;
  tile.chunks_per_row = divide_up(accesses, tile.chunk);
  return tile;
}

void backward(const Losses& in, const Tails& tails, const Gradients& gradients,
              const Matrix& grad_losses) {
  core::for_dtype(in.losses.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kCount = 16 / sizeof(scalar_t);
    const bool vectors = in.weight.data == nullptr && in.mask.data == nullptr &&
                         in_runs(in.losses, in.rows, in.n, kCount) &&
                         in_runs(grad_losses, in.rows, in.n, kCount);
    const Tile tile = tile_for(vectors ? in.n / kCount : in.n);
    const int64_t rows_per_block = kThreads / tile.x;
    const int64_t blocks = divide_up(in.rows, rows_per_block) * tile.chunks_per_row;
    launch(vectors ? backward_kernel<scalar_t, kCount> : backward_kernel<scalar_t, 1>, grid(blocks),
           kThreads, 0, in, tails, gradients, grad_losses, tile);
  });
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::superquantile::CUDA
