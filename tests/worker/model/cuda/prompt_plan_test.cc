// SPDX-License-Identifier: Apache-2.0
//
// Defends: every sequence of a tile attends exactly once, in one form; launches of the expanded form
// stay within their room, cover each key of a sequence once and in order, begin with its first and
// end with its last.
#include "worker/model/cuda/prompt_plan.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using cuda::MhaPiece;
using cuda::MlaSequence;

struct Length {
  int32_t num_tokens;
  int32_t first_position;
};

std::vector<MlaSequence> Sequences(const std::vector<Length>& lengths) {
  std::vector<MlaSequence> sequences;
  int32_t token = 0;
  for (const Length& length : lengths) {
    sequences.push_back({static_cast<int32_t>(sequences.size()) + 5, token, length.num_tokens,
                         length.first_position, -1});
    token += length.num_tokens;
  }
  return sequences;
}

// All that the header promises; the plan's pieces by sequence.
std::map<int32_t, std::vector<MhaPiece>> Check(const std::vector<MlaSequence>& sequences,
                                               int32_t key_rows, PromptPlan* plan) {
  PlanPrompts(sequences, key_rows, plan);
  std::map<int32_t, std::vector<MhaPiece>> pieces;
  EXPECT_EQ(plan->launch_begin.front(), 0);
  EXPECT_EQ(plan->launch_begin.back(), static_cast<int32_t>(plan->pieces.size()));
  for (int32_t launch = 0; launch < plan->num_launches(); ++launch) {
    EXPECT_GT(plan->launch(launch).size(), 0u);
    EXPECT_LE(plan->launch(launch).size(), static_cast<size_t>(cuda::kMhaMaxPieces));
    int32_t used = 0;
    for (const MhaPiece& piece : plan->launch(launch)) {
      EXPECT_EQ(piece.first_key, used);
      used += cuda::MhaKeyRows(piece.num_keys);
      pieces[piece.sequence].push_back(piece);
    }
    EXPECT_LE(used, key_rows);
  }
  size_t absorbed = 0;
  std::vector<bool> in_range;
  for (const RowRange& rows : plan->absorbed_rows) {
    in_range.resize(static_cast<size_t>(rows.begin), false);
    in_range.resize(static_cast<size_t>(rows.begin + rows.count), true);
  }
  for (const MlaSequence& sequence : sequences) {
    const bool expanded = pieces.count(sequence.sequence) > 0;
    EXPECT_EQ(expanded, key_rows > 0 && sequence.num_tokens >= kMinExpandedTokens);
    for (int32_t t = 0; t < sequence.num_tokens; ++t) {
      const auto row = static_cast<size_t>(sequence.first_token + t);
      EXPECT_EQ(row < in_range.size() && in_range[row], !expanded) << row;
    }
    if (!expanded) {
      EXPECT_EQ(plan->absorbed[absorbed++].sequence, sequence.sequence);
      continue;
    }
    int32_t position = 0;
    for (const MhaPiece& piece : pieces[sequence.sequence]) {
      EXPECT_EQ(piece.first_token, sequence.first_token);
      EXPECT_EQ(piece.num_tokens, sequence.num_tokens);
      EXPECT_EQ(piece.span_position, position);
      EXPECT_EQ(piece.first_position, sequence.first_position - position);
      EXPECT_EQ(piece.begins, position == 0);
      EXPECT_EQ(position % cuda::kMhaTileKeys, 0);
      EXPECT_GT(piece.num_keys, 0);
      position += piece.num_keys;
      EXPECT_EQ(piece.ends, position == sequence.first_position + sequence.num_tokens);
    }
    EXPECT_EQ(position, sequence.first_position + sequence.num_tokens);
  }
  EXPECT_EQ(absorbed, plan->absorbed.size());
  return pieces;
}

TEST(PromptPlanTest, ShortOnesAreAbsorbed) {
  PromptPlan plan;
  Check(Sequences({{1, 4000}, {255, 0}, {256, 0}, {7, 7}, {300, 5}, {1, 0}}), 4096, &plan);
  EXPECT_EQ(plan.num_launches(), 1);
  EXPECT_EQ(plan.absorbed_rows.size(), 3u);
  Check(Sequences({{1, 4000}, {300, 0}}), 0, &plan);
  EXPECT_EQ(plan.num_launches(), 0);
}

TEST(PromptPlanTest, WhatFitsIntoALaunchIsNotCutIntoSpans) {
  PromptPlan plan;
  auto pieces = Check(Sequences({{600, 0}, {600, 0}}), 1024, &plan);
  EXPECT_EQ(plan.num_launches(), 2);
  EXPECT_EQ(pieces[6].size(), 1u);
  pieces = Check(Sequences({{600, 0}, {600, 5000}}), 1024, &plan);
  EXPECT_EQ(pieces[6].size(), 7u);  // 384 keys beside the first one's, then 1,024 each
}

TEST(PromptPlanTest, RandomTiles) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  const auto pick = [&](int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng);
  };
  PromptPlan plan;
  int32_t most_launches = 0;
  for (int i = 0; i < 200; ++i) {
    std::vector<Length> lengths;
    for (int32_t n = pick(1, 60); n > 0; --n) {
      lengths.push_back({pick(0, 1) == 0 ? pick(1, 300) : pick(200, 1000), pick(0, 3000)});
    }
    Check(Sequences(lengths), pick(1, 100) * cuda::kMhaTileKeys, &plan);
    most_launches = std::max(most_launches, plan.num_launches());
  }
  EXPECT_GT(most_launches, 10);
  // More sequences than a launch takes.
  Check(Sequences(std::vector<Length>(70, {256, 0})), 70 * 256, &plan);
  EXPECT_EQ(plan.num_launches(), 3);
}

}  // namespace
}  // namespace strait
