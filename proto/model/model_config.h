// SPDX-License-Identifier: Apache-2.0
//
// ModelConfig is the validated form of a checkpoint's config.json: the shape of the model and
// nothing else.
//
// Thread:  plain values and pure functions.
// Errors:  InvalidArgument names the key, its value and what is supported; NotFound if there is no
//          config.json; ResourceExhausted if it is larger than kMaxConfigBytes.
// Limits:  limits::kMax… ("Model"); every number of the file is checked against them.
// Why:     fields keep DeepSeek's names, so that code reads like the published configuration. A
//          key that would change the result and that we do not implement is refused, never
//          ignored.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"

namespace strait {

// How a weight that is not quantized is stored.
enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2 };

constexpr uint32_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

enum class Architecture : uint8_t { kDeepseekV2, kDeepseekV3 };
enum class ScoringFunc : uint8_t { kSoftmax, kSigmoid };
enum class TopkMethod : uint8_t {
  kGreedy,              // V2: best experts of all
  kGroupLimitedGreedy,  // V2: a group's score is its best expert
  kNoauxTc,             // V3: with correction bias; a group's score is the sum of its two best
};
enum class Quantization : uint8_t { kNone, kFp8Block128 };
enum class RopeType : uint8_t { kDefault, kYarn };

// Pairs are always (0,1), (2,3), … as DeepSeek stores them; rope_interleave = false is refused.
struct RopeParameters {
  RopeType rope_type = RopeType::kDefault;
  double rope_theta = 10000;
  // --- YaRN only ---
  double factor = 1;
  uint32_t original_max_position_embeddings = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 0;          // 0: absent
  double mscale_all_dim = 0;  // 0: absent
  std::optional<double> attention_factor;
  bool truncate = true;  // the correction range's ends are rounded to whole dimensions
};

struct ModelConfig {
  Architecture architecture = Architecture::kDeepseekV3;

  uint32_t vocab_size = 0;
  uint32_t hidden_size = 0;
  uint32_t num_hidden_layers = 0;
  uint32_t max_position_embeddings = 0;
  double rms_norm_eps =
      1e-6;  // of all norms but q_a_layernorm and kv_a_layernorm: see kLoraNormEps
  bool tie_word_embeddings = false;
  DType dtype = DType::kBf16;  // of unquantized weights, as announced; a tensor's own dtype decides
  Quantization quantization = Quantization::kNone;

  // --- Attention ---
  uint32_t num_attention_heads = 0;
  uint32_t q_lora_rank = 0;  // 0: none, q_proj is one matrix
  uint32_t kv_lora_rank = 0;
  uint32_t qk_nope_head_dim = 0;
  uint32_t qk_rope_head_dim = 0;
  uint32_t v_head_dim = 0;
  RopeParameters rope_parameters;

  // --- Feed-forward ---
  uint32_t intermediate_size = 0;      // dense layers
  uint32_t moe_intermediate_size = 0;  // one expert
  uint32_t n_routed_experts = 0;       // 0: every layer is dense
  uint32_t n_shared_experts = 0;  // stored as one MLP of n_shared_experts * moe_intermediate_size
  uint32_t num_experts_per_tok = 0;
  uint32_t n_group = 1;
  uint32_t topk_group = 1;
  uint32_t first_k_dense_replace = 0;
  uint32_t moe_layer_freq = 1;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1;
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;
  TopkMethod topk_method = TopkMethod::kGreedy;

  // --- Tokens ---
  std::optional<TokenId> bos_token_id;
  std::vector<TokenId> eos_token_ids;

  uint32_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  // Whether `layer`'s feed-forward is a mixture of experts.
  bool IsMoeLayer(LayerIndex layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
};

// DeepSeek's code and transformers give q_a_layernorm and kv_a_layernorm this epsilon whatever
// rms_norm_eps says.
inline constexpr double kLoraNormEps = 1e-6;

// Rows and columns of one fp8 scale.
inline constexpr uint32_t kFp8Block = 128;

// `json` is the text of a config.json.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json);
// Reads `dir`/config.json, and eos ids of `dir`/generation_config.json where there is one.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir);

// --- Sizes. Exactly what the weights of a checkpoint take whose linear weights have the announced
// dtype (fp8 with scales where quantized); norms and biases are held as fp32. ---
uint64_t LayerWeightBytes(const ModelConfig& config, LayerIndex layer);
uint64_t EmbeddingBytes(const ModelConfig& config);
uint64_t HeadBytes(const ModelConfig& config);  // final norm and lm_head

// What a stage with `layers` holds: its layers, the embedding with the first, the head with the last.
uint64_t StageWeightBytes(absl::Span<const uint64_t> layer_bytes, uint64_t embedding_bytes,
                          uint64_t head_bytes, LayerRange layers);
uint64_t StageWeightBytes(const ModelConfig& config, LayerRange layers);

// Equal for equal shapes and arithmetic; ignores token ids.
uint64_t ModelFingerprint(const ModelConfig& config);

}  // namespace strait
