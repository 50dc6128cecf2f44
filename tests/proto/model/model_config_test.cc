// SPDX-License-Identifier: Apache-2.0
//
// Defends: a config.json becomes exactly the shape that its checkpoint has, with transformers'
// defaults for what is absent; and whatever would make us compute something else is refused by
// name.
#include "proto/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"

namespace strait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kV3[] = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
  "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 7168,
  "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
  "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
  "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
  "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
  "first_k_dense_replace": 3})";

constexpr char kV2Lite[] = R"({
  "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
  "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048,
  "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
  "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
  "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000, "beta_fast": 32, "beta_slow": 1,
  "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
  "original_max_position_embeddings": 4096}, "routed_scaling_factor": 1.0,
  "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "dtype": "float16",
  "v_head_dim": 128, "vocab_size": 102400})";

// kV3 with `key` set to `value` (later keys win).
std::string V3With(const std::string& key, const std::string& value) {
  std::string text = kV3;
  text.pop_back();
  return absl::StrCat(text, ", \"", key, "\": ", value, "}");
}

std::string V2With(const std::string& key, const std::string& value) {
  std::string text = kV2Lite;
  text.pop_back();
  return absl::StrCat(text, ", \"", key, "\": ", value, "}");
}

void ExpectRefused(const std::string& text, const std::string& part) {
  const auto config = ParseModelConfig(text);
  ASSERT_FALSE(config.ok()) << "accepted, should name " << part;
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << config.status();
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(part));
}

TEST(ModelConfig, ReadsDeepseekV3AsPublished) {
  const auto c = ParseModelConfig(kV3);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->architecture, Architecture::kDeepseekV3);
  EXPECT_EQ(c->hidden_size, 7168u);
  EXPECT_EQ(c->num_hidden_layers, 61u);
  EXPECT_EQ(c->q_lora_rank, 1536u);
  EXPECT_EQ(c->qk_head_dim(), 192u);
  EXPECT_EQ(c->n_routed_experts, 256u);
  EXPECT_EQ(c->topk_group, 4u);
  EXPECT_TRUE(c->norm_topk_prob);
  EXPECT_EQ(c->routed_scaling_factor, 2.5);
  EXPECT_EQ(c->scoring_func, ScoringFunc::kSigmoid);
  EXPECT_EQ(c->topk_method, TopkMethod::kNoauxTc);
  EXPECT_EQ(c->dtype, DType::kBf16);
  EXPECT_EQ(c->quantization, Quantization::kFp8Block128);
  const RopeParameters& rope = c->rope_parameters;
  EXPECT_EQ(rope.rope_type, RopeType::kYarn);
  EXPECT_EQ(rope.rope_theta, 10000);
  EXPECT_EQ(rope.factor, 40);
  EXPECT_EQ(rope.original_max_position_embeddings, 4096u);
  EXPECT_EQ(rope.mscale, 1);
  EXPECT_EQ(rope.mscale_all_dim, 1);
  EXPECT_FALSE(rope.attention_factor.has_value());
  EXPECT_EQ(c->bos_token_id, 0u);
  EXPECT_THAT(c->eos_token_ids, ElementsAre(1u));
  EXPECT_FALSE(c->IsMoeLayer(2));
  EXPECT_TRUE(c->IsMoeLayer(3));
}

TEST(ModelConfig, ReadsDeepseekV2LiteWithNewRopeKeys) {
  const auto c = ParseModelConfig(kV2Lite);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->architecture, Architecture::kDeepseekV2);
  EXPECT_EQ(c->q_lora_rank, 0u);
  EXPECT_EQ(c->scoring_func, ScoringFunc::kSoftmax);
  EXPECT_EQ(c->topk_method, TopkMethod::kGreedy);
  EXPECT_EQ(c->dtype, DType::kF16);
  EXPECT_EQ(c->quantization, Quantization::kNone);
  EXPECT_EQ(c->rope_parameters.rope_type, RopeType::kYarn);
  EXPECT_EQ(c->rope_parameters.mscale, 0.707);
}

TEST(ModelConfig, AbsentKeysHaveTransformersDefaults) {
  const auto v3 = ParseModelConfig(R"({"architectures": ["DeepseekV3ForCausalLM"]})");
  ASSERT_TRUE(v3.ok()) << v3.status();
  EXPECT_EQ(v3->hidden_size, 7168u);
  EXPECT_EQ(v3->num_experts_per_tok, 8u);
  EXPECT_EQ(v3->first_k_dense_replace, 3u);
  EXPECT_EQ(v3->max_position_embeddings, 4096u);
  EXPECT_EQ(v3->rope_parameters.rope_type, RopeType::kDefault);
  EXPECT_EQ(v3->bos_token_id, 0u);

  const auto v2 = ParseModelConfig(R"({"model_type": "deepseek_v2", "num_experts_per_tok": 6})");
  ASSERT_TRUE(v2.ok()) << v2.status();
  EXPECT_EQ(v2->hidden_size, 4096u);
  EXPECT_EQ(v2->n_routed_experts, 64u);
  EXPECT_EQ(v2->q_lora_rank, 1536u);
  EXPECT_EQ(v2->first_k_dense_replace, 0u);
  EXPECT_EQ(v2->topk_method, TopkMethod::kGreedy);
  EXPECT_FALSE(v2->norm_topk_prob);
  EXPECT_THAT(v2->eos_token_ids, ElementsAre(2u));
}

