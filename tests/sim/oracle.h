// SPDX-License-Identifier: Apache-2.0
//
// Oracle says what a client must get, from the request alone: no blocks, no steps, no workers.
//
// Thread:  pure function.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "coordinator/core/core.h"

namespace strait::sim {

struct Expected {
  std::vector<TokenInfo> scores;
  std::vector<TokenInfo> tokens;
  FinishReason reason = FinishReason::kLength;
  std::optional<TokenId> stop_token;
};

// What layers [begin, end) cache of these tokens: [layers, tokens].
std::vector<std::vector<uint64_t>> ExpectRows(absl::Span<const TokenId> tokens, LayerRange layers);

Expected Expect(const SequenceSpec& spec, const ModelShape& model);

}  // namespace strait::sim
