// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/layers.h"

#include "kernels/cuda/rowwise/norm.h"
#include "kernels/cuda/rowwise/quantize.h"
#include "kernels/rope.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/status.h"
#include "worker/model/kernel_names.h"

namespace strait {
namespace {

cuda::GemmParams Product(const CudaWorkspace& workspace, const cuda::Bf16* x, int64_t x_stride,
                         const cuda::Matrix& weight, int32_t num_rows) {
  cuda::GemmParams p;
  p.split_sums = workspace.split_sums;
  p.split_capacity = static_cast<int64_t>(kCudaSplitFloats);
  p.fixed_order = workspace.fixed_order;
  p.x = x;
  p.x_stride = x_stride;
  p.weight = weight;
  p.num_rows = num_rows;
  return p;
}

// The same, of what Quantize left if `quantized`.
cuda::GemmParams Fp8Product(const CudaWorkspace& workspace, bool quantized, const cuda::Bf16* x,
                            int64_t x_stride, const cuda::Matrix& weight, int32_t num_rows) {
  cuda::GemmParams p = Product(workspace, x, x_stride, weight, num_rows);
  if (!quantized) return p;
  p.x_codes = workspace.x_codes;
  p.x_scales = workspace.x_scales;
  p.x_stride = cuda::AlignedStride(weight.cols);
  return p;
}

bool Quantizes(const CudaWorkspace& workspace, int64_t num_rows) {
  return workspace.x_codes != nullptr && cuda::WorthQuantizing(num_rows, workspace.fixed_order);
}

cuda::GemmParams ToBf16(cuda::GemmParams p, cuda::Bf16* y, int64_t y_stride) {
  p.y_bf16 = y;
  p.y_stride = y_stride;
  return p;
}

cuda::GemmParams ToFp32(cuda::GemmParams p, float* y, int64_t y_stride, bool accumulate = false) {
  p.y_fp32 = y;
  p.y_stride = y_stride;
  p.accumulate = accumulate;
  return p;
}

int64_t GroupStride(const cuda::Matrix& m) { return int64_t{m.rows} * m.stride; }

int64_t ScaleStride(const cuda::Matrix& m) {
  return static_cast<int64_t>(
      Region::ScaleCount(static_cast<uint64_t>(m.rows), static_cast<uint64_t>(m.cols)));
}

int64_t AttendedStride(const ModelConfig& c) {
  return cuda::AlignedStride(int64_t{c.num_attention_heads} * c.v_head_dim);
}

}  // namespace

CudaLayers::CudaLayers(const ModelConfig& config, const CudaPool& pool,
                       const CudaWorkspace& workspace, const float* inv_freq, cudaStream_t stream)
    : config_(config),
      pool_(pool),
      ws_(workspace),
      inv_freq_(inv_freq),
      stream_(stream),
      rope_scaling_(RopeAttentionScaling(RopeConfigOf(config))),
      softmax_scale_(
          AttentionSoftmaxScale(static_cast<int32_t>(config.qk_head_dim()), RopeConfigOf(config))),
      hidden_stride_(cuda::AlignedStride(config.hidden_size)) {}

absl::Status CudaLayers::Rotate(const CudaTile& tile) {
  cuda::RopeTableParams p;
  p.positions = tile.positions;
  p.inv_freq = inv_freq_;
  p.attention_scaling = rope_scaling_;
  p.cos_sin = ws_.cos_sin;
  p.num_tokens = tile.num_rows;
  p.dim = static_cast<int32_t>(config_.qk_rope_head_dim);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::RopeTable(p, stream_));
  is_normed_ = false;
  return absl::OkStatus();
}

