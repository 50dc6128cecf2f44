// SPDX-License-Identifier: Apache-2.0
//
// Workspace holds the activations of one tile: the rows of a step that go through the layers
// together.
//
// Owns:    one mapping, taken at load; nothing large is taken while stepping.
// Thread:  loop thread only.
// Shapes:  at each member; tile_rows is T. Buffers of attention, feed-forward and head lie over
//          each other.
// Limits:  kMaxTileRows, kMaxHeadRows, kAttentionRows.
// Why:     a step of any size runs tile by tile, all layers for one tile before the next: rows
//          only look at earlier rows, which are in the cache by then. So workspace is bounded by
//          the stage, not the step.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "proto/model_config.h"
#include "worker/model/memory.h"

namespace strait {

inline constexpr uint32_t kMaxTileRows = 512;
inline constexpr uint32_t kMinTileRows = 64;
inline constexpr uint32_t kAttentionRows = 64;  // whose heads' latents exist at a time
inline constexpr uint32_t kHeadRows = 16;       // whose logits exist at a time
// A tile is as large as fits in this part of the stage's weights, within the limits above.
inline constexpr uint64_t kWorkspaceDivisor = 20;

struct Workspace {
  // H hidden_size, A num_attention_heads, Q qk_head_dim, D qk_rope_head_dim, R kv_lora_rank, K
  // experts per token, E experts, I intermediate_size, M moe_intermediate_size, S n_shared_experts
  // * M, V vocab_size.
  uint32_t tile_rows = 0;
  float* hidden = nullptr;   // [T, H]
  float* normed = nullptr;   // [T, H]
  float* cos_sin = nullptr;  // [T, D]

  // --- Attention ---
  float* q_a = nullptr;       // [T, q_lora_rank]
  float* q = nullptr;         // [T, A, Q]
  float* kv_a = nullptr;      // [T, R + D]
  float* q_rope = nullptr;    // [T, A, D]
  float* attended = nullptr;  // [T, A, v_head_dim]
  float* q_latent = nullptr;  // [kAttentionRows, A, R]
  float* o_latent = nullptr;  // [kAttentionRows, A, R]

  // --- Feed-forward ---
  float* gate = nullptr;            // [T, I] or, for shared experts, [T, S]
  float* up = nullptr;              // [T, I] or [T, S]
  float* router_logits = nullptr;   // [T, E]
  float* expert_weights = nullptr;  // [T, K]
  int32_t* expert_ids = nullptr;    // [T, K]
  int32_t* row_of = nullptr;        // [T, K]
  int32_t* token_of = nullptr;      // [T * K]
  int32_t* group_begin = nullptr;   // [E + 1]
  float* expert_gate = nullptr;     // [T * K, M]
  float* expert_up = nullptr;       // [T * K, M]
  float* expert_rows = nullptr;     // [T * K, H]
  float* shared_rows = nullptr;     // [T, H]

  // --- Head ---
  float* head_rows = nullptr;  // [kHeadRows, H]
  float* logits = nullptr;     // [kHeadRows, V]

  Mapping memory;
};

// Bytes for tiles of `tile_rows`.
uint64_t WorkspaceBytes(const ModelConfig& config, uint32_t tile_rows);

// For a stage whose weights take `weight_bytes`. ResourceExhausted if the system has no memory.
absl::StatusOr<Workspace> CreateWorkspace(const ModelConfig& config, uint64_t weight_bytes);

}  // namespace strait
