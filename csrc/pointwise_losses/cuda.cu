// CUDA kernels of the pointwise losses.
//
// forward   one read of the inputs; element losses are summed in registers. A sample is read by a
//           group of threads: few lanes of a warp, a warp or a block. A long one is cut into chunks
//           for a block each, whose sums a second launch adds in their order. Of few samples the
//           last block to finish finds the tail.
// backward  the same groups: one read of the inputs of samples with gradient, one write of each
//           gradient. Of other samples nothing is read.
//
// A thread takes 32 bytes of computed numbers at a time, 8 floats: two loads of 16 bytes of floats,
// one of halves. Loads of all inputs are under way before the first is used: those of two inputs of
// floats, at 64 registers, are 64 KiB in a multiprocessor, where some 40 hide the memory's latency.
// Sums are in double from the first addition on: the sum of finite floats may not be a finite
// float.
#define CPU_CAPABILITY CUDA

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cuda.h"
#include "pointwise_losses/pointwise_losses.h"
#include "pointwise_losses/pointwise_losses_math.h"
#include "superquantile/cuda_selection.h"

namespace sqloss::pointwise_losses::CUDA {
namespace {

using namespace core::cuda;
using superquantile::CUDA::Finish;
using superquantile::CUDA::FinishOfLaunch;

constexpr int kThreads = 256;  // of a block, at most

// The elements that a thread computes at a time.
template <typename T>
constexpr int kVector = 32 / sizeof(T);

// A tensor as kernels take it, in samples of so many elements.
struct Column {
  Sequence sequence;
  bool vectors = false;  // that make up samples are adjacent in memory and aligned
  bool even = true;      // the elements of any thread lie a stride apart
  bool contiguous = false;

  Column(const core::Strided& strided, int64_t elements, int vector) : sequence(strided) {
    if (strided.data == nullptr) return;
    const bool in_vectors = elements % vector == 0;
    const size_t last = strided.sizes.size() - 1;
    even = last == 0 || strided.sizes[last] % (in_vectors ? vector : elements) == 0;
    const int64_t size = core::element_size(strided.dtype);
    const int64_t alignment = std::min<int64_t>(vector * size, 16);
    vectors = in_vectors && even && strided.strides[last] == 1 &&
              reinterpret_cast<uintptr_t>(strided.data) % alignment == 0;
    for (size_t d = 0; d < last; ++d) vectors &= strided.strides[d] * size % alignment == 0;
    contiguous = last == 0 && strided.strides[0] == 1;
  }

  __device__ __forceinline__ int64_t offset(int64_t index) const {
    return contiguous ? index : sequence.offset(index);
  }
  // Of elements that follow one another.
  __device__ __forceinline__ int64_t stride() const { return sequence.strides[sequence.dims - 1]; }
};

// Inputs as kernels take them. Samples of one element are taken as the elements of one.
struct Columns {
  int64_t samples, elements;
  double divisor;
  Column input, target, weight, other;

  Columns(const Inputs& in, int vector)
      : samples(in.elements == 1 ? 1 : in.samples),
        elements(in.elements == 1 ? in.samples : in.elements),
        divisor(in.divisor),
        input(in.input, elements, vector),
        target(in.target, elements, vector),
        weight(in.weight, elements, vector),
        other(in.other, elements, vector) {}

  bool even() const { return input.even && target.even && weight.even && other.even; }
};

// How samples are shared out: each chunk of them to 2^log_threads threads, a block or lanes of one
// warp.
struct Groups {
  bool one_element;  // samples have
  int log_threads = 0;
  int64_t chunk;   // elements of one
  int64_t chunks;  // of a sample
};

// The elements that a thread takes at a time: first + k * step for the k < kCount whose bit is set.
template <int kCount>
struct Place {
  static constexpr unsigned kAll = (1u << kCount) - 1;
  bool vector;  // all, and `first` is a multiple of kCount
  int64_t first;
  int step;
  unsigned inside;
};

// The group of a thread.
struct Group {
  int threads, thread;
  int64_t chunk;   // of all samples; may be beyond
  int64_t sample;  // may be beyond
  int64_t begin;
  int count;  // of elements from `begin` on

