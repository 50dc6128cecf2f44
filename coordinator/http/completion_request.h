// SPDX-License-Identifier: Apache-2.0
//
// CompletionRequest is a valid request to /v1/completions or /v1/chat/completions, ready for the
// engine.
//
// Thread:  plain data; the parsers are pure but for the clock-free randomness of a missing seed.
// Errors:  ApiError, naming the field, the value and the bound.
// Limits:  proto/base/limits.h ("One request"), kMax… below, the model's context and vocabulary.
// Why:     what would change the answer and is not supported (tools, response_format, suffix …) is
//          refused; all else that is unknown is ignored.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/http/api_error.h"
#include "coordinator/http/served_model.h"

namespace strait {

inline constexpr double kMaxTemperature = 2;
inline constexpr double kMaxPenalty = 2;  // presence and frequency, either sign
inline constexpr double kMaxRepetitionPenalty = 10;
inline constexpr double kMaxLogitBiasValue = 100;  // either sign

// What a request may be checked against.
struct RequestContext {
  const ServedModel& model;
  uint32_t max_positions;
  uint32_t vocab_size;
  std::vector<TokenId> eos_token_ids;
  // Of requests without a cache_salt: of the API key that they came with.
  std::string default_salt = {};
};

struct CompletionRequest {
  bool chat = false;
  bool stream = false;
  bool include_usage = false;  // of a stream; a whole answer always has it
  bool echo = false;
  bool logprobs = false;
  uint32_t num_top = 0;
  bool tokens_as_ids = false;  // in log-probabilities
  bool return_token_ids = false;
  bool skip_special_tokens = true;
  bool include_stop = false;  // in the text
  std::vector<std::string> stops;
  std::vector<std::string> prompt_texts;  // one a prompt; empty for a prompt of token ids
  uint32_t n = 1;                         // choices of each prompt
  std::vector<TokenId> end_ids;           // that may end a sequence: eos and stop_token_ids

  RequestSpec spec;  // sequences prompt by prompt, n of each
};

using CompletionOrError = std::variant<CompletionRequest, ApiError>;

CompletionOrError ParseCompletion(std::string_view body, const RequestContext& context);
CompletionOrError ParseChat(std::string_view body, const RequestContext& context);

}  // namespace strait
