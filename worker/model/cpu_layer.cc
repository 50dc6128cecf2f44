// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cpu_layer.h"

#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "worker/model/kernel_names.h"

namespace strait {
namespace {

GemmParams Product(const float* x, int64_t x_stride, const WeightMatrix& weight, float* y,
                   int64_t y_stride, int64_t num_rows) {
  GemmParams p;
  p.x = x;
  p.x_stride = x_stride;
  p.weight = weight;
  p.y = y;
  p.y_stride = y_stride;
  p.num_rows = num_rows;
  return p;
}

void Activate(cpu::Context& context, float* gate, const float* up, int64_t width,
              int64_t num_rows) {
  SiluMulParams p;
  p.gate = gate;
  p.up = up;
  p.y = gate;
  p.gate_stride = p.up_stride = p.y_stride = width;
  p.num_rows = num_rows;
  p.dim = width;
  cpu::SiluMul(context, p);
}

}  // namespace

CpuLayers::CpuLayers(cpu::Context& context, const ModelConfig& config, const CacheLayout& layout,
                     std::byte* blocks, CpuWorkspace& workspace)
    : context_(context),
      config_(config),
      layout_(layout),
      blocks_(blocks),
      ws_(workspace),
      rope_(RopeConfigOf(config)),
      inv_freq_(config.qk_rope_head_dim / 2),
      rope_scaling_(RopeAttentionScaling(rope_)),
      softmax_scale_(AttentionSoftmaxScale(static_cast<int32_t>(config.qk_head_dim()), rope_)) {
  RopeInverseFrequencies(rope_, inv_freq_.data());
  products_.reserve(2 * (size_t{config.n_routed_experts} + 1));
}

void CpuLayers::Rotate(const Tile& tile) {
  RopeTableParams p;
  p.positions = tile.positions;
  p.inv_freq = inv_freq_.data();
  p.attention_scaling = rope_scaling_;
  p.num_tokens = tile.num_rows;
  p.dim = config_.qk_rope_head_dim;
  p.cos_sin = ws_.cos_sin;
  cpu::RopeTable(context_, p);
}

void CpuLayers::Norm(const float* x, int64_t x_stride, VectorView weight, double eps, float* y,
                     int64_t y_stride, uint32_t num_rows) {
  RmsNormParams p;
  p.x = x;
  p.x_stride = x_stride;
  p.weight = weight.data;
  p.weight_type = WeightType::kFp32;
  p.eps = static_cast<float>(eps);
  p.y = y;
  p.y_stride = y_stride;
  p.num_rows = num_rows;
  p.dim = weight.size;
  cpu::RmsNorm(context_, p);
}

void CpuLayers::Run(const LayerWeights& weights, const uint32_t* const* page_tables,
                    const Tile& tile, float* hidden) {
  const int64_t size = config_.hidden_size;
  const double eps = config_.rms_norm_eps;
  Norm(hidden, size, weights.input_layernorm, eps, ws_.normed, size, tile.num_rows);
  Project(weights.attention, tile);
  RotateProjected(tile);
  Attend(weights.attention, page_tables, tile);
  const WeightMatrix& o_proj = weights.attention.o_proj;
  GemmParams output = Product(ws_.attended, o_proj.cols, o_proj, hidden, size, tile.num_rows);
  output.accumulate = true;
  cpu::Gemm(context_, output);

  Norm(hidden, size, weights.post_attention_layernorm, eps, ws_.normed, size, tile.num_rows);
  if (config_.IsMoeLayer(weights.layer)) {
    Moe(weights.moe, tile.num_rows, hidden);
  } else {
    Dense(weights.mlp, tile.num_rows, hidden);
  }
}

// normed -> q, and kv_a with its latent normed.
void CpuLayers::Project(const AttentionWeights& weights, const Tile& tile) {
  const int64_t size = config_.hidden_size;
  const int64_t q_width = int64_t{config_.num_attention_heads} * config_.qk_head_dim();
  const int64_t kv_width = layout_.kv_lora_rank + layout_.qk_rope_head_dim;
  const bool lora = config_.q_lora_rank > 0;
  const int64_t rank = config_.q_lora_rank;

  products_.clear();
  products_.push_back(
      lora ? Product(ws_.normed, size, weights.q_a_proj, ws_.q_a, rank, tile.num_rows)
           : Product(ws_.normed, size, weights.q_proj, ws_.q, q_width, tile.num_rows));
  products_.push_back(
      Product(ws_.normed, size, weights.kv_a_proj_with_mqa, ws_.kv_a, kv_width, tile.num_rows));
  cpu::GroupedGemm(context_, products_);
  if (lora) {
    Norm(ws_.q_a, rank, weights.q_a_layernorm, kLoraNormEps, ws_.q_a, rank, tile.num_rows);
    cpu::Gemm(context_, Product(ws_.q_a, rank, weights.q_b_proj, ws_.q, q_width, tile.num_rows));
  }
  Norm(ws_.kv_a, kv_width, weights.kv_a_layernorm, kLoraNormEps, ws_.kv_a, kv_width, tile.num_rows);
}

// The rope parts: of q to q_rope, of kv_a in place.
void CpuLayers::RotateProjected(const Tile& tile) {
  const int64_t heads = config_.num_attention_heads;
  const int64_t q_head = config_.qk_head_dim();
  const int64_t dim = config_.qk_rope_head_dim;
  const int64_t kv_width = layout_.kv_lora_rank + dim;
  float* const q_part = ws_.q + config_.qk_nope_head_dim;
  float* const key = ws_.kv_a + layout_.kv_lora_rank;
  RopeParams p;
  p.cos_sin = ws_.cos_sin;
  p.num_tokens = tile.num_rows;
  p.dim = dim;
  p.x = q_part;
  p.x_token_stride = heads * q_head;
  p.x_head_stride = q_head;
  p.y = ws_.q_rope;
  p.y_token_stride = heads * dim;
  p.y_head_stride = dim;
  p.num_heads = heads;
  cpu::Rope(context_, p);
  p.x = key;
  p.y = key;
  p.x_token_stride = p.y_token_stride = kv_width;
  p.x_head_stride = p.y_head_stride = dim;
  p.num_heads = 1;
  cpu::Rope(context_, p);
}

// Appends the tile's rows to the cache, then attends: -> attended.
void CpuLayers::Attend(const AttentionWeights& weights, const uint32_t* const* page_tables,
                       const Tile& tile) {
  const int64_t heads = config_.num_attention_heads;
  const int64_t q_head = config_.qk_head_dim();
  const int64_t dim = config_.qk_rope_head_dim;
  const int64_t nope = config_.qk_nope_head_dim;
  const int64_t value = config_.v_head_dim;

  CacheAppendParams append;
  append.latent = ws_.kv_a;
  append.latent_stride = layout_.kv_lora_rank + dim;
  append.rope_key = ws_.kv_a + layout_.kv_lora_rank;
  append.rope_key_stride = layout_.kv_lora_rank + dim;
  append.positions = tile.positions;
  append.sequence_index = tile.sequence_index;
  append.is_cached = tile.is_cached;
  append.page_tables = page_tables;
  append.blocks = blocks_;
  append.layout = layout_;
  append.num_tokens = tile.num_rows;
  cpu::CacheAppend(context_, append);

  // The heads' latents are the widest activations by far, so they exist for a few rows at a time.
  for (uint32_t begin = 0; begin < tile.num_rows; begin += kAttentionRows) {
    const int64_t num_rows = std::min(kAttentionRows, tile.num_rows - begin);
    AbsorbQueryParams absorb;
    absorb.q_nope = ws_.q + begin * heads * q_head;
    absorb.q_token_stride = heads * q_head;
    absorb.q_head_stride = q_head;
    absorb.kv_b_proj = weights.kv_b_proj;
    absorb.q_latent = ws_.q_latent;
    absorb.num_tokens = num_rows;
    absorb.num_heads = heads;
    absorb.qk_nope_head_dim = nope;
    absorb.v_head_dim = value;
    cpu::AbsorbQuery(context_, absorb);

    MlaParams mla;
    mla.q_latent = ws_.q_latent;
    mla.q_rope = ws_.q_rope + begin * heads * dim;
    mla.positions = tile.positions + begin;
    mla.sequence_index = tile.sequence_index + begin;
    mla.page_tables = page_tables;
    mla.blocks = blocks_;
    mla.layout = layout_;
    mla.softmax_scale = softmax_scale_;
    mla.o_latent = ws_.o_latent;
    mla.num_tokens = num_rows;
    mla.num_heads = heads;
    cpu::Mla(context_, mla);

    ValueUpParams up;
    up.o_latent = ws_.o_latent;
    up.kv_b_proj = weights.kv_b_proj;
    up.out = ws_.attended + begin * heads * value;
    up.num_tokens = num_rows;
    up.num_heads = heads;
    up.qk_nope_head_dim = nope;
    up.v_head_dim = value;
    cpu::ValueUp(context_, up);
  }
}

void CpuLayers::Dense(const MlpWeights& weights, uint32_t num_rows, float* hidden) {
  const int64_t size = config_.hidden_size;
  const int64_t width = weights.gate_proj.rows;
  products_.clear();
  products_.push_back(Product(ws_.normed, size, weights.gate_proj, ws_.gate, width, num_rows));
  products_.push_back(Product(ws_.normed, size, weights.up_proj, ws_.up, width, num_rows));
  cpu::GroupedGemm(context_, products_);
  Activate(context_, ws_.gate, ws_.up, width, num_rows);
  GemmParams down = Product(ws_.gate, width, weights.down_proj, hidden, size, num_rows);
  down.accumulate = true;
  cpu::Gemm(context_, down);
}

void CpuLayers::Moe(const MoeWeights& weights, uint32_t num_rows, float* hidden) {
  const int64_t size = config_.hidden_size;
  const int64_t num_experts = config_.n_routed_experts;
  const int64_t width = config_.moe_intermediate_size;
  const auto picks = static_cast<int32_t>(config_.num_experts_per_tok);
  const bool has_shared = !weights.shared_experts.empty();
  const int64_t shared_width = has_shared ? weights.shared_experts.gate_proj.rows : 0;

  cpu::Gemm(context_,
            Product(ws_.normed, size, weights.gate, ws_.router_logits, num_experts, num_rows));
  RouterParams router;
  router.logits = ws_.router_logits;
  router.correction_bias = weights.e_score_correction_bias.data;
  router.scoring = config_.scoring_func == ScoringFunc::kSigmoid ? RouterScoring::kSigmoid
                                                                 : RouterScoring::kSoftmax;
  router.method = RouterMethodOf(config_.topk_method);
  router.n_routed_experts = static_cast<int32_t>(num_experts);
  router.num_experts_per_tok = picks;
  router.n_group = static_cast<int32_t>(config_.n_group);
  router.topk_group = static_cast<int32_t>(config_.topk_group);
  router.norm_topk_prob = config_.norm_topk_prob;
  router.routed_scaling_factor = static_cast<float>(config_.routed_scaling_factor);
  router.expert_ids = ws_.expert_ids;
  router.expert_weights = ws_.expert_weights;
  router.num_tokens = num_rows;
  cpu::Router(context_, router);
  ExpertGroupParams group;
  group.expert_ids = ws_.expert_ids;
  group.num_tokens = num_rows;
  group.num_experts_per_tok = picks;
  group.n_routed_experts = static_cast<int32_t>(num_experts);
  group.group_begin = ws_.group_begin;
  group.token_of = ws_.token_of;
  group.row_of = ws_.row_of;
  GroupByExpert(group);

  // One parallel loop over all experts that a row chose, and the shared ones: a decode step reads
  // each once, a prefill shares it among its rows.
  products_.clear();
  if (has_shared) {
    const MlpWeights& shared = weights.shared_experts;
    products_.push_back(
        Product(ws_.normed, size, shared.gate_proj, ws_.gate, shared_width, num_rows));
    products_.push_back(Product(ws_.normed, size, shared.up_proj, ws_.up, shared_width, num_rows));
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = ws_.group_begin[e];
    const int64_t count = ws_.group_begin[e + 1] - begin;
    if (count == 0) continue;
    const MlpWeights& expert = weights.experts[static_cast<size_t>(e)];
    GemmParams gate =
        Product(ws_.normed, size, expert.gate_proj, ws_.expert_gate + begin * width, width, count);
    gate.x_rows = ws_.token_of + begin;
    GemmParams up =
        Product(ws_.normed, size, expert.up_proj, ws_.expert_up + begin * width, width, count);
    up.x_rows = ws_.token_of + begin;
    products_.push_back(gate);
    products_.push_back(up);
  }
  cpu::GroupedGemm(context_, products_);
  Activate(context_, ws_.expert_gate, ws_.expert_up, width, int64_t{num_rows} * picks);
  if (has_shared) Activate(context_, ws_.gate, ws_.up, shared_width, num_rows);

  products_.clear();
  if (has_shared) {
    products_.push_back(Product(ws_.gate, shared_width, weights.shared_experts.down_proj,
                                ws_.shared_rows, size, num_rows));
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = ws_.group_begin[e];
    const int64_t count = ws_.group_begin[e + 1] - begin;
    if (count == 0) continue;
    products_.push_back(Product(ws_.expert_gate + begin * width, width,
                                weights.experts[static_cast<size_t>(e)].down_proj,
                                ws_.expert_rows + begin * size, size, count));
  }
  cpu::GroupedGemm(context_, products_);

  ExpertSumParams sum;
  sum.expert_rows = ws_.expert_rows;
  sum.row_of = ws_.row_of;
  sum.expert_weights = ws_.expert_weights;
  sum.addend = has_shared ? ws_.shared_rows : nullptr;
  sum.y = hidden;
  sum.accumulate = true;
  sum.num_tokens = num_rows;
  sum.num_experts_per_tok = picks;
  sum.dim = size;
  cpu::ExpertSum(context_, sum);
}

}  // namespace strait
