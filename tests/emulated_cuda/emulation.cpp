// The blocks and fibers of include/cuda_runtime.h.
#include <cuda_runtime.h>

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

// What core/cuda.h declares as the dynamic shared memory
namespace sqloss::core::cuda {
thread_local uint4 shared_memory[kEmulatedSharedMemory / sizeof(uint4)];
}

namespace emulated_cuda {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned char kUnwritten = 0xff;  // NaN

}  // namespace

thread_local Block block;

std::mt19937& chance() {
  thread_local std::mt19937 generator([] {
    const char* seed = std::getenv("EMULATED_CUDA_SEED");
    return seed == nullptr ? 0u : static_cast<unsigned>(std::strtoul(seed, nullptr, 10));
  }());
  return generator;
}

void Block::enter() {
  Block& self = block;
  (*self.kernel_)();
  self.finish();
}

void Block::run(unsigned count, const std::function<void()>& kernel) {
  kernel_ = &kernel;
  failure_.clear();
  alive_ = count;
  ready_.clear();
  at_barrier_.clear();
  meetings_.clear();
  meetings_.resize((count + kWarp - 1) / kWarp);
  while (fibers_.size() < count) {
    fibers_.push_back(std::make_unique<Fiber>());
    stacks_.push_back(std::make_unique<unsigned char[]>(kStack));
  }
  for (unsigned number = 0; number < count; ++number) {
    Fiber& fiber = *fibers_[number];
    fiber.number = number;
    fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                   number / (blockDim.x * blockDim.y)};
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks_[number].get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    ready_.push_back(&fiber);
  }
  _setjmp(scheduler_);  // fibers come back here
  if (!failure_.empty()) C10_THROW_ERROR(Error, "emulated CUDA: " + failure_);
  if (ready_.empty()) {
    TORCH_CHECK(alive_ == 0, "emulated CUDA: of ", alive_, " threads, ", at_barrier_.size(),
                " wait in __syncthreads and the others in an operation of their warp, for threads ",
                "that never come");
    return;
  }
  std::swap(ready_[chance()() % ready_.size()], ready_.back());
  current = ready_.back();
  ready_.pop_back();
  threadIdx = current->index;
  if (!current->started) {
    current->started = true;
    setcontext(&current->start);
  }
  _longjmp(current->context, 1);
}

void Block::to_scheduler() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler_, 1);
}

void Block::finish() {
  --alive_;
  if (alive_ > 0 && at_barrier_.size() == alive_) ready_.swap(at_barrier_);
  _longjmp(scheduler_, 1);
}

void Block::fail(const std::string& why) {
  failure_ = why;
  _longjmp(scheduler_, 1);
}

void Block::wait_for_block() {
  at_barrier_.push_back(current);
  if (at_barrier_.size() == alive_) {
    ready_.insert(ready_.end(), at_barrier_.begin(), at_barrier_.end());
    at_barrier_.clear();
  }
  to_scheduler();
}

Meeting& Block::meeting(unsigned lanes) {
  auto& of_warp = meetings_[current->number / kWarp];
  for (const auto& meeting : of_warp) {
    if (meeting->lanes == lanes) return *meeting;
  }
  of_warp.push_back(std::make_unique<Meeting>());
  of_warp.back()->lanes = lanes;
  return *of_warp.back();
}

unsigned Block::meet(Meeting& meeting, const void* value, size_t size) {
  const unsigned me = 1u << (current->number % kWarp);
  if (!(meeting.lanes & me)) fail("a lane calls an operation of lanes that it is not among");
  const unsigned side = meeting.passed % 2;
  std::memcpy(meeting.values[side][current->number % kWarp], value, size);
  meeting.arrived |= me;
  if (meeting.arrived != meeting.lanes) {
    meeting.waiting.push_back(current);
    to_scheduler();
    return side;
  }
  meeting.arrived = 0;
  ++meeting.passed;
  ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
  ready_.push_back(current);
  to_scheduler();
  return side;
}

void run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  TORCH_CHECK(blocks.x > 0 && blocks.y > 0 && blocks.z > 0 && blocks.y <= 65535 &&
                  blocks.z <= 65535 && blocks.x <= INT32_MAX,
              "emulated CUDA: a grid of ", blocks.x, " x ", blocks.y, " x ", blocks.z);
  const unsigned count = threads.x * threads.y * threads.z;
  TORCH_CHECK(count > 0 && count <= 1024, "emulated CUDA: ", count, " threads in a block");
  TORCH_CHECK(shared_bytes <= kEmulatedSharedMemory, "emulated CUDA: ", shared_bytes,
              " bytes of shared memory");
  std::vector<uint64_t> order(static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z);
  std::iota(order.begin(), order.end(), uint64_t(0));
  std::shuffle(order.begin(), order.end(), chance());
  auto* const shared = reinterpret_cast<unsigned char*>(sqloss::core::cuda::shared_memory);
  gridDim = blocks;
  blockDim = threads;
  for (const uint64_t number : order) {
    blockIdx = {static_cast<unsigned>(number % blocks.x),
                static_cast<unsigned>(number / blocks.x % blocks.y),
                static_cast<unsigned>(number / blocks.x / blocks.y)};
    constexpr size_t kGuard = 4096;
    const size_t guarded = std::min(shared_bytes + kGuard, kEmulatedSharedMemory);
    std::memset(shared, kUnwritten, guarded);
    block.run(count, kernel);
    for (size_t i = shared_bytes; i < guarded; ++i) {
      TORCH_CHECK(shared[i] == kUnwritten, "emulated CUDA: shared memory written at ", i, " of ",
                  shared_bytes, " bytes");
    }
  }
}

}  // namespace emulated_cuda
