// SPDX-License-Identifier: Apache-2.0
//
// ServedModel is what the API says and needs of the model: its name, and how text becomes tokens.
//
// Thread:  plain data; tokenizer and template are immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"
#include "proto/base/ids.h"

namespace strait {

struct ServedModel {
  std::string name;                                   // the id that clients name
  std::string root;                                   // where it was loaded from
  int64_t created = 0;                                // seconds since 1970
  std::shared_ptr<const Tokenizer> tokenizer;         // may be null: prompts as token ids only
  std::shared_ptr<const ChatTemplate> chat_template;  // may be null: no chat
};

// How log-probabilities call a token: its text; "bytes:\xe2\x96" when it is no whole character;
// "token_id:7" without a tokenizer, or where `as_id` asks for it.
std::string TokenName(const ServedModel& model, TokenId id, bool as_id);

// The bytes that the token contributes to text; for a special token its spelling.
std::string TokenText(const ServedModel& model, TokenId id);

}  // namespace strait
