// SPDX-License-Identifier: Apache-2.0
//
// Defends: the weights of a stage are exactly the checkpoint's tensors, each in its place, whatever
// dtype, alignment or sharding the files have; and a checkpoint that does not fit its config.json
// is refused by name.
#include "worker/checkpoint/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/worker/checkpoint/fixture.h"

namespace strait {
namespace {

using ::strait::testing::FreshDir;
using ::strait::testing::RawTensor;
using ::strait::testing::Safetensors;
using ::strait::testing::TensorsOf;
using ::strait::testing::TinyConfig;
using ::strait::testing::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;

using Tensors = std::map<std::string, RawTensor>;

class WeightsTest : public ::testing::Test {
 protected:
  void Write(const std::string& config, size_t pad = 0) {
    WriteText(dir_ + "/config.json", config);
    WriteText(dir_ + "/model.safetensors", Safetensors(tensors_, pad));
  }
  std::unique_ptr<WeightSource> Open() {
    auto source = OpenCheckpointWeights(dir_);
    EXPECT_TRUE(source.ok()) << source.status();
    return source.ok() ? *std::move(source) : nullptr;
  }
  void ExpectIs(const WeightMatrix& m, const std::string& name) {
    SCOPED_TRACE(name);
    const RawTensor& tensor = tensors_.at(name);
    ASSERT_NE(m.data, nullptr);
    EXPECT_EQ(static_cast<uint64_t>(m.rows), tensor.shape[0]);
    EXPECT_EQ(static_cast<uint64_t>(m.cols), tensor.shape[1]);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(m.data) % WeightElementBytes(m.type), 0u);
    EXPECT_EQ(std::memcmp(m.data, tensor.bytes.data(), tensor.bytes.size()), 0);
  }
  void ExpectIs(const VectorView& v, const std::string& name) {  // a bf16 tensor
    SCOPED_TRACE(name);
    const RawTensor& tensor = tensors_.at(name);
    ASSERT_EQ(v.size, tensor.shape[0]);
    for (uint32_t i = 0; i < v.size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, v.data + i, sizeof(bits));
      EXPECT_EQ(std::memcmp(reinterpret_cast<char*>(&bits) + 2, tensor.bytes.data() + 2 * i, 2), 0);
      EXPECT_EQ(bits & 0xffff, 0u);
    }
  }
  void ExpectMlp(const MlpWeights& mlp, const std::string& name) {
    ExpectIs(mlp.gate_proj, name + ".gate_proj.weight");
    ExpectIs(mlp.up_proj, name + ".up_proj.weight");
    ExpectIs(mlp.down_proj, name + ".down_proj.weight");
  }
  void ExpectLayer(const LayerWeights& w, const ModelConfig& config, LayerIndex layer);

  const std::string dir_ = FreshDir();
  Tensors tensors_;
};

void WeightsTest::ExpectLayer(const LayerWeights& w, const ModelConfig& config, LayerIndex layer) {
  const std::string name = absl::StrCat("model.layers.", layer);
  const std::string attn = name + ".self_attn";
  EXPECT_EQ(w.layer, layer);
  ExpectIs(w.input_layernorm, name + ".input_layernorm.weight");
  ExpectIs(w.post_attention_layernorm, name + ".post_attention_layernorm.weight");
  if (config.q_lora_rank == 0) {
    ExpectIs(w.attention.q_proj, attn + ".q_proj.weight");
    EXPECT_EQ(w.attention.q_a_proj.data, nullptr);
    EXPECT_TRUE(w.attention.q_a_layernorm.empty());
  } else {
    EXPECT_EQ(w.attention.q_proj.data, nullptr);
    ExpectIs(w.attention.q_a_proj, attn + ".q_a_proj.weight");
    ExpectIs(w.attention.q_a_layernorm, attn + ".q_a_layernorm.weight");
    ExpectIs(w.attention.q_b_proj, attn + ".q_b_proj.weight");
  }
  ExpectIs(w.attention.kv_a_proj_with_mqa, attn + ".kv_a_proj_with_mqa.weight");
  ExpectIs(w.attention.kv_a_layernorm, attn + ".kv_a_layernorm.weight");
  ExpectIs(w.attention.kv_b_proj, attn + ".kv_b_proj.weight");
  ExpectIs(w.attention.o_proj, attn + ".o_proj.weight");
  if (!config.IsMoeLayer(layer)) {
    ExpectMlp(w.mlp, name + ".mlp");
    EXPECT_TRUE(w.moe.experts.empty());
  } else {
    EXPECT_TRUE(w.mlp.empty());
    ExpectIs(w.moe.gate, name + ".mlp.gate.weight");
    ASSERT_EQ(w.moe.experts.size(), config.n_routed_experts);
    for (size_t e = 0; e < w.moe.experts.size(); ++e) {
      ExpectMlp(w.moe.experts[e], absl::StrCat(name, ".mlp.experts.", e));
    }
    if (config.n_shared_experts == 0) {
      EXPECT_TRUE(w.moe.shared_experts.empty());
    } else {
      ExpectMlp(w.moe.shared_experts, name + ".mlp.shared_experts");
    }
  }
  EXPECT_EQ(w.bytes, LayerWeightBytes(config, layer));
}

