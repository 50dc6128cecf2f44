// SPDX-License-Identifier: Apache-2.0
//
// Recall contexts: definitions of random words far back, then questions whose answers are known.
//
//   special · lead text · P × "\n@ KEY VALUE" · gap text · P × "\n? KEY VALUE"
//
// The questions follow in the order of the definitions and are of the same lengths, so every answer
// lies exactly `distance` tokens after the value in its definition. Keys are unique in a context
// and none is a value there.
//
// Thread:  pure functions, seeded.
// Errors:  InvalidArgument: a distance that is too short or does not fit the model's context, with
//          the limit; filler that is too short. FailedPrecondition: a tokenizer under which no
//          distance can be kept.
// Why:     contexts are put together of token ids, since text put together could be split anew
//          where two parts meet. The answer stands in the prompt and its tokens' ranks are looked
//          at, so one request asks all questions of a context.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/cli/eval_windows.h"
#include "coordinator/cli/mix.h"

namespace strait::cli {

inline constexpr size_t kMaxRecallPairs = 64;
inline constexpr size_t kMaxLeadTokens = 64;
inline constexpr size_t kMinRecallWords = 64;

// Some eight hundred common English words, without repetition.
std::span<const std::string_view> CommonWords();

// The parts of a context as token ids.
struct RecallParts {
  TokenIds special;             // before text: begin-of-sentence
  TokenIds define, ask;         // "\n@", "\n?"
  std::vector<TokenIds> words;  // each with its leading space
  TokenIds filler;              // text
};

// Of all common words' ids: those of one token, or all when fewer than kMinRecallWords are.
std::vector<TokenIds> ChooseWords(std::span<const TokenIds> words);

struct RecallAnswer {
  uint32_t position;    // of the value's first token, in the question
  uint32_t num_tokens;  // of the value
};

struct RecallContext {
  TokenIds ids;
  std::vector<RecallAnswer> answers;
};

// One context of at most `context_tokens`. As many pairs as fit: at most distance / 2 tokens of
// definitions, kMaxRecallPairs, and half of the words.
absl::StatusOr<RecallContext> MakeRecallContext(const RecallParts& parts, uint32_t distance,
                                                uint32_t context_tokens, Draws draws);

// Whole contexts with at least `num_answers` answers together, from the seed.
absl::StatusOr<std::vector<RecallContext>> MakeRecallContexts(const RecallParts& parts,
                                                              uint32_t distance,
                                                              uint32_t context_tokens,
                                                              uint32_t num_answers, uint64_t seed);

}  // namespace strait::cli
