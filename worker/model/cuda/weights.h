// SPDX-License-Identifier: Apache-2.0
//
// A stage's weights on the device: how they lie in its memory, and how they get there.
//
// Borrows: device memory, which outlives every kernel that reads it.
// Thread:  loader thread.
// Shapes:  at each member; matrices are [out, in] with padded rows (kernels/cuda/gemm/matrix.h).
// Errors:  Upload…: InvalidArgument: config.json announces fp8 and a tensor is not; those of CUDA.
// Why:     bf16 and fp8 stay as stored; fp32 and fp16 become bf16. kv_b_proj is taken apart into
//          the two matrices a head that the absorbed form multiplies with, in bf16 also where it
//          was fp8: transposing does not keep 128 x 128 blocks whole (V3: 0.2 % of a layer). For
//          prompts in the expanded form it is there whole, too. A head's rows of q are padded to 8,
//          so that every head begins at 16 bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/gemm/matrix.h"
#include "proto/model/model_config.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cuda/region.h"

namespace strait {

class Uploader;

struct DeviceMlp {
  cuda::Matrix gate_proj;  // of expert 0 where there are many, the others follow at equal distance
  cuda::Matrix up_proj;
  cuda::Matrix down_proj;
};

struct DeviceLayer {
  float* input_layernorm = nullptr;           // [hidden_size]
  float* post_attention_layernorm = nullptr;  // [hidden_size]
  cuda::Matrix q_proj;              // [heads * padded q head, hidden_size]; without q_lora_rank
  cuda::Matrix q_a_proj;            // [q_lora_rank, hidden_size]
  float* q_a_layernorm = nullptr;   // [q_lora_rank]
  cuda::Matrix q_b_proj;            // [heads * padded q head, q_lora_rank]
  cuda::Matrix kv_a_proj;           // [kv_lora_rank + qk_rope_head_dim, hidden_size]
  float* kv_a_layernorm = nullptr;  // [kv_lora_rank]
  cuda::Matrix key_up;    // of head 0: [kv_lora_rank, qk_nope_head_dim], W_UK transposed; bf16
  cuda::Matrix value_up;  // of head 0: [v_head_dim, kv_lora_rank], W_UV; bf16
  // [heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank], kv_b_proj as stored, but bf16; only
  // where prompts attend in the expanded form.
  cuda::Matrix kv_up;
  cuda::Matrix o_proj;  // [hidden_size, heads * v_head_dim]

  bool is_moe = false;
  DeviceMlp mlp;  // dense layers
  // The router's matrix as the sum of two bf16 ones, the second only where the first is not exact.
  cuda::Matrix gate;       // [n_routed_experts, hidden_size]
  cuda::Matrix gate_rest;  // the same
  bool gate_has_rest = false;
  float* e_score_correction_bias = nullptr;  // [n_routed_experts]; may be null
  // The routed ones, then the shared ones as num_shared more, which every token goes to.
  DeviceMlp experts;
  uint32_t num_shared = 0;
};

struct DeviceHead {
  float* norm = nullptr;  // [hidden_size]
  cuda::Matrix lm_head;   // [vocab_size, hidden_size]
};

// What a stage's kernels read; borrowed.
struct DeviceStage {
  std::vector<DeviceLayer> layers;
  cuda::Matrix embed_tokens;  // first stage
  float* norm = nullptr;      // last stage
  cuda::Matrix lm_head;       // last stage
};

// Elements of one head's q on the device.
inline uint64_t PaddedQHead(const ModelConfig& config) {
  return (uint64_t{config.qk_head_dim()} + 7) / 8 * 8;
}

// Whether this backend runs the model; InvalidArgument says what it cannot.
absl::Status CheckCudaModel(const ModelConfig& config);

// Whether attention over its rows has the room that it needs on this GPU; FailedPrecondition says
// how much that is.
absl::Status CheckCudaAttention(const ModelConfig& config, const cuda::Device& device);

// Lay weights out in `region`; a region without base only measures. `expands`: with what the expanded
// form takes.
DeviceLayer LayOutLayer(const ModelConfig& config, LayerIndex layer, bool expands, Region& region);
cuda::Matrix LayOutEmbedding(const ModelConfig& config, Region& region);
DeviceHead LayOutHead(const ModelConfig& config, Region& region);

// Converts and copies everything that `to` has room for.
absl::Status UploadLayer(Uploader& uploader, const ModelConfig& config, const LayerWeights& from,
                         DeviceLayer& to);

}  // namespace strait