TEST_F(WeightsTest, EveryTensorIsInItsPlace) {
  const char* const kVariants[] = {
      "",
      R"(, "q_lora_rank": null)",
      R"(, "n_shared_experts": 0, "n_group": 1)",
      R"(, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy")",
      R"(, "n_routed_experts": null)",
      R"(, "tie_word_embeddings": true)",
      R"(, "moe_layer_freq": 2)"};
  for (const char* variant : kVariants) {
    SCOPED_TRACE(variant);
    const auto config = ParseModelConfig(TinyConfig(variant));
    ASSERT_TRUE(config.ok()) << config.status();
    tensors_ = TensorsOf(*config);
    // Layers behind the last one (multi-token prediction) are none of ours.
    tensors_["model.layers.3.eh_proj.weight"] = {"BF16", {1}, "xx"};
    Write(TinyConfig(variant));
    const auto source = Open();
    ASSERT_NE(source, nullptr);
    std::vector<uint64_t> reported;
    const auto stage = LoadStageWeights(*source, {0, 3}, 2, [&](uint64_t done, uint64_t total) {
      EXPECT_LE(done, total);
      EXPECT_TRUE(reported.empty() || done >= reported.back());
      reported.push_back(done);
    });
    ASSERT_TRUE(stage.ok()) << stage.status();
    uint64_t bytes = EmbeddingBytes(*config) + HeadBytes(*config);
    for (LayerIndex layer = 0; layer < 3; ++layer) {
      ExpectLayer(stage->layers[layer], *config, layer);
      bytes += LayerWeightBytes(*config, layer);
    }
    EXPECT_EQ(stage->bytes, bytes);
    ASSERT_FALSE(reported.empty());
    EXPECT_EQ(reported.back(), bytes);
    ASSERT_TRUE(stage->embedding.has_value());
    ExpectIs(stage->embedding->embed_tokens, "model.embed_tokens.weight");
    ASSERT_TRUE(stage->head.has_value());
    ExpectIs(stage->head->norm, "model.norm.weight");
    ExpectIs(stage->head->lm_head,
             config->tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
  }
}