absl::Status CudaLayers::Quantize(bool quantized, const cuda::Bf16* x, int64_t x_stride,
                                  int32_t dim, int64_t num_rows) {
  if (!quantized) return absl::OkStatus();
  cuda::QuantizeParams p;
  p.x = x;
  p.x_stride = x_stride;
  p.codes = ws_.x_codes;
  p.codes_stride = cuda::AlignedStride(dim);
  p.scales = ws_.x_scales;
  p.num_rows = num_rows;
  p.dim = dim;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Quantize(p, stream_));
  return absl::OkStatus();
}

absl::Status CudaLayers::Norm(const float* x, int64_t x_stride, const float* weight, int32_t dim,
                              double eps, cuda::Bf16* y, int64_t y_stride, int32_t num_rows) {
  cuda::RmsNormParams p;
  p.x = x;
  p.x_stride = x_stride;
  p.weight = weight;
  p.eps = static_cast<float>(eps);
  p.y = y;
  p.y_stride = y_stride;
  p.num_rows = num_rows;
  p.dim = dim;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::RmsNorm(p, stream_));
  return absl::OkStatus();
}

absl::Status CudaLayers::NormHidden(const float* weight, int32_t num_rows) {
  const auto size = static_cast<int32_t>(config_.hidden_size);
  return Norm(ws_.hidden, size, weight, size, config_.rms_norm_eps, ws_.normed, hidden_stride_,
              num_rows);
}

absl::Status CudaLayers::Run(const DeviceLayer& weights, const DeviceLayer* next,
                             const cuda::MlaSegment* segments, const CudaTile& tile) {
  if (!is_normed_) STRAIT_RETURN_IF_ERROR(NormHidden(weights.input_layernorm, tile.num_rows));
  is_normed_ = false;
  STRAIT_RETURN_IF_ERROR(Project(weights, tile));
  STRAIT_RETURN_IF_ERROR(Attend(weights, segments, tile));
  if (weights.is_moe) return Moe(weights, next, tile.num_rows);
  STRAIT_RETURN_IF_ERROR(NormHidden(weights.post_attention_layernorm, tile.num_rows));
  return Dense(weights.mlp, tile.num_rows);
}

// normed -> q and kv_a.
absl::Status CudaLayers::Project(const DeviceLayer& weights, const CudaTile& tile) {
  const int64_t kv_width = int64_t{config_.kv_lora_rank} + config_.qk_rope_head_dim;
  const auto size = static_cast<int32_t>(config_.hidden_size);
  const auto lora = static_cast<int32_t>(config_.q_lora_rank);
  const int32_t rows = tile.num_rows;
  const bool quantized = Quantizes(ws_, rows);
  STRAIT_RETURN_IF_ERROR(Quantize(quantized, ws_.normed, hidden_stride_, size, rows));
  const auto of_normed = [&](const cuda::Matrix& weight) {
    return Fp8Product(ws_, quantized, ws_.normed, hidden_stride_, weight, rows);
  };
  const cuda::GemmParams kv_a = ToFp32(of_normed(weights.kv_a_proj), ws_.kv_a, kv_width);
  if (lora == 0) {
    const cuda::GemmParams q = ToBf16(of_normed(weights.q_proj), ws_.q, weights.q_proj.rows);
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::GemmPair(q, kv_a, stream_));
    return absl::OkStatus();
  }
  const int64_t lora_stride = cuda::AlignedStride(lora);
  const cuda::GemmParams q_a = ToFp32(of_normed(weights.q_a_proj), ws_.q_a, lora);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::GemmPair(q_a, kv_a, stream_));
  STRAIT_RETURN_IF_ERROR(Norm(ws_.q_a, lora, weights.q_a_layernorm, lora, kLoraNormEps,
                              ws_.q_a_normed, lora_stride, rows));
  STRAIT_RETURN_IF_ERROR(Quantize(quantized, ws_.q_a_normed, lora_stride, lora, rows));
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(
      ToBf16(Fp8Product(ws_, quantized, ws_.q_a_normed, lora_stride, weights.q_b_proj, rows), ws_.q,
             weights.q_b_proj.rows),
      stream_));
  return absl::OkStatus();
}

