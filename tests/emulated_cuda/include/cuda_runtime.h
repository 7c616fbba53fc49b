// CUDA's language and runtime, as far as csrc/*/cuda.cu use them, on a CPU.
//
// Every thread of a block is a fiber. A fiber runs until it has to wait for others, in
// __syncthreads or in an operation of its warp; which one runs next is drawn at random, as is the
// order of the blocks. So what a missing barrier leaves to chance is left to chance here as well.
// Also found: threads that wait for one that never comes, dynamic shared memory written beyond what
// was asked for, dynamic shared and global memory read before it is written (it starts as NaN), and
// device-side assertions.
//
// Not found: what comes from blocks that overlap (a missing fence, a stale cache), from accesses
// that are not aligned, from streams and graphs, or from other rounding: compilers for GPUs have
// their own divisions, powers and code under __CUDA_ARCH__.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one after the other, each launch on one thread of the CPU
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

constexpr size_t kEmulatedSharedMemory = 227 * 1024;

// Of the fiber that runs
extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace emulated_cuda {

constexpr unsigned kWarp = 32;

struct Fiber;

// Lanes of a warp that meet: an operation's values, kept for two operations in turn, so that one
// that is fast cannot overwrite what a slow one has yet to read.
struct Meeting {
  unsigned lanes = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  unsigned passed = 0;  // how often all have met
  unsigned char values[2][kWarp][16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool started = false;
  uint3 index;
  unsigned number = 0;  // in the block
};

class Block {
 public:
  void run(unsigned count, const std::function<void()>& kernel);
  void wait_for_block();
  Meeting& meeting(unsigned lanes);
  // Returns the side of the meeting where the values of all lanes now lie.
  unsigned meet(Meeting& meeting, const void* value, size_t size);
  [[noreturn]] void fail(const std::string& why);

  Fiber* current = nullptr;

 private:
  static void enter();
  void to_scheduler();
  void finish();

  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  std::vector<Fiber*> ready_, at_barrier_;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings_;  // of each warp
  unsigned alive_ = 0;
  std::string failure_;
};

extern thread_local Block block;
std::mt19937& chance();

// Runs a kernel; raises where it fails.
void run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

inline unsigned lane_number() { return block.current->number % kWarp; }

// f(values, lane of each) once all lanes have given theirs.
template <typename T, typename F>
auto among(unsigned lanes, T value, const F& f) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Meeting& meeting = block.meeting(lanes);
  const unsigned side = block.meet(meeting, &value, sizeof(T));
  return f([&meeting, side](unsigned lane) {
    T other;
    std::memcpy(&other, meeting.values[side][lane], sizeof(T));
    return other;
  });
}

template <typename T, typename F>
T fold(unsigned lanes, T value, const F& f) {
  return among(lanes, value, [&](auto of) {
    bool first = true;
    T result{};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      result = first ? of(lane) : f(result, of(lane));
      first = false;
    }
    return result;
  });
}

}  // namespace emulated_cuda

// --- threads -------------------------------------------------------------------------------------

inline void __syncthreads() { emulated_cuda::block.wait_for_block(); }
inline void __syncwarp(unsigned lanes = 0xffffffff) {
  emulated_cuda::among(lanes, 0, [](auto) { return 0; });
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from, int width = 32) {
  const unsigned me = emulated_cuda::lane_number(), first = me / width * width;
  return emulated_cuda::among(lanes, value, [&](auto of) { return of(first + from % width); });
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int distance, int width = 32) {
  const unsigned me = emulated_cuda::lane_number(), other = me ^ static_cast<unsigned>(distance);
  const bool inside = other / width <= me / width;
  return emulated_cuda::among(lanes, value, [&](auto of) { return inside ? of(other) : value; });
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, unsigned distance, int width = 32) {
  const unsigned me = emulated_cuda::lane_number();
  const bool inside = me % width >= distance;
  return emulated_cuda::among(lanes, value,
                              [&](auto of) { return inside ? of(me - distance) : value; });
}
inline unsigned __ballot_sync(unsigned lanes, bool yes) {
  return emulated_cuda::fold(lanes, yes ? 1u << emulated_cuda::lane_number() : 0u,
                             [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned lanes, bool yes) { return __ballot_sync(lanes, yes) != 0; }
template <typename T>
unsigned __match_any_sync(unsigned lanes, T value) {
  return emulated_cuda::among(lanes, value, [&](auto of) {
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) && of(lane) == value) same |= 1u << lane;
    }
    return same;
  });
}
inline unsigned __reduce_add_sync(unsigned lanes, unsigned value) {
  return emulated_cuda::fold(lanes, value, std::plus<unsigned>());
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
  return emulated_cuda::fold(lanes, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned lanes, unsigned value) {
  return emulated_cuda::fold(lanes, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

// --- memory --------------------------------------------------------------------------------------

// Fibers change places in no other than waiting functions: plain memory is atomic.
template <typename T>
T emulated_exchange(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T, typename V>
T atomicAdd(T* address, V value) {
  static_assert(std::is_integral_v<T>, "the order of atomic additions of floats is chance");
  return emulated_exchange(address, static_cast<T>(*address + static_cast<T>(value)));
}
template <typename T, typename V>
T atomicMax(T* address, V value) {
  return emulated_exchange(address, std::max(*address, static_cast<T>(value)));
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulated_exchange(address, *address >= last ? 0u : *address + 1);
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

// --- arithmetic ----------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline float __fdividef(float a, float b) { return a / b; }

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition)                                                  \
  do {                                                                                 \
    if (!(condition)) emulated_cuda::block.fail("device-side assertion: " #condition); \
  } while (false)

// --- runtime -------------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(kEmulatedSharedMemory);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(static_cast<Parameters>(arguments)...);
  emulated_cuda::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                          [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
