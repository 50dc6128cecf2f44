// SPDX-License-Identifier: Apache-2.0
//
// Choice turns one sequence's tokens into one choice of an answer: text without half characters,
// ended at stop strings, with the log-probabilities that were asked for.
//
// Borrows: the model and the request, which outlive it.
// Thread:  one thread at a time.
// Why:     knows no JSON and no engine, so that streams and whole answers are made of the same
//          pieces.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/http/completion_request.h"
#include "coordinator/text/detokenizer.h"

namespace strait {

struct TokenLogprob {
  TokenId id = 0;
  std::optional<float> logprob;  // absent for a prompt's first token
  std::vector<std::pair<TokenId, float>> top;
  uint32_t text_offset = 0;  // characters of the answer's text before the token
};

// Consecutive part of a choice; a whole choice is one of them, too.
struct ChoicePiece {
  uint32_t index = 0;
  std::string text;
  std::vector<TokenLogprob> logprobs;  // empty unless asked for
  std::vector<TokenId> token_ids;      // generated
  uint32_t position = 0;               // of the last token in it
  bool first = false;                  // of its choice
  std::optional<FinishReason> finish;  // in the last piece: kStop or kLength
  std::optional<TokenId> stop_token;   // what ended it, if not eos
  std::string stop_string;

  void Append(ChoicePiece&& next);
};

class Choice {
 public:
  Choice(const ServedModel& model, const CompletionRequest& request, uint32_t index);

  void AddScores(std::vector<TokenInfo> scores);
  // The echoed prompt. Call once, before the first token, when the scores are there.
  ChoicePiece Prompt();
  // `hidden`: the token adds no text (it is what ended the sequence).
  ChoicePiece Token(const TokenInfo& token, bool hidden);
  // A piece without a token: an end that no token announced.
  ChoicePiece Nothing() { return NewPiece(); }
  // What was held back. Call once, at the end; not after stopped().
  std::string Flush();

  // A stop string was found; the last piece is complete and says so.
  bool stopped() const { return matcher_.stopped(); }
  const SequenceSpec& spec() const { return spec_; }
  size_t num_generated() const { return num_generated_; }

 private:
  std::string Detokenize(TokenId id);
  ChoicePiece NewPiece();

  const CompletionRequest& request_;
  const SequenceSpec& spec_;
  const uint32_t index_;
  std::optional<Detokenizer> detokenizer_;  // absent without a tokenizer
  StopMatcher matcher_;
  std::vector<TokenInfo> scores_;
  uint32_t num_chars_ = 0;  // of the text so far, held-back stop strings included
  size_t num_generated_ = 0;
  bool begun_ = false;
};

}  // namespace strait