  __device__ __forceinline__ Group(const Columns& in, const Groups& groups)
      : threads(1 << groups.log_threads),
        thread(static_cast<int>(threadIdx.x) & (threads - 1)),
        chunk((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> groups.log_threads),
        sample(groups.chunks == 1 ? chunk : divide(chunk, groups.chunks)) {
    const int64_t first = (chunk - sample * groups.chunks) * groups.chunk;
    begin = sample * in.elements + first;
    const int64_t left = in.elements - first;
    count = static_cast<int>(left < groups.chunk ? left : groups.chunk);
  }

  // f(place) for the elements of the thread. Where whole vectors make up samples it takes those,
  // otherwise neighbouring threads take neighbours.
  template <int kCount, typename F>
  __device__ __forceinline__ void for_places(const Columns& in, const F& f) const {
    const bool vector = in.elements % kCount == 0;
    const int step = vector ? 1 : threads;
    for (int i = vector ? thread * kCount : thread; i < count; i += threads * kCount) {
      unsigned inside = Place<kCount>::kAll;
      if (!vector) {
#pragma unroll
        for (int k = 1; k < kCount; ++k) {
          if (i + k * step >= count) inside &= ~(1u << k);
        }
      }
      f(Place<kCount>{vector, begin + i, step, inside});
    }
  }
};

// The functions of the loss that a call names.
template <typename T>
struct AnyLoss {
  Loss named;
  BinaryCrossEntropyWithLogits<T> binary_cross_entropy_with_logits;
  Mse<T> mse;
  SmoothL1<T> smooth_l1;
  Huber<T> huber;
  GaussianNll<T> gaussian_nll;

  explicit AnyLoss(const Inputs& in)
      : named(in.loss),
        binary_cross_entropy_with_logits(in),
        mse(in),
        smooth_l1(in),
        huber(in),
        gaussian_nll(in) {}

  __device__ __forceinline__ T loss(T x, T y, T other) const {
    return of_named([&](const auto& functions) { return functions.loss(x, y, other); });
  }
  __device__ __forceinline__ Derivatives<T> derivatives(T x, T y, T other) const {
    return of_named([&](const auto& functions) { return functions.derivatives(x, y, other); });
  }

