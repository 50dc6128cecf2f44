// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/cuda_workspace.h"

#include <algorithm>

#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/moe/moe.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "worker/model/cuda/prompt_plan.h"
#include "worker/model/cuda/weights.h"

namespace strait {
namespace {

constexpr int32_t kSmallestExpertTile = 8;

uint64_t Padded(uint64_t elements) {
  return static_cast<uint64_t>(cuda::AlignedStride(static_cast<int64_t>(elements)));
}

// For tiles of limits->tile_rows rows.
void LimitPlans(const ModelConfig& c, const CudaTraits& traits, StepLimits* limits) {
  const auto rows = static_cast<int32_t>(limits->tile_rows);
  const auto heads = static_cast<int32_t>(c.num_attention_heads);
  if (!traits.deterministic) {
    limits->mla = cuda::MaxMlaPlan(traits.num_multiprocessors, limits::kMaxStepSequences, rows,
                                   heads, c.max_position_embeddings, false);
    limits->plan_bytes = static_cast<uint64_t>(cuda::MlaPlanBytes(limits->mla));
    return;
  }
  const cuda::MlaPartLimits parts =
      cuda::MaxMlaParts(traits.num_multiprocessors, limits::kMaxStepSequences, rows, heads,
                        c.max_position_embeddings, kCudaFixedPartials);
  limits->mla = parts.plan;
  limits->plan_bytes = static_cast<uint64_t>(parts.plan_bytes);
}

// Room for the codes of whatever products of fp8 weights read, one after the other.
void LayOutCodes(const ModelConfig& c, uint64_t tile_rows, Region& region, CudaWorkspace* w) {
  uint64_t codes = 0;
  uint64_t scales = 0;
  const auto add = [&](uint64_t rows, uint64_t dim) {
    codes = std::max(codes, rows * Padded(dim));
    scales = std::max(scales, rows * Region::ScaleCount(1, dim));
  };
  add(tile_rows, c.hidden_size);
  add(tile_rows, c.q_lora_rank);
  add(tile_rows, uint64_t{c.num_attention_heads} * c.v_head_dim);
  add(tile_rows, c.intermediate_size);
  if (c.n_routed_experts > 0) {
    add(tile_rows * (c.num_experts_per_tok + c.n_shared_experts), c.moe_intermediate_size);
  }
  w->x_codes = region.Take<uint8_t>(codes);
  w->x_scales = region.Take<float>(scales);
}

}  // namespace

uint64_t HeadTableBytes(const StepLimits& limits) {
  Region region(nullptr);
  region.Take<cuda::SampleRow>(limits.head_rows);
  region.Take<int32_t>(limits.head_rows);
  region.Take<cuda::TokenEntry>(limits.head_entries);
  return region.end();
}

CudaWorkspace LayOutCudaWorkspace(const ModelConfig& c, LayerRange layers, const StepLimits& limits,
                                  Region& region) {
  const uint64_t t = limits.tile_rows;
  const uint64_t heads = c.num_attention_heads;
  const uint64_t rank = c.kv_lora_rank;
  const uint64_t rope = c.qk_rope_head_dim;
  const bool moe = c.n_routed_experts > 0;
  CudaWorkspace w;
  w.hidden = region.Take<float>(t * c.hidden_size);
  w.normed = region.Take<cuda::Bf16>(t * Padded(c.hidden_size));
  w.fixed_order = limits.deterministic;
  w.split_sums = region.Take<float>(limits.deterministic ? 0 : kCudaSplitFloats);
  if (limits.fp8_activations) LayOutCodes(c, t, region, &w);
  w.cos_sin = region.Take<float>(t * rope);
  w.handed = region.Take<uint64_t>(uint64_t{cuda::kMaxChooseTokens} * c.n_routed_experts);
  w.tables = region.Take<std::byte>(limits.table_bytes);
  w.plan = region.Take<std::byte>(limits.plan_bytes);
  w.copies = region.Take<std::byte>(kCudaCopyStagingBytes);
  const auto partial_rows = static_cast<uint64_t>(limits.mla.max_partials) * cuda::kMlaTileRows;
  w.partial_out = region.Take<float>(partial_rows * rank);
  w.partial_lse = region.Take<float>(partial_rows);
  const bool is_last = layers.end == c.num_hidden_layers;
  w.sampled_ids = region.Take<int32_t>(is_last ? limits::kMaxStepTokens : 0);

  const Region common = region;
  Region attention = common;
  w.q_a = attention.Take<float>(t * c.q_lora_rank);
  w.q_a_normed = attention.Take<cuda::Bf16>(t * Padded(c.q_lora_rank));
  w.q = attention.Take<cuda::Bf16>(t * heads * PaddedQHead(c));
  w.kv_a = attention.Take<float>(t * (rank + rope));
  w.q_cat = attention.Take<cuda::Bf16>(t * heads * (rank + rope));
  w.o_latent = attention.Take<cuda::Bf16>(t * heads * rank);
  w.attended = attention.Take<cuda::Bf16>(t * Padded(heads * c.v_head_dim));
  const auto keys = static_cast<uint64_t>(limits.expanded_keys);
  w.key_rows = attention.Take<int32_t>(keys);
  w.rope_keys = attention.Take<cuda::Bf16>(keys * rope);
  w.keys = w.o_latent;
  w.prompt_state = reinterpret_cast<float*>(w.q_cat);
  STRAIT_CHECK(keys * (c.qk_nope_head_dim + c.v_head_dim) <= t * rank);

  Region forward = common;
  w.activated = forward.Take<cuda::Bf16>(t * Padded(c.intermediate_size));
  if (moe) {
    const uint64_t choices = t * c.num_experts_per_tok;
    w.router_logits = forward.Take<float>(t * c.n_routed_experts);
    w.expert_weights = forward.Take<float>(choices);
    w.expert_ids = forward.Take<int32_t>(choices);
    w.row_of = forward.Take<int32_t>(choices);
    const uint64_t rows = choices + t * c.n_shared_experts;
    w.token_of = forward.Take<int32_t>(rows);
    w.tiles = forward.Take<cuda::RowTile>(static_cast<uint64_t>(
        cuda::MaxExpertTiles(static_cast<int64_t>(t), c.num_experts_per_tok, c.n_routed_experts,
                             c.n_shared_experts, kSmallestExpertTile)));
    w.num_tiles = forward.Take<int32_t>(1);
    w.expert_activated = forward.Take<cuda::Bf16>(rows * Padded(c.moe_intermediate_size));
    w.expert_rows = forward.Take<cuda::Bf16>(rows * c.hidden_size);
  }

  Region head = common;
  if (is_last) {
    const uint64_t rows = limits.head_rows;
    w.head_normed = head.Take<cuda::Bf16>(rows * Padded(c.hidden_size));
    w.logits = head.Take<float>(rows * c.vocab_size);
    w.adjusted = head.Take<float>(rows * c.vocab_size);
    w.head_tables = head.Take<std::byte>(HeadTableBytes(limits));
    w.results = head.Take<cuda::SampleResult>(rows);
  }
  region = std::max({attention, forward, head},
                    [](const Region& a, const Region& b) { return a.end() < b.end(); });
  return w;
}

bool ExpandsPrompts(const ModelConfig& c, const CudaTraits& traits) {
  return traits.has_mha_prefill && !traits.deterministic && traits.row_format == RowFormat::kBf16 &&
         traits.max_step_tokens >= static_cast<uint32_t>(kMinExpandedTokens) &&
         c.kv_lora_rank == cuda::kMhaRank && c.qk_rope_head_dim == cuda::kMhaRope &&
         c.qk_nope_head_dim == cuda::kMhaNope && c.v_head_dim == cuda::kMhaValue;
}

StepLimits MakeStepLimits(const ModelConfig& c, LayerRange layers, uint32_t tile_rows,
                          const CudaTraits& traits) {
  StepLimits limits;
  limits.tile_rows = tile_rows;
  limits.deterministic = traits.deterministic;
  limits.fp8_activations = traits.fp8_activations;
  if (ExpandsPrompts(c, traits) && tile_rows >= static_cast<uint32_t>(kMinExpandedTokens)) {
    // As many as o_latent has room for.
    const uint64_t keys = uint64_t{tile_rows} * c.kv_lora_rank / (cuda::kMhaNope + cuda::kMhaValue);
    limits.expanded_keys = static_cast<int32_t>(keys / cuda::kMhaTileKeys * cuda::kMhaTileKeys);
  }
  const uint64_t row_bytes = uint64_t{c.vocab_size} * sizeof(float);
  limits.head_rows = static_cast<uint32_t>(
      std::clamp<uint64_t>(kCudaMaxLogitBytes / row_bytes, kCudaMinHeadRows, kCudaMaxHeadRows));
  // A row's own lists: each token at most once, biases, bans.
  limits.head_entries = std::max<uint64_t>(
      uint64_t{c.vocab_size} + limits::kMaxLogitBias + 2 * limits::kMaxStopTokens, 1 << 16);
  Region tables(nullptr);
  tables.Take<int32_t>(limits::kMaxStepTokens);
  tables.Take<int32_t>(limits::kMaxStepTokens);
  tables.Take<int32_t>(limits::kMaxStepTokens);
  tables.Take<cuda::MlaSegment>(uint64_t{layers.size()} * limits::kMaxStepSequences);
  limits.table_bytes = tables.end();
  LimitPlans(c, traits, &limits);
  return limits;
}

}  // namespace strait
