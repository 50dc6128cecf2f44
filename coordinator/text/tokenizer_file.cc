// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/tokenizer_file.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/text/byte_level.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/text/utf8.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

// What the parts below fill in; TokenizerFile's own parts have no empty state.
struct Vocabulary {
  std::vector<TokenEntry> tokens;
  absl::flat_hash_map<std::string, uint32_t> ids;

  absl::Status Insert(std::string_view text, int64_t id, const std::string& what);
};

absl::Status Vocabulary::Insert(std::string_view text, int64_t id, const std::string& what) {
  if (id < 0 || id >= static_cast<int64_t>(kMaxVocabSize)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        what, ": id ", id, " of token \"", ToAbsl(text), "\" is outside 0 to ", kMaxVocabSize - 1));
  }
  if (text.empty() || text.size() > kMaxTokenBytes) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": token ", id, " has ", text.size(),
                                                   " bytes, allowed are 1 to ", kMaxTokenBytes));
  }
  const auto index = static_cast<size_t>(id);
  if (index >= tokens.size()) tokens.resize(index + 1);
  TokenEntry& entry = tokens[index];
  if (entry.exists) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": id ", id, " is given to both \"",
                                                   entry.text, "\" and \"", ToAbsl(text), "\""));
  }
  entry.exists = true;
  entry.text = std::string(text);
  // A token with a character that stands for no byte decodes to itself, as Hugging Face has it.
  entry.bytes = ByteLevelDecode(text).value_or(entry.text);
  ids.emplace(entry.text, static_cast<uint32_t>(id));
  return absl::OkStatus();
}

absl::Status ParseVocab(const json::Object& model, const std::string& what,
                        Vocabulary* vocabulary) {
  STRAIT_ASSIGN_OR_RETURN(const json::Object* vocab, json::GetObject(model, "vocab", what));
  if (vocab->size() > kMaxVocabSize) {
    return absl::ResourceExhaustedError(absl::StrCat(
        what, ": vocab of ", vocab->size(), " tokens, more than the limit of ", kMaxVocabSize));
  }
  vocabulary->tokens.reserve(vocab->size());
  vocabulary->ids.reserve(vocab->size());
  const std::string where = absl::StrCat(what, ".vocab");
  for (const auto& [key, value] : *vocab) {
    if (!value.is_int64()) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": id of \"", ToAbsl({key.data(), key.size()}), "\" must be an integer"));
    }
    STRAIT_RETURN_IF_ERROR(vocabulary->Insert({key.data(), key.size()}, value.get_int64(), where));
  }
  return absl::OkStatus();
}

// A merge is "left right" or ["left", "right"].
absl::StatusOr<std::pair<std::string_view, std::string_view>> MergeParts(const json::Value& merge,
                                                                         const std::string& what) {
  if (const boost::json::string* line = merge.if_string()) {
    const std::string_view text = json::View(*line);
    const size_t space = text.find(' ');
    if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  } else if (const json::Array* pair = merge.if_array()) {
    if (pair->size() == 2 && (*pair)[0].is_string() && (*pair)[1].is_string()) {
      return std::pair(json::View((*pair)[0].get_string()), json::View((*pair)[1].get_string()));
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": must be \"left right\" or [\"left\", \"right\"]"));
}

absl::StatusOr<std::vector<Bpe::Merge>> ParseMerges(const json::Object& model,
                                                    const std::string& what,
                                                    const Vocabulary& vocabulary) {
  STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(model, "merges", what));
  if (list->size() > kMaxMerges) {
    return absl::ResourceExhaustedError(
        absl::StrCat(what, ": ", list->size(), " merges, more than the limit of ", kMaxMerges));
  }
  std::vector<Bpe::Merge> merges;
  merges.reserve(list->size());
  for (size_t rank = 0; rank < list->size(); ++rank) {
    const std::string where = absl::StrCat(what, ".merges[", rank, "]");
    STRAIT_ASSIGN_OR_RETURN(const auto parts, MergeParts((*list)[rank], where));
    const auto id_of = [&](const std::string& token) -> absl::StatusOr<uint32_t> {
      const auto it = vocabulary.ids.find(token);
      if (it != vocabulary.ids.end()) return it->second;
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": token \"", token, "\" is not in the vocab"));
    };
    const std::string left(parts.first);
    const std::string right(parts.second);
    Bpe::Merge merge;
    STRAIT_ASSIGN_OR_RETURN(merge.left, id_of(left));
    STRAIT_ASSIGN_OR_RETURN(merge.right, id_of(right));
    STRAIT_ASSIGN_OR_RETURN(merge.result, id_of(left + right));
    merges.push_back(merge);
  }
  return merges;
}

