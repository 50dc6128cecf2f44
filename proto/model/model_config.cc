// SPDX-License-Identifier: Apache-2.0
#include "proto/model/model_config.h"

#include <cmath>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/json.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

// What transformers' configuration classes take for a key that is absent.
struct Defaults {
  uint32_t vocab_size, hidden_size, intermediate_size, moe_intermediate_size, num_hidden_layers,
      num_attention_heads, n_shared_experts, n_routed_experts, n_group, topk_group,
      num_experts_per_tok, first_k_dense_replace, max_position_embeddings;
  double routed_scaling_factor;
  bool norm_topk_prob;
  TokenId bos_token_id, eos_token_id;
};
constexpr Defaults kV2Defaults = {102400, 4096, 11008, 1407, 32,  32,    2, 64, 1,
                                  1,      0,    0,     2048, 1.0, false, 1, 2};
constexpr Defaults kV3Defaults = {129280, 7168, 18432, 2048, 61,  128,  1, 256, 8,
                                  4,      8,    3,     4096, 2.5, true, 0, 1};

// Getters with the default and the bounds of a key; the first failure sticks and later reads are
// void.
class Reader {
 public:
  Reader(const json::Object& object, std::string what) : object_(object), what_(std::move(what)) {}

  bool Contains(std::string_view key) const {
    return object_.if_contains(boost::json::string_view(key.data(), key.size())) != nullptr;
  }
  bool IsNull(std::string_view key) const { return Contains(key) && !json::Find(object_, key); }

  uint32_t U32(std::string_view key, uint32_t fallback, uint32_t low, uint32_t high) {
    absl::StatusOr<int64_t> value = json::GetIntOr(object_, key, fallback, what_);
    if (!Keep(value.status())) return fallback;
    if (*value < low || *value > high) {
      Refuse(key, absl::StrCat(*value), absl::StrCat("must be within [", low, ", ", high, "]"));
      return fallback;
    }
    return static_cast<uint32_t>(*value);
  }
  double Double(std::string_view key, double fallback, double low, double high) {
    absl::StatusOr<double> value = json::GetDoubleOr(object_, key, fallback, what_);
    if (!Keep(value.status())) return fallback;
    if (!(*value >= low && *value <= high)) {
      Refuse(key, absl::StrCat(*value), absl::StrCat("must be within [", low, ", ", high, "]"));
      return fallback;
    }
    return *value;
  }
  bool Bool(std::string_view key, bool fallback) {
    absl::StatusOr<bool> value = json::GetBoolOr(object_, key, fallback, what_);
    return Keep(value.status()) ? *value : fallback;
  }
  std::string String(std::string_view key, std::string_view fallback) {
    absl::StatusOr<std::string> value = json::GetStringOr(object_, key, fallback, what_);
    return Keep(value.status()) ? *value : std::string(fallback);
  }
  // Null where the key is absent or null.
  const json::Object* Object(std::string_view key) {
    if (json::Find(object_, key) == nullptr) return nullptr;
    absl::StatusOr<const json::Object*> value = json::GetObject(object_, key, what_);
    return Keep(value.status()) ? *value : nullptr;
  }
  const json::Value* Find(std::string_view key) const { return json::Find(object_, key); }

  void Refuse(std::string_view key, std::string_view value, std::string_view supported) {
    Keep(absl::InvalidArgumentError(absl::StrCat(what_, ": \"", ToAbsl(key), "\" is ",
                                                 ToAbsl(value), "; ", ToAbsl(supported))));
  }
  bool Keep(const absl::Status& status) {
    if (status_.ok() && !status.ok()) {
      // A missing member of a configuration is the file's fault, not a missing file.
      status_ = absl::IsNotFound(status) ? absl::InvalidArgumentError(status.message()) : status;
    }
    return status.ok();
  }
  const absl::Status& status() const { return status_; }
  const std::string& what() const { return what_; }

 private:
  const json::Object& object_;
  const std::string what_;
  absl::Status status_;
};

