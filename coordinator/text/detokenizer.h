// SPDX-License-Identifier: Apache-2.0
//
// Detokenizer turns one sequence's token ids into text as they come, never emitting half a
// character; StopMatcher ends that text at a stop string, never emitting what might still become
// one.
//
// Borrows: the Tokenizer, which outlives the Detokenizer.
// Thread:  one sequence, one thread at a time.
// Limits:  a Detokenizer holds back at most 3 bytes; a StopMatcher at most its longest stop
//          string.
// Why:     All pieces joined equal Tokenizer::Decode of all ids, whatever the grouping: bytes that
//          cannot become a character turn into U+FFFD as soon as that is certain, one per maximal
//          broken part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/text/tokenizer.h"
#include "coordinator/text/utf8.h"

namespace strait {

class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens = true);

  // The text that has become certain with `id`; often empty. An id without a token adds nothing.
  std::string Push(uint32_t id);
  std::string Push(std::span<const uint32_t> ids);

  // Call at the end: the held-back half character, as U+FFFD. The Detokenizer is then as new.
  std::string Flush();

  size_t held_bytes() const { return held_.size(); }

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  std::string held_;  // start of a character that is not complete yet
};

class StopMatcher {
 public:
  // Empty strings in `stops` are ignored. With `include_stop` the matched stop string is emitted
  // too.
  explicit StopMatcher(std::vector<std::string> stops, bool include_stop = false);

  // Takes the next piece of text and returns what may be shown. The first byte that completes any
  // stop string ends the text (of several completed by that byte, the longest one is the match):
  // what follows, now and in later calls, is dropped. The result does not depend on how the text is
  // cut into pieces.
  std::string Push(std::string_view text);

  // Call when the text ends for another reason: what was held back.
  std::string Flush();

  bool stopped() const { return match_.has_value(); }
  // Index into the constructor's `stops` of the one that matched.
  std::optional<size_t> match() const { return match_; }

 private:
  struct Pattern {
    std::string text;
    std::vector<uint32_t> failure;  // length of the longest border of each prefix
    size_t index;                   // in the constructor's list
    uint32_t matched = 0;           // bytes of `text` that the end of the input matches
  };
  std::vector<Pattern> patterns_;
  bool include_stop_;
  std::string held_;
  std::optional<size_t> match_;
};

}  // namespace strait
