// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/choice.h"

#include <algorithm>
#include <iterator>

namespace strait {
namespace {

// Code points: every byte of UTF-8 but continuations.
uint32_t CountChars(std::string_view utf8) {
  return static_cast<uint32_t>(
      std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

template <class T>
void MoveAppend(std::vector<T>& to, std::vector<T>&& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

void ChoicePiece::Append(ChoicePiece&& next) {
  text += next.text;
  MoveAppend(logprobs, std::move(next.logprobs));
  MoveAppend(token_ids, std::move(next.token_ids));
  position = next.position;
  finish = next.finish;
  stop_token = next.stop_token;
  stop_string = std::move(next.stop_string);
}

Choice::Choice(const ServedModel& model, const CompletionRequest& request, uint32_t index)
    : request_(request),
      spec_(request.spec.sequences[index]),
      index_(index),
      matcher_(request.stops, request.include_stop) {
  if (model.tokenizer) detokenizer_.emplace(*model.tokenizer, request.skip_special_tokens);
}

void Choice::AddScores(std::vector<TokenInfo> scores) { MoveAppend(scores_, std::move(scores)); }

std::string Choice::Detokenize(TokenId id) {
  std::string text = detokenizer_ ? detokenizer_->Push(id) : std::string();
  num_chars_ += CountChars(text);
  return text;
}

ChoicePiece Choice::NewPiece() {
  ChoicePiece piece;
  piece.index = index_;
  piece.first = !begun_;
  piece.position = static_cast<uint32_t>(spec_.prompt.size() + num_generated_ - 1);
  begun_ = true;
  return piece;
}

ChoicePiece Choice::Prompt() {
  ChoicePiece piece = NewPiece();
  for (size_t i = 0; i < spec_.prompt.size(); ++i) {
    if (request_.logprobs) {
      TokenLogprob& entry = piece.logprobs.emplace_back();
      entry.id = spec_.prompt[i];
      entry.text_offset = num_chars_;
    }
    piece.text += Detokenize(spec_.prompt[i]);
  }
  for (TokenInfo& score : scores_) {
    if (score.position >= piece.logprobs.size()) continue;  // not asked for
    piece.logprobs[score.position].logprob = score.logprob;
    piece.logprobs[score.position].top = std::move(score.top);
  }
  scores_.clear();
  // As it was written, where it was written: normalizers may have changed it.
  const std::string& written = request_.prompt_texts[index_ / request_.n];
  if (!written.empty()) piece.text = written;
  return piece;
}

ChoicePiece Choice::Token(const TokenInfo& token, bool hidden) {
  ++num_generated_;
  ChoicePiece piece = NewPiece();
  piece.position = token.position;
  piece.token_ids.push_back(token.id);
  if (request_.logprobs) {
    piece.logprobs.push_back({token.id, token.logprob, token.top, num_chars_});
  }
  if (!hidden) piece.text = matcher_.Push(Detokenize(token.id));
  if (stopped()) {
    piece.finish = FinishReason::kStop;
    piece.stop_string = request_.stops[*matcher_.match()];
  }
  return piece;
}

std::string Choice::Flush() {
  std::string text = detokenizer_ ? matcher_.Push(detokenizer_->Flush()) : std::string();
  return text + matcher_.Flush();
}

}  // namespace strait