Architecture ReadArchitecture(Reader& r) {
  std::string name;
  if (const json::Value* list = r.Find("architectures")) {
    const json::Array* array = list->if_array();
    if (array == nullptr || array->size() != 1 || !array->front().is_string()) {
      r.Refuse("architectures", boost::json::serialize(*list), "it must be a list of one name");
      return Architecture::kDeepseekV3;
    }
    name = json::View(array->front().get_string());
    if (name == "DeepseekV2ForCausalLM") return Architecture::kDeepseekV2;
    if (name == "DeepseekV3ForCausalLM") return Architecture::kDeepseekV3;
    r.Refuse("architectures", name,
             "supported are DeepseekV2ForCausalLM and DeepseekV3ForCausalLM");
    return Architecture::kDeepseekV3;
  }
  name = r.String("model_type", "");
  if (name == "deepseek_v2") return Architecture::kDeepseekV2;
  if (name != "deepseek_v3") {
    r.Refuse("model_type", name.empty() ? "missing" : name,
             "without \"architectures\" it must be deepseek_v2 or deepseek_v3");
  }
  return Architecture::kDeepseekV3;
}

DType ReadDType(Reader& r) {
  const std::string key = r.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  const std::string name = r.String(key, "bfloat16");
  if (name == "float32") return DType::kF32;
  if (name == "float16") return DType::kF16;
  if (name != "bfloat16") r.Refuse(key, name, "supported are bfloat16, float16 and float32");
  return DType::kBf16;
}

Quantization ReadQuantization(Reader& config) {
  const json::Object* object = config.Object("quantization_config");
  if (object == nullptr) return Quantization::kNone;
  Reader r(*object, config.what() + ": quantization_config");
  const std::string method = r.String("quant_method", "missing");
  if (method != "fp8") r.Refuse("quant_method", method, "supported is fp8");
  const std::string format = r.String("fmt", "e4m3");
  if (format != "e4m3") r.Refuse("fmt", format, "supported is e4m3");
  const std::string scheme = r.String("activation_scheme", "dynamic");
  if (scheme != "dynamic") r.Refuse("activation_scheme", scheme, "supported is dynamic");
  const json::Value* block = r.Find("weight_block_size");
  const std::string shape = block == nullptr ? "missing" : boost::json::serialize(*block);
  if (shape != "[128,128]") r.Refuse("weight_block_size", shape, "supported is [128,128]");
  config.Keep(r.status());
  return Quantization::kFp8Block128;
}

RopeParameters ReadRope(Reader& config, uint32_t max_position_embeddings) {
  RopeParameters rope;
  // From 1: theta's logarithm divides. transformers' default where no place names a theta.
  const double theta = config.Double("rope_theta", 10000, 1.001, 1e12);
  rope.rope_theta = theta;
  // Transformers lets the old key win where both are filled.
  const json::Object* object = config.Object("rope_scaling");
  std::string place = "rope_scaling";
  if (object == nullptr || object->empty()) {
    place = "rope_parameters";
    object = config.Object(place);
  }
  if (object == nullptr) return rope;

  Reader r(*object, config.what() + ": " + place);
  rope.rope_theta = r.Double("rope_theta", theta, 1.001, 1e12);
  if (r.Double("partial_rotary_factor", 1, -1e9, 1e9) != 1) {
    r.Refuse("partial_rotary_factor", "not 1", "only 1 is supported");
  }
  const std::string type_key = r.Find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = r.String(type_key, "default");
  if (type == "yarn") {
    rope.rope_type = RopeType::kYarn;
    const uint32_t kMax = limits::kMaxPositionEmbeddings;
    uint32_t original = r.U32("original_max_position_embeddings", max_position_embeddings, 1, kMax);
    original = config.U32("original_max_position_embeddings", original, 1, kMax);
    rope.original_max_position_embeddings = original;
    rope.factor = r.Double("factor", double(max_position_embeddings) / original, 1, 1e6);
    rope.beta_fast = r.Double("beta_fast", 32, 0, 1e6);
    rope.beta_slow = r.Double("beta_slow", 1, 0, 1e6);
    // Python's `or` in the reference.
    if (rope.beta_fast == 0) rope.beta_fast = 32;
    if (rope.beta_slow == 0) rope.beta_slow = 1;
    rope.mscale = r.Double("mscale", 0, 0, 100);
    rope.mscale_all_dim = r.Double("mscale_all_dim", 0, 0, 100);
    if (r.Find("attention_factor") != nullptr) {
      rope.attention_factor = r.Double("attention_factor", 1, 0, 1e6);
    }
    rope.truncate = r.Bool("truncate", true);
    // With one of the two, DeepSeek's code and transformers disagree, but for mscale = 1.
    const bool one = (rope.mscale == 0) != (rope.mscale_all_dim == 0);
    if (one && !rope.attention_factor && rope.mscale != 1) {
      r.Refuse("mscale", absl::StrCat(rope.mscale, " and \"mscale_all_dim\" ", rope.mscale_all_dim),
               "set both, or neither, or mscale to 1: implementations differ otherwise");
    }
  } else if (type != "default") {
    r.Refuse(type_key, type, "supported are default and yarn");
  }
  config.Keep(r.status());
  return rope;
}