// Appends the tile's rows to the cache, attends, adds the output projection to hidden.
absl::Status CudaLayers::Attend(const DeviceLayer& weights, const cuda::MlaSegment* segments,
                                const CudaTile& tile) {
  const auto heads = static_cast<int32_t>(config_.num_attention_heads);
  const auto rank = static_cast<int32_t>(config_.kv_lora_rank);
  const auto rope = static_cast<int32_t>(config_.qk_rope_head_dim);
  const auto q_head = static_cast<int64_t>(PaddedQHead(config_));
  const int64_t cat = int64_t{rank} + rope;

  cuda::LatentAppendParams append;
  append.kv_a = ws_.kv_a;
  append.kv_a_stride = cat;
  append.norm_weight = weights.kv_a_layernorm;
  append.eps = static_cast<float>(kLoraNormEps);
  append.cos_sin = ws_.cos_sin;
  append.q = ws_.q;
  append.q_token_stride = heads * q_head;
  append.q_head_stride = q_head;
  append.q_rope_offset = static_cast<int32_t>(config_.qk_nope_head_dim);
  append.q_rope = ws_.q_cat + rank;
  append.q_rope_stride = cat;
  append.positions = tile.positions;
  append.sequence_index = tile.sequence_index;
  append.segments = segments;
  append.blocks = pool_.blocks;
  append.block_bytes = pool_.block_bytes;
  append.format = pool_.format;
  append.num_tokens = tile.num_rows;
  append.num_heads = heads;
  append.rank = rank;
  append.rope = rope;

  const RowRange all_rows = {0, tile.num_rows};
  absl::Span<const RowRange> absorbed = absl::MakeConstSpan(&all_rows, 1);
  if (tile.prompts == nullptr) {
    STRAIT_CUDA_RETURN_IF_ERROR(
        cuda::LatentAppendBeside(append, IntoLatent(weights, all_rows), stream_));
  } else {
    absorbed = tile.prompts->absorbed_rows;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::LatentAppend(append, stream_));
    for (const RowRange& rows : absorbed) {
      STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(IntoLatent(weights, rows), stream_));
    }
  }

  cuda::MlaParams mla;
  mla.q_latent = ws_.q_cat;
  mla.q_latent_stride = cat;
  mla.q_rope = ws_.q_cat + rank;
  mla.q_rope_stride = cat;
  mla.segments = segments;
  mla.blocks = pool_.blocks;
  mla.block_bytes = pool_.block_bytes;
  mla.format = pool_.format;
  mla.pool_map = pool_.map;
  mla.partial_out = ws_.partial_out;
  mla.partial_lse = ws_.partial_lse;
  mla.out = ws_.o_latent;
  mla.softmax_scale = softmax_scale_;
  mla.num_heads = heads;
  mla.rank = rank;
  mla.rope = rope;
  mla.tile_rows = tile.attention_tile_rows;
  for (const cuda::MlaPlanView& plan : tile.plans) {
    mla.plan = plan;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::LaunchMla(mla, stream_));
  }

  for (const RowRange& rows : absorbed) {
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(OutOfLatent(weights, rows), stream_));
  }
  if (tile.prompts != nullptr) STRAIT_RETURN_IF_ERROR(AttendPrompts(weights, segments, tile));

  const int64_t attended_stride = AttendedStride(config_);
  const bool quantized = Quantizes(ws_, tile.num_rows);
  STRAIT_RETURN_IF_ERROR(
      Quantize(quantized, ws_.attended, attended_stride, weights.o_proj.cols, tile.num_rows));
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(
      ToFp32(
          Fp8Product(ws_, quantized, ws_.attended, attended_stride, weights.o_proj, tile.num_rows),
          ws_.hidden, config_.hidden_size, true),
      stream_));
  return absl::OkStatus();
}

