// SPDX-License-Identifier: Apache-2.0
//
// Defends: coordinator and worker reckon with the same workspace: buffers that are alive together
// do not overlap, and a stage takes at most 5 % of its weights for it, or what the least tile needs.
#include "proto/model/stage_memory.h"

#include <gtest/gtest.h>

namespace strait {
namespace {

ModelConfig Small() {
  ModelConfig c;
  c.vocab_size = 1000;
  c.hidden_size = 64;
  c.num_attention_heads = 4;
  c.q_lora_rank = 48;
  c.kv_lora_rank = 32;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 8;
  c.v_head_dim = 24;
  c.intermediate_size = 200;
  c.moe_intermediate_size = 40;
  c.n_routed_experts = 10;
  c.n_shared_experts = 2;
  c.num_experts_per_tok = 3;
  return c;
}

TEST(WorkspaceTest, BuffersFollowEachOther) {
  const ModelConfig c = Small();
  const uint64_t t = 128;
  const CpuWorkspaceLayout w = LayOutCpuWorkspace(c, t);
  const std::vector<std::pair<uint64_t, uint64_t>> attention = {
      {w.hidden, t * 64},       {w.normed, t * 64},       {w.cos_sin, t * 8},
      {w.q_a, t * 48},          {w.q, t * 4 * 24},        {w.kv_a, t * 40},
      {w.q_rope, t * 4 * 8},    {w.attended, t * 4 * 24}, {w.q_latent, 64 * 4 * 32},
      {w.o_latent, 64 * 4 * 32}};
  const std::vector<std::pair<uint64_t, uint64_t>> forward = {
      {w.hidden, t * 64},          {w.normed, t * 64},
      {w.gate, t * 200},           {w.up, t * 200},
      {w.router_logits, t * 10},   {w.expert_weights, t * 3},
      {w.expert_ids, t * 3},       {w.row_of, t * 3},
      {w.token_of, t * 3},         {w.group_begin, 11},
      {w.expert_gate, t * 120},    {w.expert_up, t * 120},
      {w.expert_rows, t * 3 * 64}, {w.shared_rows, t * 64}};
  const std::vector<std::pair<uint64_t, uint64_t>> head = {
      {w.hidden, t * 64}, {w.head_rows, 16 * 64}, {w.logits, 16 * 1000}};
  for (const auto& buffers : {attention, forward, head}) {
    uint64_t end = 0;
    for (const auto& [begin, elements] : buffers) {
      EXPECT_GE(begin, end);
      EXPECT_EQ(begin % 64, 0u);
      end = begin + elements * 4;
    }
    EXPECT_LE(end, w.bytes);
  }
}

TEST(WorkspaceTest, ATileIsAsLargeAsFivePercentOfTheWeights) {
  const std::vector<uint64_t> sizes = WorkspaceSizes(Small());
  ASSERT_EQ(sizes.size(), kMaxTileRows / kMinTileRows);
  for (size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_EQ(sizes[i], LayOutCpuWorkspace(Small(), kMinTileRows * (i + 1)).bytes);
    EXPECT_EQ(ChooseWorkspace(sizes, 20 * sizes[i]), i);
    EXPECT_EQ(ChooseWorkspace(sizes, 20 * sizes[i] - 1), i == 0 ? 0 : i - 1);
  }
  EXPECT_EQ(ChooseWorkspace(sizes, 1), 0u);
  EXPECT_EQ(ChooseWorkspace(sizes, ~uint64_t{0}), sizes.size() - 1);
}

}  // namespace
}  // namespace strait