TEST_F(WeightsTest, OnlyTheEndsHaveEmbeddingAndHead) {
  tensors_ = TensorsOf(*ParseModelConfig(TinyConfig()));
  Write(TinyConfig());
  const auto source = Open();
  ASSERT_NE(source, nullptr);
  const auto middle = LoadStageWeights(*source, {1, 2}, 1, {});
  ASSERT_TRUE(middle.ok()) << middle.status();
  EXPECT_FALSE(middle->embedding.has_value());
  EXPECT_FALSE(middle->head.has_value());
  EXPECT_EQ(middle->layers.size(), 1u);
  EXPECT_EQ(middle->layers[0].layer, 1u);
  for (const LayerRange range : {LayerRange{0, 4}, {2, 2}, {2, 1}, {7, 9}}) {
    EXPECT_EQ(LoadStageWeights(*source, range, 1, {}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

// A stage must open with its own tensors alone: the others may be on other machines.
TEST_F(WeightsTest, AStageNeedsOnlyItsOwnTensors) {
  tensors_ = TensorsOf(*ParseModelConfig(TinyConfig()));
  std::erase_if(tensors_, [](const auto& item) {
    return item.first.find("model.layers.1.") == std::string::npos;
  });
  Write(TinyConfig());
  const auto source = Open();
  ASSERT_NE(source, nullptr);
  EXPECT_TRUE(LoadStageWeights(*source, {1, 2}, 1, {}).ok());
  const auto first = LoadStageWeights(*source, {0, 1}, 1, {});
  EXPECT_EQ(first.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(first.status().message()), HasSubstr("model.embed_tokens.weight"));
}

TEST_F(WeightsTest, UnalignedTensorsAreCopiedIntoAlignment) {
  const auto config = ParseModelConfig(TinyConfig());
  tensors_ = TensorsOf(*config);
  Write(TinyConfig(), /*pad=*/1);
  const auto source = Open();
  ASSERT_NE(source, nullptr);
  for (LayerIndex layer = 0; layer < 3; ++layer) {
    const auto weights = source->LoadLayer(layer);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectLayer(*weights, *config, layer);
  }
}

TEST_F(WeightsTest, ViewsOutliveTheirSource) {
  const auto config = ParseModelConfig(TinyConfig());
  tensors_ = TensorsOf(*config);
  Write(TinyConfig());
  auto source = Open();
  ASSERT_NE(source, nullptr);
  const auto weights = source->LoadLayer(2);
  ASSERT_TRUE(weights.ok());
  source.reset();
  ExpectLayer(*weights, *config, 2);
}

TEST_F(WeightsTest, EveryMissingTensorIsNamed) {
  const auto config = ParseModelConfig(TinyConfig());
  const Tensors whole = TensorsOf(*config);
  for (const auto& [name, tensor] : whole) {
    SCOPED_TRACE(name);
    tensors_ = whole;
    tensors_.erase(name);
    Write(TinyConfig());
    const auto source = Open();
    ASSERT_NE(source, nullptr);
    const auto stage = LoadStageWeights(*source, {0, 3}, 1, {});
    EXPECT_EQ(stage.status().code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(std::string(stage.status().message()),
                AllOf(HasSubstr(name), HasSubstr("model.safetensors")));
  }
}

TEST_F(WeightsTest, EveryWrongShapeIsNamed) {
  const auto config = ParseModelConfig(TinyConfig());
  const Tensors whole = TensorsOf(*config);
  for (const auto& [name, tensor] : whole) {
    SCOPED_TRACE(name);
    tensors_ = whole;
    // One row more.
    RawTensor& changed = tensors_[name];
    changed.bytes.resize(changed.bytes.size() + changed.bytes.size() / changed.shape[0]);
    ++changed.shape[0];
    Write(TinyConfig());
    const auto source = Open();
    ASSERT_NE(source, nullptr);
    const auto stage = LoadStageWeights(*source, {0, 3}, 1, {});
    EXPECT_EQ(stage.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(stage.status().message()),
                AllOf(HasSubstr(name), HasSubstr(absl::StrJoin(changed.shape, ", "))));
  }
}

TEST_F(WeightsTest, VectorsBecomeFp32FromEveryDtype) {
  const auto config = ParseModelConfig(TinyConfig());
  // 1.5, -2, the smallest subnormal, 65504, and zeros, in half precision.
  const std::string half("\x00\x3e\x00\xc0\x01\x00\xff\x7b", 8);
  const float expected[] = {1.5f, -2.0f, 0x1p-24f, 65504.0f};
  tensors_ = TensorsOf(*config);
  tensors_["model.norm.weight"] = {"F16", {12}, half + std::string(16, '\0')};
  Write(TinyConfig());
  auto source = Open();
  ASSERT_NE(source, nullptr);
  const auto head = source->LoadHead();
  ASSERT_TRUE(head.ok()) << head.status();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(head->norm.data[i], expected[i]) << i;

  tensors_["model.norm.weight"] = {
      "F32",
      {12},
      std::string(reinterpret_cast<const char*>(expected), 16) + std::string(32, '\0')};
  Write(TinyConfig(), /*pad=*/1);
  source = Open();
  ASSERT_NE(source, nullptr);
  const auto wide = source->LoadHead();
  ASSERT_TRUE(wide.ok()) << wide.status();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(wide->norm.data[i], expected[i]) << i;
}

TEST_F(WeightsTest, Fp8NeedsItsScalesAndItsConfig) {
  const std::string quantized =
      R"(, "hidden_size": 130, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
           "weight_block_size": [128, 128]})";
  const auto config = ParseModelConfig(TinyConfig(quantized));
  ASSERT_TRUE(config.ok()) << config.status();
  tensors_ = TensorsOf(*config);
  const std::string name = "model.layers.0.self_attn.o_proj.weight";  // [130, 6]
  tensors_[name] = {"F8_E4M3", {130, 6}, std::string(780, '\x38')};
  const float scales[] = {0.5f, 3.0f};
  const RawTensor scale{"F32", {2, 1}, std::string(reinterpret_cast<const char*>(scales), 8)};
  tensors_[name + "_scale_inv"] = scale;
  Write(TinyConfig(quantized));
  auto source = Open();
  ASSERT_NE(source, nullptr);
  const auto weights = source->LoadLayer(0);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const WeightMatrix& m = weights->attention.o_proj;
  EXPECT_EQ(m.type, WeightType::kFp8E4m3);
  ASSERT_NE(m.scale_inv, nullptr);
  EXPECT_EQ(m.scale_inv[0], 0.5f);
  EXPECT_EQ(m.scale_inv[1], 3.0f);
  EXPECT_EQ(WeightBytes(m), 780u + 8u);
  EXPECT_EQ(weights->attention.kv_a_proj_with_mqa.scale_inv, nullptr);

  tensors_[name + "_scale_inv"] = {"F32", {1, 2}, scale.bytes};
  Write(TinyConfig(quantized));
  EXPECT_THAT(std::string(Open()->LoadLayer(0).status().message()), HasSubstr("scale_inv"));
  tensors_.erase(name + "_scale_inv");
  Write(TinyConfig(quantized));
  EXPECT_EQ(Open()->LoadLayer(0).status().code(), absl::StatusCode::kNotFound);
  tensors_[name + "_scale_inv"] = scale;
  Write(TinyConfig(R"(, "hidden_size": 130)"));
  EXPECT_THAT(std::string(Open()->LoadLayer(0).status().message()),
              HasSubstr("quantization_config"));
  // The embedding is never quantized.
  tensors_["model.embed_tokens.weight"] = {"F8_E4M3", {16, 130}, std::string(2080, '\x38')};
  Write(TinyConfig(quantized));
  EXPECT_THAT(std::string(Open()->LoadEmbedding().status().message()), HasSubstr("F8_E4M3"));
}

}  // namespace
}  // namespace strait
