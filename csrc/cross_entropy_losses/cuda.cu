// CUDA kernels of the cross-entropy.
//
// forward    One read of the logits. A thread takes some logits of a sample at a time, raises the
//            maximum m of those so far, which rescales the sum of exp(x - m), and adds their exps:
//            one exp for each logit, and a few more. Coefficients of other classes than the target
//            (label smoothing, probabilities) go in sums of t and of t * (m - x), whose terms have
//            one sign, so that float holds them however large the logits are.
// backward   softmax = exp(x - log_sum_exp). One write of the gradient; the logits of samples
//            without gradient are not read.
//
// Samples are walked in one of two ways, as memory has them:
//
// by class   where samples lie together (images). A thread has kSamples samples and walks their
//            classes, kClasses at a time, so that 16 loads are in flight, or 4 of four adjacent
//            samples each. Where samples are too few to fill the device, the classes are divided
//            among some of the block's warps.
// by sample  where the classes of a sample lie together. A team of threads has a sample: the lanes
//            that one pass over few classes needs, a warp, or the block for thousands.
//
// Who adds what depends on the sizes alone, and so do the bits of the results.
#define CPU_CAPABILITY CUDA

#include <c10/macros/Macros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cuda.h"
#include "cross_entropy_losses/cross_entropy_losses.h"
#include "cross_entropy_losses/cross_entropy_losses_math.h"

namespace sqloss::cross_entropy_losses::CUDA {
namespace {

using namespace core::cuda;

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarp;

// --- one sample ----------------------------------------------------------------------------------

struct Arguments {
  int64_t samples, classes;
  Sequence input;
  int64_t input_stride;  // from a class to the next
  Sequence target;       // int64, or absent
  Sequence probabilities;
  int64_t probabilities_stride;
  const void* weight;  // [classes]
  int64_t ignore_index;
  double kept, smoothing;  // 1 - label_smoothing, label_smoothing / classes

  explicit Arguments(const Inputs& in)
      : samples(in.samples),
        classes(in.classes),
        input(in.input.first),
        input_stride(in.input.stride),
        target(in.target),
        probabilities(in.probabilities.first),
        probabilities_stride(in.probabilities.stride),
        weight(in.weight),
        ignore_index(in.ignore_index),
        kept(1 - in.label_smoothing),
        smoothing(in.label_smoothing / static_cast<double>(in.classes)) {}

  // Whether classes that are not the target have coefficients.
  __host__ __device__ bool any() const { return smoothing > 0 || probabilities.data != nullptr; }

  template <typename T>
  __device__ T weight_of(int64_t c) const {
    return weight == nullptr ? T(1) : static_cast<const T*>(weight)[c];
  }

  // t of a class that is not the target.
  template <typename T>
  __device__ T coefficient_of(T probability, T weight) const {
    return coefficient(probability, weight, static_cast<T>(kept), static_cast<T>(smoothing));
  }

