// SPDX-License-Identifier: Apache-2.0
//
// What kernels call the things that a model's configuration names.
//
// Thread:  pure functions.
#pragma once

#include "kernels/moe.h"
#include "kernels/rope.h"
#include "proto/base/check.h"
#include "proto/model/model_config.h"

namespace strait {

inline RouterMethod RouterMethodOf(TopkMethod method) {
  switch (method) {
    case TopkMethod::kGreedy:
      return RouterMethod::kGreedy;
    case TopkMethod::kGroupLimitedGreedy:
      return RouterMethod::kGroupLimitedGreedy;
    case TopkMethod::kNoauxTc:
      return RouterMethod::kNoauxTc;
  }
  STRAIT_CHECK(false, "a method that no config has");
  return RouterMethod::kGreedy;
}

inline RopeConfig RopeConfigOf(const ModelConfig& config) {
  const RopeParameters& from = config.rope_parameters;
  RopeConfig rope;
  rope.qk_rope_head_dim = static_cast<int32_t>(config.qk_rope_head_dim);
  rope.rope_theta = from.rope_theta;
  rope.yarn = from.rope_type == RopeType::kYarn;
  rope.factor = from.factor;
  rope.original_max_position_embeddings = from.original_max_position_embeddings;
  rope.beta_fast = from.beta_fast;
  rope.beta_slow = from.beta_slow;
  rope.mscale = from.mscale;
  rope.mscale_all_dim = from.mscale_all_dim;
  rope.attention_factor = from.attention_factor;
  rope.truncate = from.truncate;
  return rope;
}

}  // namespace strait
