// SPDX-License-Identifier: Apache-2.0
//
// A sequence that loses the rows of one stage in the middle of its life: what its survivors kept and what
// is computed again must give the bits of a run that nothing disturbed.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "tests/worker/model/test_pipeline.h"

namespace strait {

inline constexpr uint32_t kReplayPrompt = 150;
inline constexpr uint32_t kReplayGenerated = 12;

inline v1::OpenSequence* OpenForReplay(v1::StepPlan* plan) {
  AddOpen(plan, 5, kReplayPrompt);
  v1::OpenSequence* open = plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open();
  open->mutable_sampling()->set_seed(99);
  open->mutable_sampling()->set_temperature(0.8f);
  open->mutable_sampling()->set_top_p(0.95f);
  open->mutable_sampling()->set_repetition_penalty(1.1f);
  return open;
}

// As the coordinator does it: the last token is fed anew, the `rows` before it are kept.
inline void LoseAndReplay(TestPipeline* pipeline, size_t lost, const std::vector<TokenId>& tokens,
                          uint32_t rows) {
  pipeline->NewEpoch(lost);
  for (uint32_t begin = 0; begin < rows; begin += 64) {
    const uint32_t end = std::min(begin + 64, rows);
    v1::StepPlan plan = pipeline->Plan();
    if (begin == 0) {
      v1::OpenSequence* open = OpenForReplay(&plan);
      for (size_t i = 0; i < pipeline->num_stages(); ++i) open->add_kept_rows(i == lost ? 0 : rows);
    }
    AddRows(&plan, 5, begin, {tokens.begin() + begin, tokens.begin() + end})
        ->set_replay_stages(static_cast<uint32_t>(lost) + 1);
    pipeline->Run(plan);
    for (size_t i = 0; i < pipeline->num_stages(); ++i) {
      EXPECT_EQ(pipeline->rows_computed[i], i <= lost ? end - begin : 0) << "stage " << i;
      EXPECT_EQ(pipeline->rows_stored[i], i == lost ? end - begin : 0) << "stage " << i;
    }
  }
}

// Ids and log-probabilities of a sampled continuation, in bits. `lost`: the stage that is replaced after
// six tokens; absent: none.
inline std::vector<uint32_t> RunReplayCase(TestPipeline* pipeline, std::optional<size_t> lost) {
  std::mt19937 rng(1);
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < kReplayPrompt; ++i) {
    tokens.push_back(static_cast<TokenId>(rng() % pipeline->backend().vocab_size()));
  }
  std::vector<uint32_t> words;
  for (uint32_t rows = 0; tokens.size() < kReplayPrompt + kReplayGenerated;) {
    const auto length = static_cast<uint32_t>(tokens.size());
    if (lost && length == kReplayPrompt + 6) LoseAndReplay(pipeline, *lost, tokens, rows);
    v1::StepPlan plan = pipeline->Plan();
    if (rows == 0) OpenForReplay(&plan);
    WantSample(AddRows(&plan, 5, rows, {tokens.begin() + rows, tokens.end()}), length - rows - 1,
               5);
    const std::vector<v1::SequenceResult> results = pipeline->Run(plan);
    EXPECT_EQ(results.size(), 1u);
    const v1::TokenLogprob& sampled = results.at(0).sampled();
    words.push_back(sampled.token_id());
    words.push_back(std::bit_cast<uint32_t>(sampled.logprob()));
    for (const float logprob : sampled.top_logprobs()) {
      words.push_back(std::bit_cast<uint32_t>(logprob));
    }
    tokens.push_back(sampled.token_id());
    rows = length;
  }
  return words;
}

}  // namespace strait
