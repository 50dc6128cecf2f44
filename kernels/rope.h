// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding: frequencies from plain numbers of config.json, a table of cos and sin
// for the positions of a step, and the rotation of query and shared key.
//
// Thread:  any; pure functions.
// Shapes:  a table row holds qk_rope_head_dim/2 pairs (cos, sin), fp32.
// Why:     angles are float64 products of the position and the checkpoint's fp32 inverse frequency
//          (an fp32 product is off by 5e-3 rad at position 164k); sine and cosine are computed by
//          our own float64 code, so that every machine gets the same bits. Pairs are (2i, 2i+1),
//          as DeepSeek's weights store them, and stay where they are. transformers' DeepseekV3
//          moves them to (i, i + dim/2) first; the dot product of a query and a key does not see
//          the difference, as both are treated alike.
#pragma once

#include <cstdint>
#include <optional>

namespace strait {

// rope_parameters (or rope_theta and rope_scaling) of config.json.
struct RopeConfig {
  int32_t qk_rope_head_dim = 64;
  double rope_theta = 10000.0;
  bool yarn = false;  // what follows matters only with YaRN
  double factor = 1.0;
  double original_max_position_embeddings = 4096.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 0.0;          // 0: absent
  double mscale_all_dim = 0.0;  // 0: absent
  std::optional<double> attention_factor;
  bool truncate = true;  // round the ends of YaRN's ramp outward to whole dimensions
};

// inv_freq: [qk_rope_head_dim/2] fp32, as transformers' rope initializers compute them.
void RopeInverseFrequencies(const RopeConfig& config, float* inv_freq);

// What cos and sin are multiplied by: 1 without YaRN; with it attention_factor, or the quotient of
// get_mscale(mscale) and get_mscale(mscale_all_dim), or get_mscale(1).
float RopeAttentionScaling(const RopeConfig& config);

// qk_head_dim^-0.5, times get_mscale(mscale_all_dim)^2 where YaRN has mscale_all_dim.
float AttentionSoftmaxScale(int32_t qk_head_dim, const RopeConfig& config);

struct RopeTableParams {
  const int32_t* positions = nullptr;  // [num_tokens]
  const float* inv_freq = nullptr;     // [dim/2] fp32
  float attention_scaling = 1.0f;
  int64_t num_tokens = 0;
  int64_t dim = 0;           // qk_rope_head_dim, even
  float* cos_sin = nullptr;  // [num_tokens, dim/2, 2] fp32, out
};

struct RopeParams {
  const float* x = nullptr;  // [num_tokens, num_heads, dim] fp32, strides below
  int64_t x_token_stride = 0;
  int64_t x_head_stride = 0;
  const float* cos_sin = nullptr;  // [num_tokens, dim/2, 2] fp32
  float* y = nullptr;              // [num_tokens, num_heads, dim] fp32, strides below; may be x
  int64_t y_token_stride = 0;
  int64_t y_head_stride = 0;
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t dim = 0;  // qk_rope_head_dim, even
};

}  // namespace strait
