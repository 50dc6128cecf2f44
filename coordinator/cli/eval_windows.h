// SPDX-License-Identifier: Apache-2.0
//
// Windows are the pieces of text that `strait eval` scores, all of one length in tokens; buckets
// are ranges of positions in a window.
//
// Thread:  pure functions.
// Errors:  InvalidArgument: edges that do not rise or pass the window; text shorter than a window,
//          with the longest document's length and the fix.
// Why:     every window has the same length, so that every bucket holds the same documents and a
//          difference between buckets is one of position, not of text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/cli/eval_text.h"

namespace strait::cli {

using TokenIds = std::vector<uint32_t>;

// Positions begin … end - 1 of a window; its first token has position 0.
struct Bucket {
  uint32_t begin = 0, end = 0;
  bool operator==(const Bucket&) const = default;
};

// The ranges between neighbouring edges. Default edges are clipped to the window; edges that
// somebody gave must lie within it.
absl::StatusOr<std::vector<Bucket>> MakeBuckets(std::span<const uint32_t> edges, bool are_default,
                                                uint32_t window);

// Windows as prompts to score: the special tokens that the tokenizer puts before text (usually one,
// the begin-of-sentence token), then text. All tokens but the first are scored.
//
// JSON lines: the first `length` tokens of every document that has as many, specials included.
// Plain text: consecutive pieces, each with the specials before it; what remains is left out.
// `tokens` are those of file.documents, without specials. At most `max_windows` unless that is 0.
// REQUIRES: special.size() < length, length > 1.
absl::StatusOr<std::vector<TokenIds>> CutWindows(const TextFile& file,
                                                 std::span<const TokenIds> tokens,
                                                 const TokenIds& special, uint32_t length,
                                                 uint32_t max_windows);

// The mean of -logprobs over a bucket's scored positions. logprobs[i] is of position i + 1.
// REQUIRES: the bucket holds a scored position.
double MeanLoss(std::span<const float> logprobs, const Bucket& bucket);

// Bytes of a window's text, without the replacement characters at its ends that stand for the
// halves of characters which the cut left.
size_t WholeCharacterBytes(std::string_view text);

}  // namespace strait::cli
