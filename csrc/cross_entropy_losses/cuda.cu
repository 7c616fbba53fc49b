// CUDA kernels of the cross-entropy.
//
// forward    One read of the logits. A thread takes some logits of a sample at a time, raises the
//            maximum m of those so far, which rescales the sum of exp(x - m), and adds their exps:
//            one exp for each logit, and a few more. Coefficients of other classes than the target
//            (label smoothing, probabilities) go in sums of t and of t * (m - x), whose terms have
//            one sign, so that float holds them however large the logits are.
// backward   softmax = exp(x - log_sum_exp). One write of the gradient; the logits of samples
//            without gradient are not read. The gradient of probabilities is a kernel of its own,
//            without any exp.
//
// Samples are walked in one of two ways, as memory has them:
//
// by class   where samples lie together (images). A thread has kSamples samples and walks their
//            classes, some at a time, so that many loads are in flight; four adjacent samples
//            are one load. Where samples are too few to fill the device, the classes are divided
//            among some of the block's warps.
// by sample  where the classes of a sample lie together. A team of threads has a sample: the lanes
//            that one pass over few classes needs, a warp, or the block for thousands. In
//            forward, a team of lanes has several samples one after the other where there are
//            many, so that what is done once for a sample is done by all lanes at once.
//
// Of few samples the last block of forward to finish finds the tail. Who adds what depends on
// sizes, strides and alignment alone, and so do the bits of the results.
#define CPU_CAPABILITY CUDA

#include <c10/macros/Macros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cuda.h"
#include "core/vector_math.h"
#include "cross_entropy_losses/cross_entropy_losses.h"
#include "cross_entropy_losses/cross_entropy_losses_math.h"
#include "superquantile/cuda_selection.h"

namespace sqloss::cross_entropy_losses::CUDA {
namespace {

using namespace core::cuda;
using superquantile::CUDA::Finish;
using superquantile::CUDA::FinishOfLaunch;

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarp;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kMostBlocks = 1024 / kThreads;  // that a multiprocessor holds
#else
constexpr int kMostBlocks = 1536 / kThreads;
#endif

// Blocks that a multiprocessor shall hold at once, for which a thread must do with fewer registers,
// those of find_tail included: as many as it can where it computes in float.
template <typename T>
constexpr int blocks_at_once(int of_float) {
  return sizeof(T) == sizeof(float) ? std::min(of_float, kMostBlocks) : 1;
}

// --- one sample ----------------------------------------------------------------------------------

// Classes as kernels take them. In bytes: addresses are then the same for every dtype.
struct Numbers {
  Sequence first;
  int64_t stride, size;  // from a class to the next, of an element

  explicit Numbers(const Classes& classes)
      : first(classes.first),
        stride(classes.stride * core::element_size(first.dtype)),
        size(core::element_size(first.dtype)) {}

  __device__ __forceinline__ char* at(int64_t sample) const {
    return first.data == nullptr ? nullptr : first.data + first.offset(sample) * size;
  }
};

struct Arguments {
  int64_t samples, classes;
  Numbers input;
  Sequence target;  // int64, or absent
  Numbers probabilities;
  const void* weight;  // [classes]
  int64_t ignore_index;
  double kept, smoothing;  // 1 - label_smoothing, label_smoothing / classes

  explicit Arguments(const Inputs& in)
      : samples(in.samples),
        classes(in.classes),
        input(in.input),
        target(in.target),
        probabilities(in.probabilities),
        weight(in.weight),
        ignore_index(in.ignore_index),
        kept(1 - in.label_smoothing),
        smoothing(in.label_smoothing / static_cast<double>(in.classes)) {}