 private:
  template <typename F>
  __device__ __forceinline__ auto of_named(const F& f) const {
    switch (named) {
      case Loss::kBinaryCrossEntropyWithLogits:
        return f(binary_cross_entropy_with_logits);
      case Loss::kMse:
        return f(mse);
      case Loss::kSmoothL1:
        return f(smooth_l1);
      case Loss::kHuber:
        return f(huber);
      default:
        return f(gaussian_nll);
    }
  }
};

// --- elements in registers -----------------------------------------------------------------------

// Loads the elements that are wanted, stride * step apart; of a vector of a dtype narrower than T
// only the bits, so that no load waits for another's conversion. What is not wanted is undefined.
template <typename scalar_t, typename T, int kCount>
__device__ __forceinline__ void load(const scalar_t* from, bool vector, int64_t stride, int step,
                                     unsigned wanted, T (&values)[kCount]) {
  if (kCount > 1 && vector && wanted == Place<kCount>::kAll) {
    const auto bits = *reinterpret_cast<const Vector<scalar_t, kCount>*>(from);
    std::memcpy(values, &bits, sizeof(bits));
    return;
  }
  stride *= step;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (wanted >> k & 1) values[k] = static_cast<T>(from[k * stride]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void load(const Column& from, const Place<kCount>& place,
                                     unsigned wanted, T (&values)[kCount]) {
  const int64_t offset = from.offset(place.first);
  for_dtype<T>(from.sequence.dtype, [&](auto zero) {
    load(from.sequence.as<const decltype(zero)>() + offset, from.vectors, from.stride(), place.step,
         wanted, values);
  });
}

template <typename T, int kCount>
__device__ __forceinline__ void load_or_ones(const Column& from, const Place<kCount>& place,
                                             unsigned wanted, T (&values)[kCount]) {
  if (from.sequence.data != nullptr) return load(from, place, wanted, values);
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = T(1);
}

// Makes numbers of the bits that load() has left.
template <typename T, int kCount>
__device__ __forceinline__ void convert(const Column& from, unsigned wanted, T (&values)[kCount]) {
  if (kCount == 1 || !from.vectors || wanted != Place<kCount>::kAll) return;
  for_dtype<T>(from.sequence.dtype, [&](auto zero) {
    if constexpr (sizeof(zero) < sizeof(T)) {
      Vector<decltype(zero), kCount> bits;
      std::memcpy(&bits, values, sizeof(bits));
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = static_cast<T>(bits.values[k]);
    }
  });
}

template <typename scalar_t, typename T, int kCount>
__device__ __forceinline__ void store(scalar_t* to, bool vector, int64_t stride, int step,
                                      unsigned wanted, const T (&values)[kCount]) {
  if (kCount > 1 && vector && wanted == Place<kCount>::kAll) {
    Vector<scalar_t, kCount> whole;
#pragma unroll
    for (int k = 0; k < kCount; ++k) whole.values[k] = static_cast<scalar_t>(values[k]);
    *reinterpret_cast<Vector<scalar_t, kCount>*>(to) = whole;
    return;
  }
  stride *= step;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (wanted >> k & 1) to[k * stride] = static_cast<scalar_t>(values[k]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store(const Column& to, const Place<kCount>& place,
                                      const T (&values)[kCount]) {
  if (to.sequence.data == nullptr) return;
  const int64_t offset = to.offset(place.first);
  for_dtype<T>(to.sequence.dtype, [&](auto zero) {
    store(to.sequence.as<decltype(zero)>() + offset, to.vectors, to.stride(), place.step,
          place.inside, values);
  });
}

// Elements of all inputs. !kWeighted: of input and target alone, the others being ones.
template <typename T, int kCount, bool kWeighted>
struct Elements {
  T input[kCount], target[kCount];
  T weight[kWeighted ? kCount : 1], other[kWeighted ? kCount : 1];

  __device__ __forceinline__ Elements(const Columns& in, const Place<kCount>& place,
                                      unsigned wanted) {
    load(in.input, place, wanted, input);
    load(in.target, place, wanted, target);
    weight[0] = other[0] = T(1);
    if constexpr (kWeighted) {
      load_or_ones(in.weight, place, wanted, weight);
      load_or_ones(in.other, place, wanted, other);
      convert(in.weight, wanted, weight);
      convert(in.other, wanted, other);
    }
    convert(in.input, wanted, input);
    convert(in.target, wanted, target);
  }

  __device__ __forceinline__ T weight_of(int k) const { return weight[kWeighted ? k : 0]; }
  __device__ __forceinline__ T other_of(int k) const { return other[kWeighted ? k : 0]; }
};

// --- forward -------------------------------------------------------------------------------------

// Not inlined, so that no registers are kept for it.
template <typename T>
[[gnu::noinline]] __device__ void find_tail(const Finish& finish, T* losses, int64_t size) {
  superquantile::CUDA::finish_tail(finish, gridDim.x, losses, size, [](int) { return true; });
}

template <typename T, int kCount, bool kWeighted, typename Function>
__global__ void __launch_bounds__(kThreads, kWeighted ? 3 : 4)
    forward_kernel(Columns in, Groups groups, Function loss,
                   double* sums,  // [samples, chunks]; null where there is but one chunk
                   T* losses,     // [samples]
                   const __grid_constant__ Finish finish) {
  const Group group(in, groups);
  double sum = 0;
  if (group.sample < in.samples) {
    group.template for_places<kCount>(in, [&](const Place<kCount>& place) {
      const Elements<T, kCount, kWeighted> e(in, place, place.inside);
      T values[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = loss.loss(e.input[k], e.target[k], e.other_of(k)) * e.weight_of(k);
      }
      if (groups.one_element) {
        store(losses + place.first, place.vector, 1, place.step, place.inside, values);
      } else if (place.inside == Place<kCount>::kAll) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum += static_cast<double>(values[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (place.inside >> k & 1) sum += static_cast<double>(values[k]);
        }
      }
    });
  }
  if (!groups.one_element) {
    if (group.threads <= kWarp) {
      sum = lanes_reduce(sum, group.threads, Sum());
    } else {
      sum = block_sum(sum);
    }
    if (group.thread == 0 && group.sample < in.samples) {
      if (sums == nullptr) {
        losses[group.sample] = static_cast<T>(sum / in.divisor);
      } else {
        sums[group.chunk] = sum;
      }
    }
  }
  if (finish.ticket != nullptr) {
    find_tail(finish, losses, groups.one_element ? in.elements : in.samples);
  }
}

// The losses of samples from the sums of their chunks, each sample by a block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_chunks(const double* sums,                           // [samples, chunks]
               int64_t chunks, double divisor, T* losses) {  // [samples]
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
    sum += sums[static_cast<int64_t>(blockIdx.x) * chunks + c];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = static_cast<T>(sum / divisor);
}

// --- backward ------------------------------------------------------------------------------------

// The gradients to write; those not wanted absent.
struct GradientColumns {
  Column input, target, other;

  GradientColumns(const Gradients& gradients, int64_t elements, int vector)
      : input(gradients.input, elements, vector),
        target(gradients.target, elements, vector),
        other(gradients.other, elements, vector) {}

  bool even() const { return input.even && target.even && other.even; }
};

// kOfInput: the gradient of input alone.
template <typename T, int kCount, bool kWeighted, bool kOfInput, typename Function>
__global__ void __launch_bounds__(kThreads, kOfInput ? (kWeighted ? 3 : 4) : 2)
    backward_kernel(Columns in, Groups groups, Function loss,
                    const T* grad_losses,  // [samples]
                    GradientColumns gradients) {
  const Group group(in, groups);
  if (group.sample >= in.samples) return;
  const T of_sample =
      groups.one_element ? T(1) : grad_losses[group.sample] / static_cast<T>(in.divisor);
  group.template for_places<kCount>(in, [&](const Place<kCount>& place) {
    T grad[kCount], of_input[kCount], of_target[kCount], of_other[kCount];
    unsigned wanted = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      grad[k] = of_sample;
      if (groups.one_element && (place.inside >> k & 1)) {
        grad[k] = grad_losses[place.first + k * place.step];
      }
      if (grad[k] != T(0)) wanted |= place.inside & 1u << k;
      of_input[k] = of_target[k] = of_other[k] = T(0);
    }
    if (wanted != 0) {
      const Elements<T, kCount, kWeighted> e(in, place, wanted);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const Derivatives<T> d = loss.derivatives(e.input[k], e.target[k], e.other_of(k));
        const T scale = grad[k] * e.weight_of(k);
        of_input[k] = chain(grad[k], scale, d.input);
        of_target[k] = chain(grad[k], scale, d.target);
        of_other[k] = chain(grad[k], scale, d.other);
      }
    }
    store(gradients.input, place, of_input);
    if constexpr (!kOfInput) {
      store(gradients.target, place, of_target);
      store(gradients.other, place, of_other);
    }
  });
}

// --- launches ------------------------------------------------------------------------------------

// Samples of up to kWhole elements are one chunk; of longer ones chunks are so short as to be many.
// So few threads take a chunk that each has kVectors or more, because those without a last one
// idle; but where all threads are few, more.
Groups groups_for(const Inputs& in, const Columns& columns, int vector) {
  constexpr int64_t kWhole = kMostFusedElements, kLeastChunk = 2048, kMostChunk = 65536,
                    kManyChunks = 4096;
  constexpr int64_t kVectors = 4, kFewThreads = int64_t(1) << 17;  // of the largest devices
  constexpr int kMostLogThreads = 8;
  static_assert(1 << kMostLogThreads == kThreads);
  Groups groups;
  groups.one_element = in.elements == 1;
  groups.chunk = !groups.one_element && in.elements <= kWhole ? kWhole : kLeastChunk;
  while (groups.chunk < kMostChunk && groups.chunk * kManyChunks < in.samples * in.elements) {
    groups.chunk *= 2;
  }
  groups.chunks = divide_up(columns.elements, groups.chunk);

  const int64_t chunks = columns.samples * groups.chunks;
  const int64_t vectors = divide_up(std::min(columns.elements, groups.chunk), vector);
  int& log = groups.log_threads;
  while (log < kMostLogThreads && int64_t(1) << log < vectors &&
         (vectors >> log >= 2 * kVectors || chunks << log < kFewThreads)) {
    ++log;
  }
  return groups;
}

// A block is one group, or as many as make up kThreads.
int threads_for(const Groups& groups) {
  const int group = 1 << groups.log_threads;
  return group > kWarp ? group : kThreads;
}

template <typename Kernel, typename... Arguments>
void launch_groups(Kernel kernel, size_t shared_bytes, const Columns& columns, const Groups& groups,
                   const Arguments&... arguments) {
  const int threads = threads_for(groups);
  const int64_t blocks = divide_up(columns.samples * groups.chunks, threads >> groups.log_threads);
  launch(kernel, grid(blocks), threads, shared_bytes, columns, groups, arguments...);
}

bool has_weights(const Inputs& in) { return in.weight.data != nullptr || in.other.data != nullptr; }

// Whether there are kernels for inputs without: a gaussian_nll always has a var.
template <typename Function>
constexpr bool kMayLackWeights = true;
template <typename T>
constexpr bool kMayLackWeights<GaussianNll<T>> = false;
template <typename T>
constexpr bool kMayLackWeights<AnyLoss<T>> = false;

// f(elements at a time, functions of the loss). Each loss has kernels of its own for floats whose
// elements lie a stride apart in any thread, where trainings spend their time. Doubles and other
// strides share kernels that look the loss up for each element: with their own there would be
// twice as many to compile.
template <typename T, typename F>
void for_functions(const Inputs& in, bool even, const F& f) {
  constexpr std::integral_constant<int, kVector<T>> several;
  constexpr std::integral_constant<int, 1> one;
  if (!even) return f(one, AnyLoss<T>(in));
  if constexpr (std::is_same_v<T, float>) {
    for_loss(in.loss, [&](const auto& make) { f(several, make(T(), in)); });
  } else {
    f(several, AnyLoss<T>(in));
  }
}

template <typename T>
void forward_typed(const Inputs& in, T* losses, const superquantile::FusedTail* tail) {
  const Columns columns(in, kVector<T>);
  const Groups groups = groups_for(in, columns, kVector<T>);
  const bool add = !groups.one_element && groups.chunks > 1;
  Memory memory;
  const size_t place = memory.reserve<double>(add ? in.samples * groups.chunks : 0);
  memory.allocate();
  double* const sums = add ? memory.at<double>(place) : nullptr;
  const FinishOfLaunch<T> of_tail(tail, in.samples);
  for_functions<T>(in, columns.even(), [&](auto count, const auto& loss) {
    using Function = std::decay_t<decltype(loss)>;
    constexpr int kCount = count;
    auto kernel = forward_kernel<T, kCount, true, Function>;
    if constexpr (kMayLackWeights<Function>) {
      if (!has_weights(in)) kernel = forward_kernel<T, kCount, false, Function>;
    }
    launch_groups(kernel, of_tail.shared_bytes, columns, groups, loss, sums, losses,
                  of_tail.finish);
  });
  if (!add) return;
  const int64_t threads = std::min<int64_t>(divide_up(groups.chunks, kWarp) * kWarp, kThreads);
  launch(add_chunks<T>, grid(in.samples), static_cast<int>(threads), 0, sums, groups.chunks,
         in.divisor, losses);
}

template <typename T>
void backward_typed(const Inputs& in, const T* grad_losses, const Gradients& gradients) {
  const Columns columns(in, kVector<T>);
  const GradientColumns outputs(gradients, columns.elements, kVector<T>);
  const Groups groups = groups_for(in, columns, kVector<T>);
  const bool even = columns.even() && outputs.even();
  const bool of_input = gradients.target.data == nullptr && gradients.other.data == nullptr;
  for_functions<T>(in, even, [&](auto count, const auto& loss) {
    using Function = std::decay_t<decltype(loss)>;
    constexpr int kCount = count;
    auto kernel = backward_kernel<T, kCount, true, false, Function>;
    if constexpr (kCount > 1) {
      if (of_input) kernel = backward_kernel<T, kCount, true, true, Function>;
    }
    if constexpr (kMayLackWeights<Function>) {
      if (of_input && !has_weights(in)) kernel = backward_kernel<T, kCount, false, true, Function>;
    }
    launch_groups(kernel, 0, columns, groups, loss, grad_losses, outputs);
  });
}

void forward(const Inputs& in, core::Dtype dtype, void* losses,
             const superquantile::FusedTail* tail) {
  dtype == core::Dtype::kDouble ? forward_typed(in, static_cast<double*>(losses), tail)
                                : forward_typed(in, static_cast<float*>(losses), tail);
}

void backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
              const Gradients& gradients) {
  dtype == core::Dtype::kDouble
      ? backward_typed(in, static_cast<const double*>(grad_losses), gradients)
      : backward_typed(in, static_cast<const float*>(grad_losses), gradients);
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::pointwise_losses::CUDA
