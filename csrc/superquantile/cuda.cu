// CUDA kernel of the superquantile's gradient.
//
// One read of the losses, one write of the gradient; the row's threshold and counts come from the
// cache. A block is kThreads threads as x along a row by y rows: x is the smallest power of two
// that covers the row, so that short rows share a block and long rows are split over blocks. Each
// element is written by one thread from its own loss: nothing to synchronise, the same bits for
// every grid.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

#include <algorithm>

#include "core/total_order.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile {
namespace {

constexpr int kThreads = 256;
// Losses a thread handles: enough to amortise the row's density, few enough to fill the device.
constexpr int64_t kPerThread = 8;

struct Tile {
  int x, y;                // threads along a row, rows in a block
  int64_t chunks_per_row;  // blocks along a row
  int64_t chunk;           // losses of one of them
};

template <typename scalar_t>
__device__ double read(const void* data, int64_t row) {
  return data == nullptr ? 0.0 : static_cast<double>(static_cast<const scalar_t*>(data)[row]);
}

// The weight of a loss: 1 if there are none.
__device__ double weight_at(const Matrix& weight, int64_t row, int64_t i) {
  if (weight.data == nullptr) return 1.0;
  const int64_t offset = row * weight.row_stride + i * weight.stride;
  return weight.dtype == at::kFloat
             ? static_cast<double>(static_cast<const float*>(weight.data)[offset])
             : static_cast<const double*>(weight.data)[offset];
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) backward_kernel(Losses in,            // [rows, n]
                                                            Tails tails,          // [rows]
                                                            Gradients gradients,  // [rows] or null
                                                            Matrix grad_losses,   // [rows, n]
                                                            Tile tile) {
  using T = at::opmath_type<scalar_t>;
  const int64_t row = (blockIdx.x / tile.chunks_per_row) * tile.y + threadIdx.y;
  if (row >= in.rows) return;
  const int64_t begin = (blockIdx.x % tile.chunks_per_row) * tile.chunk;
  const int64_t end = begin + tile.chunk < in.n ? begin + tile.chunk : in.n;

  const T threshold = static_cast<T>(static_cast<const scalar_t*>(tails.threshold)[row]);
  const Density density =
      gradient_density(read<scalar_t>(gradients.value, row),
                       read<scalar_t>(gradients.threshold, row), tails.counts[row]);
  const scalar_t* losses =
      static_cast<const scalar_t*>(in.losses.data) + row * in.losses.row_stride;
  // bytes: a bool tensor may hold others than 0 and 1
  const uint8_t* mask = static_cast<const uint8_t*>(in.mask.data);
  if (mask != nullptr) mask += row * in.mask.row_stride;
  scalar_t* grad = static_cast<scalar_t*>(grad_losses.data) + row * grad_losses.row_stride;

  for (int64_t i = begin + threadIdx.x; i < end; i += tile.x) {
    const int order = core::compare(static_cast<T>(losses[i * in.losses.stride]), threshold);
    const double d = order > 0 ? density.above : density.at;
    const bool counts = mask == nullptr || mask[i * in.mask.stride] != 0;
    const double w = counts ? weight_at(in.weight, row, i) : 0.0;
    // No product outside of the tail: 0 whatever gradient comes in
    grad[i * grad_losses.stride] = static_cast<scalar_t>(order >= 0 && w > 0 ? d * w : 0.0);
  }
}

Tile tile_for(int64_t n) {
  Tile tile{1, kThreads, 1, n};
  while (tile.x < kThreads && tile.x < n) {
    tile.x *= 2;
    tile.y /= 2;
  }
  tile.chunk = std::max<int64_t>(tile.x * kPerThread, 1);
  tile.chunks_per_row = (n + tile.chunk - 1) / tile.chunk;
  return tile;
}

}  // namespace

void cuda_backward(const Losses& in, const Tails& tails, const Gradients& gradients,
                   const Matrix& grad_losses) {
  if (in.rows == 0 || in.n == 0) return;
  const Tile tile = tile_for(in.n);
  const int64_t blocks = (in.rows + tile.y - 1) / tile.y * tile.chunks_per_row;
  TORCH_CHECK(blocks <= INT32_MAX,
              "superquantile_backward: losses: expected at most 2^31 blocks of ",
              kThreads * kPerThread, " losses, got ", blocks);
  const dim3 threads(tile.x, tile.y);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, in.losses.dtype, "superquantile_backward", [&] {
        backward_kernel<scalar_t>
            <<<static_cast<unsigned int>(blocks), threads, 0, at::cuda::getCurrentCUDAStream()>>>(
                in, tails, gradients, grad_losses, tile);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace sqloss::superquantile