cuda::GemmParams CudaLayers::IntoLatent(const DeviceLayer& weights, const RowRange& rows) const {
  const auto heads = static_cast<int32_t>(config_.num_attention_heads);
  const auto q_head = static_cast<int64_t>(PaddedQHead(config_));
  const int64_t cat = int64_t{config_.kv_lora_rank} + config_.qk_rope_head_dim;
  cuda::GemmParams p =
      Product(ws_, ws_.q + rows.begin * heads * q_head, heads * q_head, weights.key_up, rows.count);
  p.x_group_stride = q_head;
  p.num_groups = heads;
  p.weight_group_stride = GroupStride(weights.key_up);
  p.y_group_stride = cat;
  return ToBf16(p, ws_.q_cat + rows.begin * heads * cat, heads * cat);
}

cuda::GemmParams CudaLayers::OutOfLatent(const DeviceLayer& weights, const RowRange& rows) const {
  const auto heads = static_cast<int32_t>(config_.num_attention_heads);
  const int64_t rank = config_.kv_lora_rank;
  const int64_t stride = AttendedStride(config_);
  cuda::GemmParams p = Product(ws_, ws_.o_latent + rows.begin * heads * rank, heads * rank,
                               weights.value_up, rows.count);
  p.x_group_stride = rank;
  p.num_groups = heads;
  p.weight_group_stride = GroupStride(weights.value_up);
  p.y_group_stride = config_.v_head_dim;
  return ToBf16(p, ws_.attended + rows.begin * stride, stride);
}

absl::Status CudaLayers::AttendPrompts(const DeviceLayer& weights, const cuda::MlaSegment* segments,
                                       const CudaTile& tile) {
  const auto heads = static_cast<int32_t>(config_.num_attention_heads);
  const int64_t rank = config_.kv_lora_rank;
  const int64_t cat = rank + config_.qk_rope_head_dim;
  const auto q_head = static_cast<int64_t>(PaddedQHead(config_));
  for (int32_t launch = 0; launch < tile.prompts->num_launches(); ++launch) {
    const absl::Span<const cuda::MhaPiece> pieces = tile.prompts->launch(launch);
    const int32_t key_rows = pieces.back().first_key + cuda::MhaKeyRows(pieces.back().num_keys);
    cuda::MhaGatherParams gather;
    gather.pieces = pieces.data();
    gather.num_pieces = static_cast<int32_t>(pieces.size());
    gather.segments = segments;
    gather.blocks = pool_.blocks;
    gather.block_bytes = pool_.block_bytes;
    gather.rows = ws_.key_rows;
    gather.rope_keys = ws_.rope_keys;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::MhaGather(gather, stream_));

    cuda::GemmParams expand = Product(ws_, reinterpret_cast<const cuda::Bf16*>(pool_.blocks), cat,
                                      weights.kv_up, key_rows);
    expand.x_rows = ws_.key_rows;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(ToBf16(expand, ws_.keys, weights.kv_up.rows), stream_));

    cuda::MhaPrefillParams p;
    p.pieces = pieces.data();
    p.num_pieces = static_cast<int32_t>(pieces.size());
    p.num_tokens = tile.num_rows;
    p.num_key_rows = key_rows;
    p.num_heads = heads;
    p.q = ws_.q;
    p.q_token_stride = heads * q_head;
    p.q_head_stride = q_head;
    p.q_rope = ws_.q_cat + rank;
    p.q_rope_token_stride = heads * cat;
    p.q_rope_head_stride = cat;
    p.keys = ws_.keys;
    p.values = ws_.keys + cuda::kMhaNope;
    p.key_row_stride = weights.kv_up.rows;
    p.key_head_stride = cuda::kMhaNope + cuda::kMhaValue;
    p.rope_keys = ws_.rope_keys;
    p.out = ws_.attended;
    p.out_stride = AttendedStride(config_);
    p.state = ws_.prompt_state;
    p.state_stride = cat / 2;
    p.softmax_scale = softmax_scale_;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::MhaPrefill(p, stream_));
  }
  return absl::OkStatus();
}