TEST(ModelConfig, NullExpertsMakeADenseModel) {
  const auto c = ParseModelConfig(V2With("n_routed_experts", "null"));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->n_routed_experts, 0u);
  EXPECT_FALSE(c->IsMoeLayer(5));
}

TEST(ModelConfig, EveryFrequentLayerIsMoe) {
  const auto c = ParseModelConfig(V3With("moe_layer_freq", "2"));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_FALSE(c->IsMoeLayer(3));
  EXPECT_TRUE(c->IsMoeLayer(4));
  EXPECT_FALSE(c->IsMoeLayer(5));
}

TEST(ModelConfig, EosMayBeAList) {
  const auto c = ParseModelConfig(V3With("eos_token_id", "[1, 7]"));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_THAT(c->eos_token_ids, ElementsAre(1u, 7u));
}

TEST(ModelConfig, OldRopeKeysWinAndThetaComesFromItsPlace) {
  const auto plain = ParseModelConfig(V3With("rope_scaling", "null"));
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(plain->rope_parameters.rope_type, RopeType::kDefault);

  std::string text = V3With("rope_scaling", "null");
  text.pop_back();
  const auto theta = ParseModelConfig(
      text + R"(, "rope_theta": 50000, "rope_parameters": {"rope_type": "default"}})");
  ASSERT_TRUE(theta.ok()) << theta.status();
  EXPECT_EQ(theta->rope_parameters.rope_theta, 50000);
}

TEST(ModelConfig, UnknownArchitectureIsNamedWithWhatIsSupported) {
  const auto c = ParseModelConfig(R"({"architectures": ["LlamaForCausalLM"]})");
  EXPECT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(c.status().message()),
              AllOf(HasSubstr("LlamaForCausalLM"), HasSubstr("DeepseekV3ForCausalLM"),
                    HasSubstr("DeepseekV2ForCausalLM")));
  ExpectRefused(R"({"architectures": []})", "architectures");
  ExpectRefused(R"({"architectures": [3]})", "architectures");
  ExpectRefused(R"({"model_type": "qwen2"})", "qwen2");
  ExpectRefused("{}", "model_type");
}

TEST(ModelConfig, RefusesWhatItDoesNotCompute) {
  const std::pair<const char*, const char*> cases[] = {
      {"hidden_act", "\"gelu\""},
      {"attention_bias", "true"},
      {"mlp_bias", "true"},
      {"rope_interleave", "false"},
      {"num_key_value_heads", "8"},
      {"scoring_func", "\"softmax\""},
      {"topk_method", "\"greedy\""},
      {"torch_dtype", "\"float64\""},
      {"quantization_config", R"({"quant_method": "gptq"})"},
      {"quantization_config", R"({"quant_method": "fp8", "weight_block_size": [64, 64]})"},
      {"quantization_config", R"({"quant_method": "fp8"})"},
      {"quantization_config",
       R"({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"})"},
      {"quantization_config", R"({"quant_method": "fp8", "weight_block_size": [128, 128],
                                  "activation_scheme": "static"})"},
      {"rope_scaling", R"({"type": "linear", "factor": 2})"},
      {"rope_scaling", R"({"type": "yarn", "factor": 40, "mscale_all_dim": 1.0})"},
      {"rope_scaling", R"({"type": "yarn", "factor": 0.5})"},
      {"rope_scaling", R"({"type": "yarn", "factor": 40, "partial_rotary_factor": 0.5})"},
  };
  for (const auto& [key, value] : cases) {
    SCOPED_TRACE(absl::StrCat(key, " = ", value));
    // A quantization or rope error names the key inside; the outer one is in its place.
    ExpectRefused(V3With(key, value), key);
  }
  ExpectRefused(V2With("norm_topk_prob", "true"), "norm_topk_prob");
  ExpectRefused(V2With("scoring_func", "\"sigmoid\""), "scoring_func");
  ExpectRefused(V2With("topk_method", "\"noaux_tc\""), "topk_method");
}