  // Whether classes that are not the target have coefficients.
  __host__ __device__ bool any() const {
    return smoothing > 0 || probabilities.first.data != nullptr;
  }

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

// exp(x) for x <= 0 or hardly more, by one instruction for 2^x that takes numbers below 2^-126 for
// 0: within 2^-22 + |x| 2^-23 of it.
__device__ __forceinline__ float exp_of(float x) {
  const float power = x * 1.44269504f;
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
#else  // emulated
  return exp2f(power);
#endif
}
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
    T more = exp_of(x[0] - m);
#pragma unroll
    for (int i = 1; i < kCount; ++i) more += exp_of(x[i] - m);
    sum += more;
    if (!kAny) return;
    T more_t = T(0), more_loss = T(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!counts[i]) continue;
      more_t += of_classes[i];
      more_loss += of_classes[i] * (m - x[i]);
    }
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

// The tail of the samples that are not ignored, once all threads of the grid have written their
// losses. Not inlined, so that no registers are kept for it.
template <typename T>
[[gnu::noinline]] __device__ void find_tail(const Finish& finish, const Arguments& in, T* losses) {
  superquantile::CUDA::finish_tail(finish, gridDim.x, losses, in.samples, [&](int i) {
    if (in.target.data == nullptr) return true;
    return in.target.as<const int64_t>()[in.target.offset(i)] != in.ignore_index;
  });
}

// --- by class ------------------------------------------------------------------------------------

constexpr int kSamples = 4;
// Read at a time; fewer where a thread holds more of each sample.
constexpr int kForwardClasses = 4, kBackwardClasses = 2;

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
  int begin, step;  // classes: some from `begin`, and again from `step` further on

  __device__ Share(const Columns& columns, int64_t samples, int classes_at_once)
      : begin(warp() / (kWarps / columns.slices) * classes_at_once),
        step(columns.slices * classes_at_once),
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
  __device__ Column(const Numbers& numbers, const Share<kAdjacent>& share)
      : dtype_(numbers.first.dtype), stride_(numbers.stride) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) samples_[i] = numbers.at(share.sample(i));
  }

  // Of `count` classes from c on; `otherwise` of further ones.
  template <typename T, int kClasses>
  __device__ __forceinline__ void read(int c, int count, T otherwise,
                                       T (&values)[kClasses][kSamples]) const {
    for_dtype<T>(dtype_, [&](auto zero) {
      using scalar_t = decltype(zero);
      using Place = Vector<scalar_t, kTogether>;
      const auto place = [&](int k, int i) {
        return *reinterpret_cast<const Place*>(samples_[i] + c * stride_ + k * stride_);
      };
      Place places[kClasses][kPlaces];
      if (count >= kClasses) {
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) places[k][i] = place(k, i);
        }
      } else {
        Place missing;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) missing.values[j] = static_cast<scalar_t>(otherwise);
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) places[k][i] = k < count ? place(k, i) : missing;
        }
      }
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
          values[k][i] = static_cast<T>(places[k][i / kTogether].values[i % kTogether]);
        }
      }
    });
  }

  template <typename T, int kClasses>
  __device__ __forceinline__ void write(const Share<kAdjacent>& share, int c, int count,
                                        const T (&values)[kClasses][kSamples]) const {
    for_dtype<T>(dtype_, [&](auto zero) {
      using scalar_t = decltype(zero);
      using Place = Vector<scalar_t, kTogether>;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
          Place place;
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            place.values[j] = static_cast<scalar_t>(values[k][i * kTogether + j]);
          }
          if (k < count && share.exists(i)) {
            *reinterpret_cast<Place*>(samples_[i] + c * stride_ + k * stride_) = place;
          }
        }
      }
    });
  }

 private:
  static constexpr int kTogether = kAdjacent ? kSamples : 1;  // read and written at once
  static constexpr int kPlaces = kSamples / kTogether;

  core::Dtype dtype_;
  int64_t stride_;
  char* samples_[kPlaces];
};

