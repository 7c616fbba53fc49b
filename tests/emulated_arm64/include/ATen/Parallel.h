// What selection.h needs of ATen/Parallel.h, with one thread.
#pragma once

#include <cstdint>

namespace at {

inline bool in_parallel_region() { return false; }
inline int get_num_threads() { return 1; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

}  // namespace at
