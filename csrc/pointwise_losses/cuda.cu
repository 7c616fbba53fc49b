// CUDA kernels of the pointwise losses.
//
// forward   one read of the inputs; element losses are summed in registers. A sample is read by a
//           group of threads: few lanes of a warp, a warp or a block. A long one is cut into chunks
//           for a block each, whose sums a second launch adds in their order.
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

namespace sqloss::pointwise_losses::CUDA {
namespace {

using namespace core::cuda;

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
    const int64_t size = c10::elementSize(strided.dtype);
    const int64_t alignment = std::min<int64_t>(vector * size, 16);
    vectors = in_vectors && even && strided.strides[last] == 1 &&
              reinterpret_cast<uintptr_t>(strided.data) % alignment == 0;
    for (size_t d = 0; d < last; ++d) vectors &= strided.strides[d] * size % alignment == 0;
    contiguous = last == 0 && strided.strides[0] == 1;
  }

  __device__ __forceinline__ int64_t offset(int64_t index) const {
    return contiguous ? index : sequence.offset(index);
  }
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
      f(Place<kCount>{begin + i, step, inside});
    }
  }
};

// --- elements in registers -----------------------------------------------------------------------

// Loads the elements that are wanted: of a vector of a dtype narrower than T only the bits, so that
// no load waits for another's conversion; convert() finishes it. What is not wanted is undefined.
template <typename T, int kCount>
__device__ __forceinline__ void load(const Column& from, const Place<kCount>& place,
                                     unsigned wanted, T (&values)[kCount]) {
  const Sequence& sequence = from.sequence;
  const int64_t offset = from.offset(place.first);
  for_dtype<T>(sequence.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* const data = sequence.as<const scalar_t>() + offset;
    if (kCount > 1 && from.vectors && wanted == Place<kCount>::kAll) {
      const auto vector = *reinterpret_cast<const Vector<scalar_t, kCount>*>(data);
      std::memcpy(values, &vector, sizeof(vector));
      return;
    }
    const int64_t stride = sequence.strides[sequence.dims - 1] * place.step;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (wanted >> k & 1) values[k] = static_cast<T>(data[k * stride]);
    }
  });
}

template <typename T, int kCount>
__device__ __forceinline__ void load_or_ones(const Column& from, const Place<kCount>& place,
                                             unsigned wanted, T (&values)[kCount]) {
  if (from.sequence.data != nullptr) return load(from, place, wanted, values);
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = T(1);
}

template <typename T, int kCount>
__device__ __forceinline__ void convert(const Column& from, unsigned wanted, T (&values)[kCount]) {
  if (kCount == 1 || !from.vectors || wanted != Place<kCount>::kAll) return;
  for_dtype<T>(from.sequence.dtype, [&](auto zero) {
    if constexpr (sizeof(zero) < sizeof(T)) {
      Vector<decltype(zero), kCount> vector;
      std::memcpy(&vector, values, sizeof(vector));
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = static_cast<T>(vector.values[k]);
    }
  });
}