void ReadAttention(Reader& r, const Defaults& d, ModelConfig* c) {
  c->num_attention_heads =
      r.U32("num_attention_heads", d.num_attention_heads, 1, limits::kMaxAttentionHeads);
  const uint32_t kv_heads =
      r.U32("num_key_value_heads", c->num_attention_heads, 1, limits::kMaxAttentionHeads);
  if (kv_heads != c->num_attention_heads) {
    r.Refuse("num_key_value_heads", absl::StrCat(kv_heads),
             absl::StrCat("it must equal num_attention_heads, ", c->num_attention_heads));
  }
  c->q_lora_rank =
      r.IsNull("q_lora_rank") ? 0 : r.U32("q_lora_rank", 1536, 0, limits::kMaxLoraRank);
  c->kv_lora_rank = r.U32("kv_lora_rank", 512, 1, limits::kMaxLoraRank);
  c->qk_nope_head_dim = r.U32("qk_nope_head_dim", 128, 1, limits::kMaxHeadDim);
  c->qk_rope_head_dim = r.U32("qk_rope_head_dim", 64, 2, limits::kMaxHeadDim);
  if (c->qk_rope_head_dim % 2 != 0) {
    r.Refuse("qk_rope_head_dim", absl::StrCat(c->qk_rope_head_dim), "it must be even");
  }
  c->v_head_dim = r.U32("v_head_dim", 128, 1, limits::kMaxHeadDim);
  c->rope_parameters = ReadRope(r, c->max_position_embeddings);
  if (!r.Bool("rope_interleave", true)) {
    r.Refuse("rope_interleave", "false", "only true is supported");
  }
  if (r.Bool("attention_bias", false)) {
    r.Refuse("attention_bias", "true", "only false is supported");
  }
}

