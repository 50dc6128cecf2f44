// SPDX-License-Identifier: Apache-2.0
//
// QuantizeParams: x[t, k] is nearly codes[t, k] * scales[t, k / 128], codes e4m3: activations as a
// product of codes with codes reads them.
//
// Shapes:  below.
// Errors:  none. NaN becomes the NaN code.
// Why:     a scale is the smallest power of two, from 2^-126 on, under which no element exceeds 448,
//          the largest code. A floating-point code loses at most one binade by it, at the bottom,
//          below 2^-13 of the largest; and multiplying by it is exact: what a code means is a bf16
//          number, and the only error is one rounding to four bits.
#pragma once

#include <cstdint>

namespace strait {

inline constexpr int64_t kQuantizeColumns = 128;  // that share a scale

struct QuantizeParams {
  const float* x = nullptr;  // [num_rows, dim] fp32, dense
  int64_t num_rows = 0;
  int64_t dim = 0;
  uint8_t* codes = nullptr;  // [num_rows, dim] e4m3, to nearest, ties to the even code
  float* scales = nullptr;   // [num_rows, ceil(dim / 128)]
};

}  // namespace strait