// Options that change what the merges do, and that no byte-level file of DeepSeek's sets.
absl::Status RefuseOptions(const json::Object& model, const std::string& what) {
  for (const std::string_view key : {"dropout", "unk_token", "continuing_subword_prefix",
                                     "end_of_word_suffix", "fuse_unk", "byte_fallback"}) {
    const json::Value* value = json::Find(model, key);
    if (value == nullptr) continue;
    if (value->is_bool() && !value->get_bool()) continue;
    if (value->is_string() && value->get_string().empty()) continue;
    return absl::UnimplementedError(absl::StrCat(
        what, ": \"", ToAbsl(key), "\": ", boost::json::serialize(*value), " is not supported"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<AddedToken>> ParseAddedTokens(const json::Object& root,
                                                         const std::string& what,
                                                         Vocabulary* vocabulary) {
  std::vector<AddedToken> tokens;
  if (json::Find(root, "added_tokens") == nullptr) return tokens;
  STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(root, "added_tokens", what));
  if (list->size() > kMaxAddedTokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        what, ": ", list->size(), " added tokens, more than the limit of ", kMaxAddedTokens));
  }
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string where = absl::StrCat(what, ": added_tokens[", i, "]");
    STRAIT_ASSIGN_OR_RETURN(const json::Object* entry, json::AsObject((*list)[i], where));
    AddedToken token;
    STRAIT_ASSIGN_OR_RETURN(const int64_t id, json::GetInt(*entry, "id", where));
    STRAIT_ASSIGN_OR_RETURN(token.content, json::GetString(*entry, "content", where));
    STRAIT_ASSIGN_OR_RETURN(token.special, json::GetBoolOr(*entry, "special", false, where));
    STRAIT_ASSIGN_OR_RETURN(token.single_word,
                            json::GetBoolOr(*entry, "single_word", false, where));
    STRAIT_ASSIGN_OR_RETURN(token.lstrip, json::GetBoolOr(*entry, "lstrip", false, where));
    STRAIT_ASSIGN_OR_RETURN(token.rstrip, json::GetBoolOr(*entry, "rstrip", false, where));
    STRAIT_ASSIGN_OR_RETURN(token.normalized,
                            json::GetBoolOr(*entry, "normalized", !token.special, where));
    const auto known = vocabulary->ids.find(token.content);
    if (known == vocabulary->ids.end()) {
      STRAIT_RETURN_IF_ERROR(vocabulary->Insert(token.content, id, where));
    } else if (known->second != id) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": \"", token.content, "\" has id ", id,
                                                     " here and ", known->second, " before"));
    }
    token.id = static_cast<uint32_t>(id);
    TokenEntry& stored = vocabulary->tokens[token.id];
    stored.special = stored.special || token.special;
    tokens.push_back(std::move(token));
  }
  return tokens;
}

absl::Status CheckNormalizer(const json::Value* normalizer, const std::string& what) {
  if (normalizer == nullptr) return absl::OkStatus();
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(*normalizer, what));
  STRAIT_ASSIGN_OR_RETURN(const std::string type, json::GetString(*object, "type", what));
  if (type == "Sequence") {
    STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(*object, "normalizers", what));
    for (const json::Value& inner : *list) STRAIT_RETURN_IF_ERROR(CheckNormalizer(&inner, what));
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat(
      what, ": type \"", type, "\" is not supported (null and an empty Sequence are)"));
}

