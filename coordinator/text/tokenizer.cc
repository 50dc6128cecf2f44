// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/bpe.h"
#include "coordinator/text/tokenizer_file.h"
#include "coordinator/text/unicode_additions.h"
#include "coordinator/text/utf8.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

// A word that comes again within one text is not merged again.
constexpr size_t kMaxCachedWords = 1u << 16;
constexpr size_t kMaxCachedWordBytes = 128;

bool HasNewerUnicode(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Utf8Step step = NextUtf8(text.substr(at));
    if (IsUnicodeAddition(step.code_point)) return true;
    at += step.length;
  }
  return false;
}

// What one call of Encode needs.
struct EncodeScratch {
  PreTokenizerScratch pre;
  BpeScratch bpe;
  // Word to the place of its ids in the result.
  absl::flat_hash_map<absl::string_view, std::pair<size_t, size_t>> cache;
  std::vector<TextPart> parts;
  std::vector<TextPart> normalized_parts;
};

}  // namespace

struct Tokenizer::Impl {
  TokenizerFile file;

  absl::Status EncodeWords(std::string_view text, EncodeScratch* scratch,
                           std::vector<uint32_t>* ids) const;
  absl::Status EncodePart(std::string_view text, EncodeScratch* scratch,
                          std::vector<uint32_t>* ids) const;
  bool Has(uint32_t id) const { return id < file.tokens.size() && file.tokens[id].exists; }
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path,
                                                           const TokenizerConfig* config) {
  STRAIT_ASSIGN_OR_RETURN(const std::string text, json::ReadFile(path, kMaxTokenizerFileBytes));
  return Parse(text, path, config);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json,
                                                            std::string_view what,
                                                            const TokenizerConfig* config) {
  STRAIT_ASSIGN_OR_RETURN(TokenizerFile file, ParseTokenizerFile(json, what, config));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::make_unique<const Impl>(std::move(file))));
}

absl::Status Tokenizer::Impl::EncodeWords(std::string_view text, EncodeScratch* scratch,
                                          std::vector<uint32_t>* ids) const {
  STRAIT_RETURN_IF_ERROR(file.pre_tokenizer.Split(text, HasNewerUnicode(text), &scratch->pre));
  for (const TextRange& piece : scratch->pre.pieces) {
    const std::string_view word = text.substr(piece.begin, piece.end - piece.begin);
    if (file.ignore_merges) {
      if (const auto whole = file.byte_tokens.find(ToAbsl(word)); whole != file.byte_tokens.end()) {
        ids->push_back(whole->second);
        continue;
      }
    }
    const size_t begin = ids->size();
    if (word.size() > kMaxCachedWordBytes) {
      file.bpe.Encode(word, &scratch->bpe, ids);
      continue;
    }
    if (const auto known = scratch->cache.find(ToAbsl(word)); known != scratch->cache.end()) {
      const auto [from, to] = known->second;
      for (size_t i = from; i < to; ++i) ids->push_back((*ids)[i]);
      continue;
    }
    file.bpe.Encode(word, &scratch->bpe, ids);
    if (scratch->cache.size() < kMaxCachedWords) {
      scratch->cache.emplace(ToAbsl(word), std::pair(begin, ids->size()));
    }
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::EncodePart(std::string_view text, EncodeScratch* scratch,
                                         std::vector<uint32_t>* ids) const {
  if (!file.pre_tokenizer.add_prefix_space() || text.starts_with(' ')) {
    return EncodeWords(text, scratch, ids);
  }
  // The cache's keys must not outlive this copy of the text.
  const std::string prefixed = absl::StrCat(" ", ToAbsl(text));
  scratch->cache.clear();
  const absl::Status status = EncodeWords(prefixed, scratch, ids);
  scratch->cache.clear();
  return status;
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view utf8,
                                                        bool add_special_tokens) const {
  if (utf8.size() > kMaxEncodeBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("text of ", utf8.size(), " bytes, more than the limit of ", kMaxEncodeBytes));
  }
  if (const std::optional<size_t> bad = FindInvalidUtf8(utf8)) {
    return absl::InvalidArgumentError(absl::StrCat("text is not valid UTF-8 at byte ", *bad));
  }
  const TokenizerFile& file = impl_->file;
  EncodeScratch scratch;
  std::vector<uint32_t> ids;
  if (add_special_tokens) ids = file.prefix_ids;
  file.added_tokens.Split(utf8, {0, utf8.size()}, &scratch.parts);
  for (const TextPart& part : scratch.parts) {
    if (part.id.has_value()) {
      ids.push_back(*part.id);
      continue;
    }
    scratch.normalized_parts.clear();
    file.normalized_added_tokens.Split(utf8, part.range, &scratch.normalized_parts);
    for (const TextPart& inner : scratch.normalized_parts) {
      if (inner.id.has_value()) {
        ids.push_back(*inner.id);
        continue;
      }
      STRAIT_RETURN_IF_ERROR(impl_->EncodePart(
          utf8.substr(inner.range.begin, inner.range.end - inner.range.begin), &scratch, &ids));
    }
  }
  if (add_special_tokens) {
    ids.insert(ids.end(), file.suffix_ids.begin(), file.suffix_ids.end());
  }
  return ids;
}

absl::StatusOr<std::string> Tokenizer::Decode(std::span<const uint32_t> ids,
                                              bool skip_special_tokens) const {
  std::string bytes;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!impl_->Has(ids[i])) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", ids[i], " at index ", i,
                                                     " is not in the vocabulary of ", vocab_size(),
                                                     " tokens"));
    }
    if (skip_special_tokens && IsSpecial(ids[i])) continue;
    bytes += TokenBytes(ids[i]);
  }
  return Utf8Lossy(bytes);
}

size_t Tokenizer::vocab_size() const { return impl_->file.tokens.size(); }

std::optional<std::string_view> Tokenizer::IdToToken(uint32_t id) const {
  if (!impl_->Has(id)) return std::nullopt;
  return impl_->file.tokens[id].text;
}

std::optional<uint32_t> Tokenizer::TokenToId(std::string_view token) const {
  const auto it = impl_->file.token_ids.find(ToAbsl(token));
  if (it == impl_->file.token_ids.end()) return std::nullopt;
  return it->second;
}

std::string_view Tokenizer::TokenBytes(uint32_t id) const {
  if (!impl_->Has(id)) return {};
  return impl_->file.tokens[id].bytes;
}

bool Tokenizer::IsSpecial(uint32_t id) const {
  return impl_->Has(id) && impl_->file.tokens[id].special;
}

std::optional<uint32_t> Tokenizer::bos_id() const { return impl_->file.bos_id; }
std::optional<uint32_t> Tokenizer::eos_id() const { return impl_->file.eos_id; }

}  // namespace strait
