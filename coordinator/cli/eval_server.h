// SPDX-License-Identifier: Apache-2.0
//
// EvalServer asks one server what `strait eval` needs to know: token ids of text, log-probabilities
// of prompts, bytes of cache.
//
// Borrows: the client, which outlives it.
// Thread:  one, as its client.
// Errors:  those of the client; FailedPrecondition (the server refuses: its words, and what eval
//          needs), Internal (an answer that is none: what was wrong with it, and from where).
// Limits:  text goes to /tokenize in pieces of kTokenizeBytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/eval_windows.h"
#include "coordinator/cli/http_client.h"
#include "proto/base/json.h"

namespace strait::cli {

// Longer text is cut after a line's end (or a character's, in a line as long as this), which may
// change the few tokens around the cut.
inline constexpr size_t kTokenizeBytes = 2 << 20;

// Of every token of a prompt but the first.
struct PromptScore {
  std::vector<float> logprobs;
  std::vector<uint8_t> is_top;  // whether no token was likelier; empty unless asked for
};

class EvalServer {
 public:
  EvalServer(HttpClient* client, std::string model) : client_(client), model_(std::move(model)) {}

  absl::StatusOr<TokenIds> Tokenize(std::string_view text, bool add_special_tokens);
  // What the tokenizer puts before text.
  absl::StatusOr<TokenIds> LeadingSpecials();
  absl::StatusOr<std::string> Detokenize(std::span<const uint32_t> ids);
  absl::StatusOr<PromptScore> Score(std::span<const uint32_t> ids, bool want_top);
  // By layer; NotFound when the server's status does not tell.
  absl::StatusOr<std::vector<double>> CacheBytesPerToken();

 private:
  // The reply's object, kept in `holder`.
  absl::StatusOr<const json::Object*> Post(std::string_view path, const json::Object& request,
                                           json::Value* holder);
  absl::Status Garbage(std::string_view path, std::string_view what) const;

  HttpClient* const client_;
  const std::string model_;
};

// The end of the piece of `text` that starts at `begin`.
size_t PieceEnd(std::string_view text, size_t begin, size_t max_bytes);

// Reads a completion's log-probabilities. `num_tokens`: of the prompt.
absl::StatusOr<PromptScore> ReadPromptScore(const json::Object& reply, size_t num_tokens,
                                            bool want_top);

}  // namespace strait::cli
