// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_windows.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "coordinator/text/utf8.h"
#include "proto/base/check.h"

namespace strait::cli {

absl::StatusOr<std::vector<Bucket>> MakeBuckets(std::span<const uint32_t> edges, bool are_default,
                                                uint32_t window) {
  if (edges.size() < 2) {
    return absl::InvalidArgumentError("--edges: at least two positions, as in 0,1024,4096");
  }
  std::vector<Bucket> buckets;
  for (size_t i = 0; i + 1 < edges.size(); ++i) {
    Bucket bucket{edges[i], edges[i + 1]};
    if (bucket.begin >= bucket.end) {
      return absl::InvalidArgumentError(
          absl::StrCat("--edges: ", bucket.end, " after ", bucket.begin, "; edges must rise"));
    }
    if (bucket.end > window && !are_default) {
      return absl::InvalidArgumentError(absl::StrCat("--edges: ", bucket.end,
                                                     " is beyond the window of ", window,
                                                     " tokens; use a larger --window"));
    }
    bucket.end = std::min(bucket.end, window);
    // A bucket of the first position alone has nothing that is scored.
    if (std::max(bucket.begin, 1u) < bucket.end) buckets.push_back(bucket);
  }
  return buckets;
}

absl::StatusOr<std::vector<TokenIds>> CutWindows(const TextFile& file,
                                                 std::span<const TokenIds> tokens,
                                                 const TokenIds& special, uint32_t length,
                                                 uint32_t max_windows) {
  STRAIT_CHECK(special.size() < length && length > 1);
  const size_t body = length - special.size();
  std::vector<TokenIds> windows;
  size_t longest = 0;
  for (const TokenIds& document : tokens) {
    longest = std::max(longest, document.size());
    for (size_t at = 0; at + body <= document.size(); at += body) {
      if (max_windows > 0 && windows.size() == max_windows) return windows;
      TokenIds& window = windows.emplace_back(special);
      const auto begin = document.begin() + static_cast<ptrdiff_t>(at);
      window.insert(window.end(), begin, begin + static_cast<ptrdiff_t>(body));
      if (file.is_lines) break;
    }
  }
  if (windows.empty()) {
    const size_t fits = longest + special.size();
    return absl::InvalidArgumentError(
        absl::StrCat(file.path,
                     file.is_lines ? " has no document as long as a window: the longest has "
                                   : " is shorter than a window: it has ",
                     fits, " tokens, a window ", length, ". Give longer text",
                     fits > 1 ? absl::StrCat(", or --window ", fits, " or less") : std::string()));
  }
  return windows;
}

double MeanLoss(std::span<const float> logprobs, const Bucket& bucket) {
  const size_t begin = std::max(bucket.begin, 1u);
  STRAIT_CHECK(begin < bucket.end && bucket.end <= logprobs.size() + 1);
  double sum = 0;
  for (size_t position = begin; position < bucket.end; ++position) sum -= logprobs[position - 1];
  return sum / static_cast<double>(bucket.end - begin);
}

size_t WholeCharacterBytes(std::string_view text) {
  while (text.starts_with(kReplacementCharacter)) text.remove_prefix(kReplacementCharacter.size());
  while (text.ends_with(kReplacementCharacter)) text.remove_suffix(kReplacementCharacter.size());
  return text.size();
}

}  // namespace strait::cli
