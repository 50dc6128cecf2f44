// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/sampling_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

constexpr float kMaxFloat = std::numeric_limits<float>::max();
// The least positive value: lower ends that are not part of their range.
constexpr float kAboveZero = std::numeric_limits<float>::denorm_min();

absl::Status CheckRange(const char* field, float value, float least, float most) {
  // Written so that NaN fails.
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "sampling.", field, " is ", value, ", it must be ", most == kMaxFloat ? "finite" : "at most ",
      most == kMaxFloat ? "" : absl::StrCat(most),
      least == -kMaxFloat   ? ""
      : least == kAboveZero ? " and above 0"
                            : absl::StrCat(" and at least ", least)));
}

absl::Status CheckIds(const char* field, const google::protobuf::RepeatedField<uint32_t>& ids,
                      uint32_t most, uint32_t vocab_size) {
  if (static_cast<uint32_t>(ids.size()) > most) {
    return absl::ResourceExhaustedError(
        absl::StrCat("sampling.", field, " has ", ids.size(), " entries, at most ", most));
  }
  std::vector<uint32_t> sorted(ids.begin(), ids.end());
  std::sort(sorted.begin(), sorted.end());
  if (!sorted.empty() && sorted.back() >= vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sampling.", field, " has token id ", sorted.back(), ", the vocabulary has ", vocab_size));
  }
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.", field, " names token id ", *twice, " twice"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SamplingParams> CheckSampling(const v1::SamplingParams& wire, uint32_t vocab_size) {
  if (wire.choice_index() >= limits::kMaxChoices) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.choice_index is ", wire.choice_index(),
                                                   ", it must be below ", limits::kMaxChoices));
  }
  STRAIT_RETURN_IF_ERROR(CheckRange("temperature", wire.temperature(), 0, kMaxFloat));
  STRAIT_RETURN_IF_ERROR(CheckRange("top_p", wire.top_p(), kAboveZero, 1));
  STRAIT_RETURN_IF_ERROR(CheckRange("min_p", wire.min_p(), 0, 1));
  STRAIT_RETURN_IF_ERROR(
      CheckRange("repetition_penalty", wire.repetition_penalty(), kAboveZero, kMaxFloat));
  STRAIT_RETURN_IF_ERROR(
      CheckRange("presence_penalty", wire.presence_penalty(), -kMaxFloat, kMaxFloat));
  STRAIT_RETURN_IF_ERROR(
      CheckRange("frequency_penalty", wire.frequency_penalty(), -kMaxFloat, kMaxFloat));
  STRAIT_RETURN_IF_ERROR(CheckIds("bias_ids", wire.bias_ids(), limits::kMaxLogitBias, vocab_size));
  STRAIT_RETURN_IF_ERROR(CheckIds("banned_ids", wire.banned_ids(), kMaxBannedTokens, vocab_size));
  if (wire.bias_ids_size() != wire.bias_values_size()) {
    return absl::InvalidArgumentError(absl::StrCat("sampling has ", wire.bias_ids_size(),
                                                   " bias_ids and ", wire.bias_values_size(),
                                                   " bias_values"));
  }
  SamplingParams params;
  params.seed = wire.seed();
  params.choice_index = wire.choice_index();
  params.temperature = wire.temperature();
  params.top_k = wire.top_k();
  params.top_p = wire.top_p();
  params.min_p = wire.min_p();
  params.repetition_penalty = wire.repetition_penalty();
  params.presence_penalty = wire.presence_penalty();
  params.frequency_penalty = wire.frequency_penalty();
  for (int i = 0; i < wire.bias_ids_size(); ++i) {
    STRAIT_RETURN_IF_ERROR(CheckRange("bias_values", wire.bias_values(i), -kMaxFloat, kMaxFloat));
    params.logit_bias.emplace_back(wire.bias_ids(i), wire.bias_values(i));
  }
  params.min_tokens = wire.min_tokens();
  params.banned_ids.assign(wire.banned_ids().begin(), wire.banned_ids().end());
  return params;
}

}  // namespace strait
