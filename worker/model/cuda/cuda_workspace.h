// SPDX-License-Identifier: Apache-2.0
//
// What a stage has on the device besides weights, cache and page tables: the activations of one tile of
// rows, and the tables of one step.
//
// Borrows: one region of device memory.
// Thread:  a plain value.
// Shapes:  at each member; T is tile_rows. Buffers of attention, feed-forward and head lie over
//          each other.
// Limits:  kCudaMinTileRows to kCudaMaxTileRows, in steps of the least; StepLimits.
// Why:     all sizes follow from the configuration and the pool: stage_layout.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/gemm/gemm.h"
#include "kernels/cuda/rowwise/sample.h"
#include "proto/base/limits.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "worker/model/cuda/device_copies.h"
#include "worker/model/cuda/region.h"

namespace strait {

inline constexpr uint32_t kCudaMaxTileRows = limits::kMaxStepTokens;
inline constexpr uint32_t kCudaMinTileRows = 64;
inline constexpr uint32_t kCudaMaxFixedTileRows = 512;  // deterministic: bounds the plans' memory
// Partial results of a deterministic plan in one launch; 128 KiB each at rank 512.
inline constexpr int32_t kCudaFixedPartials = 1024;
inline constexpr uint64_t kCudaMaxLogitBytes = 128 << 20;  // of one product of the head
inline constexpr uint32_t kCudaMaxHeadRows = 256;
inline constexpr uint32_t kCudaMinHeadRows = 16;
inline constexpr uint64_t kCudaSplitFloats = 8 << 20;  // partial sums of products that split K

// What sizes depend on besides the model and the stage's spec.
struct CudaTraits {
  int num_multiprocessors = 0;
  bool deterministic = false;
  RowFormat row_format = RowFormat::kBf16;  // of the latent cache; not kFp32
  bool fp8_activations = false;
  uint32_t max_step_tokens = kCudaMaxTileRows;  // no tile is larger
  bool has_mha_prefill = false;                 // the device has the kernel of the expanded form
  uint64_t slab_bytes = Region::kAlign;  // what is taken is a multiple of it (device_arena.h)

  uint64_t RoundUp(uint64_t bytes) const {
    return (bytes + slab_bytes - 1) / slab_bytes * slab_bytes;
  }
};

// Whether prompts attend in the expanded form where a tile is large enough for them.
bool ExpandsPrompts(const ModelConfig& config, const CudaTraits& traits);

// What a step can need at most.
struct StepLimits {
  uint32_t tile_rows = 0;
  uint32_t head_rows = 0;     // whose logits exist at a time
  uint64_t head_entries = 0;  // penalties, biases, bans of these rows
  uint64_t table_bytes = 0;   // step tables: rows, segments
  cuda::MlaPlanLimits mla;    // of one launch of attention
  uint64_t plan_bytes = 0;    // of all launches' plans
  int32_t expanded_keys = 0;  // rows; of one launch of the expanded form
  bool deterministic = false;
  bool fp8_activations = false;
};

struct CudaWorkspace {
  // H hidden_size, A heads, Q padded q head, D qk_rope_head_dim, R kv_lora_rank, C R + D rounded up
  // to 8, K experts per token, S shared ones, E experts, I and M intermediate sizes, V vocab_size.
  float* hidden = nullptr;       // [T, H]
  cuda::Bf16* normed = nullptr;  // [T, H padded]
  float* split_sums = nullptr;   // [kCudaSplitFloats]; deterministic: null
  bool fixed_order = false;      // products sum in an order that the weight alone says
  // With fp8 activations: what the next product of fp8 weights reads; else null.
  uint8_t* x_codes = nullptr;    // [most elements of padded rows]
  float* x_scales = nullptr;     // [most of their scales]
  float* cos_sin = nullptr;      // [T, D]
  uint64_t* handed = nullptr;    // [kMaxChooseTokens, E], 0 between kernels
  std::byte* tables = nullptr;   // [StepLimits::table_bytes]
  std::byte* plan = nullptr;     // [StepLimits::plan_bytes]
  std::byte* copies = nullptr;   // [kCudaCopyStagingBytes], of copies of rows beside the steps
  float* partial_out = nullptr;  // [max_partials, 64, R]
  float* partial_lse = nullptr;  // [max_partials, 64]
  // By LogitsRequest of the step before: it lies beside the layers' buffers, not under them.
  int32_t* sampled_ids = nullptr;  // [kMaxStepTokens]; last stage

  // --- Attention ---
  float* q_a = nullptr;              // [T, q_lora_rank]
  cuda::Bf16* q_a_normed = nullptr;  // [T, q_lora_rank padded]
  cuda::Bf16* q = nullptr;           // [T, A, Q]
  float* kv_a = nullptr;             // [T, R + D]
  cuda::Bf16* q_cat = nullptr;       // [T, A, C]: latent, then rope
  cuda::Bf16* o_latent = nullptr;    // [T, A, R]
  cuda::Bf16* attended = nullptr;    // [T, A * v_head_dim padded]
  // Prompts in the expanded form, when the absorbed form is through with q_cat and o_latent: keys
  // and values lie over o_latent, sums between spans in q_cat's latent columns. X expanded_keys.
  int32_t* key_rows = nullptr;      // [X] of the pool
  cuda::Bf16* rope_keys = nullptr;  // [X, D]
  cuda::Bf16* keys = nullptr;       // [X, A, nope + value]
  float* prompt_state = nullptr;    // [T, A, kMhaStateFloats of C / 2]

  // --- Feed-forward ---
  cuda::Bf16* activated = nullptr;  // [T, I padded]
  float* router_logits = nullptr;   // [T, E]
  float* expert_weights = nullptr;  // [T, K]
  int32_t* expert_ids = nullptr;    // [T, K]
  int32_t* row_of = nullptr;        // [T, K]
  int32_t* token_of = nullptr;      // [T * (K + S)]
  cuda::RowTile* tiles = nullptr;   // [MaxExpertTiles at 8 rows]
  int32_t* num_tiles = nullptr;
  cuda::Bf16* expert_activated = nullptr;  // [T * (K + S), M padded]
  cuda::Bf16* expert_rows = nullptr;       // [T * (K + S), H]

  // --- Head; B head_rows ---
  cuda::Bf16* head_normed = nullptr;      // [B, H padded]
  float* logits = nullptr;                // [B, V]
  float* adjusted = nullptr;              // [B, V]
  std::byte* head_tables = nullptr;       // [HeadTableBytes]
  cuda::SampleResult* results = nullptr;  // [B]
};

// Row indices, sampling rows, entries of one product of the head.
uint64_t HeadTableBytes(const StepLimits& limits);

StepLimits MakeStepLimits(const ModelConfig& config, LayerRange layers, uint32_t tile_rows,
                          const CudaTraits& traits);

CudaWorkspace LayOutCudaWorkspace(const ModelConfig& config, LayerRange layers,
                                  const StepLimits& limits, Region& region);

}  // namespace strait