  // The target class, or kNoClass where it is ignored.
  __device__ int64_t class_of(int64_t target) const {
    if (target == ignore_index) return kNoClass;
    CUDA_KERNEL_ASSERT(0 <= target && target < classes &&
                       "cross_entropy: target: expected class indices or ignore_index");
    return target;
  }
  static constexpr int64_t kNoClass = -1;
};

// exp(x) for x <= 0, from the hardware's exp2: within 2^-22 of it for what counts in a sum with 1.
__device__ __forceinline__ float exp_of(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ double exp_of(double x) { return core::CUDA::exp_small(x); }

// The larger of a number and one that may be NaN, which is not.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Of some logits of a sample.
template <typename T, bool kAny>
struct Sums {
  T m = kLowest<T>;
  T sum = T(0);             // of exp(x - m)
  T t = T(0), loss = T(0);  // of t and of t * (m - x), where other classes than the target have t

  // Where `counts` is false x is -inf and t is of no matter.
  template <int kCount>
  __device__ __forceinline__ void add(const T (&x)[kCount], const T (&of_classes)[kCount],
                                      const bool (&counts)[kCount]) {
    T most = m;
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = larger(most, x[i]);
    raise(most);
    T more = T(0), more_t = T(0), more_loss = T(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T below = x[i] - m;
      more += exp_of(below);
      if (kAny && counts[i]) {
        more_t += of_classes[i];
        more_loss -= of_classes[i] * below;
      }
    }
    sum += more;
    t += more_t;
    loss += more_loss;
  }

  // Of other logits.
  __device__ __forceinline__ void add(Sums other) {
    const T most = larger(m, other.m);
    raise(most);
    other.raise(most);
    sum += other.sum;
    t += other.t;
    loss += other.loss;
  }

  // To a larger m.
  __device__ __forceinline__ void raise(T most) {
    const T growth = most - m;
    sum *= exp_of(-growth);
    // Not 0 * inf: the first logits may be that far above kLowest
    if (kAny && t != T(0)) loss += t * growth;
    m = most;
  }
};

template <typename T>
struct Outcome {
  T loss;
  double log_sum_exp;
};

// From a sample's sums, its target class, if it has one, and the logit of that.
template <typename T, bool kAny>
__device__ __forceinline__ Outcome<T> outcome(const Arguments& in, const Sums<T, kAny>& sums,
                                              int64_t target, T logit) {
  const double m = static_cast<double>(sums.m);
  const double log_sum = static_cast<double>(core::CUDA::log(sums.sum));
  const bool has_target = target != Arguments::kNoClass;
  const T weight =
      has_target ? static_cast<T>(in.kept * static_cast<double>(in.weight_of<T>(target))) : T(0);
  double loss = loss_of_target(static_cast<double>(weight), static_cast<double>(logit), m, log_sum);
  if (kAny) {
    loss += log_sum * static_cast<double>(sums.t) + static_cast<double>(sums.loss);
  }
  const bool ignored = in.target.data != nullptr && !has_target;
  return {ignored ? T(0) : static_cast<T>(loss), log_sum_exp_of(m, log_sum)};
}

// --- by class ------------------------------------------------------------------------------------

constexpr int kSamples = 4, kClasses = 4;

// How a block's warps share samples and classes: kWarps / slices side by side along the samples,
// each with kSamples of each lane, times `slices` that divide the classes.
struct Columns {
  int slices;

  __host__ __device__ int64_t samples_of_block() const {
    return int64_t(kThreads) / slices * kSamples;
  }
};

// A thread's samples and classes. Adjacent: its samples lie together, those of a class at aligned
// addresses in all tensors. Else the lanes' samples lie together, and a thread's are kWarp apart.
// All threads of a block get there, for its barriers: who has no samples has the last ones, to
// read.
template <bool kAdjacent>
class Share {
 public:
  int begin, step;  // classes: kClasses from `begin`, and again from `step` further on

  __device__ Share(const Columns& columns, int64_t samples)
      : begin(warp() / (kWarps / columns.slices) * kClasses),
        step(columns.slices * kClasses),
        samples_(samples) {
    const int64_t of_warp = blockIdx.x * columns.samples_of_block() +
                            warp() % (kWarps / columns.slices) * (kWarp * kSamples);
    first_ = of_warp + lane() * (kAdjacent ? kSamples : 1);
  }

  __device__ bool exists(int i) const { return own(i) < samples_; }
  __device__ int64_t sample(int i) const {
    if (kAdjacent) return exists(0) ? own(i) : samples_ - kSamples + i;
    return exists(i) ? own(i) : samples_ - 1;
  }

 private:
  __device__ int64_t own(int i) const { return first_ + i * (kAdjacent ? 1 : kWarp); }

  int64_t first_, samples_;
};

// One number of each of a thread's samples, which lie one after the other.
template <typename T, bool kAdjacent>
__device__ __forceinline__ void read_each(const T* from, const Share<kAdjacent>& share,
                                          T (&values)[kSamples]) {
  if constexpr (kAdjacent) {
    const auto vector = *reinterpret_cast<const Vector<T, kSamples>*>(from + share.sample(0));
#pragma unroll
    for (int i = 0; i < kSamples; ++i) values[i] = vector.values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) values[i] = from[share.sample(i)];
  }
}
template <typename T, bool kAdjacent>
__device__ __forceinline__ void write_each(T* to, const Share<kAdjacent>& share,
                                           const T (&values)[kSamples]) {
  if constexpr (kAdjacent) {
    Vector<T, kSamples> vector;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) vector.values[i] = values[i];
    if (share.exists(0)) {
      *reinterpret_cast<Vector<T, kSamples>*>(to + share.sample(0)) = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      if (share.exists(i)) to[share.sample(i)] = values[i];
    }
  }
}

// The target classes of a thread's samples.
template <bool kAdjacent>
__device__ __forceinline__ void read_targets(const Arguments& in, const Share<kAdjacent>& share,
                                             int (&targets)[kSamples]) {
  int64_t given[kSamples];
  if (in.target.adjacent) {
    read_each(in.target.as<const int64_t>(), share, given);
  } else {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      given[i] = in.target.data == nullptr
                     ? in.ignore_index
                     : in.target.as<const int64_t>()[in.target.offset(share.sample(i))];
    }
  }
#pragma unroll
  for (int i = 0; i < kSamples; ++i) targets[i] = static_cast<int>(in.class_of(given[i]));
}

