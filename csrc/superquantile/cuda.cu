// CUDA kernels of the superquantile.
//
// backward  One read of the losses, one write of the gradient, 16 bytes at a time where they lie
//           together; the row's threshold and counts come from the cache. A block is kThreads
//           threads, x along a row by y rows: x is a power of two that leaves a thread up to
//           kPerThread accesses, so that short rows share a block, long rows are split over blocks
//           and the divisions of a row's density are made for many losses at once. Each element
//           is written by one thread from its own loss: nothing to synchronise, the same bits for
//           every grid.
#include <algorithm>

#include "core/cuda.h"
#include "core/total_order.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile::CUDA {
namespace {

using namespace core::cuda;

template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// f(zero of the C++ type) on the host.
template <typename F>
void for_losses(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kHalf:
      return f(at::Half());
    case at::kBFloat16:
      return f(at::BFloat16());
    default:
      TORCH_CHECK_TYPE(false, "superquantile: losses: expected float16, bfloat16, float32 or ",
                       "float64, got ", dtype);
  }
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

// kCount losses for one access: more than one where neither weights nor masks nor strides are.
template <typename scalar_t, int kCount>
__global__ void __launch_bounds__(kThreads) backward_kernel(Losses in,            // [rows, n]
                                                            Tails tails,          // [rows]
                                                            Gradients gradients,  // [rows] or null
                                                            Matrix grad_losses,   // [rows, n]
                                                            Tile tile) {
  using T = compute_t<scalar_t>;
  const int x = static_cast<int>(threadIdx.x) % tile.x, y = static_cast<int>(threadIdx.x) / tile.x;
  const int64_t row = (blockIdx.x / tile.chunks_per_row) * (kThreads / tile.x) + y;
  if (row >= in.rows) return;
  const int64_t begin = (blockIdx.x % tile.chunks_per_row) * tile.chunk;
  const int64_t accesses = in.n / kCount;
  const int64_t end = begin + tile.chunk < accesses ? begin + tile.chunk : accesses;

  const T threshold = static_cast<T>(static_cast<const scalar_t*>(tails.threshold)[row]);
  const Density density =
      gradient_density(read<scalar_t>(gradients.value, row),
                       read<scalar_t>(gradients.threshold, row), tails.counts[row]);
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
    // bytes: a bool tensor may hold others than 0 and 1
    const uint8_t* mask = static_cast<const uint8_t*>(in.mask.data);
    if (mask != nullptr) mask += row * in.mask.row_stride;
    for (int64_t i = begin + x; i < end; i += tile.x) {
      const int order = core::compare(static_cast<T>(losses[i * in.losses.stride]), threshold);
      const double d = order > 0 ? density.above : density.at;
      const bool counts = mask == nullptr || mask[i * in.mask.stride] != 0;
      const double w = counts ? weight_at(in.weight, row, i) : 0.0;
      // No product outside of the tail: 0 whatever gradient comes in
      grad[i * grad_losses.stride] = static_cast<scalar_t>(order >= 0 && w > 0 ? d * w : 0.0);
    }
  }
}

Tile tile_for(int64_t accesses) {
  Tile tile{8, 1, accesses};
  while (tile.x < kThreads && tile.x * kPerThread < accesses) tile.x *= 2;
  tile.chunk = tile.x * kPerThread;
  tile.chunks_per_row = (accesses + tile.chunk - 1) / tile.chunk;
  return tile;
}

// Whether every row of a matrix consists of whole accesses of kCount numbers.
template <typename scalar_t, int kCount>
bool in_vectors(const Matrix& matrix, int64_t rows, int64_t n) {
  return matrix.stride == 1 && n % kCount == 0 && (rows == 1 || matrix.row_stride % kCount == 0) &&
         reinterpret_cast<uintptr_t>(matrix.data) % (sizeof(scalar_t) * kCount) == 0;
}

void backward(const Losses& in, const Tails& tails, const Gradients& gradients,
              const Matrix& grad_losses) {
  for_losses(in.losses.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kCount = 16 / sizeof(scalar_t);
    const bool vectors = in.weight.data == nullptr && in.mask.data == nullptr &&
                         in_vectors<scalar_t, kCount>(in.losses, in.rows, in.n) &&
                         in_vectors<scalar_t, kCount>(grad_losses, in.rows, in.n);
    const Tile tile = tile_for(vectors ? in.n / kCount : in.n);
    const int64_t rows_per_block = kThreads / tile.x;
    const int64_t blocks = (in.rows + rows_per_block - 1) / rows_per_block * tile.chunks_per_row;
    launch(vectors ? backward_kernel<scalar_t, kCount> : backward_kernel<scalar_t, 1>, grid(blocks),
           kThreads, 0, in, tails, gradients, grad_losses, tile);
  });
}

}  // namespace

const Kernels kernels{nullptr, backward};

}  // namespace sqloss::superquantile::CUDA
