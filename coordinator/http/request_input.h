// SPDX-License-Identifier: Apache-2.0
//
// What the bodies of several routes have in common: JSON, the model's name, text, messages and
// token ids.
//
// Thread:  pure functions.
// Errors:  into the Fields, naming the member; ParseBody: an ApiError.
// Limits:  json::kMaxJsonDepth, kMaxMessages; the server bounds the bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "coordinator/http/api_error.h"
#include "coordinator/http/fields.h"
#include "coordinator/http/served_model.h"
#include "proto/base/ids.h"
#include "proto/base/json.h"

namespace strait {

inline constexpr uint32_t kMaxMessages = 4096;

// The request body as a JSON object.
std::variant<json::Object, ApiError> ParseBody(std::string_view body);

// 404 unless "model" is absent or names the served model.
void CheckModel(Fields& fields, const ServedModel& model);
// The prompt text of "messages" (and what comes with them), or nothing and an error in `fields`.
std::string RenderChat(Fields& fields, const ServedModel& model);
// The ids of `text`; errors name `param`.
std::vector<TokenId> EncodeText(Fields& fields, const ServedModel& model, std::string_view text,
                                bool add_special_tokens, std::string_view param);
// One array of token ids.
std::vector<TokenId> ReadTokenIds(Fields& fields, const json::Array& array, uint32_t vocab_size,
                                  std::string_view param);

}  // namespace strait