// A tensor's elements of a thread's samples.
template <bool kAdjacent>
class Column {
 public:
  __device__ Column(const Sequence& first, int64_t stride, const Share<kAdjacent>& share)
      : first_(first), stride_(stride) {
    if (first.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      offsets_[i] = i > 0 && kAdjacent ? offsets_[0] + i : first.offset(share.sample(i));
    }
  }

  // Of `count` classes from c on; `otherwise` of further ones.
  template <typename T>
  __device__ __forceinline__ void read(const Share<kAdjacent>& share, int c, int count, T otherwise,
                                       T (&values)[kClasses][kSamples]) const {
    for_dtype(first_.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto* const from = first_.template as<const scalar_t>() + c * stride_;
      if constexpr (kAdjacent) {
        Vector<scalar_t, kSamples> vectors[kClasses];
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
          const auto* const vector = from + offsets_[0] + k * stride_;
          if (k < count) vectors[k] = *reinterpret_cast<const Vector<scalar_t, kSamples>*>(vector);
        }
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
#pragma unroll
          for (int i = 0; i < kSamples; ++i) {
            values[k][i] = k < count ? static_cast<T>(vectors[k].values[i]) : otherwise;
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
#pragma unroll
          for (int i = 0; i < kSamples; ++i) {
            values[k][i] = k < count ? static_cast<T>(from[offsets_[i] + k * stride_]) : otherwise;
          }
        }
      }
    });
  }

  template <typename T>
  __device__ __forceinline__ void write(const Share<kAdjacent>& share, int c, int count,
                                        const T (&values)[kClasses][kSamples]) const {
    for_dtype(first_.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      auto* const to = first_.template as<scalar_t>() + c * stride_;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        if constexpr (kAdjacent) {
          Vector<scalar_t, kSamples> vector;
#pragma unroll
          for (int i = 0; i < kSamples; ++i) {
            vector.values[i] = static_cast<scalar_t>(values[k][i]);
          }
          if (k < count && share.exists(0)) {
            *reinterpret_cast<Vector<scalar_t, kSamples>*>(to + offsets_[0] + k * stride_) = vector;
          }
        } else {
#pragma unroll
          for (int i = 0; i < kSamples; ++i) {
            if (k < count && share.exists(i)) {
              to[offsets_[i] + k * stride_] = static_cast<scalar_t>(values[k][i]);
            }
          }
        }
      }
    });
  }

 private:
  const Sequence& first_;
  int64_t stride_;
  int64_t offsets_[kSamples];
};

// The coefficients of classes that are not the target.
template <typename T, bool kAdjacent>
__device__ __forceinline__ void read_coefficients(const Arguments& in,
                                                  const Column<kAdjacent>& probabilities,
                                                  const Share<kAdjacent>& share, int c, int count,
                                                  T (&t)[kClasses][kSamples]) {
  if (in.probabilities.data != nullptr) {
    probabilities.read(share, c, count, T(0), t);
  } else {
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
#pragma unroll
      for (int i = 0; i < kSamples; ++i) t[k][i] = T(0);
    }
  }
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const T weight = k < count ? in.weight_of<T>(c + k) : T(0);
#pragma unroll
    for (int i = 0; i < kSamples; ++i) t[k][i] = in.coefficient_of(t[k][i], weight);
  }
}

