// SPDX-License-Identifier: Apache-2.0
//
// GemmParams: y[m, n] (+)= sum over k of x[row(m), k] * W[n, k], the linear layers of the model.
//
// Shapes:  below. M = num_rows, N = weight.rows, K = weight.cols. Any of them may be odd; M may be
//          0.
// Errors:  none; a null or mis-sized argument is our bug and is checked.
// Why:     the sum over K has one order, which is a property of K alone: 16 lanes, lane j takes k
//          = j, j+16, ... by fused multiply-add (K padded with zeros), then the tree j + (j+8), j
//          + (j+4), j + (j+2), j + (j+1). So a row's result does not depend on the other rows, on
//          threads or on the instruction set. fp8 weights are code * scale rounded to fp32 before
//          they are multiplied.
//
// Intensity:2M flops per stored weight. M = 1 is bound by memory bandwidth (one pass over W); from
//          M of about 16 on, by fused multiply-adds.
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace strait {

struct GemmParams {
  const float* x = nullptr;         // [*, K] fp32, rows x_stride apart
  int64_t x_stride = 0;             // elements between rows of x
  const int32_t* x_rows = nullptr;  // [M] row of x that makes row m of y; may be null: row m itself
  int64_t num_rows = 0;             // M
  WeightMatrix weight;              // [N, K]
  float* y = nullptr;               // [M, N] fp32, rows y_stride apart; does not overlap x
  int64_t y_stride = 0;             // elements between rows of y
  bool accumulate = false;          // y += product (one rounding after the sum), else y = product
};

// The grouped form takes a list of GemmParams (a mixture's experts, gate and up together) and runs
// all their pieces in one parallel loop. Outputs of different entries must not overlap.

}  // namespace strait
