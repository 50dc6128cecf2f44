// SPDX-License-Identifier: Apache-2.0
#include "worker/model/workspace.h"

#include <algorithm>
#include <utility>

#include "proto/status_macros.h"

namespace strait {
namespace {

constexpr uint64_t kAlign = 64;  // bytes; a cache line

// Gives out parts of a region; without a base it only measures.
class Layout {
 public:
  Layout(std::byte* base, uint64_t begin) : base_(base), end_(begin) {}

  template <class T>
  void Take(uint64_t count, T** out) {
    if (base_ != nullptr && count > 0) *out = reinterpret_cast<T*>(base_ + end_);
    end_ = (end_ + count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }
  uint64_t end() const { return end_; }

 private:
  std::byte* const base_;
  uint64_t end_;
};

// Sets every pointer if there is a base; returns the bytes that all take.
uint64_t LayOut(const ModelConfig& c, uint32_t tile_rows, std::byte* base, Workspace* w) {
  const uint64_t t = tile_rows;
  const uint64_t heads = c.num_attention_heads;
  const bool moe = c.n_routed_experts > 0;
  const uint64_t picks = moe ? c.num_experts_per_tok : 0;
  const uint64_t shared = moe ? uint64_t{c.n_shared_experts} * c.moe_intermediate_size : 0;

  Layout common(base, 0);
  common.Take(t * c.hidden_size, &w->hidden);
  common.Take(t * c.hidden_size, &w->normed);
  common.Take(t * c.qk_rope_head_dim, &w->cos_sin);

  Layout attention(base, common.end());
  attention.Take(t * c.q_lora_rank, &w->q_a);
  attention.Take(t * heads * c.qk_head_dim(), &w->q);
  attention.Take(t * (c.kv_lora_rank + c.qk_rope_head_dim), &w->kv_a);
  attention.Take(t * heads * c.qk_rope_head_dim, &w->q_rope);
  attention.Take(t * heads * c.v_head_dim, &w->attended);
  const uint64_t attention_rows = std::min(tile_rows, kAttentionRows);
  attention.Take(attention_rows * heads * c.kv_lora_rank, &w->q_latent);
  attention.Take(attention_rows * heads * c.kv_lora_rank, &w->o_latent);

  Layout forward(base, common.end());
  const uint64_t width = std::max<uint64_t>(c.intermediate_size, shared);
  forward.Take(t * width, &w->gate);
  forward.Take(t * width, &w->up);
  if (moe) {
    forward.Take(t * c.n_routed_experts, &w->router_logits);
    forward.Take(t * picks, &w->expert_weights);
    forward.Take(t * picks, &w->expert_ids);
    forward.Take(t * picks, &w->row_of);
    forward.Take(t * picks, &w->token_of);
    forward.Take(uint64_t{c.n_routed_experts} + 1, &w->group_begin);
    forward.Take(t * picks * c.moe_intermediate_size, &w->expert_gate);
    forward.Take(t * picks * c.moe_intermediate_size, &w->expert_up);
    forward.Take(t * picks * c.hidden_size, &w->expert_rows);
    forward.Take(t * c.hidden_size, &w->shared_rows);
  }

  Layout head(base, common.end());
  head.Take(uint64_t{kHeadRows} * c.hidden_size, &w->head_rows);
  head.Take(uint64_t{kHeadRows} * c.vocab_size, &w->logits);

  return std::max({attention.end(), forward.end(), head.end()});
}

}  // namespace

uint64_t WorkspaceBytes(const ModelConfig& config, uint32_t tile_rows) {
  Workspace measured;
  return LayOut(config, tile_rows, nullptr, &measured);
}

absl::StatusOr<Workspace> CreateWorkspace(const ModelConfig& config, uint64_t weight_bytes) {
  uint32_t tile_rows = kMaxTileRows;
  while (tile_rows > kMinTileRows &&
         WorkspaceBytes(config, tile_rows) > weight_bytes / kWorkspaceDivisor) {
    tile_rows -= kMinTileRows;
  }
  Workspace workspace;
  workspace.tile_rows = tile_rows;
  STRAIT_ASSIGN_OR_RETURN(workspace.memory,
                          Mapping::Create(WorkspaceBytes(config, tile_rows), "workspace"));
  LayOut(config, tile_rows, workspace.memory.data(), &workspace);
  return workspace;
}

}  // namespace strait
