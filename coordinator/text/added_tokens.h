// SPDX-License-Identifier: Apache-2.0
//
// AddedTokens finds the added tokens that stand in a text, before the text is cut into words.
//
// Thread:  immutable after Create.
// Limits:  kMaxAddedTokens, kMaxTokenBytes (tokenizer.h).
// Why:     The leftmost match counts, of several there the longest. Tokens with "normalized":
//          false are looked for first, in the text as it came; the others in what lies between,
//          normalized.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "coordinator/text/regex.h"

namespace strait {

struct AddedToken {
  uint32_t id = 0;
  std::string content;
  bool special = false;
  bool single_word = false;  // not beside a word character
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and after it
  bool normalized = false;
};

// A part of a text: an added token, or text without an id.
struct TextPart {
  TextRange range;
  std::optional<uint32_t> id;
};

class AddedTokens {
 public:
  static AddedTokens Create(std::vector<AddedToken> tokens);

  // Appends the parts of text[range], in order. REQUIRES: `range` begins and ends between
  // characters.
  void Split(std::string_view text, TextRange range, std::vector<TextPart>* parts) const;

  bool empty() const { return tokens_.empty(); }

 private:
  explicit AddedTokens(Regex word);
  struct Node {
    std::optional<uint32_t> token;  // index of the token that ends here
  };
  std::optional<uint32_t> LongestAt(std::string_view text) const;
  bool IsWord(std::string_view character) const;

  Regex word_;
  std::vector<AddedToken> tokens_;
  // A trie: (node, byte) to the next node; node 0 is the root.
  std::vector<Node> nodes_;
  absl::flat_hash_map<uint64_t, uint32_t> edges_;
  std::vector<bool> first_bytes_;
  std::optional<char> only_first_byte_;
};

}  // namespace strait