absl::Status CheckDecoder(const json::Value* decoder, const std::string& what) {
  if (decoder == nullptr) {
    return absl::UnimplementedError(absl::StrCat(what, ": missing; ByteLevel is supported"));
  }
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(*decoder, what));
  STRAIT_ASSIGN_OR_RETURN(const std::string type, json::GetString(*object, "type", what));
  if (type == "ByteLevel") return absl::OkStatus();
  if (type == "Sequence") {
    STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(*object, "decoders", what));
    if (list->size() == 1) return CheckDecoder(&(*list)[0], what);
  }
  return absl::UnimplementedError(
      absl::StrCat(what, ": type \"", type, "\" is not supported (ByteLevel is)"));
}

// Appends to `prefix` and `suffix` what the post_processor puts around a single text.
absl::Status ParsePostProcessor(const json::Value* processor, const std::string& what,
                                TokenizerFile* file) {
  if (processor == nullptr) return absl::OkStatus();
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(*processor, what));
  STRAIT_ASSIGN_OR_RETURN(const std::string type, json::GetString(*object, "type", what));
  if (type == "ByteLevel") return absl::OkStatus();  // it is about offsets
  if (type == "Sequence") {
    STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(*object, "processors", what));
    for (const json::Value& inner : *list) {
      STRAIT_RETURN_IF_ERROR(ParsePostProcessor(&inner, what, file));
    }
    return absl::OkStatus();
  }
  if (type != "TemplateProcessing") {
    return absl::UnimplementedError(
        absl::StrCat(what, ": type \"", type,
                     "\" is not supported (null, ByteLevel, TemplateProcessing and Sequence are)"));
  }
  STRAIT_ASSIGN_OR_RETURN(const json::Array* single, json::GetArray(*object, "single", what));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* specials,
                          json::GetObject(*object, "special_tokens", what));
  std::vector<uint32_t> before;
  std::vector<uint32_t> after;
  bool text_seen = false;
  for (const json::Value& piece : *single) {
    STRAIT_ASSIGN_OR_RETURN(const json::Object* entry, json::AsObject(piece, what));
    if (json::Find(*entry, "Sequence") != nullptr) {
      if (text_seen) return absl::UnimplementedError(absl::StrCat(what, ": the text stands twice"));
      text_seen = true;
      continue;
    }
    STRAIT_ASSIGN_OR_RETURN(const json::Object* special,
                            json::GetObject(*entry, "SpecialToken", what));
    STRAIT_ASSIGN_OR_RETURN(const std::string name, json::GetString(*special, "id", what));
    STRAIT_ASSIGN_OR_RETURN(const json::Object* named, json::GetObject(*specials, name, what));
    STRAIT_ASSIGN_OR_RETURN(const json::Array* ids, json::GetArray(*named, "ids", what));
    for (const json::Value& id : *ids) {
      const int64_t value = id.is_int64() ? id.get_int64() : -1;
      if (value < 0 || value >= static_cast<int64_t>(file->tokens.size())) {
        return absl::InvalidArgumentError(
            absl::StrCat(what, ": special token \"", name, "\" has an id outside the vocabulary"));
      }
      (text_seen ? after : before).push_back(static_cast<uint32_t>(value));
    }
  }
  if (!text_seen) return absl::InvalidArgumentError(absl::StrCat(what, ": no place for the text"));
  file->prefix_ids.insert(file->prefix_ids.begin(), before.begin(), before.end());
  file->suffix_ids.insert(file->suffix_ids.end(), after.begin(), after.end());
  return absl::OkStatus();
}

