// SPDX-License-Identifier: Apache-2.0
//
// ChatTemplate turns chat messages into a prompt: it runs the subset of Jinja that DeepSeek's chat
// templates need, in the environment that transformers sets up (trim_blocks, lstrip_blocks,
// raise_exception, tojson without HTML escapes).
//
// Thread:  immutable after Parse or Load; Render may be called from any thread at once.
// Errors:  Parse, Load: Unimplemented or InvalidArgument, naming the construct and its line;
//          NotFound (no such template). Render: InvalidArgument (raise_exception's message; an
//          operation that the messages make impossible, with its line), ResourceExhausted (over a
//          limit).
// Limits:  kMaxTemplateBytes, kMaxTemplateNesting at load; kMaxRenderBytes, kMaxRenderSteps at
//          render.
// Why:     A strict subset with errors at load: a template that this cannot run must not serve a
//          model.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "coordinator/text/tokenizer_config.h"
#include "proto/base/json.h"

namespace strait {

inline constexpr size_t kMaxTemplateBytes = 1u << 20;
inline constexpr size_t kMaxTemplateNesting = 64;     // of blocks and of expressions
inline constexpr size_t kMaxRenderBytes = 64u << 20;  // of output, and of any string on the way
inline constexpr size_t kMaxRenderSteps = 4'000'000;  // evaluated nodes, loop rounds included

struct ChatInput {
  json::Array messages;  // as the request has them: {"role": …, "content": …, …}
  json::Value tools;     // null or an array
  bool add_generation_prompt = true;
  json::Object variables;  // more of them (chat_template_kwargs), such as {"thinking": true}
};

class ChatTemplate {
 public:
  // The template called `name` of `config`, which also gives bos_token and eos_token.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Load(const TokenizerConfig& config,
                                                            std::string_view name = "default");
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source,
                                                             const TokenizerConfig& config);
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // The prompt text. It usually begins with BOS: encode it with add_special_tokens = false.
  absl::StatusOr<std::string> Render(const ChatInput& input) const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace strait
