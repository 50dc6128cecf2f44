// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/tokenizer_config.h"

#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

constexpr std::string_view kTemplateFile = "chat_template.jinja";

// A token is a string, or an object with its text under "content".
absl::StatusOr<std::string> Token(const json::Object& config, std::string_view key,
                                  const std::string& path) {
  const json::Value* value = json::Find(config, key);
  if (value == nullptr) return std::string();
  if (const json::Object* object = value->if_object()) {
    return json::GetString(*object, "content", absl::StrCat(path, ": ", ToAbsl(key)));
  }
  return json::GetString(config, key, path);
}

absl::StatusOr<std::optional<bool>> Flag(const json::Object& config, std::string_view key,
                                         const std::string& path) {
  if (json::Find(config, key) == nullptr) return std::optional<bool>();
  STRAIT_ASSIGN_OR_RETURN(const bool value, json::GetBool(config, key, path));
  return std::optional<bool>(value);
}

absl::StatusOr<std::vector<NamedTemplate>> Templates(const json::Object& config,
                                                     const std::string& path) {
  std::vector<NamedTemplate> templates;
  const json::Value* value = json::Find(config, "chat_template");
  if (value == nullptr) return templates;
  if (!value->is_array()) {
    STRAIT_ASSIGN_OR_RETURN(std::string source, json::GetString(config, "chat_template", path));
    templates.push_back({"default", std::move(source)});
    return templates;
  }
  const json::Array& list = value->get_array();
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string what = absl::StrCat(path, ": chat_template[", i, "]");
    STRAIT_ASSIGN_OR_RETURN(const json::Object* entry, json::AsObject(list[i], what));
    NamedTemplate named;
    STRAIT_ASSIGN_OR_RETURN(named.name, json::GetString(*entry, "name", what));
    STRAIT_ASSIGN_OR_RETURN(named.source, json::GetString(*entry, "template", what));
    templates.push_back(std::move(named));
  }
  return templates;
}

}  // namespace

absl::StatusOr<TokenizerConfig> TokenizerConfig::Load(const std::string& path) {
  STRAIT_ASSIGN_OR_RETURN(const json::Value root, json::ParseFile(path, kMaxTokenizerConfigBytes));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(root, path));
  TokenizerConfig config;
  STRAIT_ASSIGN_OR_RETURN(config.bos_token, Token(*object, "bos_token", path));
  STRAIT_ASSIGN_OR_RETURN(config.eos_token, Token(*object, "eos_token", path));
  STRAIT_ASSIGN_OR_RETURN(config.pad_token, Token(*object, "pad_token", path));
  STRAIT_ASSIGN_OR_RETURN(config.unk_token, Token(*object, "unk_token", path));
  STRAIT_ASSIGN_OR_RETURN(config.add_bos_token, Flag(*object, "add_bos_token", path));
  STRAIT_ASSIGN_OR_RETURN(config.add_eos_token, Flag(*object, "add_eos_token", path));
  STRAIT_ASSIGN_OR_RETURN(const std::string tokenizer_class,
                          json::GetStringOr(*object, "tokenizer_class", "", path));
  if (tokenizer_class == "LlamaTokenizer" || tokenizer_class == "LlamaTokenizerFast") {
    // The defaults of these classes, which do not look at the post_processor.
    if (!config.add_bos_token.has_value()) config.add_bos_token = true;
    if (!config.add_eos_token.has_value()) config.add_eos_token = false;
  }
  STRAIT_ASSIGN_OR_RETURN(config.chat_templates, Templates(*object, path));

  const std::filesystem::path beside = std::filesystem::path(path).parent_path() / kTemplateFile;
  std::error_code ignored;
  if (std::filesystem::exists(beside, ignored)) {
    STRAIT_ASSIGN_OR_RETURN(std::string source,
                            json::ReadFile(beside.string(), kMaxTokenizerConfigBytes));
    std::erase_if(config.chat_templates,
                  [](const NamedTemplate& named) { return named.name == "default"; });
    config.chat_templates.push_back({"default", std::move(source)});
  }
  return config;
}

}  // namespace strait