void ReadRouter(Reader& r, const Defaults& d, ModelConfig* c) {
  const bool v3 = c->architecture == Architecture::kDeepseekV3;
  const std::string scoring = r.String("scoring_func", v3 ? "sigmoid" : "softmax");
  if (scoring != (v3 ? "sigmoid" : "softmax")) {
    r.Refuse("scoring_func", scoring,
             v3 ? "DeepseekV3ForCausalLM uses sigmoid" : "DeepseekV2ForCausalLM uses softmax");
  }
  c->scoring_func = v3 ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;

  const std::string method = r.String("topk_method", v3 ? "noaux_tc" : "greedy");
  if (v3 && method == "noaux_tc") {
    c->topk_method = TopkMethod::kNoauxTc;
  } else if (!v3 && method == "group_limited_greedy") {
    c->topk_method = TopkMethod::kGroupLimitedGreedy;
  } else if (!v3 && method == "greedy") {
    c->topk_method = TopkMethod::kGreedy;
  } else {
    r.Refuse("topk_method", method,
             v3 ? "DeepseekV3ForCausalLM uses noaux_tc"
                : "DeepseekV2ForCausalLM uses greedy or group_limited_greedy");
  }

  c->num_experts_per_tok =
      r.U32("num_experts_per_tok", d.num_experts_per_tok, 0, c->n_routed_experts);
  if (c->num_experts_per_tok == 0) r.Refuse("num_experts_per_tok", "0 or missing", "set it");
  c->norm_topk_prob = r.Bool("norm_topk_prob", d.norm_topk_prob);
  if (!v3 && c->norm_topk_prob) {
    r.Refuse("norm_topk_prob", "true",
             "only false is supported with DeepseekV2ForCausalLM: implementations differ");
  }
  c->routed_scaling_factor = r.Double("routed_scaling_factor", d.routed_scaling_factor, 1e-6, 1e6);

  const bool null_groups = r.IsNull("n_group");
  c->n_group = null_groups ? 1 : r.U32("n_group", d.n_group, 1, c->n_routed_experts);
  c->topk_group = null_groups || r.IsNull("topk_group")
                      ? c->n_group
                      : r.U32("topk_group", d.topk_group, 1, c->n_group);
  if (!r.status().ok() || c->topk_method == TopkMethod::kGreedy) return;
  const uint32_t group_size = c->n_routed_experts / c->n_group;
  if (c->n_routed_experts % c->n_group != 0) {
    r.Refuse("n_group", absl::StrCat(c->n_group),
             absl::StrCat("it must divide n_routed_experts, ", c->n_routed_experts));
  } else if (c->topk_method == TopkMethod::kNoauxTc && group_size < 2) {
    r.Refuse("n_group", absl::StrCat(c->n_group), "noaux_tc needs two experts in a group");
  } else if (c->num_experts_per_tok > c->topk_group * group_size) {
    r.Refuse("num_experts_per_tok", absl::StrCat(c->num_experts_per_tok),
             absl::StrCat("topk_group groups hold only ", c->topk_group * group_size, " experts"));
  }
}

void ReadFeedForward(Reader& r, const Defaults& d, ModelConfig* c) {
  const std::string act = r.String("hidden_act", "silu");
  if (act != "silu") r.Refuse("hidden_act", act, "supported is silu");
  if (r.Bool("mlp_bias", false)) r.Refuse("mlp_bias", "true", "only false is supported");
  c->intermediate_size =
      r.U32("intermediate_size", d.intermediate_size, 1, limits::kMaxIntermediateSize);
  c->n_routed_experts = r.IsNull("n_routed_experts") ? 0
                                                     : r.U32("n_routed_experts", d.n_routed_experts,
                                                             0, limits::kMaxRoutedExperts);
  if (c->n_routed_experts == 0) return;
  c->moe_intermediate_size =
      r.U32("moe_intermediate_size", d.moe_intermediate_size, 1, limits::kMaxIntermediateSize);
  c->n_shared_experts = r.IsNull("n_shared_experts") ? 0
                                                     : r.U32("n_shared_experts", d.n_shared_experts,
                                                             0, limits::kMaxSharedExperts);
  c->first_k_dense_replace =
      r.U32("first_k_dense_replace", d.first_k_dense_replace, 0, limits::kMaxHiddenLayers);
  c->moe_layer_freq = r.U32("moe_layer_freq", 1, 1, limits::kMaxHiddenLayers);
  if (uint64_t{c->n_shared_experts} * c->moe_intermediate_size > limits::kMaxIntermediateSize) {
    r.Refuse("n_shared_experts", absl::StrCat(c->n_shared_experts),
             absl::StrCat("times moe_intermediate_size it is over ", limits::kMaxIntermediateSize));
  }
  ReadRouter(r, d, c);
}

absl::StatusOr<TokenId> TokenOf(const json::Value& value, std::string_view key, uint32_t vocab_size,
                                std::string_view what) {
  if (const int64_t* id = value.if_int64(); id != nullptr && *id >= 0 && *id < vocab_size) {
    return static_cast<TokenId>(*id);
  }
  return absl::InvalidArgumentError(
      absl::StrCat(ToAbsl(what), ": \"", ToAbsl(key), "\" holds ", boost::json::serialize(value),
                   "; a token id must be an integer within [0, ", vocab_size, ")"));
}

