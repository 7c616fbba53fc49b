// Memory for a kernel's working set, kept for its next call: a fresh allocation of this size would
// be paged in anew each time, at more than the cost of using it. The threads of one call share what
// is kept, because they pass their results on.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace sqloss::core {

// The memory that is kept.
class ScratchMemory {
 public:
  static constexpr std::align_val_t kAlignment{64};  // of the widest vectors
  struct Free {
    void operator()(char* data) const { ::operator delete[](data, kAlignment); }
  };
  struct Bytes {
    std::unique_ptr<char[], Free> data;
    int64_t size = 0;
  };

  // Of the buffers kept, the smallest that is large enough; or a new one. Sizes are rounded up to
  // powers of two, so that calls of many sizes share few buffers.
  static Bytes take(int64_t needed) {
    const auto size = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(needed)));
    {
      const std::lock_guard<std::mutex> lock(kept().mutex);
      std::vector<Bytes>& buffers = kept().buffers;
      auto best = buffers.end();
      for (auto it = buffers.begin(); it != buffers.end(); ++it) {
        if (it->size >= size && (best == buffers.end() || it->size < best->size)) best = it;
      }
      if (best != buffers.end()) {
        Bytes taken = std::move(*best);
        kept().size -= taken.size;
        buffers.erase(best);
        return taken;
      }
    }
    auto* const data = static_cast<char*>(::operator new[](size, kAlignment));
    return {std::unique_ptr<char[], Free>(data), size};
  }

  // The oldest make room for the newest.
  static void keep(Bytes bytes) {
    if (!bytes.data || bytes.size > kMostKept) return;
    const std::lock_guard<std::mutex> lock(kept().mutex);
    std::vector<Bytes>& buffers = kept().buffers;
    auto oldest = buffers.begin();
    for (; kept().size + bytes.size > kMostKept; ++oldest) kept().size -= oldest->size;
    buffers.erase(buffers.begin(), oldest);
    kept().size += bytes.size;
    buffers.push_back(std::move(bytes));
  }

 private:
  struct Kept {
    std::mutex mutex;
    std::vector<Bytes> buffers;
    int64_t size = 0;
  };
  static constexpr int64_t kMostKept = int64_t(1) << 26;  // bytes

  static Kept& kept() {
    static auto* kept = new Kept;  // for threads that outlive static objects
    return *kept;
  }
};

// A growing array, uninitialised, of a type that may be copied as bytes.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Scratch&&) noexcept = default;
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Scratch() { ScratchMemory::keep(std::move(bytes_)); }

  T* data() { return reinterpret_cast<T*>(bytes_.data.get()); }

  // Room for `count` of them; the first `used` stay.
  T* reserve(int64_t count, int64_t used = 0) {
    const int64_t needed = count * static_cast<int64_t>(sizeof(T));
    if (needed > bytes_.size) {
      auto larger = ScratchMemory::take(std::max(needed, 2 * bytes_.size));
      if (used > 0) std::memcpy(larger.data.get(), bytes_.data.get(), used * sizeof(T));
      std::swap(bytes_, larger);
      ScratchMemory::keep(std::move(larger));
    }
    return data();
  }

 private:
  ScratchMemory::Bytes bytes_;
};

}  // namespace sqloss::core
