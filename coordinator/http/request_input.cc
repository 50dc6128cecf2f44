// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/request_input.h"

#include <optional>
#include <utility>

#include "proto/base/text.h"

namespace strait {
namespace {

std::string Quoted(std::string_view name) { return "\"" + std::string(name) + "\""; }

}  // namespace

std::variant<json::Object, ApiError> ParseBody(std::string_view body) {
  absl::StatusOr<json::Value> value = json::Parse(body, "request body");
  if (!value.ok()) {
    return ApiError{400, std::string(ToStd(value.status().message())), "", "invalid_json"};
  }
  if (!value->is_object()) {
    return ApiError{
        400, "request body: must be a JSON object, not " + std::string(json::TypeName(*value)), "",
        "invalid_json"};
  }
  return std::move(value->get_object());
}

void CheckModel(Fields& fields, const ServedModel& model) {
  const std::optional<std::string> name = fields.String("model");
  if (!name || *name == model.name) return;
  fields.Fail(ApiError{
      404, "the model " + Quoted(*name) + " does not exist; this server has " + Quoted(model.name),
      "model", "model_not_found"});
}

std::vector<TokenId> ReadTokenIds(Fields& fields, const json::Array& array, uint32_t vocab_size,
                                  std::string_view param) {
  std::vector<TokenId> ids;
  ids.reserve(array.size());
  for (size_t i = 0; i < array.size(); ++i) {
    const std::optional<int64_t> id = WholeNumber(array[i]);
    if (!id || *id < 0 || *id >= vocab_size) {
      const std::string what =
          id ? "is " + std::to_string(*id) : "is " + std::string(json::TypeName(array[i]));
      fields.Fail(param, Quoted(param) + ": token " + std::to_string(i) + " " + what +
                             "; token ids are integers from 0 to " +
                             std::to_string(vocab_size - 1));
      return {};
    }
    ids.push_back(static_cast<TokenId>(*id));
  }
  return ids;
}

std::vector<TokenId> EncodeText(Fields& fields, const ServedModel& model, std::string_view text,
                                bool add_special_tokens, std::string_view param) {
  if (!model.tokenizer) {
    fields.Fail(param,
                "the model's directory has no tokenizer.json: give prompts as arrays of token ids",
                "no_tokenizer");
    return {};
  }
  absl::StatusOr<std::vector<uint32_t>> ids = model.tokenizer->Encode(text, add_special_tokens);
  if (!ids.ok()) {
    fields.Fail(param, std::string(ToStd(ids.status().message())));
    return {};
  }
  return *std::move(ids);
}

std::string RenderChat(Fields& fields, const ServedModel& model) {
  if (!model.tokenizer || !model.chat_template) {
    fields.Fail("messages",
                "the model's directory has no " +
                    std::string(model.tokenizer ? "chat template" : "tokenizer.json") +
                    ": use /v1/completions",
                model.tokenizer ? "no_chat_template" : "no_tokenizer");
    return "";
  }
  const json::Value* value = fields.Any("messages");
  if (value == nullptr || !value->is_array() || value->get_array().empty() ||
      value->get_array().size() > kMaxMessages) {
    fields.Fail("messages", "\"messages\" must be an array of 1 to " +
                                std::to_string(kMaxMessages) + " messages");
    return "";
  }
  ChatInput input;
  for (size_t i = 0; i < value->get_array().size(); ++i) {
    const std::string place = "messages[" + std::to_string(i) + "]";
    const json::Object* message = value->get_array()[i].if_object();
    if (message == nullptr) {
      fields.Fail(place, place + " must be an object with \"role\" and \"content\"");
      return "";
    }
    Fields members(*message);
    if (!members.String("role")) fields.Fail(place + ".role", place + ".role must be a string");
    json::Object copy = *message;
    const json::Value* content = members.Any("content");
    if (content != nullptr && content->is_array()) {
      std::string text;
      for (const json::Value& item : content->get_array()) {
        const json::Object* part = item.if_object();
        const json::Value* type = part ? json::Find(*part, "type") : nullptr;
        const json::Value* part_text = part ? json::Find(*part, "text") : nullptr;
        if (!type || !type->is_string() || type->get_string() != "text" || !part_text ||
            !part_text->is_string()) {
          fields.Fail(place + ".content",
                      place + ".content can only have parts {\"type\": \"text\", \"text\": …}");
          return "";
        }
        if (&item != &content->get_array().front()) text += '\n';
        text += json::View(part_text->get_string());
      }
      copy["content"] = text;
    } else if (content != nullptr && !content->is_string()) {
      fields.Fail(place + ".content", place + ".content must be a string or an array of parts");
      return "";
    } else if (content == nullptr && json::Find(*message, "tool_calls") == nullptr) {
      fields.Fail(place + ".content", place + ".content is missing");
      return "";
    }
    input.messages.push_back(std::move(copy));
  }
  input.add_generation_prompt = fields.Bool("add_generation_prompt", true);
  if (const json::Object* variables = fields.Object("chat_template_kwargs")) {
    input.variables = *variables;
  }
  if (!fields.ok()) return "";
  absl::StatusOr<std::string> text = model.chat_template->Render(input);
  if (!text.ok()) {
    fields.Fail("messages", "chat template: " + std::string(ToStd(text.status().message())));
    return "";
  }
  return *std::move(text);
}

}  // namespace strait
