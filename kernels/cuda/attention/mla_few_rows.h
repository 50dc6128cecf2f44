// SPDX-License-Identifier: Apache-2.0
//
// Latent attention on Hopper where a tile has few rows: decoding with at most 16 heads. LaunchMla takes
// it for fp8 rows where MlaParams::tile_rows allows; this header is for what measures it.
//
// Thread, Stream: as mla.h.
// Errors:  cudaErrorInvalidValue: a format, a shape or a variant that there is no kernel for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/attention/mla.h"

namespace strait::cuda {

inline constexpr int32_t kMlaFewRows = 16;  // of a tile at a time; more take several passes

// How the kernel is cut; all give the results of the same products, in another order where the groups
// are others.
struct MlaFewRowsVariant {
  RowFormat format = RowFormat::kFp8;
  int32_t groups = 2;         // warpgroups, each of which takes every groups-th step
  int32_t stages = 4;         // steps in shared memory: 64 rows of fp8, 32 of bf16
  int32_t copies = 4;         // bulk copies of a step; bf16: one a row
  int32_t blocks = 1;         // thread blocks of a multiprocessor
  bool integer_bits = false;  // codes to halves by shifts and masks, not by the conversion
  bool copies_only = false;   // brings cache blocks and does nothing with them: no results
  friend bool operator==(const MlaFewRowsVariant&, const MlaFewRowsVariant&) = default;
};

// Those that are compiled. LaunchMla takes the first, for fp8 rows; bf16 rows not yet.
inline constexpr MlaFewRowsVariant kMlaFewRowsVariants[] = {
    {.groups = 2, .stages = 4, .copies = 4},
    {.groups = 2, .stages = 4, .copies = 1},
    {.groups = 2, .stages = 3, .copies = 4},
    {.groups = 3, .stages = 4, .copies = 4},
    {.groups = 1, .stages = 2, .copies = 4, .blocks = 2},
    {.groups = 2, .stages = 4, .copies = 4, .integer_bits = true},
    {.groups = 2, .stages = 4, .copies = 4, .copies_only = true},
    {.format = RowFormat::kBf16, .groups = 2, .stages = 5, .copies = 32},
    {.format = RowFormat::kBf16, .groups = 1, .stages = 2, .copies = 32, .blocks = 2},
    {.format = RowFormat::kBf16, .groups = 2, .stages = 5, .copies = 32, .copies_only = true},
};

// Attention of every tile of the plan, then the merge. A variant of two thread blocks a
// multiprocessor wants a plan of as many.
cudaError_t LaunchMlaFewRows(const MlaParams& params, const MlaFewRowsVariant& variant,
                             cudaStream_t stream);

}  // namespace strait::cuda