// normed -> added to hidden.
absl::Status CudaLayers::Dense(const DeviceMlp& mlp, int32_t num_rows) {
  const int32_t width = mlp.gate_proj.rows;
  const int64_t width_stride = cuda::AlignedStride(width);
  const bool quantized = Quantizes(ws_, num_rows);
  STRAIT_RETURN_IF_ERROR(
      Quantize(quantized, ws_.normed, hidden_stride_, mlp.gate_proj.cols, num_rows));
  cuda::GemmParams gated =
      Fp8Product(ws_, quantized, ws_.normed, hidden_stride_, mlp.gate_proj, num_rows);
  gated.up = mlp.up_proj;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(ToBf16(gated, ws_.activated, width_stride), stream_));
  STRAIT_RETURN_IF_ERROR(Quantize(quantized, ws_.activated, width_stride, width, num_rows));
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(
      ToFp32(Fp8Product(ws_, quantized, ws_.activated, width_stride, mlp.down_proj, num_rows),
             ws_.hidden, config_.hidden_size, true),
      stream_));
  return absl::OkStatus();
}

absl::Status CudaLayers::ChooseExperts(const DeviceLayer& weights,
                                       const cuda::ExpertListsParams& lists) {
  const int32_t experts = lists.n_routed_experts;
  RouterParams router;
  router.logits = ws_.router_logits;
  router.correction_bias = weights.e_score_correction_bias;
  router.scoring = config_.scoring_func == ScoringFunc::kSigmoid ? RouterScoring::kSigmoid
                                                                 : RouterScoring::kSoftmax;
  router.method = RouterMethodOf(config_.topk_method);
  router.n_routed_experts = experts;
  router.num_experts_per_tok = lists.num_experts_per_tok;
  router.n_group = static_cast<int32_t>(config_.n_group);
  router.topk_group = static_cast<int32_t>(config_.topk_group);
  router.norm_topk_prob = config_.norm_topk_prob;
  router.routed_scaling_factor = static_cast<float>(config_.routed_scaling_factor);
  router.expert_ids = ws_.expert_ids;
  router.expert_weights = ws_.expert_weights;
  router.num_tokens = lists.num_tokens;

  cuda::ChooseExpertsParams all;
  all.x = ws_.hidden;
  all.norm_weight = weights.post_attention_layernorm;
  all.eps = static_cast<float>(config_.rms_norm_eps);
  all.normed = ws_.normed;
  all.normed_stride = hidden_stride_;
  all.gate = weights.gate;
  if (weights.gate_has_rest) all.gate_rest = weights.gate_rest;
  all.logits = ws_.router_logits;
  all.handed = ws_.handed;
  all.router = router;
  all.lists = lists;
  // Its sums are in another order than the products' that more tokens need.
  if (!ws_.fixed_order && cuda::CanChooseExperts(all)) {
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::ChooseExperts(all, stream_));
    return absl::OkStatus();
  }
  STRAIT_RETURN_IF_ERROR(NormHidden(weights.post_attention_layernorm, lists.num_tokens));
  STRAIT_CUDA_RETURN_IF_ERROR(
      cuda::Gemm(ToFp32(Product(ws_, ws_.normed, hidden_stride_, weights.gate, lists.num_tokens),
                        ws_.router_logits, experts),
                 stream_));
  if (weights.gate_has_rest) {
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(
        ToFp32(Product(ws_, ws_.normed, hidden_stride_, weights.gate_rest, lists.num_tokens),
               ws_.router_logits, experts, true),
        stream_));
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Router(router, stream_));
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::ExpertLists(lists, stream_));
  return absl::OkStatus();
}

