// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "coordinator/text/utf8.h"
#include "proto/base/check.h"

namespace strait {
namespace {

uint64_t EdgeKey(uint32_t node, char byte) {
  return uint64_t{node} << 8 | static_cast<unsigned char>(byte);
}

// Unicode's White_Space.
bool IsSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string_view LastCharacter(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0 && (static_cast<unsigned char>(text[--begin]) & 0xC0) == 0x80) {
  }
  return text.substr(begin);
}

size_t SpacesAtStart(std::string_view text) {
  size_t count = 0;
  while (count < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(count));
    if (!IsSpace(step.code_point)) break;
    count += step.length;
  }
  return count;
}

size_t SpacesAtEnd(std::string_view text) {
  size_t count = 0;
  while (count < text.size()) {
    const std::string_view last = LastCharacter(text.substr(0, text.size() - count));
    if (!IsSpace(NextUtf8(last).code_point)) break;
    count += last.size();
  }
  return count;
}

}  // namespace

AddedTokens::AddedTokens(Regex word) : word_(std::move(word)) {}

AddedTokens AddedTokens::Create(std::vector<AddedToken> tokens) {
  // Word characters, and the two joiners, which the regexes do not count as such.
  absl::StatusOr<Regex> word = Regex::Compile("[\\w\u200C\u200D]");
  STRAIT_CHECK(word.ok());
  AddedTokens result(*std::move(word));
  result.tokens_ = std::move(tokens);
  result.nodes_.resize(1);
  result.first_bytes_.assign(256, false);
  for (uint32_t index = 0; index < result.tokens_.size(); ++index) {
    const std::string& content = result.tokens_[index].content;
    if (content.empty()) continue;
    uint32_t node = 0;
    for (const char byte : content) {
      auto [edge, is_new] = result.edges_.try_emplace(EdgeKey(node, byte),
                                                      static_cast<uint32_t>(result.nodes_.size()));
      if (is_new) result.nodes_.emplace_back();
      node = edge->second;
    }
    // Of the same content twice the first one counts.
    if (!result.nodes_[node].token.has_value()) result.nodes_[node].token = index;
    result.first_bytes_[static_cast<unsigned char>(content[0])] = true;
  }
  if (std::count(result.first_bytes_.begin(), result.first_bytes_.end(), true) == 1) {
    const auto only = std::find(result.first_bytes_.begin(), result.first_bytes_.end(), true);
    result.only_first_byte_ = static_cast<char>(only - result.first_bytes_.begin());
  }
  return result;
}

bool AddedTokens::IsWord(std::string_view character) const {
  RegexScratch scratch;
  std::vector<TextRange> matches;
  return word_.FindAll(character, true, &scratch, &matches).ok() && !matches.empty();
}

std::optional<uint32_t> AddedTokens::LongestAt(std::string_view text) const {
  std::optional<uint32_t> longest;
  uint32_t node = 0;
  for (const char byte : text) {
    const auto edge = edges_.find(EdgeKey(node, byte));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (nodes_[node].token.has_value()) longest = nodes_[node].token;
  }
  return longest;
}

void AddedTokens::Split(std::string_view text, TextRange range,
                        std::vector<TextPart>* parts) const {
  const std::string_view piece = text.substr(range.begin, range.end - range.begin);
  size_t done = 0;  // what `parts` covers already
  size_t at = 0;
  while (at < piece.size()) {
    if (only_first_byte_.has_value()) {
      at = piece.find(*only_first_byte_, at);
      if (at == std::string_view::npos) break;
    } else if (!first_bytes_[static_cast<unsigned char>(piece[at])]) {
      ++at;
      continue;
    }
    const std::optional<uint32_t> index = LongestAt(piece.substr(at));
    if (!index.has_value()) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[*index];
    size_t begin = at;
    size_t end = at + token.content.size();
    at = end;
    if (token.single_word) {
      const std::string_view after = piece.substr(end);
      if (begin > 0 && IsWord(LastCharacter(piece.substr(0, begin)))) continue;
      if (!after.empty() && IsWord(after.substr(0, NextUtf8(after).length))) continue;
    }
    if (token.lstrip) begin = std::max(begin - SpacesAtEnd(piece.substr(0, begin)), done);
    if (token.rstrip) end += SpacesAtStart(piece.substr(end));
    if (done < begin) parts->push_back({{range.begin + done, range.begin + begin}, std::nullopt});
    parts->push_back({{range.begin + begin, range.begin + end}, token.id});
    done = end;
  }
  if (done < piece.size()) parts->push_back({{range.begin + done, range.end}, std::nullopt});
}

}  // namespace strait