// The coefficients of classes that are not the target.
template <typename T, bool kAdjacent, int kClasses>
__device__ __forceinline__ void read_coefficients(const Arguments& in,
                                                  const Column<kAdjacent>& probabilities, int c,
                                                  int count, T (&t)[kClasses][kSamples]) {
  if (in.probabilities.first.data != nullptr) {
    probabilities.read(c, count, T(0), t);
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
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(kAny ? 2 : 3))
    forward_by_class(const __grid_constant__ Arguments in, const Columns columns,
                     T* losses,            // [samples]
                     double* log_sum_exp,  // [samples]
                     const __grid_constant__ Finish finish) {
  const Share<kAdjacent> share(columns, in.samples, kForwardClasses);
  const int classes = static_cast<int>(in.classes);
  const Column<kAdjacent> input(in.input, share);
  const Column<kAdjacent> probabilities(in.probabilities, share);
  int targets[kSamples];
  read_targets(in, share, targets);

  Slice<T, kAny> slices[kSamples];
#pragma unroll 1
  for (int c = share.begin; c < classes; c += share.step) {
    const int count = classes - c;
    T x[kForwardClasses][kSamples], t[kForwardClasses][kSamples];
    input.read(c, count, -std::numeric_limits<T>::infinity(), x);
    if (kAny) read_coefficients(in, probabilities, c, count, t);
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      T of_sample[kForwardClasses], coefficients[kForwardClasses];
      bool counts[kForwardClasses];
#pragma unroll
      for (int k = 0; k < kForwardClasses; ++k) {
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
    for (int slice = 1; share.begin == 0 && slice < columns.slices; ++slice) {
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        const int other = thread + slice * (kThreads / columns.slices);
        slices[i].sums.add(shared[other * kSamples + i].sums);
        slices[i].logit += shared[other * kSamples + i].logit;
      }
    }
  }
  if (share.begin == 0) {
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
  if (finish.ticket != nullptr) find_tail(finish, in, losses);
}

template <typename T, bool kAdjacent>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(kAdjacent ? 4 : 2))
    backward_by_class(const Arguments in, const Columns columns, const T* grad_losses,  // [samples]
                      const double* log_sum_exp,                                        // [samples]
                      const Numbers grad_input) {
  const Share<kAdjacent> share(columns, in.samples, kBackwardClasses);
  const int classes = static_cast<int>(in.classes);
  const Column<kAdjacent> input(in.input, share);
  const Column<kAdjacent> probabilities(in.probabilities, share);
  const Column<kAdjacent> gradient(grad_input, share);
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
    if (in.probabilities.first.data != nullptr || (in.any() && in.weight != nullptr)) {
#pragma unroll 1
      for (int c = 0; c < classes; c += kBackwardClasses) {
        T t[kBackwardClasses][kSamples];
        read_coefficients(in, probabilities, c, classes - c, t);
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
#pragma unroll
          for (int k = 0; k < kBackwardClasses; ++k) sum_t[i] += static_cast<double>(t[k][i]);
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
    T grad[kBackwardClasses][kSamples] = {};
    if (any_gradient) {
      T x[kBackwardClasses][kSamples], t[kBackwardClasses][kSamples] = {};
      input.read(c, count, T(0), x);
      if (in.any()) read_coefficients(in, probabilities, c, count, t);
#pragma unroll
      for (int k = 0; k < kBackwardClasses; ++k) {
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
          const T of_class = targets[i] == c + k ? t_of_target[i] : t[k][i];
          grad[k][i] = has_gradient[i]
                           ? scales[i].gradient(exp_of(scales[i].exponent(x[k][i])), of_class)
                           : T(0);
        }
      }
    }
    gradient.write(share, c, count, grad);
  }
}

template <typename T, bool kAdjacent>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(kAdjacent ? 4 : 2))
    target_backward_by_class(const Arguments in, const Columns columns,
                             const T* grad_losses,       // [samples]
                             const double* log_sum_exp,  // [samples]
                             const Numbers grad_target) {
  const Share<kAdjacent> share(columns, in.samples, kBackwardClasses);
  const int classes = static_cast<int>(in.classes);
  const Column<kAdjacent> input(in.input, share);
  const Column<kAdjacent> gradient(grad_target, share);
  T grad_loss[kSamples];
  read_each(grad_losses, share, grad_loss);
  Scale<T> scales[kSamples];
  bool any_gradient = false;
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    const bool has_gradient = grad_loss[i] != T(0);
    any_gradient = any_gradient || has_gradient;
    const double exponent = has_gradient ? log_sum_exp[share.sample(i)] : 0.0;
    scales[i] = Scale<T>(grad_loss[i], /*sum_t=*/0, exponent);
  }

