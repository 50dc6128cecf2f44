// SPDX-License-Identifier: Apache-2.0
#include "worker/model/logits.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/kernels.h"
#include "proto/base/check.h"
#include "worker/model/token_counts.h"

namespace strait {
namespace {

TokenId SampleToken(cpu::Context& context, const float* logits, uint32_t vocab_size,
                    const BatchSequence& sequence, uint32_t position) {
  const SamplingParams& sampling = *sequence.sampling;
  const absl::Span<const TokenId> tokens = sequence.tokens.subspan(0, position + 1);
  const size_t num_prompt = std::min<size_t>(sequence.prompt_tokens, tokens.size());
  const uint32_t num_generated = static_cast<uint32_t>(tokens.size() - num_prompt);

  SampleParams params;
  params.logits = logits;
  params.vocab_size = vocab_size;
  params.temperature = sampling.temperature;
  params.top_k = static_cast<int32_t>(std::min(sampling.top_k, vocab_size));
  params.top_p = sampling.top_p;
  params.min_p = sampling.min_p;
  params.repetition_penalty = sampling.repetition_penalty;
  params.presence_penalty = sampling.presence_penalty;
  params.frequency_penalty = sampling.frequency_penalty;
  std::vector<TokenCount> prompt;
  std::vector<TokenCount> output;
  if (sampling.repetition_penalty != 1) prompt = CountTokens(tokens.subspan(0, num_prompt));
  if (sampling.needs_tokens()) output = CountTokens(tokens.subspan(num_prompt));
  params.prompt_tokens = prompt.data();
  params.num_prompt_tokens = static_cast<int64_t>(prompt.size());
  params.output_tokens = output.data();
  params.num_output_tokens = static_cast<int64_t>(output.size());
  std::vector<TokenBias> bias;
  for (const auto& [token, value] : sampling.logit_bias) {
    bias.push_back({static_cast<int32_t>(token), value});
  }
  params.logit_bias = bias.data();
  params.num_logit_bias = static_cast<int64_t>(bias.size());
  std::vector<int32_t> banned;
  if (num_generated < sampling.min_tokens) {
    banned.assign(sampling.banned_ids.begin(), sampling.banned_ids.end());
  }
  params.banned_tokens = banned.data();
  params.num_banned_tokens = static_cast<int64_t>(banned.size());

  const double uniform =
      SamplingUniform(sampling.seed, sampling.choice_index, uint64_t{position} + 1);
  return static_cast<TokenId>(cpu::Sample(context, params, uniform));
}

}  // namespace

LogitsResult ReadLogits(cpu::Context& context, const float* logits, uint32_t vocab_size,
                        const BatchSequence& sequence, uint32_t position,
                        const LogitsRequest& request) {
  const LogitStats stats = cpu::ComputeLogitStats(context, logits, vocab_size);
  LogitsResult result;
  // One logit that is NaN or infinite makes the sum so.
  if (!std::isfinite(stats.log_sum_exp)) {
    result.status = absl::DataLossError(absl::StrCat(
        "the logits at position ", position,
        " are not finite: the weights hold NaN or infinity, or the model overflows on this text"));
    return result;
  }
  if (request.sample) {
    STRAIT_CHECK(sequence.sampling != nullptr);
    result.token = SampleToken(context, logits, vocab_size, sequence, position);
  } else {
    result.token = request.token;
  }
  STRAIT_CHECK(result.token < vocab_size);
  result.logprob = LogProb(logits[result.token], stats);
  if (request.num_top > 0) {
    for (const ScoredToken& top : cpu::TopTokens(context, logits, vocab_size, request.num_top)) {
      result.top.emplace_back(static_cast<TokenId>(top.token_id), LogProb(top.logit, stats));
    }
  }
  return result;
}

}  // namespace strait
