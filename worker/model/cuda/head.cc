// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/cuda/rowwise/norm.h"
#include "kernels/sample.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/model/token_counts.h"

namespace strait {

static_assert(cuda::kMaxTopTokens >= static_cast<int32_t>(limits::kMaxTopLogprobs));

absl::StatusOr<HeadStep> HeadStep::Create(PinnedPool& pinned, const StepLimits& limits) {
  HeadStep step;
  STRAIT_ASSIGN_OR_RETURN(step.tables_, pinned.Take(HeadTableBytes(limits)));
  STRAIT_ASSIGN_OR_RETURN(step.results_,
                          pinned.Take(uint64_t{limits.head_rows} * sizeof(cuda::SampleResult)));
  return step;
}

cuda::SampleRow CudaHead::RowOf(const StageBatch& batch, const LogitsRequest& request) {
  const BatchSequence& sequence = batch.sequences[request.sequence_index];
  cuda::SampleRow row;
  row.num_top = static_cast<int32_t>(request.num_top);
  row.token = static_cast<int32_t>(request.token);
  const auto here = [&] { return static_cast<int32_t>(entries_.size()); };
  row.banned_begin = row.bias_begin = row.prompt_begin = row.output_begin = row.output_end = here();
  if (!request.sample) return row;
  STRAIT_CHECK(sequence.sampling != nullptr);
  const SamplingParams& s = *sequence.sampling;
  uint32_t first_row = 0;
  for (uint32_t i = 0; i < request.sequence_index; ++i) first_row += batch.sequences[i].num_tokens;
  const uint32_t position = sequence.first_position + (request.row - first_row);
  const absl::Span<const TokenId> tokens = sequence.tokens.subspan(0, position + 1);
  const size_t num_prompt = std::min<size_t>(sequence.prompt_tokens, tokens.size());
  row.sample = 1;
  row.top_k = static_cast<int32_t>(std::min(s.top_k, config_->vocab_size));
  row.temperature = s.temperature;
  row.top_p = s.top_p;
  row.min_p = s.min_p;
  row.repetition_penalty = s.repetition_penalty;
  row.presence_penalty = s.presence_penalty;
  row.frequency_penalty = s.frequency_penalty;
  row.uniform = SamplingUniform(s.seed, s.choice_index, uint64_t{position} + 1);

  if (tokens.size() - num_prompt < s.min_tokens) {
    for (const TokenId id : s.banned_ids) entries_.push_back({static_cast<int32_t>(id), 0});
  }
  row.bias_begin = here();
  for (const auto& [id, bias] : s.logit_bias) entries_.push_back({static_cast<int32_t>(id), bias});
  row.prompt_begin = here();
  std::vector<TokenCount> output;
  STRAIT_CHECK(!s.needs_tokens() || !sequence.token_of_request, "penalties take all of the tokens");
  if (s.needs_tokens()) output = CountTokens(tokens.subspan(num_prompt));
  if (s.repetition_penalty != 1) {
    for (const TokenCount& token : CountTokens(tokens.subspan(0, num_prompt))) {
      const bool in_output = std::binary_search(
          output.begin(), output.end(), token,
          [](const TokenCount& a, const TokenCount& b) { return a.token_id < b.token_id; });
      if (!in_output) entries_.push_back({token.token_id, 0});
    }
  }
  row.output_begin = here();
  for (const TokenCount& token : output) {
    entries_.push_back({token.token_id, static_cast<float>(token.count)});
  }
  row.output_end = here();
  return row;
}

absl::Status CudaHead::Ask(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                           uint32_t first_request, uint32_t first_row, HeadStep* step) {
  while (!requests.empty()) {
    if (!step->num_top_.empty()) {
      STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
      Collect(step);
    }
    STRAIT_ASSIGN_OR_RETURN(
        const size_t count,
        AskSome(batch, requests.subspan(0, std::min<size_t>(requests.size(), limits_->head_rows)),
                first_request, first_row, step));
    requests.remove_prefix(count);
    first_request += static_cast<uint32_t>(count);
  }
  return absl::OkStatus();
}

absl::StatusOr<size_t> CudaHead::AskSome(const StageBatch& batch,
                                         absl::Span<const LogitsRequest> requests,
                                         uint32_t first_request, uint32_t first_row,
                                         HeadStep* step) {
  Region host(step->tables_.data());
  auto* const rows = host.Take<cuda::SampleRow>(limits_->head_rows);
  auto* const indices = host.Take<int32_t>(limits_->head_rows);
  auto* const entries = host.Take<cuda::TokenEntry>(limits_->head_entries);
  entries_.clear();
  size_t count = 0;
  for (; count < requests.size(); ++count) {
    const LogitsRequest& request = requests[count];
    const size_t before = entries_.size();
    STRAIT_CHECK(request.row >= first_row, "rows of logits must rise");
    rows[count] = RowOf(batch, request);
    indices[count] = static_cast<int32_t>(request.row - first_row);
    if (entries_.size() > limits_->head_entries) {
      entries_.resize(before);
      break;
    }
  }
  STRAIT_CHECK(count > 0, "one row's lists are within the limit");
  std::copy(entries_.begin(), entries_.end(), entries);
  const auto used =
      static_cast<uint64_t>(reinterpret_cast<std::byte*>(entries) - step->tables_.data()) +
      entries_.size() * sizeof(cuda::TokenEntry);
  STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(ws_->head_tables, step->tables_.data(), used,
                                              cudaMemcpyHostToDevice, stream_));
  Region device(ws_->head_tables);
  const auto* const d_rows = device.Take<cuda::SampleRow>(limits_->head_rows);
  const auto* const d_indices = device.Take<int32_t>(limits_->head_rows);
  const auto* const d_entries = device.Take<cuda::TokenEntry>(limits_->head_entries);