#pragma unroll 1
  for (int c = share.begin; c < classes; c += share.step) {
    const int count = classes - c;
    T grad[kBackwardClasses][kSamples] = {};
    if (any_gradient) {
      T x[kBackwardClasses][kSamples];
      input.read(c, count, T(0), x);
#pragma unroll
      for (int k = 0; k < kBackwardClasses; ++k) {
        const T weight = k < count ? in.weight_of<T>(c + k) : T(0);
        const T factor = static_cast<T>(in.kept) * weight;
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
          if (grad_loss[i] != T(0)) grad[k][i] = scales[i].target_gradient(x[k][i], factor);
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
  __device__ int64_t number() const {
    return blockIdx.x * int64_t(kThreads / size_) + threadIdx.x / size_;
  }

  // Of all threads of the team, in every thread. All threads of the block have to call it.
  template <typename Operation, typename T>
  __device__ T reduce(T value, T neutral, const Operation& operation) const {
    if (size_ > kWarp) return block_reduce(value, neutral, operation);
    return lanes_reduce(value, size_, operation);
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
class Runs {
 public:
  static constexpr int kCount = kRuns * kRun;
  int64_t begin;  // the first run's first class, below 0 where it goes over the sample's beginning
  int64_t step;   // from these runs to the next

  __device__ Runs(const Team& team, const Arguments& in, const char* sample)
      : step(int64_t(team.size()) * kCount), classes_(in.classes), distance_(team.size() * kRun) {
    const auto element = reinterpret_cast<uintptr_t>(sample) >> (__ffs(in.input.size) - 1);
    begin = team.rank() * kRun - static_cast<int>(element % kRun);
  }

  // The class of element i of the runs, counted from their first one's.
  __device__ int place(int i) const { return i / kRun * distance_ + i % kRun; }

  // Whether element i of the runs from c on is a class.
  __device__ bool counts(int64_t c, int i) const {
    return place(i) < at_most(classes_ - c) && (i % kRun == i ? c + i >= 0 : true);
  }
  // Whether all elements of `count` runs from number r on are.
  __device__ bool whole(int64_t c, int r, int count) const {
    return counts(c, r * kRun) && counts(c, (r + count) * kRun - 1);
  }

  // Where a class is, as place() counts; below 0 where it is not.
  __device__ int place_of(int64_t target, int64_t c) const {
    return target < c ? -1 : at_most(target - c);
  }

 private:
  static __device__ int at_most(int64_t number) {
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    return static_cast<int>(number < kMost ? number : kMost);
  }

  int64_t classes_;
  int distance_;
};

// A tensor's elements of one sample.
class Row {
 public:
  __device__ Row(const Numbers& numbers, int64_t sample)
      : dtype_(numbers.first.dtype),
        adjacent_(numbers.stride == numbers.size),
        stride_(numbers.stride),
        sample_(numbers.at(sample)) {}

  __device__ __forceinline__ char* at(int64_t c) const { return sample_ + c * stride_; }

  template <typename T, int kRun>
  __device__ __forceinline__ void read(const Runs<kRun>& runs, int64_t c, T otherwise,
                                       T (&values)[kRuns * kRun]) const {
    for_dtype<T>(dtype_, [&](auto zero) {
      using scalar_t = decltype(zero);
      using Run = Vector<scalar_t, kRun>;
      const bool aligned = is_aligned<Run>(c);
      const auto run = [&](int r) { return at(c) + runs.place(r * kRun) * stride_; };
      Run numbers[kRuns];
      if (aligned && runs.whole(c, 0, kRuns)) {  // all loads before the first use
#pragma unroll
        for (int r = 0; r < kRuns; ++r) numbers[r] = *reinterpret_cast<const Run*>(run(r));
      } else {
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          if (aligned && runs.whole(c, r, 1)) {
            numbers[r] = *reinterpret_cast<const Run*>(run(r));
            continue;
          }
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            numbers[r].values[i] = runs.counts(c, r * kRun + i)
                                       ? *reinterpret_cast<const scalar_t*>(run(r) + i * stride_)
                                       : static_cast<scalar_t>(otherwise);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRuns * kRun; ++i) {
        values[i] = static_cast<T>(numbers[i / kRun].values[i % kRun]);
      }
    });
  }

  template <typename T, int kRun>
  __device__ __forceinline__ void write(const Runs<kRun>& runs, int64_t c,
                                        const T (&values)[kRuns * kRun]) const {
    for_dtype<T>(dtype_, [&](auto zero) {
      using scalar_t = decltype(zero);
      using Run = Vector<scalar_t, kRun>;
      const bool aligned = is_aligned<Run>(c);
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        Run numbers;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          numbers.values[i] = static_cast<scalar_t>(values[r * kRun + i]);
        }
        char* const run = at(c) + runs.place(r * kRun) * stride_;
        if (aligned && runs.whole(c, r, 1)) {
          *reinterpret_cast<Run*>(run) = numbers;
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (!runs.counts(c, r * kRun + i)) continue;
            *reinterpret_cast<scalar_t*>(run + i * stride_) = numbers.values[i];
          }
        }
      }
    });
  }

 private:
  template <typename Run>
  __device__ bool is_aligned(int64_t c) const {
    return adjacent_ && reinterpret_cast<uintptr_t>(at(c)) % alignof(Run) == 0;
  }

  core::Dtype dtype_;
  bool adjacent_;
  int64_t stride_;
  char* sample_;
};

// The coefficients of classes that are not the target, and 0 beside the sample's classes.
template <int kRun, typename T>
__device__ __forceinline__ void read_coefficients(const Arguments& in, const Row& probabilities,
                                                  const Runs<kRun>& runs, int64_t c,
                                                  T (&t)[kRuns * kRun]) {
  if (in.probabilities.first.data != nullptr) {
    probabilities.read(runs, c, T(0), t);
  } else {
#pragma unroll
    for (int i = 0; i < kRuns * kRun; ++i) t[i] = T(0);
  }
#pragma unroll
  for (int i = 0; i < kRuns * kRun; ++i) {
    const T weight = runs.counts(c, i) ? in.weight_of<T>(c + runs.place(i)) : T(0);
    t[i] = in.coefficient_of(t[i], weight);
  }
}

__device__ __forceinline__ int64_t read_target(const Arguments& in, int64_t sample) {
  if (in.target.data == nullptr) return Arguments::kNoClass;
  return in.class_of(in.target.as<const int64_t>()[in.target.offset(sample)]);
}

// `rounds` samples to a team, of which each lane finishes one.
template <typename T, bool kAny, int kRun>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(kAny       ? 2
                                                              : kRun > 1 ? 4
                                                                         : 5))
    forward_by_sample(const __grid_constant__ Arguments in, int team_size, int rounds,
                      T* losses,            // [samples]
                      double* log_sum_exp,  // [samples]
                      const __grid_constant__ Finish finish) {
  const Team team(team_size);
  const int64_t begin = team.number() * rounds;
  const int64_t own = begin + team.rank(), last = in.samples - 1;
  const bool exists = team.rank() < rounds && own <= last;
  const int64_t target = exists ? read_target(in, own) : Arguments::kNoClass;
  T logit = T(0);
  if (target != Arguments::kNoClass) {
    const char* const at = in.input.at(own) + target * in.input.stride;
    for_dtype<T>(in.input.first.dtype, [&](auto zero) {
      logit = static_cast<T>(*reinterpret_cast<const decltype(zero)*>(at));
    });
  }

  Sums<T, kAny> own_sums;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int64_t sample = begin + round < last ? begin + round : last;
    const Row input(in.input, sample);
    const Row probabilities(in.probabilities, sample);
    const Runs<kRun> runs(team, in, input.at(0));
    Sums<T, kAny> sums;
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
    if (round == team.rank()) own_sums = sums;
  }
  if (exists) {
    const Outcome<T> of_sample = outcome(in, own_sums, target, logit);
    losses[own] = of_sample.loss;
    log_sum_exp[own] = of_sample.log_sum_exp;
  }
  if (finish.ticket != nullptr) find_tail(finish, in, losses);
}

