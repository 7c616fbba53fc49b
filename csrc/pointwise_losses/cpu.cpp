// CPU kernels of the pointwise losses; compiled once per CPU capability.
//
// forward   one read of the inputs, tile by tile: element losses into a tile, summed from there.
//           Short samples share tiles, long ones are split into chunks over the threads.
// backward  one read of the inputs of samples with gradient, one write of each gradient.
#include <ATen/Parallel.h>

#include <memory>

#include "core/tile.h"
#include "pointwise_losses/pointwise_losses.h"
#include "pointwise_losses/pointwise_losses_math.h"

namespace sqloss::pointwise_losses::CPU_CAPABILITY {
namespace {

using core::Strided;
using namespace core::CPU_CAPABILITY;

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 16384;
// Samples of no more elements share a tile: a tile of their own would be mostly its overhead.
constexpr int64_t kShort = 64;
// A part of a long sample, for one thread: 256 KiB of floats.
constexpr int64_t kChunk = 64 * kTile;

// --- tiles ---------------------------------------------------------------------------------------

// A tile of each input, and the buffers it may need.
template <typename T>
class InputTiles {
 public:
  const T *input, *target, *weight, *other;
  const bool plain;  // weight and other are all ones

  explicit InputTiles(const Inputs& in)
      : plain(in.weight.data == nullptr && in.other.data == nullptr), in_(in) {
    if (in.weight.data == nullptr || in.other.data == nullptr) {
      std::fill_n(ones_.data, kTile, T(1));
    }
  }

  void read(int64_t begin, int64_t count) {
    input = read_tile(in_.input, begin, count, buffers_[0]);
    target = read_tile(in_.target, begin, count, buffers_[1]);
    weight = read_or_ones(in_.weight, begin, count, buffers_[2]);
    other = read_or_ones(in_.other, begin, count, buffers_[3]);
  }

 private:
  const T* read_or_ones(const Strided& source, int64_t begin, int64_t count, Tile<T>& buffer) {
    return source.data == nullptr ? ones_.data : read_tile(source, begin, count, buffer);
  }