absl::Status CudaLayers::Moe(const DeviceLayer& weights, const DeviceLayer* next,
                             int32_t num_rows) {
  const auto experts = static_cast<int32_t>(config_.n_routed_experts);
  const auto picks = static_cast<int32_t>(config_.num_experts_per_tok);
  const auto size = static_cast<int32_t>(config_.hidden_size);
  const bool fp8 = weights.experts.gate_proj.scales != nullptr;
  cuda::ExpertListsParams lists;
  lists.expert_ids = ws_.expert_ids;
  lists.num_tokens = num_rows;
  lists.num_experts_per_tok = picks;
  lists.n_routed_experts = experts;
  lists.num_shared = static_cast<int32_t>(weights.num_shared);
  const int64_t choices = int64_t{num_rows} * picks;
  const bool quantized =
      ws_.x_codes != nullptr && cuda::WorthQuantizingExperts(choices, experts, ws_.fixed_order);
  lists.tile_rows = quantized ? cuda::kCodeTileRows
                              : cuda::ExpertTileRows(choices, experts, fp8, ws_.fixed_order);
  lists.token_of = ws_.token_of;
  lists.row_of = ws_.row_of;
  lists.tiles = ws_.tiles;
  lists.num_tiles = ws_.num_tiles;
  STRAIT_RETURN_IF_ERROR(ChooseExperts(weights, lists));

  const DeviceMlp& e = weights.experts;
  const int32_t width = e.gate_proj.rows;
  const int64_t width_stride = cuda::AlignedStride(width);
  const auto grouped = [&](cuda::GemmParams p) {
    p.num_groups = experts + lists.num_shared;
    p.weight_group_stride = GroupStride(p.weight);
    p.scale_group_stride = ScaleStride(p.weight);
    p.tiles = ws_.tiles;
    p.num_tiles = ws_.num_tiles;
    p.tile_rows = lists.tile_rows;
    p.max_tiles = static_cast<int32_t>(
        cuda::MaxExpertTiles(num_rows, picks, experts, lists.num_shared, lists.tile_rows));
    return p;
  };
  STRAIT_RETURN_IF_ERROR(Quantize(quantized, ws_.normed, hidden_stride_, size, num_rows));
  cuda::GemmParams gated =
      grouped(Fp8Product(ws_, quantized, ws_.normed, hidden_stride_, e.gate_proj, 0));
  gated.up = e.up_proj;
  gated.x_rows = ws_.token_of;
  if (num_rows <= lists.tile_rows) {  // a shared expert is one tile
    gated.known = {experts, static_cast<int32_t>(choices), num_rows};
    gated.num_known = lists.num_shared;
  }
  STRAIT_CUDA_RETURN_IF_ERROR(
      cuda::Gemm(ToBf16(gated, ws_.expert_activated, width_stride), stream_));
  STRAIT_RETURN_IF_ERROR(Quantize(quantized, ws_.expert_activated, width_stride, width,
                                  choices + int64_t{num_rows} * lists.num_shared));
  cuda::GemmParams down =
      grouped(Fp8Product(ws_, quantized, ws_.expert_activated, width_stride, e.down_proj, 0));
  down.list_again = !quantized;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::Gemm(ToBf16(down, ws_.expert_rows, size), stream_));
  cuda::ExpertSumParams sum;
  sum.expert_rows = ws_.expert_rows;
  sum.expert_stride = size;
  sum.row_of = ws_.row_of;
  sum.expert_weights = ws_.expert_weights;
  sum.y = ws_.hidden;
  sum.num_tokens = num_rows;
  sum.num_experts_per_tok = picks;
  sum.num_shared = lists.num_shared;
  sum.dim = size;
  // Where a stage begins, the norm is a kernel of its own, whose sum is in another order.
  if (next != nullptr && !ws_.fixed_order) {
    sum.norm_weight = next->input_layernorm;
    sum.eps = static_cast<float>(config_.rms_norm_eps);
    sum.normed = ws_.normed;
    sum.normed_stride = hidden_stride_;
    is_normed_ = true;
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::ExpertSum(sum, stream_));
  return absl::OkStatus();
}

}  // namespace strait
