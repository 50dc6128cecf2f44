// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cache.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/kernels.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/model/cpu_layer.h"
#include "worker/model/cpu_workspace.h"
#include "worker/model/host_cache.h"
#include "worker/model/host_copies.h"
#include "worker/model/logits.h"
#include "worker/model/memory.h"
#include "worker/model/shared_parts.h"

namespace strait {
namespace {

// Raise it with every change that may change a bit of the results.
constexpr int kKernelRevision = 1;

}  // namespace

struct CpuBackend::Shared {
  CpuBackendOptions options;
  std::unique_ptr<WeightSource> weights;
  std::unique_ptr<cpu::Context> context;
  std::shared_ptr<MemoryBudget> budget;
  std::unique_ptr<HostCache> cache;
  CacheLayout layout;
  SharedParts parts;

  const ModelConfig& config() const { return weights->config(); }
};

namespace {

class CpuStageModel final : public StageModel {
 public:
  CpuStageModel(std::shared_ptr<CpuBackend::Shared> shared, const StageSpec& spec,
                StageParts weights, CpuWorkspace workspace, MemoryBudget::Share share)
      : shared_(std::move(shared)),
        config_(shared_->config()),
        context_(*shared_->context),
        spec_(spec),
        weights_(std::move(weights)),
        ws_(std::move(workspace)),
        share_(std::move(share)),
        layers_(context_, config_, shared_->layout, shared_->cache->blocks(), ws_),
        copies_(spec_.layers.size(), shared_->cache.get(),
                static_cast<uint32_t>(shared_->layout.row_bytes)) {}

  absl::Status Begin(const StageBatch& batch, HiddenIn in, HiddenOut out) override;
  bool TakesAhead(uint32_t, uint32_t) const override { return false; }
  bool Done() const override { return true; }
  absl::Status Finish(std::vector<LogitsResult>* results) override;

  BlockCopies& copies() override { return copies_; }
  absl::Status SetCapacity(uint32_t pool_blocks) override {
    spec_.pool_blocks = pool_blocks;
    return absl::OkStatus();
  }
  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return weights_.bytes; }

 private:
  bool is_first() const { return weights_.embedding != nullptr; }
  bool is_last() const { return weights_.head != nullptr; }

  void ListRows(const StageBatch& batch);
  void Embed(uint32_t first_row, uint32_t num_rows, float* hidden);
  void ReadHead(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                uint32_t first_row, const float* hidden);

  const std::shared_ptr<CpuBackend::Shared> shared_;
  const ModelConfig& config_;
  cpu::Context& context_;
  StageSpec spec_;
  const StageParts weights_;
  CpuWorkspace ws_;
  const MemoryBudget::Share share_;
  CpuLayers layers_;

  // Of the batch, in the kernels' form; kept for their memory.
  std::vector<int32_t> positions_;            // [rows]
  std::vector<int32_t> sequence_index_;       // [rows]
  std::vector<int32_t> token_ids_;            // [rows], first stage only
  std::vector<uint8_t> is_cached_;            // [sequences]
  std::vector<const uint32_t*> page_tables_;  // [layers, sequences]

  bool begun_ = false;
  std::vector<LogitsResult> results_;  // of the step that is begun

  HostCopies copies_;  // last: its thread ends before the pool does
};

void CpuStageModel::ListRows(const StageBatch& batch) {
  positions_.clear();
  sequence_index_.clear();
  token_ids_.clear();
  is_cached_.clear();
  page_tables_.resize(batch.sequences.size() * spec_.layers.size());
  for (size_t index = 0; index < batch.sequences.size(); ++index) {
    const BatchSequence& sequence = batch.sequences[index];
    const uint32_t end = sequence.first_position + sequence.num_tokens;
    STRAIT_CHECK(sequence.num_tokens > 0 && end <= config_.max_position_embeddings);
    STRAIT_CHECK(sequence.tokens.size() == end && !sequence.token_of_request);
    STRAIT_CHECK(sequence.page_tables.size() == spec_.layers.size());
    is_cached_.push_back(sequence.is_cached);
    for (uint32_t position = sequence.first_position; position < end; ++position) {
      positions_.push_back(static_cast<int32_t>(position));
      sequence_index_.push_back(static_cast<int32_t>(index));
      token_ids_.push_back(static_cast<int32_t>(sequence.tokens[position]));
    }
    for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer) {
      const absl::Span<const BlockId> table = sequence.page_tables[layer];
      STRAIT_CHECK(table.size() >= BlocksPerLayer(end));
      for (const BlockId block : table) STRAIT_CHECK(block < shared_->cache->num_blocks());
      page_tables_[layer * batch.sequences.size() + index] = table.data();
    }
  }
  STRAIT_CHECK(positions_.size() == batch.num_tokens);
}

