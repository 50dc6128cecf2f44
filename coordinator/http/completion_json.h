// SPDX-License-Identifier: Apache-2.0
//
// The JSON of answers to /v1/completions and /v1/chat/completions, whole or as chunks of a stream.
//
// Thread:  pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "coordinator/http/choice.h"
#include "coordinator/http/completion_request.h"
#include "coordinator/http/served_model.h"

namespace strait {

// What all chunks of an answer share. Borrows the model and the request.
struct AnswerHead {
  std::string id;
  int64_t created = 0;  // seconds since 1970
  const ServedModel& model;
  const CompletionRequest& request;
};

struct Usage {
  size_t prompt_tokens = 0;
  size_t cached_tokens = 0;  // of the prompts
  size_t generated_tokens = 0;
};

std::string WholeJson(const AnswerHead& head, std::span<const ChoicePiece> choices, Usage usage);
std::string ChunkJson(const AnswerHead& head, const ChoicePiece& piece);
// The last chunk of a stream: usage and no choices.
std::string UsageChunkJson(const AnswerHead& head, Usage usage);

}  // namespace strait