template <typename T, int kRun>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(3))
    backward_by_sample(const Arguments in, int team_size, const T* grad_losses,  // [samples]
                       const double* log_sum_exp,                                // [samples]
                       const Numbers grad_input) {
  const Team team(team_size);
  const bool exists = team.number() < in.samples;
  const int64_t sample = exists ? team.number() : in.samples - 1;
  const Row input(in.input, sample);
  const Row probabilities(in.probabilities, sample);
  const Row gradient(grad_input, sample);
  const Runs<kRun> runs(team, in, input.at(0));
  const T grad_loss = grad_losses[sample];
  const int64_t target = read_target(in, sample);
  const bool has_target = target != Arguments::kNoClass;
  const bool ignored = in.target.data != nullptr && !has_target;
  const bool has_gradient = exists && grad_loss != T(0) && !ignored;

  double sum_t = in.smoothing * static_cast<double>(in.classes);
  if (in.probabilities.first.data != nullptr || (in.any() && in.weight != nullptr)) {
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
      const int place = runs.place_of(target, c);
#pragma unroll
      for (int i = 0; i < kRuns * kRun; ++i) {
        const bool is_target = runs.place(i) == place;
        grad[i] = scale.gradient(exp_of(scale.exponent(x[i])), is_target ? t_of_target : t[i]);
      }
    }
    gradient.write(runs, c, grad);
  }
}

