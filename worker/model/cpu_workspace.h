// SPDX-License-Identifier: Apache-2.0
//
// CpuWorkspace holds the activations of one tile: the rows of a step that go through the layers
// together.
//
// Owns:    one mapping, taken at load; nothing large is taken while stepping.
// Thread:  loop thread only.
// Shapes:  at each member; tile_rows is T. Buffers of attention, feed-forward and head lie over
//          each other.
// Limits:  those of proto/model/stage_memory.h, which lays it out.
// Why:     a step of any size runs tile by tile, all layers for one tile before the next: rows
//          only look at earlier rows, which are in the cache by then. So workspace is bounded by
//          the stage, not the step.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "proto/model/model_config.h"
#include "proto/model/stage_memory.h"
#include "worker/model/memory.h"

namespace strait {

struct CpuWorkspace {
  // Letters as in proto/model/stage_memory.h.
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

// For a stage whose weights take `weight_bytes`. ResourceExhausted if the system has no memory.
absl::StatusOr<CpuWorkspace> CreateCpuWorkspace(const ModelConfig& config, uint64_t weight_bytes);

}  // namespace strait
