// Memory for a kernel's working set, kept for its next call: a fresh allocation of this size would
// be paged in anew each time, at more than the cost of using it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace sqloss::core {

// A growing array of numbers, uninitialised, whose memory goes back to the thread that drops it.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Scratch&&) noexcept = default;
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Scratch() { keep(std::move(bytes_)); }

  T* data() { return reinterpret_cast<T*>(bytes_.data.get()); }

  // Room for `count` numbers; the first `used` stay.
  T* reserve(int64_t count, int64_t used = 0) {
    const int64_t needed = count * static_cast<int64_t>(sizeof(T));
    if (needed > bytes_.size) {
      Bytes larger = take(std::max(needed, 2 * bytes_.size));
      if (used > 0) std::memcpy(larger.data.get(), bytes_.data.get(), used * sizeof(T));
      std::swap(bytes_, larger);
      keep(std::move(larger));
    }
    return data();
  }

 private:
  struct Bytes {
    std::unique_ptr<char[]> data;
    int64_t size = 0;
  };
  struct Kept {
    std::vector<Bytes> buffers;
    int64_t size = 0;
  };
  static constexpr int64_t kMostKept = int64_t(1) << 25;  // bytes of a thread

  static Kept& kept() {
    static thread_local Kept kept;
    return kept;
  }
  static void keep(Bytes bytes) {
    if (!bytes.data || kept().size + bytes.size > kMostKept) return;
    kept().size += bytes.size;
    kept().buffers.push_back(std::move(bytes));
  }
  // Of the buffers kept, the smallest that is large enough; or a new one.
  static Bytes take(int64_t size) {
    std::vector<Bytes>& buffers = kept().buffers;
    auto best = buffers.end();
    for (auto it = buffers.begin(); it != buffers.end(); ++it) {
      if (it->size >= size && (best == buffers.end() || it->size < best->size)) best = it;
    }
    if (best == buffers.end()) return {std::unique_ptr<char[]>(new char[size]), size};
    Bytes taken = std::move(*best);
    kept().size -= taken.size;
    buffers.erase(best);
    return taken;
  }

  Bytes bytes_;
};

}  // namespace sqloss::core