// What a thread knows of a sample.
template <typename T, bool kAny>
struct Slice {
  Sums<T, kAny> sums;
  T logit = T(0);  // of the target class, in the slice that has it
};

template <typename T, bool kAny, bool kAdjacent>
__global__ void __launch_bounds__(kThreads, 3)
    forward_by_class(const Arguments in, const Columns columns, T* losses,  // [samples]
                     double* log_sum_exp) {                                 // [samples]
  const Share<kAdjacent> share(columns, in.samples);
  const int classes = static_cast<int>(in.classes);
  const Column<kAdjacent> input(in.input, in.input_stride, share);
  const Column<kAdjacent> probabilities(in.probabilities, in.probabilities_stride, share);
  int targets[kSamples];
  read_targets(in, share, targets);

  Slice<T, kAny> slices[kSamples];
#pragma unroll 1
  for (int c = share.begin; c < classes; c += share.step) {
    const int count = classes - c;
    T x[kClasses][kSamples], t[kClasses][kSamples];
    input.read(share, c, count, -std::numeric_limits<T>::infinity(), x);
    if (kAny) read_coefficients(in, probabilities, share, c, count, t);
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      T of_sample[kClasses], coefficients[kClasses];
      bool counts[kClasses];
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        of_sample[k] = x[k][i];
        coefficients[k] = kAny ? t[k][i] : T(0);
        counts[k] = k < count;
        if (targets[i] == c + k) slices[i].logit = x[k][i];
      }
      slices[i].sums.add(of_sample, coefficients, counts);
    }
  }

  if (columns.slices > 1) {
    auto* const shared = reinterpret_cast<Slice<T, kAny>*>(dynamic_shared_memory());
    const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kSamples; ++i) shared[thread * kSamples + i] = slices[i];
    __syncthreads();
    if (share.begin > 0) return;
    for (int slice = 1; slice < columns.slices; ++slice) {
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        const int other = thread + slice * (kThreads / columns.slices);
        slices[i].sums.add(shared[other * kSamples + i].sums);
        slices[i].logit += shared[other * kSamples + i].logit;
      }
    }
  }
  T loss[kSamples];
  double exponent[kSamples];
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    const Outcome<T> of_sample = outcome(in, slices[i].sums, targets[i], slices[i].logit);
    loss[i] = of_sample.loss;
    exponent[i] = of_sample.log_sum_exp;
  }
  write_each(losses, share, loss);
  write_each(log_sum_exp, share, exponent);
}

template <typename T, bool kAdjacent>
__global__ void __launch_bounds__(kThreads, 3)
    backward_by_class(const Arguments in, const Columns columns, const T* grad_losses,  // [samples]
                      const double* log_sum_exp,                                        // [samples]
                      const Sequence grad_input, int64_t grad_stride) {
  const Share<kAdjacent> share(columns, in.samples);
  const int classes = static_cast<int>(in.classes);
  const Column<kAdjacent> input(in.input, in.input_stride, share);
  const Column<kAdjacent> probabilities(in.probabilities, in.probabilities_stride, share);
  const Column<kAdjacent> gradient(grad_input, grad_stride, share);
  T grad_loss[kSamples];
  read_each(grad_losses, share, grad_loss);
  int targets[kSamples];
  read_targets(in, share, targets);
  bool has_gradient[kSamples], any_gradient = false;
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    const bool ignored = in.target.data != nullptr && targets[i] == Arguments::kNoClass;
    has_gradient[i] = grad_loss[i] != T(0) && !ignored;
    any_gradient = any_gradient || has_gradient[i];
  }

  Scale<T> scales[kSamples];
  T t_of_target[kSamples];
  if (any_gradient) {
    double sum_t[kSamples] = {};
    if (in.probabilities.data != nullptr || (in.any() && in.weight != nullptr)) {
#pragma unroll 1
      for (int c = 0; c < classes; c += kClasses) {
        T t[kClasses][kSamples];
        read_coefficients(in, probabilities, share, c, classes - c, t);
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
#pragma unroll
          for (int k = 0; k < kClasses; ++k) sum_t[i] += static_cast<double>(t[k][i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSamples; ++i) sum_t[i] = in.smoothing * classes;
    }
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const bool has_target = targets[i] != Arguments::kNoClass;
      const double weight = has_target ? static_cast<double>(in.weight_of<T>(targets[i])) : 0.0;
      t_of_target[i] = static_cast<T>((in.kept + in.smoothing) * weight);
      const double exponent = has_gradient[i] ? log_sum_exp[share.sample(i)] : 0.0;
      scales[i] = Scale<T>(grad_loss[i], sum_t[i] + in.kept * weight, exponent);
    }
  }

#pragma unroll 1
  for (int c = share.begin; c < classes; c += share.step) {
    const int count = classes - c;
    T grad[kClasses][kSamples] = {};
    if (any_gradient) {
      T x[kClasses][kSamples], t[kClasses][kSamples] = {};
      input.read(share, c, count, T(0), x);
      if (in.any()) read_coefficients(in, probabilities, share, c, count, t);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
          const T of_class = targets[i] == c + k ? t_of_target[i] : t[k][i];
          grad[k][i] = has_gradient[i] ? scales[i].gradient(x[k][i], of_class) : T(0);
        }
      }
    }
    gradient.write(share, c, count, grad);
  }
}

