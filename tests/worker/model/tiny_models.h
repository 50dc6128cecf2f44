// SPDX-License-Identifier: Apache-2.0
//
// Small models of every form that the backend knows, with sizes that nothing divides.
#pragma once

#include "proto/model/model_config.h"

namespace strait {

inline ModelConfig TinyV3() {
  ModelConfig c;
  c.architecture = Architecture::kDeepseekV3;
  c.vocab_size = 211;
  c.hidden_size = 88;
  c.num_hidden_layers = 5;
  c.max_position_embeddings = 1024;
  c.rms_norm_eps = 1e-5;
  c.num_attention_heads = 6;
  c.q_lora_rank = 44;
  c.kv_lora_rank = 36;
  c.qk_nope_head_dim = 20;
  c.qk_rope_head_dim = 24;
  c.v_head_dim = 18;
  c.rope_parameters.rope_type = RopeType::kYarn;
  c.rope_parameters.factor = 8;
  c.rope_parameters.original_max_position_embeddings = 128;
  c.rope_parameters.mscale = 1;
  c.rope_parameters.mscale_all_dim = 1;
  c.intermediate_size = 130;
  c.moe_intermediate_size = 28;
  c.n_routed_experts = 12;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = 4;
  c.n_group = 4;
  c.topk_group = 2;
  c.first_k_dense_replace = 1;
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.5;
  c.scoring_func = ScoringFunc::kSigmoid;
  c.topk_method = TopkMethod::kNoauxTc;
  return c;
}

inline ModelConfig TinyV3Fp8() {
  ModelConfig c = TinyV3();
  c.hidden_size = 200;  // not divisible by the scales' 128
  c.intermediate_size = 300;
  c.moe_intermediate_size = 140;
  c.num_hidden_layers = 3;
  c.quantization = Quantization::kFp8Block128;
  c.rope_parameters = RopeParameters();
  return c;
}

inline ModelConfig TinyV2Lite() {
  ModelConfig c = TinyV3();
  c.architecture = Architecture::kDeepseekV2;
  c.q_lora_rank = 0;
  c.n_shared_experts = 2;
  c.n_group = 1;
  c.topk_group = 1;
  c.norm_topk_prob = false;
  c.routed_scaling_factor = 1;
  c.scoring_func = ScoringFunc::kSoftmax;
  c.topk_method = TopkMethod::kGreedy;
  c.rope_parameters.mscale = 0.707;
  c.rope_parameters.mscale_all_dim = 0.707;
  c.dtype = DType::kF16;
  return c;
}

inline ModelConfig TinyV2() {
  ModelConfig c = TinyV2Lite();
  c.q_lora_rank = 44;
  c.n_group = 3;
  c.topk_group = 2;
  c.routed_scaling_factor = 16;
  c.topk_method = TopkMethod::kGroupLimitedGreedy;
  c.dtype = DType::kF32;
  return c;
}

}  // namespace strait
