// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/detokenizer.h"

#include <algorithm>
#include <utility>

namespace strait {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(&tokenizer), skip_special_tokens_(skip_special_tokens) {}

std::string Detokenizer::Push(uint32_t id) {
  if (skip_special_tokens_ && tokenizer_->IsSpecial(id)) return {};
  held_ += tokenizer_->TokenBytes(id);
  std::string text;
  std::string_view rest = held_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::Kind::kIncomplete) break;
    text += step.kind == Utf8Step::Kind::kCharacter ? rest.substr(0, step.length)
                                                    : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  held_.erase(0, held_.size() - rest.size());
  return text;
}

std::string Detokenizer::Push(std::span<const uint32_t> ids) {
  std::string text;
  for (const uint32_t id : ids) text += Push(id);
  return text;
}

std::string Detokenizer::Flush() {
  const std::string text = Utf8Lossy(held_);
  held_.clear();
  return text;
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : include_stop_(include_stop) {
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) continue;
    Pattern pattern{.text = std::move(stops[i]), .failure = {}, .index = i};
    // Knuth, Morris and Pratt: failure[n] is where to go on after n matched bytes and a wrong one.
    pattern.failure.assign(pattern.text.size() + 1, 0);
    for (size_t n = 1, border = 0; n < pattern.text.size(); ++n) {
      while (border > 0 && pattern.text[n] != pattern.text[border]) {
        border = pattern.failure[border];
      }
      if (pattern.text[n] == pattern.text[border]) ++border;
      pattern.failure[n + 1] = static_cast<uint32_t>(border);
    }
    patterns_.push_back(std::move(pattern));
  }
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped()) return {};
  if (patterns_.empty()) return std::string(text);
  for (const char byte : text) {
    held_.push_back(byte);
    const Pattern* found = nullptr;
    for (Pattern& pattern : patterns_) {
      while (pattern.matched > 0 && pattern.text[pattern.matched] != byte) {
        pattern.matched = pattern.failure[pattern.matched];
      }
      if (pattern.text[pattern.matched] == byte) ++pattern.matched;
      if (pattern.matched < pattern.text.size()) continue;
      if (found == nullptr || pattern.text.size() > found->text.size()) found = &pattern;
      pattern.matched = pattern.failure[pattern.matched];
    }
    if (found != nullptr) {
      match_ = found->index;
      if (!include_stop_) held_.resize(held_.size() - found->text.size());
      return std::exchange(held_, {});
    }
  }
  size_t keep = 0;
  for (const Pattern& pattern : patterns_) keep = std::max<size_t>(keep, pattern.matched);
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace strait
