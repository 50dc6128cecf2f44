// SPDX-License-Identifier: Apache-2.0
//
// GemmWork is a matrix product with part of a stored matrix, for kernels built on gemm.
//
// Thread:  as kernels/cpu/kernels.h.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/cpu/context.h"
#include "kernels/gemm.h"

namespace strait::cpu {

struct GemmWork {
  GemmParams params;       // params.weight.rows: the rows that take part; data, scales: the whole's
  int64_t weight_row = 0;  // the first of them
};

void RunGemms(Context& context, absl::Span<const GemmWork> works);

}  // namespace strait::cpu
