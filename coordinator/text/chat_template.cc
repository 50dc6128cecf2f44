// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/chat_template.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/text/jinja_parser.h"
#include "coordinator/text/jinja_renderer.h"
#include "coordinator/text/utf8.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {

struct ChatTemplate::Impl {
  jinja::Block block;
  std::vector<std::pair<std::string, std::string>> tokens;  // bos_token and the like
};

ChatTemplate::ChatTemplate(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Load(const TokenizerConfig& config,
                                                                 std::string_view name) {
  std::vector<std::string> names;
  for (const NamedTemplate& known : config.chat_templates) {
    if (known.name == name) return Parse(known.source, config);
    names.push_back(known.name);
  }
  return absl::NotFoundError(
      absl::StrCat("no chat template \"", ToAbsl(name), "\"; there ",
                   names.empty() ? "is none" : "are: ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source,
                                                                  const TokenizerConfig& config) {
  if (source.size() > kMaxTemplateBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "chat template of ", source.size(), " bytes, more than the limit of ", kMaxTemplateBytes));
  }
  if (const std::optional<size_t> bad = FindInvalidUtf8(source)) {
    return absl::InvalidArgumentError(
        absl::StrCat("chat template is not valid UTF-8 at byte ", *bad));
  }
  auto impl = std::make_unique<Impl>();
  STRAIT_ASSIGN_OR_RETURN(impl->block, jinja::ParseTemplate(source));
  for (const auto& [name, token] :
       {std::pair("bos_token", config.bos_token), std::pair("eos_token", config.eos_token),
        std::pair("pad_token", config.pad_token), std::pair("unk_token", config.unk_token)}) {
    // A token that the file does not have is undefined in the template.
    if (!token.empty()) impl->tokens.emplace_back(name, token);
  }
  return std::unique_ptr<ChatTemplate>(new ChatTemplate(std::move(impl)));
}

absl::StatusOr<std::string> ChatTemplate::Render(const ChatInput& input) const {
  std::vector<std::pair<std::string, jinja::Value>> globals;
  for (const auto& [name, token] : impl_->tokens) {
    globals.emplace_back(name, jinja::Value::String(token));
  }
  STRAIT_ASSIGN_OR_RETURN(jinja::Value messages,
                          jinja::Value::FromJson(json::Value(input.messages)));
  STRAIT_ASSIGN_OR_RETURN(jinja::Value tools, jinja::Value::FromJson(input.tools));
  globals.emplace_back("messages", std::move(messages));
  globals.emplace_back("tools", std::move(tools));
  globals.emplace_back("documents", jinja::Value::MakeNone());
  globals.emplace_back("add_generation_prompt", jinja::Value::Bool(input.add_generation_prompt));
  for (const auto& [key, value] : input.variables) {
    const std::string name(key.data(), key.size());
    STRAIT_ASSIGN_OR_RETURN(jinja::Value converted, jinja::Value::FromJson(value));
    // A variable given by the caller takes the place of a token, never of what the fields above
    // say.
    for (const std::string_view fixed :
         {"messages", "tools", "documents", "add_generation_prompt"}) {
      if (name == fixed) {
        return absl::InvalidArgumentError(
            absl::StrCat("variable \"", name, "\" cannot be given this way"));
      }
    }
    std::erase_if(globals, [&](const auto& global) { return global.first == name; });
    globals.emplace_back(name, std::move(converted));
  }
  return jinja::Renderer(std::move(globals)).Run(impl_->block);
}

}  // namespace strait
