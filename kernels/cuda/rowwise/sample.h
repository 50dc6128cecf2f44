// SPDX-License-Identifier: Apache-2.0
//
// From rows of logits to tokens on the device: a known token scored or a token sampled, and the
// best tokens. Semantics of kernels/sample.h.
//
// Stream:  the parameter; asynchronous.
// Shapes:  below; one thread block a row.
// Errors:  CUDA's launch errors.
// Limits:  kMaxTopTokens; vocab_size at most 2^20.
// Why:     probabilities are summed as whole numbers of 2^-40 of the greatest, so that sums do not
//          depend on the order in which threads add: a row's token is a function of its logits and
//          its noise. Noise is made on the host (kernels/sample.h), 8 bytes a row. Tokens of less
//          than 2^-41 of the best one's probability are never sampled.
//
// Intensity: three passes over a row when greedy, up to twelve with top_k and top_p, one for each of
// the best tokens: bound by L2.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace strait::cuda {

inline constexpr int32_t kMaxTopTokens = 20;

// A token and a number that goes with it.
struct TokenEntry {
  int32_t token_id;
  float value;
};

struct SampleRow {
  // Entries [begin, end) of SampleParams::entries, each with distinct ids: banned (no value), bias,
  // then tokens of the prompt that are not in the output (no value), then of the output (count).
  int32_t banned_begin = 0;
  int32_t bias_begin = 0;
  int32_t prompt_begin = 0;
  int32_t output_begin = 0;
  int32_t output_end = 0;
  int32_t num_top = 0;
  int32_t sample = 0;  // 0: score `token`
  int32_t token = 0;
  int32_t top_k = 0;
  float temperature = 1.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t reserved = 0;
  double uniform = 0;  // SamplingUniform()
};

struct SampleResult {
  int32_t token;
  float logprob;
  int32_t top_ids[kMaxTopTokens];
  float top_logprobs[kMaxTopTokens];
};

struct SampleParams {
  const float* logits = nullptr;        // [num_rows, vocab_size] fp32, rows logits_stride apart
  float* adjusted = nullptr;            // the same shape; scratch
  const SampleRow* rows = nullptr;      // [num_rows]
  const TokenEntry* entries = nullptr;  // of all rows
  SampleResult* results = nullptr;      // [num_rows]
  int32_t* token_ids = nullptr;         // [num_rows], the results' tokens; may be null
  int64_t logits_stride = 0;
  int64_t num_rows = 0;
  int32_t vocab_size = 0;
};

cudaError_t Sample(const SampleParams& params, cudaStream_t stream);

}  // namespace strait::cuda
