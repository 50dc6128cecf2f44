// SPDX-License-Identifier: Apache-2.0
//
// TokenizerConfig reads what tokenizer_config.json adds to tokenizer.json: which tokens begin and
// end a text, whether encoding adds them, and the chat templates.
//
// Thread:  plain data.
// Errors:  NotFound (no such file), InvalidArgument (wrong JSON, naming the key).
// Limits:  kMaxTokenizerConfigBytes.
// Why:     DeepSeek's tokenizer.json adds no BOS; its tokenizer_class (Llama) does, by
//          add_bos_token.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace strait {

inline constexpr size_t kMaxTokenizerConfigBytes = 16u << 20;

struct NamedTemplate {
  std::string name;  // "default" when the file holds one plain string
  std::string source;
};

struct TokenizerConfig {
  std::string bos_token;  // empty: none
  std::string eos_token;
  std::string pad_token;
  std::string unk_token;
  // Empty: the file leaves it to tokenizer.json's post_processor.
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;
  std::vector<NamedTemplate> chat_templates;

  // Reads the file at `path`. A chat_template.jinja beside it takes the place of the "default"
  // template.
  static absl::StatusOr<TokenizerConfig> Load(const std::string& path);
};

}  // namespace strait
