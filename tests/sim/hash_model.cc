// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/hash_model.h"

#include <algorithm>

namespace strait::sim {

std::vector<std::pair<TokenId, float>> Top(uint64_t hidden, uint32_t num_top, uint32_t vocab_size) {
  std::vector<std::pair<TokenId, float>> top;
  if (num_top == 0) return top;
  for (TokenId token = 0; token < vocab_size; ++token)
    top.emplace_back(token, Logprob(hidden, token));
  const auto wanted = top.begin() + std::min(num_top, vocab_size);
  std::partial_sort(top.begin(), wanted, top.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });
  top.erase(wanted, top.end());
  return top;
}

TokenId Sample(uint64_t hidden, const SamplingParams& params, uint32_t position,
               uint32_t prompt_tokens, uint32_t vocab_size) {
  uint64_t h = hidden;
  if (params.temperature > 0) {
    h = Mix(h, Mix(params.seed, (uint64_t{params.choice_index} << 32) | position));
  }
  // Penalties tell the prompt from the output.
  if (params.presence_penalty != 0) h = Mix(h, prompt_tokens);
  const bool bans = position - prompt_tokens < params.min_tokens;
  for (uint64_t attempt = 0;; ++attempt) {
    const auto token = static_cast<TokenId>(Mix(h, attempt) % vocab_size);
    const auto& banned = params.banned_ids;
    if (bans && std::find(banned.begin(), banned.end(), token) != banned.end()) continue;
    return token;
  }
}

}  // namespace strait::sim
