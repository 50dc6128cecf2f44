// SPDX-License-Identifier: Apache-2.0
#include "kernels/rope.h"

#include <algorithm>
#include <cmath>

#include "kernels/float64_math.h"
#include "proto/base/check.h"

namespace strait {
namespace {

double GetMscale(double scale, double mscale) {
  return scale <= 1.0 ? 1.0 : 0.1 * mscale * Float64Log(scale) + 1.0;
}

// The dimension whose frequency turns num_rotations times within the original context.
double CorrectionDim(const RopeConfig& config, double num_rotations) {
  constexpr double kTwoPi = 6.283185307179586;
  return config.qk_rope_head_dim *
         Float64Log(config.original_max_position_embeddings / (num_rotations * kTwoPi)) /
         (2.0 * Float64Log(config.rope_theta));
}

}  // namespace

void RopeInverseFrequencies(const RopeConfig& config, float* inv_freq) {
  const int32_t dim = config.qk_rope_head_dim;
  STRAIT_CHECK(dim > 0 && dim % 2 == 0 && config.rope_theta > 1.0);
  double low = 0;
  double high = 0;
  if (config.yarn) {
    STRAIT_CHECK(config.factor > 0 && config.beta_fast > 0 && config.beta_slow > 0 &&
                 config.original_max_position_embeddings > 0);
    low = CorrectionDim(config, config.beta_fast);
    high = CorrectionDim(config, config.beta_slow);
    if (config.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, dim - 1.0);
    if (low == high) high += 0.001;  // the ramp would have no width
  }
  // transformers computes these in float32, so every step is rounded to it here.
  for (int32_t i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    const float pos_freq = static_cast<float>(
        Float64Exp(static_cast<double>(exponent) * Float64Log(config.rope_theta)));
    const float extrapolated = 1.0f / pos_freq;
    if (!config.yarn) {
      inv_freq[i] = extrapolated;
      continue;
    }
    const float interpolated = 1.0f / (static_cast<float>(config.factor) * pos_freq);
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float keep = 1.0f - ramp;
    inv_freq[i] = interpolated * (1.0f - keep) + extrapolated * keep;
  }
}

float RopeAttentionScaling(const RopeConfig& config) {
  if (!config.yarn) return 1.0f;
  if (config.attention_factor) return static_cast<float>(*config.attention_factor);
  if (config.mscale != 0.0 && config.mscale_all_dim != 0.0) {
    return static_cast<float>(GetMscale(config.factor, config.mscale) /
                              GetMscale(config.factor, config.mscale_all_dim));
  }
  return static_cast<float>(GetMscale(config.factor, 1.0));
}

float AttentionSoftmaxScale(int32_t qk_head_dim, const RopeConfig& config) {
  double scale = 1.0 / std::sqrt(static_cast<double>(qk_head_dim));
  if (config.yarn && config.mscale_all_dim != 0.0) {
    const double mscale = GetMscale(config.factor, config.mscale_all_dim);
    scale *= mscale * mscale;
  }
  return static_cast<float>(scale);
}

}  // namespace strait
