// SPDX-License-Identifier: Apache-2.0
//
// What a model weighs, and how two processes recognize the same architecture (proto/model/model_config.h).
#include <xxhash.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/model/model_config.h"

namespace strait {
namespace {

uint64_t PlainBytes(const ModelConfig& c, uint64_t rows, uint64_t cols) {
  return rows * cols * DTypeBytes(c.dtype);
}

uint64_t LinearBytes(const ModelConfig& c, uint64_t rows, uint64_t cols) {
  if (c.quantization == Quantization::kNone) return PlainBytes(c, rows, cols);
  const uint64_t blocks =
      ((rows + kFp8Block - 1) / kFp8Block) * ((cols + kFp8Block - 1) / kFp8Block);
  return rows * cols + blocks * sizeof(float);
}

uint64_t VectorBytes(uint64_t size) { return size * sizeof(float); }

uint64_t MlpBytes(const ModelConfig& c, uint64_t intermediate) {
  return 2 * LinearBytes(c, intermediate, c.hidden_size) +
         LinearBytes(c, c.hidden_size, intermediate);
}

uint64_t AttentionBytes(const ModelConfig& c) {
  const uint64_t heads = c.num_attention_heads;
  uint64_t bytes = LinearBytes(c, c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size) +
                   VectorBytes(c.kv_lora_rank) +
                   LinearBytes(c, heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank) +
                   LinearBytes(c, c.hidden_size, heads * c.v_head_dim);
  if (c.q_lora_rank == 0) return bytes + LinearBytes(c, heads * c.qk_head_dim(), c.hidden_size);
  return bytes + LinearBytes(c, c.q_lora_rank, c.hidden_size) + VectorBytes(c.q_lora_rank) +
         LinearBytes(c, heads * c.qk_head_dim(), c.q_lora_rank);
}

}  // namespace

uint64_t LayerWeightBytes(const ModelConfig& c, LayerIndex layer) {
  const uint64_t common = AttentionBytes(c) + 2 * VectorBytes(c.hidden_size);
  if (!c.IsMoeLayer(layer)) return common + MlpBytes(c, c.intermediate_size);
  uint64_t bytes = common + PlainBytes(c, c.n_routed_experts, c.hidden_size) +
                   c.n_routed_experts * MlpBytes(c, c.moe_intermediate_size);
  if (c.topk_method == TopkMethod::kNoauxTc) bytes += VectorBytes(c.n_routed_experts);
  if (c.n_shared_experts > 0) {
    bytes += MlpBytes(c, uint64_t{c.n_shared_experts} * c.moe_intermediate_size);
  }
  return bytes;
}

uint64_t EmbeddingBytes(const ModelConfig& c) { return PlainBytes(c, c.vocab_size, c.hidden_size); }

uint64_t HeadBytes(const ModelConfig& c) {
  return PlainBytes(c, c.vocab_size, c.hidden_size) + VectorBytes(c.hidden_size);
}

uint64_t StageWeightBytes(absl::Span<const uint64_t> layer_bytes, uint64_t embedding_bytes,
                          uint64_t head_bytes, LayerRange layers) {
  uint64_t bytes = 0;
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) bytes += layer_bytes[layer];
  if (layers.begin == 0) bytes += embedding_bytes;
  if (layers.end == layer_bytes.size()) bytes += head_bytes;
  return bytes;
}

uint64_t StageWeightBytes(const ModelConfig& c, LayerRange layers) {
  std::vector<uint64_t> layer_bytes;
  for (LayerIndex layer = 0; layer < c.num_hidden_layers; ++layer) {
    layer_bytes.push_back(LayerWeightBytes(c, layer));
  }
  return StageWeightBytes(layer_bytes, EmbeddingBytes(c), HeadBytes(c), layers);
}

uint64_t ModelFingerprint(const ModelConfig& c) {
  std::string text = "strait-model-1";
  const auto add_int = [&](uint64_t value) { absl::StrAppend(&text, ";", value); };
  const auto add_real = [&](double value) {
    char buffer[40];
    std::snprintf(buffer, sizeof(buffer), ";%.17g", value);
    text += buffer;
  };
  for (uint64_t value : {uint64_t(c.architecture),
                         uint64_t(c.vocab_size),
                         uint64_t(c.hidden_size),
                         uint64_t(c.num_hidden_layers),
                         uint64_t(c.max_position_embeddings),
                         uint64_t(c.tie_word_embeddings),
                         uint64_t(c.dtype),
                         uint64_t(c.quantization),
                         uint64_t(c.num_attention_heads),
                         uint64_t(c.q_lora_rank),
                         uint64_t(c.kv_lora_rank),
                         uint64_t(c.qk_nope_head_dim),
                         uint64_t(c.qk_rope_head_dim),
                         uint64_t(c.v_head_dim),
                         uint64_t(c.intermediate_size),
                         uint64_t(c.moe_intermediate_size),
                         uint64_t(c.n_routed_experts),
                         uint64_t(c.n_shared_experts),
                         uint64_t(c.num_experts_per_tok),
                         uint64_t(c.n_group),
                         uint64_t(c.topk_group),
                         uint64_t(c.first_k_dense_replace),
                         uint64_t(c.moe_layer_freq),
                         uint64_t(c.norm_topk_prob),
                         uint64_t(c.scoring_func),
                         uint64_t(c.topk_method)}) {
    add_int(value);
  }
  const RopeParameters& rope = c.rope_parameters;
  for (uint64_t value : {uint64_t(rope.rope_type), uint64_t(rope.original_max_position_embeddings),
                         uint64_t(rope.attention_factor.has_value()), uint64_t(rope.truncate)}) {
    add_int(value);
  }
  for (double value :
       {c.rms_norm_eps, c.routed_scaling_factor, rope.rope_theta, rope.factor, rope.beta_fast,
        rope.beta_slow, rope.mscale, rope.mscale_all_dim, rope.attention_factor.value_or(0)}) {
    add_real(value);
  }
  return XXH3_64bits(text.data(), text.size());
}

}  // namespace strait