template <typename T, int kRun>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(3))
    target_backward_by_sample(const Arguments in, int team_size, const T* grad_losses,  // [samples]
                              const double* log_sum_exp,                                // [samples]
                              const Numbers grad_target) {
  const Team team(team_size);
  const int64_t sample = team.number();
  if (sample >= in.samples) return;
  const Row input(in.input, sample);
  const Row gradient(grad_target, sample);
  const Runs<kRun> runs(team, in, input.at(0));
  const T grad_loss = grad_losses[sample];
  const bool has_gradient = grad_loss != T(0);
  const Scale<T> scale(grad_loss, /*sum_t=*/0, has_gradient ? log_sum_exp[sample] : 0.0);

#pragma unroll 1
  for (int64_t c = runs.begin; c < in.classes; c += runs.step) {
    T grad[kRuns * kRun] = {};
    if (has_gradient) {
      T x[kRuns * kRun];
      input.read(runs, c, T(0), x);
#pragma unroll
      for (int i = 0; i < kRuns * kRun; ++i) {
        const T weight = runs.counts(c, i) ? in.weight_of<T>(c + runs.place(i)) : T(0);
        grad[i] = scale.target_gradient(x[i], static_cast<T>(in.kept) * weight);
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
  const auto size = kSamples * core::element_size(first.dtype);
  return reinterpret_cast<uintptr_t>(first.data) % std::min<size_t>(size, 16) == 0;
}
bool in_vectors(const Classes& classes) {
  return classes.first.data == nullptr || in_vectors(classes.first, classes.stride);
}
bool in_vectors(const void* numbers) { return reinterpret_cast<uintptr_t>(numbers) % 16 == 0; }

// So many fill a device of more than a hundred multiprocessors.
constexpr int64_t kEnoughThreads = int64_t(1) << 17;

Columns columns_of(const Inputs& in) {
  Columns columns{1};
  while (columns.slices < kWarps && in.samples * columns.slices / kSamples < kEnoughThreads &&
         columns.slices * 2 * kForwardClasses * 2 <= in.classes) {
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

int rounds_of(const Inputs& in, int team_size) {
  if (team_size > kWarp) return 1;
  const int64_t threads = in.samples * team_size;
  return static_cast<int>(std::clamp<int64_t>(threads / kEnoughThreads, 1, team_size));
}

template <typename T>
void forward_typed(const Inputs& in, T* losses, double* log_sum_exp,
                   const superquantile::FusedTail* tail) {
  const Arguments arguments(in);
  const FinishOfLaunch<T> of_tail(tail, in.samples);
  const bool any = arguments.any();
  if (walk_by_sample(in)) {
    const int team = team_size_of(in);
    const auto in_runs = any ? forward_by_sample<T, true, 4> : forward_by_sample<T, false, 4>;
    const auto one_by_one = any ? forward_by_sample<T, true, 1> : forward_by_sample<T, false, 1>;
    const int rounds = rounds_of(in, team);
    launch(walk_in_runs(in) ? in_runs : one_by_one,
           grid(divide_up(in.samples, int64_t(kThreads / team) * rounds)), kThreads,
           of_tail.shared_bytes, arguments, team, rounds, losses, log_sum_exp, of_tail.finish);
  } else {
    const bool adjacent = in_vectors(in.input) && in_vectors(in.probabilities);
    const auto in_fours = any ? forward_by_class<T, true, true> : forward_by_class<T, false, true>;
    const auto singly = any ? forward_by_class<T, true, false> : forward_by_class<T, false, false>;
    const Columns columns = columns_of(in);
    const size_t of_slice = any ? sizeof(Slice<T, true>) : sizeof(Slice<T, false>);
    const size_t of_slices = columns.slices > 1 ? kThreads * kSamples * of_slice : 0;
    launch(adjacent ? in_fours : singly, grid(divide_up(in.samples, columns.samples_of_block())),
           kThreads, std::max(of_slices, of_tail.shared_bytes), arguments, columns, losses,
           log_sum_exp, of_tail.finish);
  }
}

template <typename T>
void backward_typed(const Inputs& in, const T* grad_losses, const double* log_sum_exp,
                    const Classes& grad_input) {
  const Arguments arguments(in);
  const Numbers gradient(grad_input);
  if (walk_by_sample(in)) {
    const int team = team_size_of(in);
    launch(walk_in_runs(in) ? backward_by_sample<T, 4> : backward_by_sample<T, 1>,
           grid(divide_up(in.samples, kThreads / team)), kThreads, 0, arguments, team, grad_losses,
           log_sum_exp, gradient);
  } else {
    const bool adjacent = in_vectors(in.input) && in_vectors(in.probabilities) &&
                          in_vectors(grad_input) && in_vectors(grad_losses);
    const Columns columns = columns_of(in);
    launch(adjacent ? backward_by_class<T, true> : backward_by_class<T, false>,
           grid(divide_up(in.samples, columns.samples_of_block())), kThreads, 0, arguments, columns,
           grad_losses, log_sum_exp, gradient);
  }
}

template <typename T>
void target_backward_typed(const Inputs& in, const T* grad_losses, const double* log_sum_exp,
                           const Classes& grad_target) {
  const Arguments arguments(in);
  const Numbers gradient(grad_target);
  if (walk_by_sample(in)) {
    const int team = team_size_of(in);
    launch(walk_in_runs(in) ? target_backward_by_sample<T, 4> : target_backward_by_sample<T, 1>,
           grid(divide_up(in.samples, kThreads / team)), kThreads, 0, arguments, team, grad_losses,
           log_sum_exp, gradient);
  } else {
    const bool adjacent =
        in_vectors(in.input) && in_vectors(grad_target) && in_vectors(grad_losses);
    const Columns columns = columns_of(in);
    launch(adjacent ? target_backward_by_class<T, true> : target_backward_by_class<T, false>,
           grid(divide_up(in.samples, columns.samples_of_block())), kThreads, 0, arguments, columns,
           grad_losses, log_sum_exp, gradient);
  }
}

void forward(const Inputs& in, core::Dtype dtype, void* losses, double* log_sum_exp,
             const superquantile::FusedTail* tail) {
  dtype == core::Dtype::kDouble ? forward_typed(in, static_cast<double*>(losses), log_sum_exp, tail)
                                : forward_typed(in, static_cast<float*>(losses), log_sum_exp, tail);
}

void backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
              const double* log_sum_exp, const Classes& grad_input) {
  dtype == core::Dtype::kDouble
      ? backward_typed(in, static_cast<const double*>(grad_losses), log_sum_exp, grad_input)
      : backward_typed(in, static_cast<const float*>(grad_losses), log_sum_exp, grad_input);
}

void target_backward(const Inputs& in, core::Dtype dtype, const void* grad_losses,
                     const double* log_sum_exp, const Classes& grad_target) {
  dtype == core::Dtype::kDouble
      ? target_backward_typed(in, static_cast<const double*>(grad_losses), log_sum_exp, grad_target)
      : target_backward_typed(in, static_cast<const float*>(grad_losses), log_sum_exp, grad_target);
}

}  // namespace

const Kernels kernels{forward, backward, target_backward};

}  // namespace sqloss::cross_entropy_losses::CUDA
