// SPDX-License-Identifier: Apache-2.0
//
// How often each token occurs: what penalties are computed from.
//
// Thread:  pure function.
#pragma once

#include <algorithm>
#include <vector>

#include "absl/types/span.h"
#include "kernels/sample.h"
#include "proto/base/ids.h"

namespace strait {

// Distinct tokens by rising id.
inline std::vector<TokenCount> CountTokens(absl::Span<const TokenId> tokens) {
  std::vector<TokenId> sorted(tokens.begin(), tokens.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<TokenCount> counts;
  for (const TokenId token : sorted) {
    const auto id = static_cast<int32_t>(token);
    if (counts.empty() || counts.back().token_id != id) counts.push_back({id, 0});
    ++counts.back().count;
  }
  return counts;
}

}  // namespace strait
