// SPDX-License-Identifier: Apache-2.0
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "worker/checkpoint/tensor_provider.h"

namespace strait {
namespace {

// Asks for one tensor after the other, counts bytes, remembers the first failure.
class Assembler {
 public:
  explicit Assembler(TensorProvider& tensors) : tensors_(tensors) {}

  WeightMatrix Matrix(const std::string& name, uint64_t rows, uint64_t cols,
                      TensorRole role = TensorRole::kLinear) {
    if (!status_.ok()) return {};
    absl::StatusOr<WeightMatrix> matrix = tensors_.Matrix(
        name + ".weight", static_cast<uint32_t>(rows), static_cast<uint32_t>(cols), role);
    status_ = matrix.status();
    if (!matrix.ok()) return {};
    bytes_ += WeightBytes(*matrix);
    return *matrix;
  }
  VectorView Vector(const std::string& name, uint32_t size, TensorRole role) {
    if (!status_.ok()) return {};
    absl::StatusOr<VectorView> vector = tensors_.Vector(name, size, role);
    status_ = vector.status();
    if (!vector.ok()) return {};
    bytes_ += uint64_t{size} * sizeof(float);
    return *vector;
  }
  VectorView Norm(const std::string& name, uint32_t size) {
    return Vector(name + ".weight", size, TensorRole::kNorm);
  }
  MlpWeights Mlp(const std::string& name, uint64_t hidden_size, uint64_t intermediate) {
    MlpWeights mlp;
    mlp.gate_proj = Matrix(name + ".gate_proj", intermediate, hidden_size);
    mlp.up_proj = Matrix(name + ".up_proj", intermediate, hidden_size);
    mlp.down_proj = Matrix(name + ".down_proj", hidden_size, intermediate);
    return mlp;
  }

  template <class Weights>
  absl::StatusOr<Weights> Finish(Weights weights) {
    STRAIT_RETURN_IF_ERROR(status_);
    STRAIT_ASSIGN_OR_RETURN(weights.storage, tensors_.Finish());
    weights.bytes = bytes_;
    return weights;
  }

 private:
  TensorProvider& tensors_;
  absl::Status status_;
  uint64_t bytes_ = 0;
};

AttentionWeights Attention(const ModelConfig& c, const std::string& name, Assembler& a) {
  const uint64_t heads = c.num_attention_heads;
  AttentionWeights w;
  if (c.q_lora_rank == 0) {
    w.q_proj = a.Matrix(name + ".q_proj", heads * c.qk_head_dim(), c.hidden_size);
  } else {
    w.q_a_proj = a.Matrix(name + ".q_a_proj", c.q_lora_rank, c.hidden_size);
    w.q_a_layernorm = a.Norm(name + ".q_a_layernorm", c.q_lora_rank);
    w.q_b_proj = a.Matrix(name + ".q_b_proj", heads * c.qk_head_dim(), c.q_lora_rank);
  }
  w.kv_a_proj_with_mqa =
      a.Matrix(name + ".kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size);
  w.kv_a_layernorm = a.Norm(name + ".kv_a_layernorm", c.kv_lora_rank);
  w.kv_b_proj =
      a.Matrix(name + ".kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank);
  w.o_proj = a.Matrix(name + ".o_proj", c.hidden_size, heads * c.v_head_dim);
  return w;
}

MoeWeights Moe(const ModelConfig& c, const std::string& name, Assembler& a) {
  MoeWeights w;
  w.gate = a.Matrix(name + ".gate", c.n_routed_experts, c.hidden_size, TensorRole::kGate);
  if (c.topk_method == TopkMethod::kNoauxTc) {
    w.e_score_correction_bias = a.Vector(name + ".gate.e_score_correction_bias", c.n_routed_experts,
                                         TensorRole::kCorrectionBias);
  }
  w.experts.reserve(c.n_routed_experts);
  for (uint32_t expert = 0; expert < c.n_routed_experts; ++expert) {
    w.experts.push_back(
        a.Mlp(absl::StrCat(name, ".experts.", expert), c.hidden_size, c.moe_intermediate_size));
  }
  if (c.n_shared_experts > 0) {
    w.shared_experts = a.Mlp(name + ".shared_experts", c.hidden_size,
                             uint64_t{c.n_shared_experts} * c.moe_intermediate_size);
  }
  return w;
}

}  // namespace

absl::StatusOr<LayerWeights> AssembleLayer(const ModelConfig& c, LayerIndex layer,
                                           TensorProvider& tensors) {
  Assembler a(tensors);
  const std::string name = absl::StrCat("model.layers.", layer);
  LayerWeights w;
  w.layer = layer;
  w.input_layernorm = a.Norm(name + ".input_layernorm", c.hidden_size);
  w.attention = Attention(c, name + ".self_attn", a);
  w.post_attention_layernorm = a.Norm(name + ".post_attention_layernorm", c.hidden_size);
  if (c.IsMoeLayer(layer)) {
    w.moe = Moe(c, name + ".mlp", a);
  } else {
    w.mlp = a.Mlp(name + ".mlp", c.hidden_size, c.intermediate_size);
  }
  return a.Finish(std::move(w));
}

absl::StatusOr<EmbeddingWeights> AssembleEmbedding(const ModelConfig& c, TensorProvider& tensors) {
  Assembler a(tensors);
  EmbeddingWeights w;
  w.embed_tokens =
      a.Matrix("model.embed_tokens", c.vocab_size, c.hidden_size, TensorRole::kEmbedding);
  return a.Finish(std::move(w));
}

absl::StatusOr<HeadWeights> AssembleHead(const ModelConfig& c, TensorProvider& tensors) {
  Assembler a(tensors);
  HeadWeights w;
  w.norm = a.Norm("model.norm", c.hidden_size);
  w.lm_head =
      c.tie_word_embeddings
          ? a.Matrix("model.embed_tokens", c.vocab_size, c.hidden_size, TensorRole::kEmbedding)
          : a.Matrix("lm_head", c.vocab_size, c.hidden_size, TensorRole::kHead);
  return a.Finish(std::move(w));
}

uint64_t WeightBytes(const WeightMatrix& m) {
  const uint64_t codes =
      static_cast<uint64_t>(m.rows) * static_cast<uint64_t>(m.cols) * WeightElementBytes(m.type);
  if (m.scale_inv == nullptr) return codes;
  const uint64_t blocks = static_cast<uint64_t>((m.rows + kFp8BlockSize - 1) / kFp8BlockSize) *
                          static_cast<uint64_t>((m.cols + kFp8BlockSize - 1) / kFp8BlockSize);
  return codes + blocks * sizeof(float);
}

}  // namespace strait
