// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/admission.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status CheckCount(const char* field, uint64_t count, uint64_t least, uint64_t most) {
  if (count >= least && count <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", count, " entries, it must have ", least, " to ", most));
}

// Written so that NaN fails.
absl::Status CheckRange(const char* field, float value, bool in_range, const char* bounds) {
  if (in_range && std::isfinite(value)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, ", it must be ", bounds));
}

absl::Status CheckIds(const char* field, std::vector<TokenId> ids, uint32_t vocab_size) {
  const auto most = std::max_element(ids.begin(), ids.end());
  if (most == ids.end() || *most < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has token id ", *most, ", the vocabulary has ", vocab_size, " tokens"));
}

absl::Status CheckSampling(const SequenceSpec& spec) {
  if (spec.choice_index >= limits::kMaxChoices) {
    return absl::InvalidArgumentError(absl::StrCat("choice_index is ", spec.choice_index,
                                                   ", it must be below ", limits::kMaxChoices));
  }
  STRAIT_RETURN_IF_ERROR(
      CheckRange("temperature", spec.temperature, spec.temperature >= 0, "0 or more"));
  STRAIT_RETURN_IF_ERROR(
      CheckRange("top_p", spec.top_p, spec.top_p > 0 && spec.top_p <= 1, "above 0 and at most 1"));
  STRAIT_RETURN_IF_ERROR(
      CheckRange("min_p", spec.min_p, spec.min_p >= 0 && spec.min_p <= 1, "0 to 1"));
  STRAIT_RETURN_IF_ERROR(CheckRange("repetition_penalty", spec.repetition_penalty,
                                    spec.repetition_penalty > 0, "above 0"));
  STRAIT_RETURN_IF_ERROR(CheckRange("presence_penalty", spec.presence_penalty, true, "finite"));
  STRAIT_RETURN_IF_ERROR(CheckRange("frequency_penalty", spec.frequency_penalty, true, "finite"));
  for (const auto& bias : spec.logit_bias) {
    STRAIT_RETURN_IF_ERROR(CheckRange("a value of logit_bias", bias.second, true, "finite"));
  }
  return absl::OkStatus();
}

absl::Status CheckSequence(const SequenceSpec& spec, const ModelShape& model) {
  if (spec.prompt.empty()) {
    return absl::InvalidArgumentError("the prompt is empty, it must have at least one token");
  }
  const uint64_t length = spec.prompt.size() + uint64_t{spec.max_tokens};
  if (length > model.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt's ", spec.prompt.size(), " tokens and max_tokens ", spec.max_tokens, " make ",
        length, ", the context of this server has ", model.max_positions));
  }
  STRAIT_RETURN_IF_ERROR(CheckIds("the prompt", spec.prompt, model.vocab_size));
  if (spec.min_tokens > spec.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("min_tokens ", spec.min_tokens, " is above max_tokens ", spec.max_tokens));
  }
  STRAIT_RETURN_IF_ERROR(
      CheckCount("stop_token_ids", spec.stop_token_ids.size(), 0, limits::kMaxStopTokens));
  STRAIT_RETURN_IF_ERROR(CheckIds("stop_token_ids", spec.stop_token_ids, model.vocab_size));
  STRAIT_RETURN_IF_ERROR(
      CheckCount("logit_bias", spec.logit_bias.size(), 0, limits::kMaxLogitBias));
  std::vector<TokenId> biased;
  for (const auto& bias : spec.logit_bias) biased.push_back(bias.first);
  STRAIT_RETURN_IF_ERROR(CheckIds("logit_bias", biased, model.vocab_size));
  std::sort(biased.begin(), biased.end());
  const auto twice = std::adjacent_find(biased.begin(), biased.end());
  if (twice != biased.end()) {
    return absl::InvalidArgumentError(absl::StrCat("logit_bias names token id ", *twice, " twice"));
  }
  if (spec.num_top > limits::kMaxTopLogprobs) {
    return absl::InvalidArgumentError(absl::StrCat(
        "logprobs asks for ", spec.num_top, " alternatives, at most ", limits::kMaxTopLogprobs));
  }
  return CheckSampling(spec);
}

}  // namespace

absl::Status CheckRequest(const RequestSpec& request, const ModelShape& model) {
  STRAIT_RETURN_IF_ERROR(
      CheckCount("the request", request.sequences.size(), 1, limits::kMaxChoices));
  for (const SequenceSpec& spec : request.sequences) {
    STRAIT_RETURN_IF_ERROR(CheckSequence(spec, model));
  }
  return absl::OkStatus();
}

absl::Status CheckFits(const RequestSpec& request, uint64_t capacity_rows) {
  for (const SequenceSpec& spec : request.sequences) {
    // The last token is sampled, never fed.
    const uint64_t rows = spec.prompt.size() + uint64_t{spec.max_tokens} - 1;
    if (rows <= capacity_rows) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt's ", spec.prompt.size(), " tokens and max_tokens ",
                     spec.max_tokens, " need ", rows, " cache rows, the roomiest pipeline has ",
                     capacity_rows, "; ask for fewer tokens or give the workers more memory"));
  }
  return absl::OkStatus();
}

}  // namespace strait
