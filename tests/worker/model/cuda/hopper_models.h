// SPDX-License-Identifier: Apache-2.0
//
// Tiny models whose contexts cross attention's spans: of the portable kernel's rows, and of Hopper's.
#pragma once

#include "tests/worker/model/cuda/cuda_fixture.h"

namespace strait {

// Rows of the portable attention kernel.
inline ModelConfig Portable(ModelConfig config) {
  config = OnCuda(std::move(config));
  config.max_position_embeddings = 8192;
  return config;
}
inline ModelConfig V3() { return Portable(TinyV3()); }
inline ModelConfig V3Fp8() {
  ModelConfig config = Portable(TinyV3Fp8());
  config.qk_nope_head_dim = 24;  // fp8 on a GPU: heads of a multiple of 8 columns
  return config;
}
inline ModelConfig V2Lite() { return Portable(TinyV2Lite()); }
inline ModelConfig V2() { return Portable(TinyV2()); }

// Rows of the Hopper kernel, 16 heads: a tile is four tokens.
inline ModelConfig Lite512() {
  ModelConfig config = V2Lite();
  config.num_hidden_layers = 3;
  config.hidden_size = 256;
  config.num_attention_heads = 16;
  config.kv_lora_rank = 512;
  config.qk_rope_head_dim = 64;
  config.qk_nope_head_dim = 32;
  config.v_head_dim = 32;
  return config;
}
// 256 heads: a token is four tiles, and a long context's chunk is more than one launch holds.
inline ModelConfig Heads256() {
  ModelConfig config = V3Fp8();
  config.hidden_size = 256;
  config.q_lora_rank = 128;
  config.num_attention_heads = 256;
  config.kv_lora_rank = 512;
  config.qk_rope_head_dim = 64;
  config.qk_nope_head_dim = 32;
  config.v_head_dim = 32;
  return config;
}

}  // namespace strait