// --- by sample -----------------------------------------------------------------------------------

// The threads that share a sample: 2^k lanes of a warp, or all of the block.
class Team {
 public:
  explicit __device__ Team(int size) : size_(size) {}

  __device__ int size() const { return size_; }
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % size_; }
  __device__ int64_t sample() const {
    return blockIdx.x * int64_t(kThreads / size_) + threadIdx.x / size_;
  }

  // Of all threads of the team, in every thread. All threads of the block have to call it.
  template <typename Operation, typename T>
  __device__ T reduce(T value, T neutral, const Operation& operation) const {
    if (size_ > kWarp) return block_reduce(value, neutral, operation);
    for (int distance = size_ / 2; distance > 0; distance /= 2) {
      value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
  }
  template <typename T>
  __device__ T sum(T value) const {
    return reduce(value, T(0), Sum());
  }

 private:
  int size_;
};

// A thread's classes of a sample, kRuns runs of kRun adjacent ones at a time. Runs of one class are
// for few classes. Runs of more begin at aligned addresses, so that they are read at once, but the
// first and the last of a sample, which may go over its ends.
constexpr int kRuns = 4;

template <int kRun>
struct Runs {
  int64_t begin;  // the first run's first class, below 0 where it goes over the sample's beginning
  int64_t step;   // from these to the next
  int distance;   // between runs
  int64_t classes;

  __device__ Runs(const Team& team, const Arguments& in, int64_t offset)
      : step(int64_t(team.size()) * kRun * kRuns),
        distance(team.size() * kRun),
        classes(in.classes) {
    int over = 0;
    if (kRun > 1) {
      for_dtype(in.input.dtype, [&](auto zero) {
        const auto address = reinterpret_cast<uintptr_t>(in.input.as<decltype(zero)>() + offset);
        over = static_cast<int>(address / sizeof(zero) % kRun);
      });
    }
    begin = team.rank() * kRun - over;
  }

  // Of element i of the runs from c on.
  __device__ int64_t class_of(int64_t c, int i) const { return c + i / kRun * distance + i % kRun; }
  __device__ bool counts(int64_t c, int i) const {
    return (kRun == 1 || class_of(c, i) >= 0) && class_of(c, i) < classes;
  }
};

// A tensor's elements of one sample.
struct Row {
  const Sequence& tensor;
  int64_t offset, stride;

  __device__ Row(const Sequence& first, int64_t stride, int64_t sample)
      : tensor(first), offset(first.data == nullptr ? 0 : first.offset(sample)), stride(stride) {}