absl::Status CpuStageModel::Begin(const StageBatch& batch, HiddenIn in, HiddenOut out) {
  STRAIT_CHECK(!begun_);
  const absl::Span<const std::byte> hidden_in = in.host();
  const absl::Span<std::byte> hidden_out = out.host();
  const size_t row_bytes = size_t{config_.hidden_size} * sizeof(float);
  STRAIT_CHECK(hidden_in.size() == (is_first() ? 0 : batch.num_tokens * row_bytes));
  STRAIT_CHECK(hidden_out.size() == (is_last() ? 0 : batch.num_tokens * row_bytes));
  STRAIT_CHECK(reinterpret_cast<uintptr_t>(hidden_out.data()) % alignof(float) == 0);
  ListRows(batch);
  absl::Span<const LogitsRequest> requests = batch.logits;
  for (uint32_t begin = 0; begin < batch.num_tokens; begin += ws_.tile_rows) {
    Tile tile;
    tile.num_rows = std::min(ws_.tile_rows, batch.num_tokens - begin);
    tile.positions = positions_.data() + begin;
    tile.sequence_index = sequence_index_.data() + begin;
    tile.is_cached = is_cached_.data();
    float* const hidden =
        is_last() ? ws_.hidden : reinterpret_cast<float*>(hidden_out.data() + begin * row_bytes);
    if (is_first()) {
      Embed(begin, tile.num_rows, hidden);
    } else {
      std::memcpy(hidden, hidden_in.data() + begin * row_bytes, tile.num_rows * row_bytes);
    }
    layers_.Rotate(tile);
    for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer) {
      layers_.Run(weights_.layers[layer]->weights,
                  page_tables_.data() + layer * batch.sequences.size(), tile, hidden);
    }
    size_t count = 0;
    while (count < requests.size() && requests[count].row < begin + tile.num_rows) ++count;
    for (size_t i = 0; i < count; i += kHeadRows) {
      ReadHead(batch, requests.subspan(i, std::min<size_t>(kHeadRows, count - i)), begin, hidden);
    }
    requests.remove_prefix(count);
  }
  STRAIT_CHECK(requests.empty(), "logits were asked for at a row that the batch does not have");
  begun_ = true;
  return absl::OkStatus();
}

absl::Status CpuStageModel::Finish(std::vector<LogitsResult>* results) {
  STRAIT_CHECK(std::exchange(begun_, false));
  *results = std::exchange(results_, {});
  return absl::OkStatus();
}

void CpuStageModel::Embed(uint32_t first_row, uint32_t num_rows, float* hidden) {
  EmbeddingParams p;
  p.table = weights_.embedding->weights.embed_tokens;
  p.token_ids = token_ids_.data() + first_row;
  p.y = hidden;
  p.num_tokens = num_rows;
  cpu::Embedding(context_, p);
}

// Final norm and head for at most kHeadRows wanted rows of a tile that begins at `first_row`.
void CpuStageModel::ReadHead(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                             uint32_t first_row, const float* hidden) {
  STRAIT_CHECK(is_last());
  const int64_t size = config_.hidden_size;
  const HeadWeights& head = weights_.head->weights;
  for (size_t i = 0; i < requests.size(); ++i) {
    STRAIT_CHECK(requests[i].row >= first_row, "rows of logits must rise");
    std::copy_n(hidden + (requests[i].row - first_row) * size, size, ws_.head_rows + i * size);
  }
  RmsNormParams norm;
  norm.x = ws_.head_rows;
  norm.x_stride = size;
  norm.weight = head.norm.data;
  norm.weight_type = WeightType::kFp32;
  norm.eps = static_cast<float>(config_.rms_norm_eps);
  norm.y = ws_.head_rows;
  norm.y_stride = size;
  norm.num_rows = static_cast<int64_t>(requests.size());
  norm.dim = size;
  cpu::RmsNorm(context_, norm);
  GemmParams product;
  product.x = ws_.head_rows;
  product.x_stride = size;
  product.num_rows = static_cast<int64_t>(requests.size());
  product.weight = head.lm_head;
  product.y = ws_.logits;
  product.y_stride = config_.vocab_size;
  cpu::Gemm(context_, product);
  for (size_t i = 0; i < requests.size(); ++i) {
    const LogitsRequest& request = requests[i];
    STRAIT_CHECK(sequence_index_[request.row] == static_cast<int32_t>(request.sequence_index));
    results_.push_back(ReadLogits(context_, ws_.logits + i * size_t{config_.vocab_size},
                                  config_.vocab_size, batch.sequences[request.sequence_index],
                                  static_cast<uint32_t>(positions_[request.row]), request));
  }
}

}  // namespace

