// SPDX-License-Identifier: Apache-2.0
//
// A tokenizer for tests whose ids 0 to 255 are the bytes themselves, with special tokens behind
// them, and a chat template that uses those.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "coordinator/http/served_model.h"
#include "gtest/gtest.h"
#include "proto/base/json.h"

namespace strait {

inline constexpr TokenId kTestBos = 256;
inline constexpr TokenId kTestEos = 257;
inline constexpr TokenId kTestUser = 258;
inline constexpr TokenId kTestAssistant = 259;

// The character that byte-level BPE writes for a byte: itself if printable, else one from U+0100
// on.
inline std::string ByteLevelCharacter(int byte) {
  const auto printable = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 128) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

inline ServedModel TestModel(bool with_tokenizer = true, bool with_template = true) {
  ServedModel model;
  model.name = "test-model";
  model.root = "/models/test";
  model.created = 1700000000;
  if (!with_tokenizer) return model;

  json::Object vocab;
  for (int byte = 0; byte < 256; ++byte) vocab[ByteLevelCharacter(byte)] = byte;
  json::Array added;
  const char* const names[] = {"<bos>", "<eos>", "<user>", "<assistant>"};
  for (int i = 0; i < 4; ++i) {
    added.push_back(json::Object{{"id", 256 + i},
                                 {"content", names[i]},
                                 {"special", true},
                                 {"single_word", false},
                                 {"lstrip", false},
                                 {"rstrip", false},
                                 {"normalized", false}});
  }
  const json::Object file{
      {"added_tokens", added},
      {"normalizer", nullptr},
      {"pre_tokenizer", json::Object{{"type", "ByteLevel"},
                                     {"add_prefix_space", false},
                                     {"trim_offsets", true},
                                     {"use_regex", false}}},
      {"post_processor", nullptr},
      {"decoder", json::Object{{"type", "ByteLevel"}}},
      {"model", json::Object{{"type", "BPE"}, {"vocab", vocab}, {"merges", json::Array{}}}}};
  TokenizerConfig config;
  config.bos_token = "<bos>";
  config.eos_token = "<eos>";
  config.add_bos_token = true;
  auto tokenizer = Tokenizer::Parse(boost::json::serialize(file), "test tokenizer", &config);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  if (!tokenizer.ok()) return model;
  model.tokenizer = *std::move(tokenizer);
  if (!with_template) return model;
  auto chat = ChatTemplate::Parse(
      "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
      "<user>{{ message['content'] }}{% else %}<assistant>{{ message['content'] }}<eos>{% endif %}"
      "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
      config);
  EXPECT_TRUE(chat.ok()) << chat.status();
  if (chat.ok()) model.chat_template = *std::move(chat);
  return model;
}

}  // namespace strait