  const Inputs& in_;
  Tile<T> buffers_[4], ones_;
};

// The loops below are functions of their own: the compiler believes __restrict of parameters alone.
// A loss whose elements begin with a long chain of operations (Function::first) takes two loops: a
// core overlaps the work on more vectors of elements if each is a shorter chain. Factors that are
// all ones are left out, which changes no bit.

template <typename Function, typename T>
constexpr bool kInTwo = requires(const Function& loss, T x) { loss.first(x); };

template <typename Function, typename T>
[[gnu::noinline]] void first_tile(const Function& loss, const T* __restrict x, int64_t count,
                                  T* __restrict first) {
  for (int64_t i = 0; i < count; ++i) first[i] = loss.first(x[i]);
}

// losses holds what first_tile made, of a loss in two loops.
template <bool kPlain, typename Function, typename T>
[[gnu::noinline]] void loss_tile(const Function& loss, const T* __restrict x, const T* __restrict y,
                                 const T* __restrict weight, const T* __restrict other,
                                 int64_t count, T* __restrict losses) {
  for (int64_t i = 0; i < count; ++i) {
    const T o = kPlain ? T(1) : other[i];
    T element;
    if constexpr (kInTwo<Function, T>) {
      element = loss.loss(x[i], y[i], o, losses[i]);
    } else {
      element = loss.loss(x[i], y[i], o);
    }
    losses[i] = kPlain ? element : element * weight[i];
  }
}

template <bool kPlain, typename Function, typename T>
[[gnu::noinline]] void gradient_tile(const Function& loss, const T* __restrict x,
                                     const T* __restrict y, const T* __restrict weight,
                                     const T* __restrict other, const T* __restrict grad,
                                     int64_t count, T* __restrict grad_x) {
  for (int64_t i = 0; i < count; ++i) {
    const T o = kPlain ? T(1) : other[i], scale = kPlain ? grad[i] : grad[i] * weight[i];
    T derivative;
    if constexpr (kInTwo<Function, T>) {
      derivative = loss.derivatives(x[i], y[i], o, grad_x[i]).input;
    } else {
      derivative = loss.derivatives(x[i], y[i], o).input;
    }
    grad_x[i] = chain(grad[i], scale, derivative);
  }
}

template <typename Function, typename T>
[[gnu::noinline]] void gradient_tiles(const Function& loss, const T* __restrict x,
                                      const T* __restrict y, const T* __restrict weight,
                                      const T* __restrict other, const T* __restrict grad,
                                      int64_t count, T* __restrict grad_x, T* __restrict grad_y,
                                      T* __restrict grad_other) {
  for (int64_t i = 0; i < count; ++i) {
    const Derivatives<T> d = loss.derivatives(x[i], y[i], other[i]);
    const T scale = grad[i] * weight[i];
    grad_x[i] = chain(grad[i], scale, d.input);
    grad_y[i] = chain(grad[i], scale, d.target);
    grad_other[i] = chain(grad[i], scale, d.other);
  }
}

template <typename Function, typename T>
void write_losses(const Function& loss, const InputTiles<T>& in, int64_t count, T* losses) {
  if constexpr (kInTwo<Function, T>) first_tile(loss, in.input, count, losses);
  const auto write = in.plain ? loss_tile<true, Function, T> : loss_tile<false, Function, T>;
  write(loss, in.input, in.target, in.weight, in.other, count, losses);
}

// --- forward -------------------------------------------------------------------------------------

// Tiles of whole samples.
template <typename Function, typename T>
void forward_short(const Inputs& in, const Function& loss, T* losses) {
  const int64_t n = in.elements, per_tile = kTile / n;
  at::parallel_for(0, (in.samples + per_tile - 1) / per_tile, std::max<int64_t>(1, kGrain / kTile),
                   [&](int64_t begin, int64_t end) {
                     InputTiles<T> tiles(in);
                     Tile<T> elements;
                     for (int64_t tile = begin; tile < end; ++tile) {
                       const int64_t first = tile * per_tile;
                       const int64_t samples = std::min(per_tile, in.samples - first);
                       tiles.read(first * n, samples * n);
                       if (n == 1) {  // the sum and mean of one
                         write_losses(loss, tiles, samples, losses + first);
                         continue;
                       }
                       write_losses(loss, tiles, samples * n, elements.data);
                       for (int64_t s = 0; s < samples; ++s) {
                         double sum = 0;
                         for (int64_t i = 0; i < n; ++i)
                           sum += static_cast<double>(elements.data[s * n + i]);
                         losses[first + s] = static_cast<T>(sum / in.divisor);
                       }
                     }
                   });
}

// Chunks of one sample, whose sums are added in their order.
template <typename Function, typename T>
void forward_long(const Inputs& in, const Function& loss, T* losses) {
  const int64_t chunks = (in.elements + kChunk - 1) / kChunk;
  const std::unique_ptr<double[]> sums(new double[in.samples * chunks]);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(in.elements, kChunk));
  at::parallel_for(0, in.samples * chunks, grain, [&](int64_t begin, int64_t end) {
    InputTiles<T> tiles(in);
    Tile<T> elements;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / chunks;
      const int64_t from = task % chunks * kChunk, to = std::min(from + kChunk, in.elements);
      OrderedSum lanes;
      for (int64_t i = from; i < to; i += kTile) {
        const int64_t count = std::min(kTile, to - i);
        tiles.read(sample * in.elements + i, count);
        write_losses(loss, tiles, count, elements.data);
        lanes.add(elements.data, count);
      }
      sums[task] = lanes.total();
    }
  });
  for (int64_t s = 0; s < in.samples; ++s) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[s * chunks + c];
    losses[s] = static_cast<T>(sum / in.divisor);
  }
}

template <typename T>
void forward_typed(const Inputs& in, T* losses) {
  for_loss(in.loss, [&](const auto& make) {
    const auto loss = make(T(), in);
    in.elements <= kShort ? forward_short(in, loss, losses) : forward_long(in, loss, losses);
  });
}

// --- backward ------------------------------------------------------------------------------------

// Writes the gradients of tiles.
template <typename T>
class GradientTiles {
 public:
  explicit GradientTiles(const Gradients& gradients) : gradients_(gradients) {}

  template <typename Function>
  void write(const Function& loss, const InputTiles<T>& in, const T* grad, int64_t begin,
             int64_t count) {
    T* const x = place(gradients_.input, begin, count, buffers_[0]);
    if (gradients_.target.data == nullptr && gradients_.other.data == nullptr) {
      if constexpr (kInTwo<Function, T>) first_tile(loss, in.input, count, x);
      const auto write_x =
          in.plain ? gradient_tile<true, Function, T> : gradient_tile<false, Function, T>;
      write_x(loss, in.input, in.target, in.weight, in.other, grad, count, x);
    } else {
      T* const y = place(gradients_.target, begin, count, buffers_[1]);
      T* const other = place(gradients_.other, begin, count, buffers_[2]);
      gradient_tiles(loss, in.input, in.target, in.weight, in.other, grad, count, x, y, other);
      put(y, gradients_.target, begin, count);
      put(other, gradients_.other, begin, count);
    }
    put(x, gradients_.input, begin, count);
  }

