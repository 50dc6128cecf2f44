// SPDX-License-Identifier: Apache-2.0
//
// What the tests of this folder share: the files of tests/golden/tokenizer, and a tokenizer.json
// as a value that a test can change.
#pragma once

#include <string>

#include "coordinator/text/tokenizer.h"
#include "coordinator/text/tokenizer_config.h"
#include "gtest/gtest.h"
#include "proto/base/json.h"

namespace strait::testing {

inline std::string GoldenPath(const std::string& name) {
  return std::string(STRAIT_SOURCE_DIR) + "/tests/golden/tokenizer/" + name;
}

inline json::Value GoldenJson(const std::string& name) {
  auto value = json::ParseFile(GoldenPath(name), 64u << 20);
  EXPECT_TRUE(value.ok()) << value.status();
  return value.ok() ? *std::move(value) : json::Value();
}

inline std::string Str(const json::Value& value) {
  return std::string(json::View(value.as_string()));
}

inline TokenizerConfig GoldenConfig() {
  auto config = TokenizerConfig::Load(GoldenPath("tokenizer_config.json"));
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *std::move(config) : TokenizerConfig();
}

inline std::unique_ptr<Tokenizer> GoldenTokenizer() {
  auto tokenizer = Tokenizer::Load(GoldenPath("tokenizer.json"));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

}  // namespace strait::testing