  template <int kRun, typename T>
  __device__ __forceinline__ void read(const Runs<kRun>& runs, int64_t c, T otherwise,
                                       T (&values)[kRuns * kRun]) const {
    for_dtype(tensor.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto* const from = tensor.as<const scalar_t>() + offset;
#pragma unroll
      for (int first = 0; first < kRuns * kRun; first += kRun) {
        const auto* const run = from + runs.class_of(c, first) * stride;
        if (kRun > 1 && at_once<kRun>(runs, c, first, run)) {
          const auto vector = *reinterpret_cast<const Vector<scalar_t, kRun>*>(run);
#pragma unroll
          for (int i = 0; i < kRun; ++i) values[first + i] = static_cast<T>(vector.values[i]);
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            values[first + i] =
                runs.counts(c, first + i) ? static_cast<T>(run[i * stride]) : otherwise;
          }
        }
      }
    });
  }

  template <int kRun, typename T>
  __device__ __forceinline__ void write(const Runs<kRun>& runs, int64_t c,
                                        const T (&values)[kRuns * kRun]) const {
    for_dtype(tensor.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      auto* const to = tensor.as<scalar_t>() + offset;
#pragma unroll
      for (int first = 0; first < kRuns * kRun; first += kRun) {
        auto* const run = to + runs.class_of(c, first) * stride;
        if (kRun > 1 && at_once<kRun>(runs, c, first, run)) {
          Vector<scalar_t, kRun> vector;
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            vector.values[i] = static_cast<scalar_t>(values[first + i]);
          *reinterpret_cast<Vector<scalar_t, kRun>*>(run) = vector;
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (runs.counts(c, first + i))
              run[i * stride] = static_cast<scalar_t>(values[first + i]);
          }
        }
      }
    });
  }

 private:
  template <int kRun, typename scalar_t>
  __device__ bool at_once(const Runs<kRun>& runs, int64_t c, int first, scalar_t* run) const {
    using Whole = Vector<std::remove_const_t<scalar_t>, kRun>;
    return stride == 1 && runs.counts(c, first) && runs.counts(c, first + kRun - 1) &&
           reinterpret_cast<uintptr_t>(run) % alignof(Whole) == 0;
  }
};

// The coefficients of classes that are not the target, and 0 beside the sample's classes.
template <int kRun, typename T>
__device__ __forceinline__ void read_coefficients(const Arguments& in, const Row& probabilities,
                                                  const Runs<kRun>& runs, int64_t c,
                                                  T (&t)[kRuns * kRun]) {
  if (in.probabilities.data != nullptr) {
    probabilities.read(runs, c, T(0), t);
  } else {
#pragma unroll
    for (int i = 0; i < kRuns * kRun; ++i) t[i] = T(0);
  }
#pragma unroll
  for (int i = 0; i < kRuns * kRun; ++i) {
    const T weight = runs.counts(c, i) ? in.weight_of<T>(runs.class_of(c, i)) : T(0);
    t[i] = in.coefficient_of(t[i], weight);
  }
}

__device__ __forceinline__ int64_t read_target(const Arguments& in, int64_t sample) {
  if (in.target.data == nullptr) return Arguments::kNoClass;
  return in.class_of(in.target.as<const int64_t>()[in.target.offset(sample)]);
}

template <typename T, bool kAny, int kRun>
__global__ void __launch_bounds__(kThreads)
    forward_by_sample(const Arguments in, int team_size, T* losses,  // [samples]
                      double* log_sum_exp) {                         // [samples]
  const Team team(team_size);
  const bool exists = team.sample() < in.samples;
  const int64_t sample = exists ? team.sample() : in.samples - 1;
  const Row input(in.input, in.input_stride, sample);
  const Row probabilities(in.probabilities, in.probabilities_stride, sample);
  const int64_t target = read_target(in, sample);
  T logit = T(0);
  if (target != Arguments::kNoClass) {
    const int64_t offset = input.offset + target * input.stride;
    for_dtype(in.input.dtype, [&](auto zero) {
      logit = static_cast<T>(in.input.as<const decltype(zero)>()[offset]);
    });
  }

  Sums<T, kAny> sums;
  const Runs<kRun> runs(team, in, input.offset);
#pragma unroll 1
  for (int64_t c = runs.begin; c < in.classes; c += runs.step) {
    T x[kRuns * kRun], t[kRuns * kRun];
    bool counts[kRuns * kRun];
    input.read(runs, c, -std::numeric_limits<T>::infinity(), x);
    if (kAny) read_coefficients(in, probabilities, runs, c, t);
#pragma unroll
    for (int i = 0; i < kRuns * kRun; ++i) counts[i] = runs.counts(c, i);
    sums.add(x, t, counts);
  }
  sums.raise(team.reduce(sums.m, kLowest<T>, Maximum()));
  sums.sum = team.sum(sums.sum);
  if (kAny) {
    sums.t = team.sum(sums.t);
    sums.loss = team.sum(sums.loss);
  }
  if (!exists || team.rank() > 0) return;
  const Outcome<T> of_sample = outcome(in, sums, target, logit);
  losses[sample] = of_sample.loss;
  log_sum_exp[sample] = of_sample.log_sum_exp;
}

