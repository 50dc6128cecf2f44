// SPDX-License-Identifier: Apache-2.0
//
// From logits to a token: log-probabilities, the best k tokens, and sampling as vLLM defines it.
//
// Thread:  any; pure functions of their arguments.
// Shapes:  logits [vocab_size] fp32, never changed.
// Why:     noise is a counter-based generator keyed by (seed, choice, position), so a sequence's
//          sampler has no state. Equal logits go to the lower id everywhere.
//
// Intensity:one pass (greedy), a handful of passes (top_k, top_p) over the logits: bound by cache.
#pragma once

#include <array>
#include <cstdint>

namespace strait {

// Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// Uniform in [0, 1) with 53 bits: key = seed; counter = (position, choice).
double SamplingUniform(uint64_t seed, uint32_t choice_index, uint64_t position);

struct TokenCount {
  int32_t token_id;
  int32_t count;
};

struct TokenBias {
  int32_t token_id;
  float bias;
};

struct LogitStats {
  float max;           // the greatest logit
  double log_sum_exp;  // log of the sum of exp(logit), fixed order of summation
};

// log-probability of a logit under its stats.
inline float LogProb(float logit, const LogitStats& stats) {
  return static_cast<float>(static_cast<double>(logit) - stats.log_sum_exp);
}

// Order of application (vLLM's): bans and bias; repetition, frequency, presence penalties;
// temperature; min_p; top_k; top_p; draw by inverse distribution function in order of token id.
struct SampleParams {
  const float* logits = nullptr;  // [vocab_size] fp32
  int64_t vocab_size = 0;
  float temperature = 1.0f;                   // 0: greedy
  int32_t top_k = 0;                          // 0: all
  float top_p = 1.0f;                         // (0, 1]
  float min_p = 0.0f;                         // [0, 1]: keep p >= min_p * max p
  float repetition_penalty = 1.0f;            // > 0; over prompt and output tokens
  float presence_penalty = 0.0f;              // over output tokens
  float frequency_penalty = 0.0f;             // over output tokens
  const TokenCount* prompt_tokens = nullptr;  // [num_prompt_tokens] distinct ids; may be null
  int64_t num_prompt_tokens = 0;
  const TokenCount* output_tokens = nullptr;  // [num_output_tokens] distinct ids; may be null
  int64_t num_output_tokens = 0;
  const TokenBias* logit_bias = nullptr;  // [num_logit_bias] distinct ids; may be null
  int64_t num_logit_bias = 0;
  const int32_t* banned_tokens = nullptr;  // [num_banned_tokens]; may be null
  int64_t num_banned_tokens = 0;
};

struct ScoredToken {
  int32_t token_id;
  float logit;
};

}  // namespace strait
