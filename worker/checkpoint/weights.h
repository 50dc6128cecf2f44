// SPDX-License-Identifier: Apache-2.0
//
// The weights of layers, embedding and head as plain views, from a checkpoint or from a seed.
//
// Owns:    a …Weights struct's `storage` keeps everything that its views point to.
// Thread:  a WeightSource may be used by any thread, synchronized inside; the structs are plain
//          values.
// Shapes:  as at each member; matrices are row-major [out, in], as stored; absent ones have null
//          data.
// Errors:  those of Checkpoint; ResourceExhausted if memory for random weights cannot be had.
// Why:     matrices stay where they are and in their stored precision; vectors (norms, biases) are
//          small and become fp32 once, so that no kernel cares about their dtype.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/weight.h"
#include "proto/base/ids.h"
#include "proto/model/model_config.h"

namespace strait {

// With scales.
uint64_t WeightBytes(const WeightMatrix& matrix);

struct VectorView {
  const float* data = nullptr;
  uint32_t size = 0;
  bool empty() const { return data == nullptr; }
};

struct AttentionWeights {
  // With q_lora_rank == 0 only q_proj, else only the three others.
  WeightMatrix q_proj;       // [num_heads * qk_head_dim, hidden_size]
  WeightMatrix q_a_proj;     // [q_lora_rank, hidden_size]
  VectorView q_a_layernorm;  // [q_lora_rank]
  WeightMatrix q_b_proj;  // [num_heads * qk_head_dim, q_lora_rank]; a head's rows: nope, then rope

  WeightMatrix kv_a_proj_with_mqa;  // [kv_lora_rank + qk_rope_head_dim, hidden_size]
  VectorView kv_a_layernorm;        // [kv_lora_rank]
  WeightMatrix kv_b_proj;  // [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]; a head's
                           // rows: key, value
  WeightMatrix o_proj;     // [hidden_size, num_heads * v_head_dim]
};

struct MlpWeights {
  WeightMatrix gate_proj;  // [intermediate, hidden_size]
  WeightMatrix up_proj;    // [intermediate, hidden_size]
  WeightMatrix down_proj;  // [hidden_size, intermediate]
  bool empty() const { return gate_proj.data == nullptr; }
};

struct MoeWeights {
  WeightMatrix gate;                   // [n_routed_experts, hidden_size], never fp8
  VectorView e_score_correction_bias;  // [n_routed_experts]; noaux_tc only, else empty
  std::vector<MlpWeights> experts;     // [n_routed_experts]
  MlpWeights shared_experts;           // empty if n_shared_experts == 0
};

struct LayerWeights {
  LayerIndex layer = 0;
  VectorView input_layernorm;  // [hidden_size]
  AttentionWeights attention;
  VectorView post_attention_layernorm;  // [hidden_size]
  // By config.IsMoeLayer(layer) exactly one of these is filled.
  MlpWeights mlp;
  MoeWeights moe;

  uint64_t bytes = 0;  // all of the above
  std::shared_ptr<const void> storage;
};

struct EmbeddingWeights {
  WeightMatrix embed_tokens;  // [vocab_size, hidden_size]
  uint64_t bytes = 0;
  std::shared_ptr<const void> storage;
};

struct HeadWeights {
  VectorView norm;       // [hidden_size]
  WeightMatrix lm_head;  // [vocab_size, hidden_size]; embed_tokens where the checkpoint ties them
  uint64_t bytes = 0;
  std::shared_ptr<const void> storage;
};

// Where weights come from.
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  virtual const ModelConfig& config() const = 0;
  // REQUIRES: layer < num_hidden_layers.
  virtual absl::StatusOr<LayerWeights> LoadLayer(LayerIndex layer) = 0;
  virtual absl::StatusOr<EmbeddingWeights> LoadEmbedding() = 0;
  virtual absl::StatusOr<HeadWeights> LoadHead() = 0;
};

// Views into the files of `dir`.
absl::StatusOr<std::unique_ptr<WeightSource>> OpenCheckpointWeights(const std::string& dir);

// Matrices of deterministic noise, scaled so that activations stay finite, norms of one: a function
// of (config, seed, tensor name) only, so that every split of the layers gives the same model.
// Filled by `num_threads`; with config.quantization fp8 where the published checkpoints have fp8.
std::unique_ptr<WeightSource> MakeRandomWeights(const ModelConfig& config, uint64_t seed,
                                                uint32_t num_threads);

// bytes_done only grows and reaches bytes_total at the end; called from the loading thread.
using LoadProgress = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

struct StageWeights {
  LayerRange range;
  std::vector<LayerWeights> layers;           // [range.size()]
  std::optional<EmbeddingWeights> embedding;  // range.begin == 0
  std::optional<HeadWeights> head;            // range.end == num_hidden_layers
  uint64_t bytes = 0;
};

// Which weights are wanted.
struct WeightParts {
  std::vector<LayerIndex> layers;
  bool embedding = false;
  bool head = false;
};

// What a stage with these layers needs. REQUIRES: a range of the model.
WeightParts PartsOf(const ModelConfig& config, LayerRange range);

// Their bytes as config.json announces them.
uint64_t PartsBytes(const ModelConfig& config, const WeightParts& parts);

// The weights of `parts`, layers in their order; `range` is not filled. As LoadStageWeights.
absl::StatusOr<StageWeights> LoadWeightParts(WeightSource& source, const WeightParts& parts,
                                             uint32_t num_threads, const LoadProgress& progress);

// All weights of a stage, every page of them touched by `num_threads`, so that the first step is
// not slow. InvalidArgument if `range` is empty or ends beyond the model. `progress` may be empty.
absl::StatusOr<StageWeights> LoadStageWeights(WeightSource& source, LayerRange range,
                                              uint32_t num_threads, const LoadProgress& progress);

}  // namespace strait