CpuBackend::CpuBackend(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}
CpuBackend::~CpuBackend() = default;

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(
    const CpuBackendOptions& options, std::unique_ptr<WeightSource> weights) {
  if (options.num_threads == 0 || options.num_threads > uint32_t{cpu::kMaxThreads}) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the CPU backend runs on 1 to ", cpu::kMaxThreads, " threads, not ", options.num_threads));
  }
  if (options.row_format == RowFormat::kFp8) {
    return absl::InvalidArgumentError(
        "--cache-format fp8 needs --backend cuda: the CPU backend keeps fp32 or bf16 cache rows. A "
        "cluster has one format, so with CPU workers it is one of these");
  }
  if (options.row_format != RowFormat::kFp32 && options.row_format != RowFormat::kBf16) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the CPU backend keeps fp32 or bf16 cache rows, not ", RowFormatName(options.row_format)));
  }
  auto shared = std::make_shared<Shared>();
  shared->options = options;
  shared->weights = std::move(weights);
  cpu::ContextOptions context;
  context.num_threads = static_cast<int>(options.num_threads);
  context.simd = options.simd;
  STRAIT_ASSIGN_OR_RETURN(shared->context, cpu::Context::Create(context));
  shared->budget = std::make_shared<MemoryBudget>(options.memory_bytes);
  const ModelConfig& config = shared->config();
  shared->layout =
      MakeCacheLayout(options.row_format, config.kv_lora_rank, config.qk_rope_head_dim);
  STRAIT_ASSIGN_OR_RETURN(
      shared->cache,
      HostCache::Create(shared->budget, static_cast<uint64_t>(shared->layout.block_bytes)));
  return std::unique_ptr<CpuBackend>(new CpuBackend(std::move(shared)));
}

absl::StatusOr<std::unique_ptr<StageModel>> CpuBackend::Load(
    const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) {
  const ModelConfig& config = shared_->config();
  if (spec.layers.begin >= spec.layers.end || spec.layers.end > config.num_hidden_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers ", spec.layers.begin, " to ",
                                                   spec.layers.end, " of a model with ",
                                                   config.num_hidden_layers));
  }
  if (spec.pool_blocks == 0) {
    return absl::InvalidArgumentError("a stage needs latent blocks, pool_blocks is 0");
  }
  const auto what = absl::StrCat("a stage of layers ", spec.layers.begin, " to ", spec.layers.end,
                                 " with ", spec.pool_blocks, " latent blocks");
  const std::vector<uint64_t> workspaces = WorkspaceSizes(config);
  const auto workspace_bytes = [&workspaces](uint64_t weight_bytes) {
    return workspaces[ChooseWorkspace(workspaces, weight_bytes)];
  };
  STRAIT_ASSIGN_OR_RETURN(
      StageParts weights,
      shared_->parts.Load(*shared_->weights, spec.layers, shared_->budget, what,
                          workspace_bytes(StageWeightBytes(config, spec.layers)),
                          shared_->options.num_threads, progress));
  STRAIT_ASSIGN_OR_RETURN(
      MemoryBudget::Share share,
      MemoryBudget::Take(shared_->budget, workspace_bytes(weights.bytes), what));
  STRAIT_ASSIGN_OR_RETURN(CpuWorkspace workspace, CreateCpuWorkspace(config, weights.bytes));
  return std::make_unique<CpuStageModel>(shared_, spec, std::move(weights), std::move(workspace),
                                         std::move(share));
}

CacheMemory& CpuBackend::cache() { return *shared_->cache; }
uint32_t CpuBackend::hidden_row_bytes() const {
  return config().hidden_size * static_cast<uint32_t>(sizeof(float));
}
uint32_t CpuBackend::num_layers() const { return config().num_hidden_layers; }
uint32_t CpuBackend::vocab_size() const { return config().vocab_size; }
uint32_t CpuBackend::max_positions() const { return config().max_position_embeddings; }
const ModelConfig& CpuBackend::config() const { return shared_->config(); }
uint64_t CpuBackend::block_bytes() const {
  return static_cast<uint64_t>(shared_->layout.block_bytes);
}
RowShape CpuBackend::row_shape() const {
  return {shared_->options.row_format, config().kv_lora_rank, config().qk_rope_head_dim};
}
uint64_t CpuBackend::memory_bytes() const { return shared_->budget->total(); }

std::string CpuBackend::numerics_id() const {
  return absl::StrCat("cpu/", kKernelRevision, "/", RowFormatName(shared_->options.row_format));
}

}  // namespace strait
