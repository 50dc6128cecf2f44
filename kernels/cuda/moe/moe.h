// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts around the experts' products: which experts a token goes to, the lists that a
// grouped product needs, the weighted sum of what the experts answer. Semantics: kernels/moe.h.
//
// Stream:  the parameter; asynchronous.
// Shapes:  below.
// Errors:  CUDA's launch errors; cudaErrorInvalidValue beyond kMaxRouterExperts.
// Limits:  kMaxRouterExperts.
// Why:     nothing goes back to the host: grids are sized by what a step can need at most, blocks
//          beyond the lists' ends return at once. Rows lie by ascending expert, then token; tiles
//          too, but the shared experts' come first. No atomics decide an order.
//
// Intensity: the router works on n_routed_experts numbers a token: bound by the launch. The sum
// reads num_experts_per_tok rows a token: bound by memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gemm/gemm.h"
#include "kernels/moe.h"

namespace strait::cuda {

inline constexpr int32_t kMaxRouterExperts = 4096;

// Pointers of `params` are on the device.
cudaError_t Router(const RouterParams& params, cudaStream_t stream);

struct ExpertListsParams {
  const int32_t* expert_ids = nullptr;  // [num_tokens, num_experts_per_tok]
  int32_t num_tokens = 0;
  int32_t num_experts_per_tok = 0;
  int32_t n_routed_experts = 0;
  int32_t num_shared = 0;  // experts n_routed_experts, … that every token goes to
  int32_t tile_rows = 0;   // of the products to come
  // [num_tokens * (num_experts_per_tok + num_shared)] token of a grouped row, out: rows of routed
  // experts, then for each shared one all tokens in order.
  int32_t* token_of = nullptr;
  int32_t* row_of = nullptr;  // [num_tokens, num_experts_per_tok] grouped row of a choice, out
  RowTile* tiles = nullptr;   // [MaxExpertTiles()] shared experts', then the others' in order, out
  int32_t* num_tiles = nullptr;  // out
};

// What *num_tiles never exceeds.
constexpr int64_t MaxExpertTiles(int64_t num_tokens, int64_t num_experts_per_tok,
                                 int64_t num_experts, int64_t num_shared, int64_t tile_rows) {
  const int64_t num_choices = num_tokens * num_experts_per_tok;
  const int64_t used = num_choices < num_experts ? num_choices : num_experts;
  return used + num_choices / tile_rows + num_shared * ((num_tokens + tile_rows - 1) / tile_rows);
}

cudaError_t ExpertLists(const ExpertListsParams& params, cudaStream_t stream);

inline constexpr int32_t kMaxChooseTokens = 4;  // of ChooseExperts

// All of it for a few tokens in one launch, from the residual to the lists: a norm, the router's
// product, Router and ExpertLists. Logits are sums in another order than the products'.
struct ChooseExpertsParams {
  const float* x = nullptr;  // [num_tokens, dim] fp32, dense
  const float* norm_weight = nullptr;
  float eps = 1e-6f;
  Bf16* normed = nullptr;  // [num_tokens, dim] bf16, rows normed_stride apart, out
  int64_t normed_stride = 0;
  Matrix gate;                 // [n_routed_experts, dim] bf16
  Matrix gate_rest;            // the same, added; may be empty
  float* logits = nullptr;     // [num_tokens, n_routed_experts] out; the router's are not read
  uint64_t* handed = nullptr;  // [num_tokens, n_routed_experts] 0 before and after
  RouterParams router;
  ExpertListsParams lists;
};

// Whether it is made for this many tokens of this shape.
bool CanChooseExperts(const ChooseExpertsParams& params);
// REQUIRES: CanChooseExperts.
cudaError_t ChooseExperts(const ChooseExpertsParams& params, cudaStream_t stream);

// y[t] += sum over j, in order, of weights[t, j] * expert_rows[row_of[t, j]], then of the shared
// experts' rows of t. With norm_weight, normed[t] = RMS norm of the new y[t] (norm.h): the next
// layer's first.
struct ExpertSumParams {
  const Bf16* expert_rows = nullptr;  // [*, dim] bf16, rows expert_stride apart
  int64_t expert_stride = 0;
  const int32_t* row_of = nullptr;        // [num_tokens, num_experts_per_tok]
  const float* expert_weights = nullptr;  // [num_tokens, num_experts_per_tok]
  float* y = nullptr;                     // [num_tokens, dim] fp32, dense
  int64_t num_tokens = 0;
  int32_t num_experts_per_tok = 0;
  int32_t num_shared = 0;
  int32_t dim = 0;
  const float* norm_weight = nullptr;  // [dim] fp32; may be null: no norm
  float eps = 1e-6f;
  Bf16* normed = nullptr;  // [num_tokens, dim] bf16, rows normed_stride apart, out
  int64_t normed_stride = 0;
};

cudaError_t ExpertSum(const ExpertSumParams& params, cudaStream_t stream);

}  // namespace strait::cuda
