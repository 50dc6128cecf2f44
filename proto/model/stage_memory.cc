// SPDX-License-Identifier: Apache-2.0
#include "proto/model/stage_memory.h"

#include <algorithm>

#include "proto/base/check.h"

namespace strait {
namespace {

constexpr uint64_t kAlign = 64;  // bytes; a cache line
constexpr uint64_t kElement = 4;

// Gives out parts of a region, one after the other.
class Region {
 public:
  explicit Region(uint64_t begin) : end_(begin) {}
  uint64_t Take(uint64_t elements) {
    const uint64_t begin = end_;
    end_ = (end_ + elements * kElement + kAlign - 1) / kAlign * kAlign;
    return begin;
  }
  uint64_t end() const { return end_; }

 private:
  uint64_t end_;
};

}  // namespace

CpuWorkspaceLayout LayOutCpuWorkspace(const ModelConfig& c, uint32_t tile_rows) {
  const uint64_t t = tile_rows;
  const uint64_t heads = c.num_attention_heads;
  const bool moe = c.n_routed_experts > 0;
  const uint64_t picks = moe ? c.num_experts_per_tok : 0;
  const uint64_t shared = moe ? uint64_t{c.n_shared_experts} * c.moe_intermediate_size : 0;
  CpuWorkspaceLayout w;

  Region common(0);
  w.hidden = common.Take(t * c.hidden_size);
  w.normed = common.Take(t * c.hidden_size);
  w.cos_sin = common.Take(t * c.qk_rope_head_dim);

  Region attention(common.end());
  w.q_a = attention.Take(t * c.q_lora_rank);
  w.q = attention.Take(t * heads * c.qk_head_dim());
  w.kv_a = attention.Take(t * (c.kv_lora_rank + c.qk_rope_head_dim));
  w.q_rope = attention.Take(t * heads * c.qk_rope_head_dim);
  w.attended = attention.Take(t * heads * c.v_head_dim);
  const uint64_t attention_rows = std::min(tile_rows, kAttentionRows);
  w.q_latent = attention.Take(attention_rows * heads * c.kv_lora_rank);
  w.o_latent = attention.Take(attention_rows * heads * c.kv_lora_rank);

  Region forward(common.end());
  const uint64_t width = std::max<uint64_t>(c.intermediate_size, shared);
  w.gate = forward.Take(t * width);
  w.up = forward.Take(t * width);
  if (moe) {
    w.router_logits = forward.Take(t * c.n_routed_experts);
    w.expert_weights = forward.Take(t * picks);
    w.expert_ids = forward.Take(t * picks);
    w.row_of = forward.Take(t * picks);
    w.token_of = forward.Take(t * picks);
    w.group_begin = forward.Take(uint64_t{c.n_routed_experts} + 1);
    w.expert_gate = forward.Take(t * picks * c.moe_intermediate_size);
    w.expert_up = forward.Take(t * picks * c.moe_intermediate_size);
    w.expert_rows = forward.Take(t * picks * c.hidden_size);
    w.shared_rows = forward.Take(t * c.hidden_size);
  }

  Region head(common.end());
  w.head_rows = head.Take(uint64_t{kHeadRows} * c.hidden_size);
  w.logits = head.Take(uint64_t{kHeadRows} * c.vocab_size);

  w.bytes = std::max({attention.end(), forward.end(), head.end()});
  return w;
}

std::vector<uint64_t> WorkspaceSizes(const ModelConfig& config) {
  std::vector<uint64_t> sizes;
  for (uint32_t rows = kMinTileRows; rows <= kMaxTileRows; rows += kMinTileRows) {
    sizes.push_back(LayOutCpuWorkspace(config, rows).bytes);
  }
  return sizes;
}

size_t ChooseWorkspace(absl::Span<const uint64_t> sizes, uint64_t weight_bytes) {
  STRAIT_CHECK(!sizes.empty());
  size_t chosen = sizes.size() - 1;
  while (chosen > 0 && sizes[chosen] > weight_bytes / kWorkspaceDivisor) --chosen;
  return chosen;
}

const std::vector<uint64_t>& WorkspaceSizesOf(const StageCosts& costs, LayerRange layers) {
  return layers.end == costs.layer_bytes.size() ? costs.last_workspace_bytes
                                                : costs.workspace_bytes;
}

uint64_t StageFixedBytes(const StageCosts& costs, LayerRange layers) {
  const uint64_t weights =
      StageWeightBytes(costs.layer_bytes, costs.embedding_bytes, costs.head_bytes, layers);
  const std::vector<uint64_t>& sizes = WorkspaceSizesOf(costs, layers);
  return weights + costs.stage_bytes + layers.size() * costs.layer_workspace_bytes +
         sizes[ChooseWorkspace(sizes, weights)];
}

uint64_t StageEdgeBytes(const StageCosts& costs, LayerRange layers, uint32_t max_step_tokens) {
  const uint64_t num_edges = (layers.begin > 0) + (layers.end < costs.layer_bytes.size());
  return num_edges * (costs.edge_bytes + max_step_tokens * costs.edge_row_bytes);
}

}  // namespace strait
