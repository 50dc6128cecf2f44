// SPDX-License-Identifier: Apache-2.0
#include "tests/worker/checkpoint/fixture.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace strait::testing {

std::string FreshDir() {
  const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
  const std::string dir =
      absl::StrCat(::testing::TempDir(), "strait_", test->test_suite_name(), "_", test->name());
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  return dir;
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string ReadText(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

std::string RawSafetensors(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

std::string Safetensors(const std::map<std::string, RawTensor>& tensors, size_t pad) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    absl::StrAppend(&header, ",\"", name, "\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":[",
                    absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[", data.size(), ",",
                    data.size() + tensor.bytes.size(), "]}");
    data += tensor.bytes;
  }
  header += "}";
  header += std::string((8 - header.size() % 8) % 8 + pad, ' ');
  return RawSafetensors(header, data);
}

RawTensor Bf16Noise(const std::string& name, std::vector<uint64_t> shape) {
  uint64_t count = 1;
  for (const uint64_t dim : shape) count *= dim;
  uint32_t seed = 7;
  for (const char c : name) seed = seed * 31 + static_cast<unsigned char>(c);
  std::mt19937 random(seed);
  RawTensor tensor{"BF16", std::move(shape), std::string(count * 2, '\0')};
  for (uint64_t i = 0; i < count; ++i) {
    // Exponents about 1: all values finite.
    const uint16_t bits = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);
    std::memcpy(tensor.bytes.data() + 2 * i, &bits, 2);
  }
  return tensor;
}

std::map<std::string, RawTensor> TensorsOf(const ModelConfig& c) {
  std::map<std::string, RawTensor> out;
  const auto add = [&](const std::string& name, std::vector<uint64_t> shape) {
    out[name] = Bf16Noise(name, std::move(shape));
  };
  const auto add_mlp = [&](const std::string& name, uint64_t intermediate) {
    add(name + ".gate_proj.weight", {intermediate, c.hidden_size});
    add(name + ".up_proj.weight", {intermediate, c.hidden_size});
    add(name + ".down_proj.weight", {c.hidden_size, intermediate});
  };
  add("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, c.hidden_size});
  add("model.norm.weight", {c.hidden_size});
  const uint64_t heads = c.num_attention_heads;
  for (uint32_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    const std::string name = absl::StrCat("model.layers.", layer);
    const std::string attention = name + ".self_attn";
    add(name + ".input_layernorm.weight", {c.hidden_size});
    add(name + ".post_attention_layernorm.weight", {c.hidden_size});
    if (c.q_lora_rank == 0) {
      add(attention + ".q_proj.weight", {heads * c.qk_head_dim(), c.hidden_size});
    } else {
      add(attention + ".q_a_proj.weight", {c.q_lora_rank, c.hidden_size});
      add(attention + ".q_a_layernorm.weight", {c.q_lora_rank});
      add(attention + ".q_b_proj.weight", {heads * c.qk_head_dim(), c.q_lora_rank});
    }
    add(attention + ".kv_a_proj_with_mqa.weight",
        {c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size});
    add(attention + ".kv_a_layernorm.weight", {c.kv_lora_rank});
    add(attention + ".kv_b_proj.weight",
        {heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank});
    add(attention + ".o_proj.weight", {c.hidden_size, heads * c.v_head_dim});
    if (!c.IsMoeLayer(layer)) {
      add_mlp(name + ".mlp", c.intermediate_size);
      continue;
    }
    add(name + ".mlp.gate.weight", {c.n_routed_experts, c.hidden_size});
    if (c.topk_method == TopkMethod::kNoauxTc) {
      out[name + ".mlp.gate.e_score_correction_bias"] = {
          "F32", {c.n_routed_experts}, std::string(4 * c.n_routed_experts, '\x3e')};
    }
    for (uint32_t expert = 0; expert < c.n_routed_experts; ++expert) {
      add_mlp(absl::StrCat(name, ".mlp.experts.", expert), c.moe_intermediate_size);
    }
    if (c.n_shared_experts > 0) {
      add_mlp(name + ".mlp.shared_experts", uint64_t{c.n_shared_experts} * c.moe_intermediate_size);
    }
  }
  return out;
}

std::string TinyConfig(const std::string& extra) {
  return R"({"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "intermediate_size": 10,
    "moe_intermediate_size": 5, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "vocab_size": 16,
    "torch_dtype": "bfloat16")" +
         extra + "}";
}

}  // namespace strait::testing
