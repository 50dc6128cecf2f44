// SPDX-License-Identifier: Apache-2.0
//
// What a stage takes besides weights and pool: the activations of one tile, the rows of a step that
// go through the layers together. One set of pure functions, used by the coordinator to plan and by
// the worker to allocate.
//
// Thread:  pure functions.
// Limits:  kMinTileRows … kMaxTileRows; a tile is as large as fits in a kWorkspaceDivisor-th part of
//          the stage's weights.
// Why:     a worker's memory holds weights, pool and workspace; a planner that forgets one of them
//          plans stages that do not fit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "proto/model/model_config.h"

namespace strait {

inline constexpr uint32_t kMaxTileRows = 512;
inline constexpr uint32_t kMinTileRows = 64;    // tiles are multiples of it
inline constexpr uint32_t kAttentionRows = 64;  // whose heads' latents exist at a time
inline constexpr uint32_t kHeadRows = 16;       // whose logits exist at a time
inline constexpr uint64_t kWorkspaceDivisor = 20;

// Where each buffer begins, in bytes. Buffers of attention, feed-forward and head lie over each
// other. Elements are 4 bytes. H hidden_size, A num_attention_heads, Q qk_head_dim, D
// qk_rope_head_dim, R kv_lora_rank, K experts per token, E experts, I intermediate_size, M
// moe_intermediate_size, S n_shared_experts * M, V vocab_size, T rows of a tile.
struct CpuWorkspaceLayout {
  uint64_t hidden = 0;   // [T, H]
  uint64_t normed = 0;   // [T, H]
  uint64_t cos_sin = 0;  // [T, D]

  // --- Attention ---
  uint64_t q_a = 0;       // [T, q_lora_rank]
  uint64_t q = 0;         // [T, A, Q]
  uint64_t kv_a = 0;      // [T, R + D]
  uint64_t q_rope = 0;    // [T, A, D]
  uint64_t attended = 0;  // [T, A, v_head_dim]
  uint64_t q_latent = 0;  // [kAttentionRows, A, R]
  uint64_t o_latent = 0;  // [kAttentionRows, A, R]

  // --- Feed-forward ---
  uint64_t gate = 0;            // [T, I] or, for shared experts, [T, S]
  uint64_t up = 0;              // [T, I] or [T, S]
  uint64_t router_logits = 0;   // [T, E]
  uint64_t expert_weights = 0;  // [T, K]
  uint64_t expert_ids = 0;      // [T, K]
  uint64_t row_of = 0;          // [T, K]
  uint64_t token_of = 0;        // [T * K]
  uint64_t group_begin = 0;     // [E + 1]
  uint64_t expert_gate = 0;     // [T * K, M]
  uint64_t expert_up = 0;       // [T * K, M]
  uint64_t expert_rows = 0;     // [T * K, H]
  uint64_t shared_rows = 0;     // [T, H]

  // --- Head ---
  uint64_t head_rows = 0;  // [kHeadRows, H]
  uint64_t logits = 0;     // [kHeadRows, V]

  uint64_t bytes = 0;  // of all
};

CpuWorkspaceLayout LayOutCpuWorkspace(const ModelConfig& config, uint32_t tile_rows);

// Bytes for tiles of kMinTileRows, twice as many, … kMaxTileRows rows.
std::vector<uint64_t> WorkspaceSizes(const ModelConfig& config);

// Which of `sizes` a stage takes whose weights have `weight_bytes`: the last that is small enough,
// else the first. REQUIRES: sizes rise and are not empty.
size_t ChooseWorkspace(absl::Span<const uint64_t> sizes, uint64_t weight_bytes);

// How a kind of worker counts the memory of its stages, told by the worker where it is another than
// the CPU's (ModelConfig's weights, WorkspaceSizes). A stage takes at most its layers' weights, what
// comes with its first and last layer, blocks, the workspace that its weights choose, with a share
// for each layer, and what its edges take: one to the stage before it, one to the stage after it.
struct StageCosts {
  std::vector<uint64_t> layer_bytes;  // [num_hidden_layers] weights
  uint64_t embedding_bytes = 0;       // with the first layer
  uint64_t head_bytes = 0;            // with the last
  uint64_t block_bytes = 0;           // a latent block of one layer, and what it takes besides
  uint64_t layer_workspace_bytes = 0;
  uint64_t stage_bytes = 0;               // of any stage besides: what its parts are rounded up by
  std::vector<uint64_t> workspace_bytes;  // rising; for ChooseWorkspace
  std::vector<uint64_t> last_workspace_bytes;  // the same, of a stage with the last layer
  // Of each edge, where edges may lie in the same memory; else 0.
  uint64_t edge_bytes = 0;
  uint64_t edge_row_bytes = 0;  // more, for each row that a step may have
};

// The sizes that a stage with these layers chooses from.
const std::vector<uint64_t>& WorkspaceSizesOf(const StageCosts& costs, LayerRange layers);

// Weights and workspace.
uint64_t StageFixedBytes(const StageCosts& costs, LayerRange layers);

// What the edges of a stage take. REQUIRES: max_step_tokens <= limits::kMaxStepTokens.
uint64_t StageEdgeBytes(const StageCosts& costs, LayerRange layers, uint32_t max_step_tokens);

}  // namespace strait
