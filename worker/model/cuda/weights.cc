// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/weights.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/mla.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/uploader.h"

namespace strait {
namespace {

DeviceMlp LayOutMlp(const ModelConfig& c, uint64_t width, bool fp8, uint64_t groups,
                    Region& region) {
  DeviceMlp mlp;
  mlp.gate_proj = region.TakeMatrix(width, c.hidden_size, fp8, groups);
  mlp.up_proj = region.TakeMatrix(width, c.hidden_size, fp8, groups);
  mlp.down_proj = region.TakeMatrix(c.hidden_size, width, fp8, groups);
  return mlp;
}

absl::Status UploadMlp(Uploader& up, const MlpWeights& from, const DeviceMlp& to,
                       uint64_t group = 0) {
  STRAIT_RETURN_IF_ERROR(up.Matrix(from.gate_proj, to.gate_proj, group));
  STRAIT_RETURN_IF_ERROR(up.Matrix(from.up_proj, to.up_proj, group));
  return up.Matrix(from.down_proj, to.down_proj, group);
}

}  // namespace

absl::Status CheckCudaModel(const ModelConfig& c) {
  const auto refuse = [](const auto&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat("the CUDA backend does not run this model: ", what...));
  };
  if (c.kv_lora_rank % 16 != 0 || c.kv_lora_rank > 512) {
    return refuse("kv_lora_rank is ", c.kv_lora_rank, ", must be a multiple of 16, at most 512");
  }
  if (c.qk_rope_head_dim % 8 != 0 || c.qk_rope_head_dim > 64) {
    return refuse("qk_rope_head_dim is ", c.qk_rope_head_dim,
                  ", must be a multiple of 8, at most 64");
  }
  if (c.quantization == Quantization::kFp8Block128 && PaddedQHead(c) != c.qk_head_dim()) {
    return refuse("with fp8 weights a head's q (", c.qk_head_dim(),
                  ") must be a multiple of 8 columns");
  }
  if (c.quantization == Quantization::kFp8Block128 && c.n_shared_experts > 1 &&
      c.moe_intermediate_size % kFp8Block != 0) {
    return refuse("with fp8 weights and ", c.n_shared_experts,
                  " shared experts, moe_intermediate_size must be a multiple of ", kFp8Block);
  }
  return absl::OkStatus();
}

absl::Status CheckCudaAttention(const ModelConfig& c, const cuda::Device& device) {
  const auto rank = static_cast<int32_t>(c.kv_lora_rank);
  const auto rope = static_cast<int32_t>(c.qk_rope_head_dim);
  const int64_t needed = cuda::MlaPortableSharedBytes(rank, rope);
  const bool hopper = device.compute_capability / 10 == 9 && rank == 512 && rope == 64;
  if (hopper || needed <= device.shared_bytes) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "attention over rows of ", rank, " and ", rope, " columns needs ", needed,
      " bytes of shared memory a thread block, ", device.name, " has ", device.shared_bytes,
      ": use a GPU of compute capability 8.0, 9.0 or 10.0, or --backend cpu"));
}

DeviceLayer LayOutLayer(const ModelConfig& c, LayerIndex layer, bool expands, Region& region) {
  const bool fp8 = c.quantization == Quantization::kFp8Block128;
  const uint64_t heads = c.num_attention_heads;
  const uint64_t q_rows = heads * PaddedQHead(c);
  DeviceLayer d;
  d.input_layernorm = region.Take<float>(c.hidden_size);
  d.post_attention_layernorm = region.Take<float>(c.hidden_size);
  if (c.q_lora_rank == 0) {
    d.q_proj = region.TakeMatrix(q_rows, c.hidden_size, fp8);
  } else {
    d.q_a_proj = region.TakeMatrix(c.q_lora_rank, c.hidden_size, fp8);
    d.q_a_layernorm = region.Take<float>(c.q_lora_rank);
    d.q_b_proj = region.TakeMatrix(q_rows, c.q_lora_rank, fp8);
  }
  d.kv_a_proj = region.TakeMatrix(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size, fp8);
  d.kv_a_layernorm = region.Take<float>(c.kv_lora_rank);
  d.key_up = region.TakeMatrix(c.kv_lora_rank, c.qk_nope_head_dim, false, heads);
  d.value_up = region.TakeMatrix(c.v_head_dim, c.kv_lora_rank, false, heads);
  if (expands) {
    d.kv_up = region.TakeMatrix(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, false);
  }
  d.o_proj = region.TakeMatrix(c.hidden_size, heads * c.v_head_dim, fp8);
  d.is_moe = c.IsMoeLayer(layer);
  if (!d.is_moe) {
    d.mlp = LayOutMlp(c, c.intermediate_size, fp8, 1, region);
    return d;
  }
  d.gate = region.TakeMatrix(c.n_routed_experts, c.hidden_size, false);
  d.gate_rest = region.TakeMatrix(c.n_routed_experts, c.hidden_size, false);
  if (c.topk_method == TopkMethod::kNoauxTc) {
    d.e_score_correction_bias = region.Take<float>(c.n_routed_experts);
  }
  d.num_shared = c.n_shared_experts;
  d.experts = LayOutMlp(c, c.moe_intermediate_size, fp8, c.n_routed_experts + d.num_shared, region);
  return d;
}

