// The tail of losses by the kernel that computes them: what such kernels are told of it.
#pragma once

#include "core/strided.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile {

// So few losses that the last of a kernel's blocks can hold them.
constexpr int64_t kMostFusedLosses = 4096;

// What a kernel of losses is told of their tail.
struct FusedTail {
  double tail_fraction;
  core::Strided extra;  // [losses], added to the losses first; or absent
  Tails tails;
};

}  // namespace sqloss::superquantile
