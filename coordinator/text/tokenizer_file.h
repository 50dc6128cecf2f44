// SPDX-License-Identifier: Apache-2.0
//
// TokenizerFile is a tokenizer.json, read, checked and ready to run: what Tokenizer stands on.
//
// Thread:  plain data, immutable once parsed.
// Errors:  as Tokenizer::Load.
// Limits:  those of tokenizer.h.
// Why:     Everything is checked here, once; the code that encodes and decodes checks nothing
//          again.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/bpe.h"
#include "coordinator/text/pre_tokenizer.h"
#include "coordinator/text/tokenizer_config.h"

namespace strait {

struct TokenEntry {
  std::string text;   // as the file spells it
  std::string bytes;  // what it contributes to decoded text
  bool special = false;
  bool exists = false;
};

struct TokenizerFile {
  std::vector<TokenEntry> tokens;  // by id
  absl::flat_hash_map<std::string, uint32_t> token_ids;
  absl::flat_hash_map<std::string, uint32_t> byte_tokens;  // only with ignore_merges
  AddedTokens added_tokens;                                // "normalized": false
  AddedTokens normalized_added_tokens;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  bool ignore_merges = false;
  std::vector<uint32_t> prefix_ids;  // what add_special_tokens puts before a text
  std::vector<uint32_t> suffix_ids;
  std::optional<uint32_t> bos_id;
  std::optional<uint32_t> eos_id;
};

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json, std::string_view what,
                                                 const TokenizerConfig* config);

}  // namespace strait
