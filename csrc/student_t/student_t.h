// Student-t and normal samples with their KL divergence: what the kernels take and promise.
//
// With loc, scale and df of an element, t a draw of t(0, 1, df) (student_t_math.h; of no df: of the
// standard normal), prior_df that of the prior t(0, 1, prior_df):
//
//   z = loc + scale * t
//   kl of the element, one of
//     mc                 log q(z) - log p(z)
//     analytic_entropy   E log q - log p(z), whose first term needs no sample
//     closed_form        of the normal: (loc^2 + scale^2 - 1) / 2 - log(scale)
//
// summed over the columns of a row, and averaged over the samples if `mean`. Random bits are a
// function of (seed of the row, sample, row, column): Philox blocks of counter (e / 2, sample,
// part) with e = row * columns + column, of which an even e takes the words 0 and 1 and an odd e
// the words 2 and 3; part 1 has the lower bits for double. So a row may be drawn again alone, and
// every number of threads draws the same.
//
// Elements are computed in float, or in double where loc or scale is of it; sums over columns and
// samples are in double and in an order that depends on sizes alone.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/kernels.h"
#include "core/strided.h"

namespace sqloss::student_t {

// What `scale` holds: the scale, its logarithm, or twice that.
enum class Parameterization { kScale, kLogScale, kLogvar };
enum class Kl { kNone, kMc, kAnalyticEntropy, kClosedForm };

// What degrees of freedom are given for: every element, every column, or all of them.
enum class DfShape { kFull, kColumns, kScalar };

// Tensors as sequences of rows * columns numbers, expanded to that where they have fewer.
struct Inputs {
  Parameterization parameterization;
  Kl kl;
  bool mean;
  int64_t rows, columns, num_samples;
  core::Strided df;  // absent: the normal distribution
  core::Strided loc, scale;
  core::Strided prior_df;  // absent: df
  DfShape df_shape = DfShape::kFull, prior_df_shape = DfShape::kFull;
  core::Strided seeds, row_ids;  // int64, one per row; no row_ids: 0, 1, 2, ...
};

// Where the outputs go, in the sequence [num_samples, rows, columns] or [num_samples or 1, rows];
// the unwanted ones absent.
struct Outputs {
  core::Strided z;
  void* kl = nullptr;
};

// Of the outputs, the same sequences; of none that is not used.
struct Gradients {
  core::Strided z, kl;
  core::Strided loc, scale;    // to be written: those wanted
  core::Strided df, prior_df;  // also, of the shapes of the inputs
};

// [num_samples, rows, columns] each
struct NoiseOutputs {
  core::Strided energy, cosine;
};

// The kernels of one CPU capability, or of CUDA on the current stream of the current device.
// `dtype` is that of the computation and of the KL divergence. There is an element or more.
struct Kernels {
  void (*forward)(const Inputs&, core::Dtype dtype, const Outputs&);
  void (*backward)(const Inputs&, core::Dtype dtype, const Gradients&);
  // The random numbers alone; of the inputs, only the sizes, seeds and row_ids are read.
  void (*noise)(const Inputs&, core::Dtype dtype, const NoiseOutputs&);
};

SQLOSS_DECLARE_KERNELS

}  // namespace sqloss::student_t