TEST(ModelConfig, AbsurdNumbersAreRefusedByName) {
  const char* const kKeys[] = {
      "vocab_size",        "hidden_size",      "num_hidden_layers",       "num_attention_heads",
      "kv_lora_rank",      "qk_nope_head_dim", "qk_rope_head_dim",        "v_head_dim",
      "intermediate_size", "n_routed_experts", "moe_intermediate_size",   "num_experts_per_tok",
      "n_group",           "topk_group",       "max_position_embeddings", "moe_layer_freq",
      "q_lora_rank",       "n_shared_experts", "first_k_dense_replace"};
  for (const char* key : kKeys) {
    for (const char* value :
         {"-1", "1000000000000", "4294967297", "1.5", "\"64\"", "[1]", "true"}) {
      SCOPED_TRACE(absl::StrCat(key, " = ", value));
      ExpectRefused(V3With(key, value), key);
    }
  }
  for (const char* key : {"hidden_size", "num_attention_heads", "kv_lora_rank", "v_head_dim"}) {
    SCOPED_TRACE(key);
    ExpectRefused(V3With(key, "0"), key);
  }
  ExpectRefused(V3With("rms_norm_eps", "-1"), "rms_norm_eps");
  ExpectRefused(V3With("rms_norm_eps", "1e300"), "rms_norm_eps");
  ExpectRefused(V3With("routed_scaling_factor", "0"), "routed_scaling_factor");
  ExpectRefused(V3With("rope_theta", "0"), "rope_theta");
  ExpectRefused(V3With("rope_theta", "1"), "rope_theta");
}

TEST(ModelConfig, InconsistentRoutingIsRefused) {
  ExpectRefused(V3With("n_group", "7"), "n_group");
  ExpectRefused(V3With("n_group", "256"), "n_group");
  ExpectRefused(V3With("topk_group", "9"), "topk_group");
  ExpectRefused(V3With("num_experts_per_tok", "129"), "num_experts_per_tok");
  ExpectRefused(V3With("qk_rope_head_dim", "63"), "qk_rope_head_dim");
  ExpectRefused(V2With("num_experts_per_tok", "null"), "num_experts_per_tok");
}

TEST(ModelConfig, TokenIdsMustBeInTheVocabulary) {
  ExpectRefused(V3With("eos_token_id", "129280"), "eos_token_id");
  ExpectRefused(V3With("eos_token_id", "[1, -1]"), "eos_token_id");
  ExpectRefused(V3With("bos_token_id", "\"a\""), "bos_token_id");
  std::string many = "[0";
  for (uint32_t i = 0; i < limits::kMaxEosTokens; ++i) many += ", 1";
  ExpectRefused(V3With("eos_token_id", many + "]"), "eos_token_id");
}

TEST(ModelConfig, BrokenJsonIsRefused) {
  ExpectRefused("", "config.json");
  ExpectRefused("[]", "config.json");
  ExpectRefused(std::string(kV3).substr(0, 200), "config.json");
  EXPECT_EQ(ParseModelConfig(std::string(limits::kMaxConfigBytes + 1, ' ')).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(ModelConfig, WeightBytesAreThoseOfThePublishedFiles) {
  const auto v3 = ParseModelConfig(kV3);
  ASSERT_TRUE(v3.ok());
  // Matrix elements of a MoE layer, counted by hand from the published shapes.
  const uint64_t attention =
      1536ull * 7168 + 24576ull * 1536 + 576ull * 7168 + 32768ull * 512 + 7168ull * 16384;
  const uint64_t experts = 257ull * 3 * 2048 * 7168;
  const uint64_t scales =
      4 * (12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128 + 257 * 3 * 16 * 56);
  const uint64_t gate = 2ull * 256 * 7168;
  const uint64_t vectors = 4ull * (2 * 7168 + 1536 + 512 + 256);
  EXPECT_EQ(LayerWeightBytes(*v3, 10), attention + experts + scales + gate + vectors);
  EXPECT_EQ(EmbeddingBytes(*v3), 2ull * 129280 * 7168);
  EXPECT_EQ(HeadBytes(*v3), 2ull * 129280 * 7168 + 4 * 7168);
}

TEST(ModelConfig, FingerprintFollowsTheShapeOnly) {
  const auto base = ParseModelConfig(kV3);
  ASSERT_TRUE(base.ok());
  EXPECT_EQ(ModelFingerprint(*base), ModelFingerprint(*ParseModelConfig(kV3)));
  EXPECT_EQ(ModelFingerprint(*base),
            ModelFingerprint(*ParseModelConfig(V3With("eos_token_id", "5"))));
  for (const auto& [key, value] : {std::pair{"num_hidden_layers", "60"},
                                   {"rms_norm_eps", "1e-5"},
                                   {"rope_scaling", "null"},
                                   {"quantization_config", "null"}}) {
    const auto other = ParseModelConfig(V3With(key, value));
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_NE(ModelFingerprint(*base), ModelFingerprint(*other)) << key;
  }
}

TEST(ModelConfig, DirectoryMayOverrideEosAndMustHaveAConfig) {
  const std::string dir = ::testing::TempDir() + "model_config_test";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  EXPECT_EQ(LoadModelConfig(dir).status().code(), absl::StatusCode::kNotFound);
  std::ofstream(dir + "/config.json") << kV3;
  auto config = LoadModelConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1u));
  std::ofstream(dir + "/generation_config.json") << R"({"eos_token_id": [1, 9]})";
  config = LoadModelConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1u, 9u));
  std::ofstream(dir + "/generation_config.json") << "{";
  EXPECT_EQ(LoadModelConfig(dir).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace strait