template <typename T, int kRun>
__global__ void __launch_bounds__(kThreads)
    backward_by_sample(const Arguments in, int team_size, const T* grad_losses,  // [samples]
                       const double* log_sum_exp,                                // [samples]
                       const Sequence grad_input, int64_t grad_stride) {
  const Team team(team_size);
  const bool exists = team.sample() < in.samples;
  const int64_t sample = exists ? team.sample() : in.samples - 1;
  const Row input(in.input, in.input_stride, sample);
  const Row probabilities(in.probabilities, in.probabilities_stride, sample);
  const Row gradient(grad_input, grad_stride, sample);
  const Runs<kRun> runs(team, in, input.offset);
  const T grad_loss = grad_losses[sample];
  const int64_t target = read_target(in, sample);
  const bool has_target = target != Arguments::kNoClass;
  const bool ignored = in.target.data != nullptr && !has_target;
  const bool has_gradient = exists && grad_loss != T(0) && !ignored;

  double sum_t = in.smoothing * static_cast<double>(in.classes);
  if (in.probabilities.data != nullptr || (in.any() && in.weight != nullptr)) {
    double of_thread = 0;
#pragma unroll 1
    for (int64_t c = runs.begin; has_gradient && c < in.classes; c += runs.step) {
      T t[kRuns * kRun];
      read_coefficients(in, probabilities, runs, c, t);
#pragma unroll
      for (int i = 0; i < kRuns * kRun; ++i) of_thread += static_cast<double>(t[i]);
    }
    sum_t = team.sum(of_thread);
  }
  if (!exists) return;
  const double weight = has_target ? static_cast<double>(in.weight_of<T>(target)) : 0.0;
  const auto t_of_target = static_cast<T>((in.kept + in.smoothing) * weight);
  const Scale<T> scale(grad_loss, sum_t + in.kept * weight,
                       has_gradient ? log_sum_exp[sample] : 0.0);

#pragma unroll 1
  for (int64_t c = runs.begin; c < in.classes; c += runs.step) {
    T grad[kRuns * kRun] = {};
    if (has_gradient) {
      T x[kRuns * kRun], t[kRuns * kRun] = {};
      input.read(runs, c, T(0), x);
      if (in.any()) read_coefficients(in, probabilities, runs, c, t);
#pragma unroll
      for (int i = 0; i < kRuns * kRun; ++i) {
        const bool is_target = has_target && runs.class_of(c, i) == target;
        grad[i] = scale.gradient(x[i], is_target ? t_of_target : t[i]);
      }
    }
    gradient.write(runs, c, grad);
  }
}

// --- host ----------------------------------------------------------------------------------------

bool walk_by_sample(const Inputs& in) {
  constexpr int64_t kMostClasses = int64_t(1) << 30;  // that by class counts
  return in.samples == 1 || in.classes > kMostClasses ||
         in.input.stride < in.input.first.strides.back();
}

// Whether samples 4 k to 4 k + 3 lie together for every class, at aligned addresses.
bool in_vectors(const core::Strided& first, int64_t class_stride) {
  const auto whole = [](int64_t number) { return number % kSamples == 0; };
  if (first.strides.back() != 1 || !whole(first.sizes.back()) || !whole(class_stride)) return false;
  for (size_t d = 0; d + 1 < first.strides.size(); ++d) {
    if (!whole(first.strides[d])) return false;
  }
  const auto size = kSamples * c10::elementSize(first.dtype);
  return reinterpret_cast<uintptr_t>(first.data) % std::min<size_t>(size, 16) == 0;
}
bool in_vectors(const Classes& classes) {
  return classes.first.data == nullptr || in_vectors(classes.first, classes.stride);
}
bool in_vectors(const void* numbers) { return reinterpret_cast<uintptr_t>(numbers) % 16 == 0; }

