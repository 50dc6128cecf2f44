// SPDX-License-Identifier: Apache-2.0
//
// LevelTable: the pieces of work that are compiled once per instruction set, as function pointers.
//
// Borrows: everything; a piece runs on one thread and touches only its share of the output.
// Why:     included by the level_*.cc files: plain data only, no inline function, so that nothing
//          compiled with wider instructions can be linked into the portable code.
#pragma once

#include <cstdint>

#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/mla.h"
#include "kernels/moe.h"
#include "kernels/norm.h"

namespace strait::cpu {

// Up to this many rows a gemm reads its weights straight from where they are stored; with more it
// first widens a panel of them, which the rows then share.
inline constexpr int64_t kGemmDirectRows = 12;
// A panel: kGemmPanelN weight rows by kGemmPanelK columns, for kGemmPanelM rows of x.
inline constexpr int64_t kGemmPanelN = 24;
inline constexpr int64_t kGemmPanelK = 512;
inline constexpr int64_t kGemmPanelM = 128;
// Floats of scratch for one gemm piece: the panel, the 16-lane sums, one padded tile of x.
inline constexpr int64_t kGemmScratch =
    kGemmPanelN * kGemmPanelK + kGemmPanelM * kGemmPanelN * 16 + 16 * kGemmPanelK;

// Tokens whose absorbed queries share a pass over a head's weights.
inline constexpr int64_t kAbsorbTokens = 48;
inline constexpr int64_t kAbsorbRows = 32;  // rows of W_UK widened at a time

// (token, head) pairs that share a pass over cache blocks.
inline constexpr int64_t kMlaTileQueries = 32;

// Consecutive (token, head) pairs of one sequence: pair = token * num_heads + head.
struct MlaTile {
  int64_t first_pair;
  int64_t num_pairs;      // 1 to kMlaTileQueries
  int64_t last_position;  // the greatest position among its tokens
};

// Unnormalized attention of a tile over a range of rows, in scratch:
// max [kMlaTileQueries], sum [kMlaTileQueries], out [kMlaTileQueries, padded rank].
struct MlaPartial {
  float* max;
  float* sum;
  float* out;
};

struct LevelTable {
  // y[m0..m1, n0..n1] of one gemm whose weight begins weight_row rows into the stored matrix;
  // scale rows are counted from the stored matrix's first row.
  void (*gemm)(const GemmParams& params, int64_t weight_row, int64_t m0, int64_t m1, int64_t n0,
               int64_t n1, float* scratch);
  void (*rms_norm)(const RmsNormParams& params, int64_t row0, int64_t row1);
  // Tokens t0..t1 (at most kAbsorbTokens) of one head.
  void (*absorb)(const AbsorbQueryParams& params, int64_t head, int64_t t0, int64_t t1,
                 float* scratch);
  // Folds spans span0..span1 of a tile, left to right.
  void (*mla_spans)(const MlaParams& params, const MlaTile& tile, int64_t span0, int64_t span1,
                    const MlaPartial& result, float* scratch);
  // Folds `next`, which is one span, into `total`, which holds all spans before it.
  void (*mla_fold)(const MlaParams& params, const MlaTile& tile, const MlaPartial& total,
                   const MlaPartial& next, int64_t span);
  // Writes out / sum to o_latent.
  void (*mla_finish)(const MlaParams& params, const MlaTile& tile, const MlaPartial& total);
  void (*silu_mul)(const SiluMulParams& params, int64_t row0, int64_t row1);
  void (*add)(const float* x, float* y, int64_t count);
  void (*expert_sum)(const ExpertSumParams& params, int64_t t0, int64_t t1);
  // y = exp(x - shift), 1 / (1 + exp(-x)).
  void (*exp_shifted)(const float* x, float shift, float* y, int64_t count);
  void (*sigmoid)(const float* x, float* y, int64_t count);
  // Sum of exp(x - shift), 16 lanes over runs of 1,024, the runs in float64.
  double (*sum_exp)(const float* x, float shift, int64_t count);
  // One row of a matrix as fp32.
  void (*widen_row)(const WeightMatrix& matrix, int64_t row, float* y);
};

// Floats of scratch for the pieces above.
constexpr int64_t PadTo16(int64_t n) { return (n + 15) / 16 * 16; }
int64_t AbsorbScratch(const AbsorbQueryParams& params);
int64_t MlaScratch(const MlaParams& params);
inline constexpr int64_t kMlaPartialHead = 2 * kMlaTileQueries;  // max and sum

extern const LevelTable kPortableTable;
#if defined(STRAIT_X86)
extern const LevelTable kAvx2Table;
extern const LevelTable kAvx512Table;
#endif

}  // namespace strait::cpu
