// What the CUDA kernels share: launches, memory, reductions in a fixed order, tensors of any dtype
// and stride. Included by csrc/*/cuda.cu alone.
//
// No result depends on how blocks are scheduled: work is cut into chunks that depend on sizes,
// strides and alignment alone, and what chunks add up is added in their order. Blocks never wait
// for one another; what all have to be done for, the last one of them does (last_block).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "core/cuda_runtime.h"
#include "core/dtype.h"
#include "core/strided.h"

namespace sqloss::core::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxThreads = 1024;  // of a block

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- host ----------------------------------------------------------------------------------------

// Runs a kernel on the current stream of the current device, with the arguments as its parameters.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            const Arguments&... arguments) {
  if (blocks.x == 0 || blocks.y == 0) return;
  // More has to be asked for, and a device can refuse. What was asked for last holds: no other
  // thread may ask before this launch.
  constexpr size_t kWithoutAsking = 48 * 1024;
  static std::mutex mutex;
  std::unique_lock<std::mutex> lock(mutex, std::defer_lock);
  if (shared_bytes > kWithoutAsking) {
    lock.lock();
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream();
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Room for a call's intermediate results, from torch's caching allocator: kernels of the current
// stream may use it, those already launched also after it is freed.
class Memory {
 public:
  // Where `count` Ts are to lie; before allocate().
  template <typename T>
  size_t reserve(int64_t count) {
    constexpr size_t kAlignment = 256;
    const size_t offset = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }

  void allocate() {
    if (size_ > 0) memory_.reset(core::cuda::allocate(size_));
  }

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + offset);
  }

  // Bytes from `begin` to `end`, by work on the stream.
  void zero(size_t begin, size_t end) const {
    if (begin == end) return;
    check(cudaMemsetAsync(at<char>(begin), 0, end - begin, current_stream()));
  }

  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* memory) const { core::cuda::free(memory); }
  };

  size_t size_ = 0;
  std::unique_ptr<void, Free> memory_;
};

// A ticket for last_block, cleared by work on the stream. To be kept until the kernel is launched.
class Ticket {
 public:
  Ticket() {
    memory_.reserve<unsigned>(1);
    memory_.allocate();
    memory_.zero(0, sizeof(unsigned));
  }
  unsigned* get() const { return memory_.at<unsigned>(0); }

 private:
  Memory memory_;
};

// --- threads -------------------------------------------------------------------------------------

// Of blocks whose threads are numbered along x.
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x / kWarp); }

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<unsigned char*>(shared_memory);
}

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Minimum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Of the values of a warp's lanes, the same bits in every lane: the operation is commutative, and
// each lane applies it in the same tree.
template <typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// In one instruction where there is one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned warp_reduce(unsigned value, Sum) {
  return __reduce_add_sync(kAllLanes, value);
}
__device__ __forceinline__ unsigned warp_reduce(unsigned value, Maximum) {
  return __reduce_max_sync(kAllLanes, value);
}
__device__ __forceinline__ unsigned warp_reduce(unsigned value, Minimum) {
  return __reduce_min_sync(kAllLanes, value);
}
#endif

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce(value, Maximum());
}

// Of groups of `lanes` adjacent lanes, a power of 2 and the same for all of the warp.
template <typename T, typename Operation>
__device__ __forceinline__ T lanes_reduce(T value, int lanes, Operation operation) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Of all threads of a block of whole warps, in every thread. All threads have to call it.
template <typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T value, T neutral, Operation operation) {
  __shared__ T of_warps[kMaxThreads / kWarp];
  value = warp_reduce(value, operation);
  __syncthreads();  // of_warps may still be read from the call before
  if (lane() == 0) of_warps[warp()] = value;
  __syncthreads();
  return warp_reduce(lane() < warps() ? of_warps[lane()] : neutral, operation);
}
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, T(0), Sum());
}

// Whether this block is the last of `blocks` to come here: then all threads of it see what the
// others had written before. The ticket is 0 before and after. Read what others wrote by __ldcg.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();  // each thread's writes before the ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// --- tensors -------------------------------------------------------------------------------------

// f(zero of the C++ type) for a floating dtype, which is the same for all threads, and not wider
// than Widest.
template <typename Widest = double, typename F>
__device__ __forceinline__ void for_dtype(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<Widest, double>) {
    if (dtype == Dtype::kDouble) return f(double());
  }
  switch (dtype) {
    case Dtype::kFloat:
      return f(float());
    case Dtype::kHalf:
      return f(c10::Half());
    default:
      return f(c10::BFloat16());
  }
}

// a / b of numbers that are not negative: division of 64 bits takes several times as long as of 32.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A Strided as kernels take it.
struct Sequence {
  static constexpr int kMaxDims = 16;
  // Accesses are this wide where memory allows.
  static constexpr int kAlignment = 16;

  char* data = nullptr;  // null: absent
  Dtype dtype = Dtype::kFloat;
  bool adjacent = false;  // elements follow one another, from an aligned address on
  int dims = 0;
  int64_t sizes[kMaxDims], strides[kMaxDims];  // outermost first, in elements

  Sequence() = default;
  explicit Sequence(const Strided& strided)
      : data(strided.data), dtype(strided.dtype), dims(static_cast<int>(strided.sizes.size())) {
    if (data == nullptr) return;
    check_dims(dims, kMaxDims);
    for (int d = 0; d < dims; ++d) {
      sizes[d] = strided.sizes[d];
      strides[d] = strided.strides[d];
    }
    adjacent = dims == 1 && strides[0] == 1 && reinterpret_cast<uintptr_t>(data) % kAlignment == 0;
  }

  // Of an element, in elements.
  __device__ __forceinline__ int64_t offset(int64_t index) const {
    if (dims == 1) return index * strides[0];
    int64_t offset = 0;
#pragma unroll 1  // divisions are much code
    for (int d = dims - 1; d > 0; --d) {
      const int64_t above = divide(index, sizes[d]);
      offset += (index - above * sizes[d]) * strides[d];
      index = above;
    }
    return offset + index * strides[0];
  }

  template <typename T>
  __device__ __forceinline__ T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// kCount numbers that one or two loads bring.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T values[kCount];
};

template <typename T>
__device__ __forceinline__ T read(const Sequence& from, int64_t index) {
  T value;
  const int64_t offset = from.offset(index);
  cuda::for_dtype(from.dtype, [&](auto zero) {
    value = static_cast<T>(from.as<const decltype(zero)>()[offset]);
  });
  return value;
}

template <typename T>
__device__ __forceinline__ void write(const Sequence& to, int64_t index, T value) {
  const int64_t offset = to.offset(index);
  cuda::for_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    to.as<scalar_t>()[offset] = static_cast<scalar_t>(value);
  });
}

}  // namespace sqloss::core::cuda