Columns columns_of(const Inputs& in) {
  // Enough samples for two blocks on each of more than a hundred multiprocessors
  constexpr int64_t kEnough = int64_t(1) << 18;
  Columns columns{1};
  while (columns.slices < kWarps && in.samples * columns.slices < kEnough &&
         columns.slices * 2 * kClasses * 2 <= in.classes) {
    columns.slices *= 2;
  }
  return columns;
}

// From so many classes on, runs of adjacent ones are worth the ends that they go over.
constexpr int64_t kManyClasses = 512;

bool walk_in_runs(const Inputs& in) { return in.input.stride == 1 && in.classes >= kManyClasses; }

int team_size_of(const Inputs& in) {
  // As many that most have something to do in a pass, and a block where a warp needed many passes
  const int64_t per_thread = walk_in_runs(in) ? kRuns * kSamples : kRuns;
  constexpr int64_t kPasses = 4;
  if (in.classes > kWarp * per_thread * kPasses) return kThreads;
  int size = 1;
  while (size < kWarp && size * per_thread < in.classes) size *= 2;
  return size;
}

int64_t blocks_for(int64_t samples, int64_t of_block) {
  return (samples + of_block - 1) / of_block;
}

template <typename T>
void forward_typed(const Inputs& in, T* losses, double* log_sum_exp) {
  const Arguments arguments(in);
  const bool any = arguments.any();
  if (walk_by_sample(in)) {
    const int team = team_size_of(in);
    const auto in_runs = any ? forward_by_sample<T, true, 4> : forward_by_sample<T, false, 4>;
    const auto one_by_one = any ? forward_by_sample<T, true, 1> : forward_by_sample<T, false, 1>;
    launch(walk_in_runs(in) ? in_runs : one_by_one, grid(blocks_for(in.samples, kThreads / team)),
           kThreads, 0, arguments, team, losses, log_sum_exp);
  } else {
    const bool adjacent = in_vectors(in.input) && in_vectors(in.probabilities);
    const auto in_fours = any ? forward_by_class<T, true, true> : forward_by_class<T, false, true>;
    const auto singly = any ? forward_by_class<T, true, false> : forward_by_class<T, false, false>;
    const Columns columns = columns_of(in);
    const size_t of_slice = any ? sizeof(Slice<T, true>) : sizeof(Slice<T, false>);
    launch(adjacent ? in_fours : singly, grid(blocks_for(in.samples, columns.samples_of_block())),
           kThreads, columns.slices > 1 ? kThreads * kSamples * of_slice : 0, arguments, columns,
           losses, log_sum_exp);
  }
}

template <typename T>
void backward_typed(const Inputs& in, const T* grad_losses, const double* log_sum_exp,
                    const Classes& grad_input) {
  const Arguments arguments(in);
  const Sequence gradient(grad_input.first);
  if (walk_by_sample(in)) {
    const int team = team_size_of(in);
    launch(walk_in_runs(in) ? backward_by_sample<T, 4> : backward_by_sample<T, 1>,
           grid(blocks_for(in.samples, kThreads / team)), kThreads, 0, arguments, team, grad_losses,
           log_sum_exp, gradient, grad_input.stride);
  } else {
    const bool adjacent = in_vectors(in.input) && in_vectors(in.probabilities) &&
                          in_vectors(grad_input) && in_vectors(grad_losses);
    const Columns columns = columns_of(in);
    launch(adjacent ? backward_by_class<T, true> : backward_by_class<T, false>,
           grid(blocks_for(in.samples, columns.samples_of_block())), kThreads, 0, arguments,
           columns, grad_losses, log_sum_exp, gradient, grad_input.stride);
  }
}

void forward(const Inputs& in, at::ScalarType dtype, void* losses, double* log_sum_exp) {
  dtype == at::kDouble ? forward_typed(in, static_cast<double*>(losses), log_sum_exp)
                       : forward_typed(in, static_cast<float*>(losses), log_sum_exp);
}

void backward(const Inputs& in, at::ScalarType dtype, const void* grad_losses,
              const double* log_sum_exp, const Classes& grad_input) {
  dtype == at::kDouble
      ? backward_typed(in, static_cast<const double*>(grad_losses), log_sum_exp, grad_input)
      : backward_typed(in, static_cast<const float*>(grad_losses), log_sum_exp, grad_input);
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace sqloss::cross_entropy_losses::CUDA