  const int64_t stride = cuda::AlignedStride(config_->hidden_size);
  cuda::RmsNormParams norm;
  norm.x = ws_->hidden;
  norm.x_stride = config_->hidden_size;
  norm.x_rows = d_indices;
  norm.weight = weights_->norm;
  norm.eps = static_cast<float>(config_->rms_norm_eps);
  norm.y = ws_->head_normed;
  norm.y_stride = stride;
  norm.num_rows = static_cast<int64_t>(count);
  norm.dim = static_cast<int32_t>(config_->hidden_size);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::RmsNorm(norm, stream_));
  cuda::GemmParams product;
  product.x = ws_->head_normed;
  product.x_stride = stride;
  product.num_rows = static_cast<int32_t>(count);
  product.weight = weights_->lm_head;
  product.split_sums = ws_->split_sums;
  product.split_capacity = static_cast<int64_t>(kCudaSplitFloats);
  product.fixed_order = ws_->fixed_order;
  product.y_fp32 = ws_->logits;
  product.y_stride = config_->vocab_size;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(product, stream_));
  cuda::SampleParams sample;
  sample.logits = ws_->logits;
  sample.adjusted = ws_->adjusted;
  sample.rows = d_rows;
  sample.entries = d_entries;
  sample.results = ws_->results;
  sample.token_ids = ws_->sampled_ids + first_request;
  sample.logits_stride = config_->vocab_size;
  sample.num_rows = static_cast<int64_t>(count);
  sample.vocab_size = static_cast<int32_t>(config_->vocab_size);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Sample(sample, stream_));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(step->results_.data(), ws_->results,
                                              count * sizeof(cuda::SampleResult),
                                              cudaMemcpyDeviceToHost, stream_));
  for (const LogitsRequest& request : requests.subspan(0, count)) {
    step->num_top_.push_back(std::min(request.num_top, config_->vocab_size));
  }
  return count;
}

void CudaHead::Collect(HeadStep* step) const {
  const auto* read = reinterpret_cast<const cuda::SampleResult*>(step->results_.data());
  for (const uint32_t num_top : step->num_top_) {
    LogitsResult& result = step->done_.emplace_back();
    result.token = static_cast<TokenId>(read->token);
    STRAIT_CHECK(result.token < config_->vocab_size);
    result.logprob = read->logprob;
    if (std::isnan(result.logprob)) {  // one logit that is NaN or infinite makes it so
      result.status = absl::DataLossError(
          "the logits are not finite: the weights hold NaN or infinity, or the model overflows on "
          "this text");
    }
    for (uint32_t j = 0; j < num_top; ++j) {
      result.top.emplace_back(static_cast<TokenId>(read->top_ids[j]), read->top_logprobs[j]);
    }
    ++read;
  }
  step->num_top_.clear();
}

std::vector<LogitsResult> CudaHead::Take(HeadStep* step) const {
  Collect(step);
  return std::exchange(step->done_, {});
}

}  // namespace strait
