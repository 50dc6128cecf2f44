// SPDX-License-Identifier: Apache-2.0
//
// PreTokenizer cuts text into the words that BPE then works on, by the "pre_tokenizer" of a
// tokenizer.json: a sequence of Split, Digits and, last, ByteLevel.
//
// Thread:  immutable after Parse.
// Errors:  Parse: Unimplemented naming a type or behavior that DeepSeek's files do not use;
//          InvalidArgument naming a wrong member. Split: as Regex::FindAll.
// Limits:  kMaxPreTokenizerSteps.
// Why:     Each step sees the pieces of the step before as texts of their own, so a lookahead ends
//          at a piece's end. ByteLevel must be there and last: a vocabulary of bytes is all that
//          we run.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/text/regex.h"
#include "proto/base/json.h"

namespace strait {

inline constexpr size_t kMaxPreTokenizerSteps = 64;

// Reused from call to call by one thread.
struct PreTokenizerScratch {
  RegexScratch regex;
  std::vector<TextRange> matches;
  std::vector<TextRange> pieces;
  std::vector<TextRange> next_pieces;
};

class PreTokenizer {
 public:
  // `spec` is the value of "pre_tokenizer"; `what` names the file.
  static absl::StatusOr<PreTokenizer> Parse(const json::Value& spec, std::string_view what);

  // Leaves in scratch->pieces the words of `text`, in order, none empty. REQUIRES: valid UTF-8.
  absl::Status Split(std::string_view text, bool newer_unicode, PreTokenizerScratch* scratch) const;

  // True when a text that does not begin with a space is to be given one before Split.
  bool add_prefix_space() const { return add_prefix_space_; }

 private:
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  struct Step {
    Regex regex;
    Behavior behavior;
    bool invert;
  };
  absl::Status Add(const json::Object& spec, const std::string& what, int depth);
  absl::Status AddSplit(const json::Object& spec, const std::string& what);
  absl::Status AddByteLevel(const json::Object& spec, const std::string& what);
  static void Cut(const Step& step, TextRange piece, const std::vector<TextRange>& matches,
                  std::vector<TextRange>* out);

  std::vector<Step> steps_;
  bool byte_level_ = false;
  bool add_prefix_space_ = false;
};

}  // namespace strait
