// SPDX-License-Identifier: Apache-2.0
//
// Tokenizer turns text into token ids and back: the byte-level BPE of a tokenizer.json, with the
// added tokens, normalizers and pre-tokenizer sequences that DeepSeek's files use, to the same ids
// as Hugging Face `tokenizers`.
//
// Owns:    the vocabulary, merges and compiled regexes.
// Thread:  immutable after Load; every method may be called from any thread at once.
// Errors:  Load: NotFound, InvalidArgument (malformed file, naming the entry), Unimplemented (a
//          component that DeepSeek's files do not use, naming it), ResourceExhausted (over a
//          limit). Encode: InvalidArgument with the byte offset of what is not UTF-8,
//          ResourceExhausted (text over kMaxEncodeBytes). Decode: InvalidArgument naming an id
//          that is not in the vocabulary.
// Limits:  kMaxTokenizerFileBytes, kMaxVocabSize, kMaxMerges, kMaxAddedTokens, kMaxTokenBytes.
// Why:     A model's vocab_size may be larger than the tokenizer's (V2 pads 100,002 to 102,400),
//          so a sampled id may have no token: lookups of one id answer "nothing", only Decode
//          refuses it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/text/tokenizer_config.h"

namespace strait {

inline constexpr size_t kMaxTokenizerFileBytes = 128u << 20;
inline constexpr size_t kMaxVocabSize = 1u << 20;
inline constexpr size_t kMaxMerges = 1u << 21;
inline constexpr size_t kMaxAddedTokens = 1u << 16;
inline constexpr size_t kMaxTokenBytes = 1u << 12;
inline constexpr size_t kMaxEncodeBytes = 256u << 20;

class Tokenizer {
 public:
  // Reads a tokenizer.json. `config`, where given, decides by its add_bos_token and add_eos_token
  // what add_special_tokens adds; otherwise the file's post_processor does.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path,
                                                         const TokenizerConfig* config = nullptr);
  // The same from text that is already in memory; `what` names it in errors.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view json,
                                                          std::string_view what,
                                                          const TokenizerConfig* config = nullptr);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Added tokens that stand in the text become their ids; add_special_tokens puts BOS (and EOS)
  // around.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view utf8,
                                               bool add_special_tokens) const;

  // Always valid UTF-8: bytes that form no character become U+FFFD.
  absl::StatusOr<std::string> Decode(std::span<const uint32_t> ids, bool skip_special_tokens) const;

  // Ids are below this (the highest id plus one); some below it may have no token.
  size_t vocab_size() const;

  // The token as tokenizer.json spells it (bytes as printable characters: "Ġthe").
  std::optional<std::string_view> IdToToken(uint32_t id) const;
  std::optional<uint32_t> TokenToId(std::string_view token) const;

  // What the token contributes to decoded text; may be part of a character. Empty when there is no
  // token.
  std::string_view TokenBytes(uint32_t id) const;

  bool IsSpecial(uint32_t id) const;

  // From the config given to Load; absent without one.
  std::optional<uint32_t> bos_id() const;
  std::optional<uint32_t> eos_id() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace strait