cuda::Matrix LayOutEmbedding(const ModelConfig& c, Region& region) {
  return region.TakeMatrix(c.vocab_size, c.hidden_size, false);
}

DeviceHead LayOutHead(const ModelConfig& c, Region& region) {
  DeviceHead head;
  head.norm = region.Take<float>(c.hidden_size);
  head.lm_head = region.TakeMatrix(c.vocab_size, c.hidden_size, false);
  return head;
}

absl::Status UploadLayer(Uploader& up, const ModelConfig& c, const LayerWeights& from,
                         DeviceLayer& to) {
  STRAIT_RETURN_IF_ERROR(up.Vector(from.input_layernorm, to.input_layernorm));
  STRAIT_RETURN_IF_ERROR(up.Vector(from.post_attention_layernorm, to.post_attention_layernorm));
  const AttentionWeights& a = from.attention;
  const HeadRows q_heads = {c.qk_head_dim(), PaddedQHead(c)};
  if (c.q_lora_rank == 0) {
    STRAIT_RETURN_IF_ERROR(up.Matrix(a.q_proj, to.q_proj, 0, q_heads));
  } else {
    STRAIT_RETURN_IF_ERROR(up.Matrix(a.q_a_proj, to.q_a_proj));
    STRAIT_RETURN_IF_ERROR(up.Vector(a.q_a_layernorm, to.q_a_layernorm));
    STRAIT_RETURN_IF_ERROR(up.Matrix(a.q_b_proj, to.q_b_proj, 0, q_heads));
  }
  STRAIT_RETURN_IF_ERROR(up.Matrix(a.kv_a_proj_with_mqa, to.kv_a_proj));
  STRAIT_RETURN_IF_ERROR(up.Vector(a.kv_a_layernorm, to.kv_a_layernorm));
  STRAIT_RETURN_IF_ERROR(up.UpProjections(a.kv_b_proj, c.num_attention_heads, c.qk_nope_head_dim,
                                          to.key_up, to.value_up));
  if (!to.kv_up.empty()) STRAIT_RETURN_IF_ERROR(up.Matrix(a.kv_b_proj, to.kv_up));
  STRAIT_RETURN_IF_ERROR(up.Matrix(a.o_proj, to.o_proj));
  if (!to.is_moe) return UploadMlp(up, from.mlp, to.mlp);
  to.gate_has_rest = from.moe.gate.type != WeightType::kBf16;
  STRAIT_RETURN_IF_ERROR(up.Matrix(from.moe.gate, to.gate));
  if (to.gate_has_rest) STRAIT_RETURN_IF_ERROR(up.Rest(from.moe.gate, to.gate_rest));
  if (to.e_score_correction_bias != nullptr) {
    STRAIT_RETURN_IF_ERROR(up.Vector(from.moe.e_score_correction_bias, to.e_score_correction_bias));
  }
  for (uint64_t e = 0; e < from.moe.experts.size(); ++e) {
    STRAIT_RETURN_IF_ERROR(UploadMlp(up, from.moe.experts[e], to.experts, e));
  }
  // Stored as one MLP, num_shared times as wide.
  for (uint64_t e = 0; e < to.num_shared; ++e) {
    const MlpWeights& shared = from.moe.shared_experts;
    const uint64_t group = c.n_routed_experts + e;
    STRAIT_RETURN_IF_ERROR(up.RowSlice(shared.gate_proj, e, to.experts.gate_proj, group));
    STRAIT_RETURN_IF_ERROR(up.RowSlice(shared.up_proj, e, to.experts.up_proj, group));
    STRAIT_RETURN_IF_ERROR(up.ColumnSlice(shared.down_proj, e, to.experts.down_proj, group));
  }
  return absl::OkStatus();
}

}  // namespace strait
