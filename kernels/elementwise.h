// SPDX-License-Identifier: Apache-2.0
//
// The elementwise kernels: gated activation, residual sum, embedding rows.
//
// Shapes:  below.
//
// Intensity:below 1 flop per byte (silu about 4): bound by memory or cache bandwidth.
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace strait {

// y = silu(gate) * up, silu(v) = v / (1 + exp(-v)). y may be gate or up.
struct SiluMulParams {
  const float* gate = nullptr;  // [num_rows, dim] fp32, rows gate_stride apart
  int64_t gate_stride = 0;
  const float* up = nullptr;  // [num_rows, dim] fp32, rows up_stride apart
  int64_t up_stride = 0;
  float* y = nullptr;  // [num_rows, dim] fp32, rows y_stride apart
  int64_t y_stride = 0;
  int64_t num_rows = 0;
  int64_t dim = 0;
};

// y += x.
struct AddParams {
  const float* x = nullptr;  // [count] fp32
  float* y = nullptr;        // [count] fp32
  int64_t count = 0;
};

// y[t, :] = table[token_ids[t], :] widened to fp32.
struct EmbeddingParams {
  WeightMatrix table;                  // [vocab_size, hidden_size]
  const int32_t* token_ids = nullptr;  // [num_tokens], each in [0, vocab_size)
  float* y = nullptr;                  // [num_tokens, hidden_size] fp32, dense
  int64_t num_tokens = 0;
};

}  // namespace strait