template <typename T, int kCount>
__device__ __forceinline__ void store(const Column& to, const Place<kCount>& place,
                                      const T (&values)[kCount]) {
  const Sequence& sequence = to.sequence;
  if (sequence.data == nullptr) return;
  const int64_t offset = to.offset(place.first);
  for_dtype<T>(sequence.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* const data = sequence.as<scalar_t>() + offset;
    if (kCount > 1 && to.vectors && place.inside == Place<kCount>::kAll) {
      Vector<scalar_t, kCount> vector;
#pragma unroll
      for (int k = 0; k < kCount; ++k) vector.values[k] = static_cast<scalar_t>(values[k]);
      *reinterpret_cast<Vector<scalar_t, kCount>*>(data) = vector;
      return;
    }
    const int64_t stride = sequence.strides[sequence.dims - 1] * place.step;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (place.inside >> k & 1) data[k * stride] = static_cast<scalar_t>(values[k]);
    }
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

template <typename T, int kCount, bool kWeighted, typename Function>
__global__ void __launch_bounds__(kThreads, kWeighted ? 3 : 4)
    forward_kernel(Columns in, Groups groups, Function loss,
                   double* sums,  // [samples, chunks]; null where there is but one chunk
                   T* losses) {   // [samples]
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
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (place.inside >> k & 1) losses[place.first + k * place.step] = values[k];
        }
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
  if (groups.one_element) return;

  if (group.threads <= kWarp) {
    for (int distance = group.threads / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
  } else {
    sum = block_sum(sum);
  }
  if (group.thread != 0 || group.sample >= in.samples) return;
  if (sums == nullptr) {
    losses[group.sample] = static_cast<T>(sum / in.divisor);
  } else {
    sums[group.chunk] = sum;
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

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Samples of up to kWhole elements are one chunk; of longer ones chunks are so short as to be many.
// So few threads take a chunk that each has kVectors or more, because those without a last one
// idle; but where all threads are few, more.
Groups groups_for(const Inputs& in, const Columns& columns, int vector) {
  constexpr int64_t kWhole = 8192, kLeastChunk = 2048, kMostChunk = 65536, kManyChunks = 4096;
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
void launch_groups(Kernel kernel, const Columns& columns, const Groups& groups,
                   const Arguments&... arguments) {
  const int threads = threads_for(groups);
  const int64_t blocks = divide_up(columns.samples * groups.chunks, threads >> groups.log_threads);
  launch(kernel, grid(blocks), threads, 0, columns, groups, arguments...);
}

bool has_weights(const Inputs& in) { return in.weight.data != nullptr || in.other.data != nullptr; }

template <typename T>
void forward_typed(const Inputs& in, T* losses) {
  const Columns columns(in, kVector<T>);
  const Groups groups = groups_for(in, columns, kVector<T>);
  const bool add = !groups.one_element && groups.chunks > 1;
  Memory memory;
  const size_t place = memory.reserve<double>(add ? in.samples * groups.chunks : 0);
  memory.allocate();
  double* const sums = add ? memory.at<double>(place) : nullptr;
  for_loss(in.loss, [&](const auto& make) {
    const auto loss = make(T(), in);
    using Function = std::decay_t<decltype(loss)>;
    auto kernel = !columns.even() ? forward_kernel<T, 1, true, Function>
                                  : forward_kernel<T, kVector<T>, true, Function>;
    if constexpr (!std::is_same_v<Function, GaussianNll<T>>) {  // which always has a var
      if (columns.even() && !has_weights(in)) {
        kernel = forward_kernel<T, kVector<T>, false, Function>;
      }
    }
    launch_groups(kernel, columns, groups, loss, sums, losses);
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
  for_loss(in.loss, [&](const auto& make) {
    const auto loss = make(T(), in);
    using Function = std::decay_t<decltype(loss)>;
    auto kernel = !even      ? backward_kernel<T, 1, true, false, Function>
                  : of_input ? backward_kernel<T, kVector<T>, true, true, Function>
                             : backward_kernel<T, kVector<T>, true, false, Function>;
    if constexpr (!std::is_same_v<Function, GaussianNll<T>>) {
      if (even && of_input && !has_weights(in)) {
        kernel = backward_kernel<T, kVector<T>, false, true, Function>;
      }
    }
    launch_groups(kernel, columns, groups, loss, grad_losses, outputs);
  });
}

void forward(const Inputs& in, at::ScalarType dtype, void* losses) {
  dtype == at::kDouble ? forward_typed(in, static_cast<double*>(losses))
                       : forward_typed(in, static_cast<float*>(losses));
}

void backward(const Inputs& in, at::ScalarType dtype, const void* grad_losses,
              const Gradients& gradients) {
  dtype == at::kDouble ? backward_typed(in, static_cast<const double*>(grad_losses), gradients)
                       : backward_typed(in, static_cast<const float*>(grad_losses), gradients);
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::pointwise_losses::CUDA
