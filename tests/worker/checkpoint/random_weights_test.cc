// SPDX-License-Identifier: Apache-2.0
//
// Defends: random weights are a function of (config, seed, tensor name) alone, whatever the split
// into stages and the number of threads; their scale keeps activations finite.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/worker/checkpoint/fixture.h"
#include "worker/checkpoint/weights.h"

namespace strait {
namespace {

using ::strait::testing::TinyConfig;

ModelConfig Config(const std::string& extra = "") {
  return ParseModelConfig(TinyConfig(extra)).value();
}

// Contents of a stage's matrices and vectors, one after the other.
std::string Contents(const LayerWeights& w) {
  std::string all;
  const auto add = [&](const WeightMatrix& m) {
    if (m.data == nullptr) return;
    const uint64_t codes = static_cast<uint64_t>(m.rows * m.cols * WeightElementBytes(m.type));
    all.append(static_cast<const char*>(m.data), codes);
    if (m.scale_inv != nullptr) {
      all.append(reinterpret_cast<const char*>(m.scale_inv), WeightBytes(m) - codes);
    }
  };
  const auto add_vector = [&](const VectorView& v) {
    all.append(reinterpret_cast<const char*>(v.data), v.size * sizeof(float));
  };
  const auto add_mlp = [&](const MlpWeights& mlp) {
    add(mlp.gate_proj);
    add(mlp.up_proj);
    add(mlp.down_proj);
  };
  add_vector(w.input_layernorm);
  for (const WeightMatrix* m : {&w.attention.q_proj, &w.attention.q_a_proj, &w.attention.q_b_proj,
                                &w.attention.kv_a_proj_with_mqa, &w.attention.kv_b_proj,
                                &w.attention.o_proj, &w.moe.gate}) {
    add(*m);
  }
  add_vector(w.moe.e_score_correction_bias);
  add_mlp(w.mlp);
  for (const MlpWeights& expert : w.moe.experts) add_mlp(expert);
  add_mlp(w.moe.shared_experts);
  return all;
}

StageWeights Load(const ModelConfig& config, uint64_t seed, LayerRange range, uint32_t threads) {
  return LoadStageWeights(*MakeRandomWeights(config, seed, threads), range, threads, {}).value();
}

TEST(RandomWeights, EverySplitGivesTheSameModel) {
  for (const char* extra :
       {"", R"(, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]})",
        R"(, "torch_dtype": "float32")", R"(, "torch_dtype": "float16", "q_lora_rank": null)"}) {
    SCOPED_TRACE(extra);
    const ModelConfig config = Config(extra);
    const StageWeights whole = Load(config, 42, {0, 3}, 1);
    const StageWeights head = Load(config, 42, {0, 1}, 3);
    const StageWeights tail = Load(config, 42, {1, 3}, 2);
    EXPECT_EQ(Contents(whole.layers[0]), Contents(head.layers[0]));
    EXPECT_EQ(Contents(whole.layers[1]), Contents(tail.layers[0]));
    EXPECT_EQ(Contents(whole.layers[2]), Contents(tail.layers[1]));
    const WeightMatrix& a = whole.embedding->embed_tokens;
    EXPECT_EQ(std::memcmp(a.data, head.embedding->embed_tokens.data, WeightBytes(a)), 0);
    const WeightMatrix& b = whole.head->lm_head;
    EXPECT_EQ(std::memcmp(b.data, tail.head->lm_head.data, WeightBytes(b)), 0);
    for (const LayerWeights& layer : whole.layers) {
      EXPECT_EQ(layer.bytes, LayerWeightBytes(config, layer.layer));
    }
    EXPECT_EQ(whole.embedding->bytes, EmbeddingBytes(config));
    EXPECT_EQ(whole.head->bytes, HeadBytes(config));
  }
}

TEST(RandomWeights, SeedsAndLayersDiffer) {
  const ModelConfig config = Config();
  const StageWeights a = Load(config, 1, {0, 3}, 1);
  const StageWeights b = Load(config, 2, {0, 3}, 1);
  EXPECT_NE(Contents(a.layers[1]), Contents(b.layers[1]));
  EXPECT_NE(Contents(a.layers[1]), Contents(a.layers[2]));
}

// More elements than one thread takes at a time: the borders leave no trace.
TEST(RandomWeights, ThreadsDoNotShowInLargeTensors) {
  const ModelConfig config = Config(R"(, "hidden_size": 1031, "intermediate_size": 2053)");
  const StageWeights one = Load(config, 9, {0, 1}, 1);
  const StageWeights four = Load(config, 9, {0, 1}, 4);
  EXPECT_EQ(Contents(one.layers[0]), Contents(four.layers[0]));
}

TEST(RandomWeights, TiedEmbeddingIsTheHead) {
  const ModelConfig config = Config(R"(, "tie_word_embeddings": true)");
  const StageWeights w = Load(config, 5, {0, 3}, 1);
  const WeightMatrix& m = w.embedding->embed_tokens;
  EXPECT_EQ(std::memcmp(m.data, w.head->lm_head.data, WeightBytes(m)), 0);
}

float Bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

TEST(RandomWeights, ScaleKeepsAUnitInputAtUnitSize) {
  const ModelConfig config = Config(R"(, "hidden_size": 256, "intermediate_size": 512)");
  const StageWeights w = Load(config, 3, {0, 1}, 2);
  const WeightMatrix& m = w.layers[0].mlp.gate_proj;
  double sum = 0, squares = 0;
  const int64_t count = m.rows * m.cols;
  for (int64_t i = 0; i < count; ++i) {
    const double value = Bf16(static_cast<const uint16_t*>(m.data)[i]);
    ASSERT_TRUE(std::isfinite(value));
    sum += value;
    squares += value * value;
  }
  // 131,072 values of deviation 1/16: the mean's own deviation is 1.7e-4.
  EXPECT_NEAR(sum / count, 0, 1e-3);
  EXPECT_NEAR(std::sqrt(squares / count), 1 / 16.0, 2e-3);
  for (uint32_t i = 0; i < w.layers[0].input_layernorm.size; ++i) {
    EXPECT_EQ(w.layers[0].input_layernorm.data[i], 1.0f);
  }
}

TEST(RandomWeights, QuantizedCodesAreFiniteAndScaled) {
  const ModelConfig config = Config(
      R"(, "hidden_size": 256,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]})");
  const StageWeights w = Load(config, 3, {0, 1}, 2);
  const WeightMatrix& m = w.layers[0].mlp.gate_proj;
  ASSERT_EQ(m.type, WeightType::kFp8E4m3);
  double squares = 0;
  const int64_t count = m.rows * m.cols;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t code = static_cast<const uint8_t*>(m.data)[i];
    ASSERT_NE(code & 0x7f, 0x7f) << "NaN";
    const int exponent = code >> 3 & 15;
    const double magnitude =
        exponent == 0 ? (code & 7) * 0x1p-9 : std::ldexp(8 + (code & 7), exponent - 10);
    squares += magnitude * magnitude * m.scale_inv[0] * m.scale_inv[0];
  }
  EXPECT_NEAR(std::sqrt(squares / count), 1 / 16.0, 4e-3);
  EXPECT_EQ(w.embedding->embed_tokens.type, WeightType::kBf16);
}

TEST(RandomWeights, TooMuchMemoryIsAStatus) {
  // About 480 TB a layer: more than the address space.
  const ModelConfig config = Config(
      R"(, "hidden_size": 65536, "moe_intermediate_size": 300000, "n_routed_experts": 4096,
         "first_k_dense_replace": 0)");
  const auto source = MakeRandomWeights(config, 1, 1);
  const auto layer = source->LoadLayer(0);
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kResourceExhausted) << layer.status();
}

}  // namespace
}  // namespace strait
