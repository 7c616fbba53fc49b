// Which kernels serve a tensor.
#include "core/cpu_capability.h"
#include "student_t/student_t.h"

namespace sqloss::student_t {

const Kernels& cpu_kernels() {
  static const Kernels& chosen =
      core::for_this_cpu(DEFAULT::kernels, AVX2::kernels, AVX512::kernels);
  return chosen;
}

}  // namespace sqloss::student_t