// An id or a list of ids; leaves `ids` alone where the key is absent or null.
absl::Status ReadEos(const json::Object& object, uint32_t vocab_size, std::string_view what,
                     std::vector<TokenId>* ids) {
  const std::string_view key = "eos_token_id";
  const json::Value* value = json::Find(object, key);
  if (value == nullptr) return absl::OkStatus();
  std::vector<TokenId> found;
  if (const json::Array* array = value->if_array()) {
    if (array->size() > limits::kMaxEosTokens) {
      return absl::InvalidArgumentError(absl::StrCat(ToAbsl(what), ": \"eos_token_id\" lists ",
                                                     array->size(), " ids; at most ",
                                                     limits::kMaxEosTokens, " are supported"));
    }
    for (const json::Value& item : *array) {
      STRAIT_ASSIGN_OR_RETURN(const TokenId id, TokenOf(item, key, vocab_size, what));
      found.push_back(id);
    }
  } else {
    STRAIT_ASSIGN_OR_RETURN(const TokenId id, TokenOf(*value, key, vocab_size, what));
    found.push_back(id);
  }
  *ids = std::move(found);
  return absl::OkStatus();
}

absl::Status ReadTokens(Reader& r, const json::Object& object, const Defaults& d, ModelConfig* c) {
  if (!r.Contains("bos_token_id")) {
    if (d.bos_token_id < c->vocab_size) c->bos_token_id = d.bos_token_id;
  } else if (const json::Value* bos = r.Find("bos_token_id")) {
    STRAIT_ASSIGN_OR_RETURN(c->bos_token_id,
                            TokenOf(*bos, "bos_token_id", c->vocab_size, r.what()));
  }
  if (!r.Contains("eos_token_id") && d.eos_token_id < c->vocab_size) {
    c->eos_token_ids = {d.eos_token_id};
  }
  return ReadEos(object, c->vocab_size, r.what(), &c->eos_token_ids);
}

absl::StatusOr<ModelConfig> FromJson(std::string_view text, const std::string& what) {
  if (text.size() > limits::kMaxConfigBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        what, ": ", text.size(), " bytes, more than the limit of ", limits::kMaxConfigBytes));
  }
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(text, what));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(value, what));
  Reader r(*object, what);
  ModelConfig c;
  c.architecture = ReadArchitecture(r);
  STRAIT_RETURN_IF_ERROR(r.status());
  const Defaults& d = c.architecture == Architecture::kDeepseekV3 ? kV3Defaults : kV2Defaults;

  c.vocab_size = r.U32("vocab_size", d.vocab_size, 1, limits::kMaxVocabSize);
  c.hidden_size = r.U32("hidden_size", d.hidden_size, 1, limits::kMaxHiddenSize);
  c.num_hidden_layers =
      r.U32("num_hidden_layers", d.num_hidden_layers, 1, limits::kMaxHiddenLayers);
  c.max_position_embeddings = r.U32("max_position_embeddings", d.max_position_embeddings, 1,
                                    limits::kMaxPositionEmbeddings);
  c.rms_norm_eps = r.Double("rms_norm_eps", 1e-6, 0, 1);
  c.tie_word_embeddings = r.Bool("tie_word_embeddings", false);
  c.dtype = ReadDType(r);
  c.quantization = ReadQuantization(r);
  ReadAttention(r, d, &c);
  ReadFeedForward(r, d, &c);
  STRAIT_RETURN_IF_ERROR(r.status());
  STRAIT_RETURN_IF_ERROR(ReadTokens(r, *object, d, &c));
  return c;
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json) {
  return FromJson(json, "config.json");
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir) {
  const std::string path = dir + "/config.json";
  const absl::StatusOr<std::string> text = json::ReadFile(path, limits::kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        absl::StrCat(text.status().message(), "; name the directory of a Hugging Face checkpoint"));
  }
  STRAIT_RETURN_IF_ERROR(text.status());
  STRAIT_ASSIGN_OR_RETURN(ModelConfig config, FromJson(*text, path));

  const std::string generation = dir + "/generation_config.json";
  absl::StatusOr<json::Value> value = json::ParseFile(generation, limits::kMaxConfigBytes);
  if (absl::IsNotFound(value.status())) return config;
  STRAIT_RETURN_IF_ERROR(value.status());
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(*value, generation));
  STRAIT_RETURN_IF_ERROR(ReadEos(*object, config.vocab_size, generation, &config.eos_token_ids));
  return config;
}

}  // namespace strait