  void write_zeros(int64_t begin, int64_t count) {
    for (const Strided* gradient : {&gradients_.input, &gradients_.target, &gradients_.other}) {
      if (gradient->data != nullptr) {
        core::CPU_CAPABILITY::write_zeros(*gradient, begin, count);
      }
    }
  }

 private:
  static T* place(const Strided& gradient, int64_t begin, int64_t count, Tile<T>& buffer) {
    return gradient.data == nullptr ? buffer.data : tile_to_write(gradient, begin, count, buffer);
  }
  static void put(const T* values, const Strided& gradient, int64_t begin, int64_t count) {
    if (gradient.data != nullptr) write_tile(values, gradient, begin, count);
  }

  const Gradients& gradients_;
  Tile<T> buffers_[3];
};

template <typename T>
bool all_zero(const T* values, int64_t count) {
  int64_t others = 0;
  for (int64_t i = 0; i < count; ++i) others += values[i] != T(0);
  return others == 0;
}

// Tiles of whole samples, with the gradient of each of their elements.
template <typename Function, typename T>
void backward_short(const Inputs& in, const Function& loss, const T* grad_losses,
                    const Gradients& gradients) {
  const int64_t n = in.elements, per_tile = kTile / n;
  const T divisor = static_cast<T>(in.divisor);
  at::parallel_for(0, (in.samples + per_tile - 1) / per_tile, std::max<int64_t>(1, kGrain / kTile),
                   [&](int64_t begin, int64_t end) {
                     InputTiles<T> tiles(in);
                     GradientTiles<T> outputs(gradients);
                     Tile<T> grads;
                     for (int64_t tile = begin; tile < end; ++tile) {
                       const int64_t first = tile * per_tile;
                       const int64_t samples = std::min(per_tile, in.samples - first);
                       const T* grad = grad_losses + first;
                       if (all_zero(grad, samples)) {
                         outputs.write_zeros(first * n, samples * n);
                         continue;
                       }
                       if (n > 1) {
                         for (int64_t s = 0; s < samples; ++s)
                           std::fill_n(grads.data + s * n, n, grad[s] / divisor);
                         grad = grads.data;
                       }
                       tiles.read(first * n, samples * n);
                       outputs.write(loss, tiles, grad, first * n, samples * n);
                     }
                   });
}

// Chunks of one sample.
template <typename Function, typename T>
void backward_long(const Inputs& in, const Function& loss, const T* grad_losses,
                   const Gradients& gradients) {
  const int64_t chunks = (in.elements + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(in.elements, kChunk));
  const T divisor = static_cast<T>(in.divisor);
  at::parallel_for(0, in.samples * chunks, grain, [&](int64_t begin, int64_t end) {
    InputTiles<T> tiles(in);
    GradientTiles<T> outputs(gradients);
    Tile<T> grads;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / chunks;
      const int64_t from = task % chunks * kChunk, to = std::min(from + kChunk, in.elements);
      const T grad = grad_losses[sample] / divisor;
      if (grad == T(0)) {
        outputs.write_zeros(sample * in.elements + from, to - from);
        continue;
      }
      std::fill_n(grads.data, std::min(kTile, to - from), grad);
      for (int64_t i = from; i < to; i += kTile) {
        const int64_t first = sample * in.elements + i, count = std::min(kTile, to - i);
        tiles.read(first, count);
        outputs.write(loss, tiles, grads.data, first, count);
      }
    }
  });
}

template <typename T>
void backward_typed(const Inputs& in, const T* grad_losses, const Gradients& gradients) {
  for_loss(in.loss, [&](const auto& make) {
    const auto loss = make(T(), in);
    in.elements <= kShort ? backward_short(in, loss, grad_losses, gradients)
                          : backward_long(in, loss, grad_losses, gradients);
  });
}

void forward(const Inputs& in, core::Dtype dtype, void* losses, const superquantile::FusedTail*) {
  dtype == core::Dtype::kDouble ? forward_typed(in, static_cast<double*>(losses))
                                : forward_typed(in, static_cast<float*>(losses));
}

void backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
              const Gradients& gradients) {
  dtype == core::Dtype::kDouble
      ? backward_typed(in, static_cast<const double*>(grad_losses), gradients)
      : backward_typed(in, static_cast<const float*>(grad_losses), gradients);
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::pointwise_losses::CPU_CAPABILITY
