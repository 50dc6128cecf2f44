// SPDX-License-Identifier: Apache-2.0
//
// Latent attention on Hopper where a tile has few rows and the cache is fp8: decoding with at most 16
// heads. LaunchMla takes it where MlaParams::tile_rows allows; this header is for what measures it.
//
// Thread, Stream: as mla.h.
// Errors:  cudaErrorInvalidValue: a format, a shape or a variant that there is no kernel for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/attention/mla.h"

namespace strait::cuda {

inline constexpr int32_t kMlaFewRows = 16;  // of a tile at a time; more take several passes

// How the kernel is cut; the default is what LaunchMla takes. All give the results of the same
// products, in another order where the groups are others.
struct MlaFewRowsVariant {
  int32_t groups = 2;         // warpgroups, each of which takes every groups-th cache block
  int32_t stages = 4;         // cache blocks in shared memory
  int32_t copies = 4;         // bulk copies of a cache block
  int32_t blocks = 1;         // thread blocks of a multiprocessor
  bool integer_bits = false;  // codes to halves by shifts and masks, not by the conversion
  bool copies_only = false;   // brings cache blocks and does nothing with them: no results
  friend bool operator==(const MlaFewRowsVariant&, const MlaFewRowsVariant&) = default;
};

// Those that are compiled, the default first.
inline constexpr MlaFewRowsVariant kMlaFewRowsVariants[] = {
    {2, 4, 4, 1, false}, {2, 4, 1, 1, false}, {2, 3, 4, 1, false},       {3, 4, 4, 1, false},
    {1, 2, 4, 2, false}, {2, 4, 4, 1, true},  {2, 4, 4, 1, false, true},
};

// Attention of every tile of the plan, then the merge. A variant of two thread blocks a
// multiprocessor wants a plan of as many.
cudaError_t LaunchMlaFewRows(const MlaParams& params, const MlaFewRowsVariant& variant,
                             cudaStream_t stream);

}  // namespace strait::cuda
