// SPDX-License-Identifier: Apache-2.0
//
// HashModel is the simulator's idea of a language model: plain functions from (tokens, position)
// to the next token, defined once and used twice: by HashBackend through real page tables, by the
// Oracle without any.
//
// Thread:  pure functions.
// Why:     every token depends on every cache row of every layer before it, so one wrong block,
//          stale row, position or missed token changes what comes out.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "proto/base/ids.h"
#include "worker/backend.h"

namespace strait::sim {

// Fingerprint of the weights that the Oracle knows. With others every layer answers otherwise.
inline constexpr uint64_t kHashWeights = 0x5EED;

inline uint64_t Mix(uint64_t a, uint64_t b = 0) {
  uint64_t x =
      a * 0x9E3779B97F4A7C15ull + (b ^ (b >> 29)) * 0xD6E8FEB86659FD93ull + 0x632BE59BD9B4E019ull;
  x = (x ^ (x >> 32)) * 0xBF58476D1CE4E5B9ull;
  return x ^ (x >> 29);
}

inline uint64_t Embed(TokenId token, uint32_t position) { return Mix(token + 1, position); }
// What a layer caches of a token.
inline uint64_t CacheRow(uint64_t hidden, LayerIndex layer, uint32_t position) {
  return Mix(hidden, (uint64_t{layer} << 32) | position);
}
// A layer attends to a row at `position`: terms of a sum.
inline uint64_t Attend(uint64_t row, uint32_t position) { return Mix(row, position); }
inline uint64_t LayerOut(uint64_t hidden, uint64_t attended, LayerIndex layer) {
  return Mix(hidden ^ attended, layer);
}

// "Log-probability" of a token after the final hidden state: an exact multiple of 2^-10.
inline float Logprob(uint64_t hidden, TokenId token) {
  return -static_cast<float>(Mix(hidden, uint64_t{token} + 77) % 10240) / 1024.0f;
}

// Logits for this position are NaN if the sequence's seed says so.
inline constexpr uint64_t kNanSeed = uint64_t{1} << 40;
inline bool LogitsAreNan(uint64_t seed, uint32_t position) { return seed == kNanSeed + position; }

// The alternatives reported: falling log-probability, ties by lower id.
std::vector<std::pair<TokenId, float>> Top(uint64_t hidden, uint32_t num_top, uint32_t vocab_size);

// The token sampled for `position` (one after the row that `hidden` is of).
TokenId Sample(uint64_t hidden, const SamplingParams& params, uint32_t position,
               uint32_t prompt_tokens, uint32_t vocab_size);

}  // namespace strait::sim