absl::Status ApplyConfig(const TokenizerConfig& config, std::string_view what,
                         TokenizerFile* file) {
  const auto id_of = [&](const std::string& token) -> std::optional<uint32_t> {
    const auto it = file->token_ids.find(token);
    if (token.empty() || it == file->token_ids.end()) return std::nullopt;
    return it->second;
  };
  file->bos_id = id_of(config.bos_token);
  file->eos_id = id_of(config.eos_token);
  if (!config.add_bos_token.has_value() && !config.add_eos_token.has_value()) {
    return absl::OkStatus();
  }
  const auto add = [&](bool wanted, const std::string& token, std::optional<uint32_t> id,
                       std::string_view key, std::vector<uint32_t>* ids) {
    ids->clear();
    if (!wanted) return absl::OkStatus();
    if (!id.has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("tokenizer_config.json: add_", ToAbsl(key),
                                                     " is true but ", ToAbsl(key), " \"", token,
                                                     "\" is not a token of ", ToAbsl(what)));
    }
    ids->push_back(*id);
    return absl::OkStatus();
  };
  STRAIT_RETURN_IF_ERROR(add(config.add_bos_token.value_or(false), config.bos_token, file->bos_id,
                             "bos_token", &file->prefix_ids));
  return add(config.add_eos_token.value_or(false), config.eos_token, file->eos_id, "eos_token",
             &file->suffix_ids);
}

}  // namespace

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view text, std::string_view source,
                                                 const TokenizerConfig* config) {
  const std::string what(source);
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(text, what));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* root, json::AsObject(value, what));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* model, json::GetObject(*root, "model", what));
  const std::string model_what = absl::StrCat(what, ": model");
  STRAIT_ASSIGN_OR_RETURN(const std::string type,
                          json::GetStringOr(*model, "type", "BPE", model_what));
  if (type != "BPE") {
    return absl::UnimplementedError(
        absl::StrCat(model_what, ": type \"", type, "\" is not supported (BPE is)"));
  }
  STRAIT_RETURN_IF_ERROR(RefuseOptions(*model, model_what));
  STRAIT_RETURN_IF_ERROR(
      CheckNormalizer(json::Find(*root, "normalizer"), absl::StrCat(what, ": normalizer")));
  STRAIT_RETURN_IF_ERROR(
      CheckDecoder(json::Find(*root, "decoder"), absl::StrCat(what, ": decoder")));
  const json::Value* pre_tokenizer_spec = json::Find(*root, "pre_tokenizer");
  STRAIT_ASSIGN_OR_RETURN(
      PreTokenizer pre_tokenizer,
      PreTokenizer::Parse(pre_tokenizer_spec ? *pre_tokenizer_spec : json::Value(), what));

  Vocabulary vocabulary;
  STRAIT_RETURN_IF_ERROR(ParseVocab(*model, model_what, &vocabulary));
  STRAIT_ASSIGN_OR_RETURN(const std::vector<Bpe::Merge> merges,
                          ParseMerges(*model, model_what, vocabulary));
  std::array<std::optional<uint32_t>, 256> byte_ids;
  for (int byte = 0; byte < 256; ++byte) {
    std::string character;
    AppendUtf8(ByteLevelCharacter(static_cast<unsigned char>(byte)), &character);
    const auto it = vocabulary.ids.find(character);
    if (it != vocabulary.ids.end()) byte_ids[static_cast<size_t>(byte)] = it->second;
  }
  STRAIT_ASSIGN_OR_RETURN(const bool ignore_merges,
                          json::GetBoolOr(*model, "ignore_merges", false, model_what));
  absl::flat_hash_map<std::string, uint32_t> byte_tokens;
  if (ignore_merges) {
    for (const auto& [token, id] : vocabulary.ids) {
      if (std::optional<std::string> bytes = ByteLevelDecode(token)) byte_tokens[*bytes] = id;
    }
  }

  STRAIT_ASSIGN_OR_RETURN(const std::vector<AddedToken> added,
                          ParseAddedTokens(*root, what, &vocabulary));
  std::vector<AddedToken> raw;
  std::vector<AddedToken> normalized;
  for (const AddedToken& token : added) (token.normalized ? normalized : raw).push_back(token);

  TokenizerFile file{
      .tokens = std::move(vocabulary.tokens),
      .token_ids = std::move(vocabulary.ids),
      .byte_tokens = std::move(byte_tokens),
      .added_tokens = AddedTokens::Create(std::move(raw)),
      .normalized_added_tokens = AddedTokens::Create(std::move(normalized)),
      .pre_tokenizer = std::move(pre_tokenizer),
      .bpe = Bpe::Create(byte_ids, merges),
      .ignore_merges = ignore_merges,
  };
  STRAIT_RETURN_IF_ERROR(ParsePostProcessor(json::Find(*root, "post_processor"),
                                            absl::StrCat(what, ": post_processor"), &file));
  if (config != nullptr) STRAIT_RETURN_IF_ERROR(ApplyConfig(*config, what, &file));
  return file;
}

}  // namespace strait
