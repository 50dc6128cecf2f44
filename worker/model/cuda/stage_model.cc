// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/stage_model.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/moe/moe.h"
#include "kernels/rope.h"
#include "proto/base/check.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/model/reservation.h"
#include "worker/model/cuda/status.h"
#include "worker/model/kernel_names.h"

namespace strait {
namespace {

constexpr int32_t kMaxGraphRows = 256;  // beyond it launching is no longer what a step waits for

}  // namespace

absl::StatusOr<std::unique_ptr<CudaStageModel>> CudaStageModel::Create(CudaWorker worker,
                                                                       const StageSpec& spec,
                                                                       DeviceStageParts parts,
                                                                       MemoryBudget::Share graphs) {
  std::unique_ptr<CudaStageModel> model(
      new CudaStageModel(std::move(worker), spec, std::move(parts), std::move(graphs)));
  STRAIT_RETURN_IF_ERROR(model->Init());
  return model;
}

CudaStageModel::~CudaStageModel() {
  copies_.reset();  // waits; steps, too, if copies do
  (void)cudaSetDevice(device_);
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
  for (const auto& [rows, graph] : graphs_) (void)cudaGraphExecDestroy(graph);
  for (const Slot& slot : slots_) {
    if (slot.done != nullptr) (void)cudaEventDestroy(slot.done);
  }
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::Status CudaStageModel::Init() {
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(device_));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::PrepareMla());
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::PrepareMhaPrefill());
  const CudaTraits& traits = *worker_.traits;
  const auto what =
      absl::StrCat("a stage of layers ", spec_.layers.begin, " to ", spec_.layers.end);
  const CudaStageLayout measured = LayOutStage(config_, spec_, traits, nullptr);
  bytes_ = measured.bytes;
  limits_ = measured.limits;
  STRAIT_ASSIGN_OR_RETURN(workspace_memory_, worker_.arena->Take(measured.region_end, what));
  const CudaStageLayout layout = LayOutStage(config_, spec_, traits, workspace_memory_.data());
  ws_ = layout.workspace;
  const size_t handed = size_t{cuda::kMaxChooseTokens} * config_.n_routed_experts;
  if (handed > 0) {
    STRAIT_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(ws_.handed, 0, handed * sizeof(*ws_.handed), stream_));
  }
  std::vector<float> inv_freq(config_.qk_rope_head_dim / 2);
  RopeInverseFrequencies(RopeConfigOf(config_), inv_freq.data());
  STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(layout.inv_freq, inv_freq.data(),
                                              inv_freq.size() * sizeof(float),
                                              cudaMemcpyHostToDevice, stream_));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));

  const CudaPool& pool = worker_.cache->pool();
  layers_.emplace(config_, pool, ws_, layout.inv_freq, stream_);
  if (weights_.norm != nullptr) head_.emplace(config_, limits_, ws_, weights_, stream_);
  for (Slot& slot : slots_) STRAIT_RETURN_IF_ERROR(InitSlot(&slot));
  const uint64_t most =
      DeviceTables::DeviceBytes(spec_.layers.size(), worker_.cache->most_blocks());
  STRAIT_ASSIGN_OR_RETURN(table_memory_, worker_.arena->Take(0, most, what));
  STRAIT_RETURN_IF_ERROR(SetCapacity(spec_.pool_blocks));
  STRAIT_ASSIGN_OR_RETURN(
      copies_, DeviceCopies::Create(spec_.layers.size(),
                                    {.device = device_,
                                     .pool = pool.blocks,
                                     .cache = worker_.cache,
                                     .row_bytes = RowBytes(traits.row_format, config_.kv_lora_rank,
                                                           config_.qk_rope_head_dim),
                                     .staging = ws_.copies,
                                     .pinned = worker_.pinned,
                                     .newest_step = [this] { return newest_step(); }}));
  Log(LogLevel::kInfo, "GPU memory of a stage",
      {{"weights", bytes_.weights},
       {"cache", bytes_.pool},
       {"workspace", bytes_.workspace},
       {"of_it_for_graphs", bytes_.graphs},
       {"all", bytes_.total()},
       {"rows_at_once", limits_.tile_rows}});
  return absl::OkStatus();
}

absl::Status CudaStageModel::SetCapacity(uint32_t pool_blocks) {
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(device_));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
  StageSpec spec = spec_;
  spec.pool_blocks = pool_blocks;
  std::array<PinnedMemory, kMaxStepsBegun> arrivals;
  const uint64_t arrival_bytes = DeviceTables::ArrivalBytes(pool_blocks);
  const bool more = arrival_bytes > slots_[0].arrivals.bytes();  // fewer keep what there is
  for (PinnedMemory& memory : arrivals) {
    if (!more) break;
    STRAIT_ASSIGN_OR_RETURN(memory, worker_.pinned->Take(arrival_bytes));
  }
  STRAIT_RETURN_IF_ERROR(
      table_memory_.Resize(DeviceTables::DeviceBytes(spec.layers.size(), pool_blocks),
                           absl::StrCat("page tables of ", pool_blocks, " latent blocks")));
  for (size_t i = 0; more && i < slots_.size(); ++i) slots_[i].arrivals = std::move(arrivals[i]);
  page_tables_.emplace(spec, table_memory_.data());  // all is brought anew
  spec_ = spec;
  return absl::OkStatus();
}

absl::Status CudaStageModel::InitSlot(Slot* slot) {
  STRAIT_ASSIGN_OR_RETURN(StepTables tables,
                          StepTables::Create(*worker_.pinned, limits_, ws_.tables));
  slot->tables.emplace(std::move(tables));
  STRAIT_ASSIGN_OR_RETURN(slot->plan, worker_.pinned->Take(limits_.plan_bytes));
  if (weights_.embed_tokens.empty() || !head_) {
    STRAIT_ASSIGN_OR_RETURN(
        slot->staging,
        worker_.pinned->Take(uint64_t{limits_.tile_rows} * config_.hidden_size * sizeof(float)));
  }
  if (head_) {
    STRAIT_ASSIGN_OR_RETURN(slot->head, HeadStep::Create(*worker_.pinned, limits_));
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming));
  return absl::OkStatus();
}

absl::Status CudaStageModel::Begin(const StageBatch& batch, HiddenIn hidden_in,
                                   HiddenOut hidden_out) {
  STRAIT_CHECK(num_begun_ < kMaxStepsBegun);
  Slot& slot = slots_[next_slot_];
  absl::Status status = CudaStatus(cudaSetDevice(device_), "cudaSetDevice");
  if (status.ok()) status = Enqueue(batch, hidden_in, hidden_out, &slot);
  if (status.ok()) status = CudaStatus(cudaEventRecord(slot.done, stream_), "cudaEventRecord");
  if (!status.ok()) {
    ExitIfContextLost(status);  // it waits for the device: the buffers are free
    slot.Void();
    return status;
  }
  next_slot_ = (next_slot_ + 1) % kMaxStepsBegun;
  ++num_begun_;
  return absl::OkStatus();
}

bool CudaStageModel::Done() const {
  STRAIT_CHECK(num_begun_ > 0);
  if (cudaEventQuery(slots_[oldest_slot()].done) != cudaErrorNotReady) return true;
  (void)cudaGetLastError();  // nobody else is to find that
  return false;
}

absl::Status CudaStageModel::Finish(std::vector<LogitsResult>* results) {
  STRAIT_CHECK(num_begun_ > 0);
  Slot& oldest = slots_[oldest_slot()];
  --num_begun_;
  absl::Status status = CudaStatus(cudaSetDevice(device_), "cudaSetDevice");
  if (status.ok()) status = CudaStatus(cudaEventSynchronize(oldest.done), "cudaEventSynchronize");
  if (!status.ok()) {
    ExitIfContextLost(status);
    oldest.Void();
    return status;
  }
  Collect(&oldest);
  if (head_) *results = head_->Take(&oldest.head);
  return absl::OkStatus();
}

absl::Status CudaStageModel::Enqueue(const StageBatch& batch, HiddenIn hidden_in,
                                     HiddenOut hidden_out, Slot* slot) {
  const size_t row_bytes = size_t{config_.hidden_size} * sizeof(float);
  const bool is_first = !weights_.embed_tokens.empty();
  STRAIT_CHECK(hidden_in.bytes.size() == (is_first ? 0 : batch.num_tokens * row_bytes));
  STRAIT_CHECK(hidden_out.bytes.size() == (head_ ? 0 : batch.num_tokens * row_bytes));
  if (!TakesAhead(batch.num_tokens, static_cast<uint32_t>(batch.logits.size()))) {
    // Its tiles would overwrite what the step before has sampled.
    STRAIT_CHECK(num_begun_ == 0, "a step of several tiles is not taken ahead");
  }
  StepTables& tables = *slot->tables;
  STRAIT_RETURN_IF_ERROR(tables.Fill(
      batch, config_.max_position_embeddings, worker_.cache->num_blocks(), &*page_tables_,
      absl::MakeSpan(slot->arrivals.data(), slot->arrivals.bytes()), stream_));
  uint32_t first_request = 0;
  for (uint32_t begin = 0; begin < batch.num_tokens; begin += limits_.tile_rows) {
    CudaTile tile;
    tile.num_rows = static_cast<int32_t>(std::min(limits_.tile_rows, batch.num_tokens - begin));
    tile.positions = tables.positions() + begin;
    tile.sequence_index = tables.sequence_index() + begin;
    const uint32_t end = begin + static_cast<uint32_t>(tile.num_rows);
    const size_t tile_bytes = static_cast<size_t>(tile.num_rows) * row_bytes;
    // Pinned memory is filled again when the last tile's copies have been made.
    if (begin > 0) {
      STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
      Collect(slot);
    }
    STRAIT_RETURN_IF_ERROR(Plan(batch, begin, slot, &tile));
    if (!is_first) STRAIT_RETURN_IF_ERROR(CopyIn(hidden_in, begin * row_bytes, tile_bytes, slot));
    const bool decodes = batch.num_tokens == batch.sequences.size() &&
                         batch.num_tokens == static_cast<uint32_t>(tile.num_rows) &&
                         tile.num_rows <= kMaxGraphRows && tile.plans.size() == 1;
    const int32_t* const token_ids = tables.token_ids() + begin;
    STRAIT_RETURN_IF_ERROR(decodes ? ReplayTile(tile, tables, token_ids)
                                   : RunTile(tile, tables, token_ids));
    if (!head_) {
      STRAIT_RETURN_IF_ERROR(CopyOut(hidden_out, begin * row_bytes, tile_bytes, slot));
      continue;
    }
    const absl::Span<const LogitsRequest> left = batch.logits.subspan(first_request);
    uint32_t count = 0;
    while (count < left.size() && left[count].row < end) ++count;
    STRAIT_RETURN_IF_ERROR(
        head_->Ask(batch, left.subspan(0, count), first_request, begin, &slot->head));
    first_request += count;
  }
  STRAIT_CHECK(first_request == batch.logits.size(),
               "logits were asked for at a row that the batch does not have");
  return absl::OkStatus();
}

absl::Status CudaStageModel::CopyIn(const HiddenIn& hidden, size_t offset, size_t bytes,
                                    Slot* slot) {
  const std::byte* from = hidden.bytes.data() + offset;
  if (!hidden.on_device) {
    std::memcpy(slot->staging.data(), from, bytes);
    from = slot->staging.data();
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
      ws_.hidden, from, bytes, hidden.on_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice,
      stream_));
  return absl::OkStatus();
}

absl::Status CudaStageModel::CopyOut(const HiddenOut& hidden, size_t offset, size_t bytes,
                                     Slot* slot) {
  std::byte* const to = hidden.bytes.data() + offset;
  if (hidden.on_device) {
    STRAIT_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(to, ws_.hidden, bytes, cudaMemcpyDeviceToDevice, stream_));
    return absl::OkStatus();
  }
  STRAIT_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(slot->staging.data(), ws_.hidden, bytes, cudaMemcpyDeviceToHost, stream_));
  slot->host_out = to;
  slot->host_out_bytes = bytes;
  return absl::OkStatus();
}

void CudaStageModel::Collect(Slot* slot) {
  if (head_) head_->Collect(&slot->head);
  if (slot->host_out == nullptr) return;
  std::memcpy(slot->host_out, slot->staging.data(), slot->host_out_bytes);
  slot->host_out = nullptr;
}

absl::Status CudaStageModel::RunTile(const CudaTile& tile, const StepTables& tables,
                                     const int32_t* token_ids) {
  if (!weights_.embed_tokens.empty()) {
    cuda::EmbeddingParams embed;
    embed.table = weights_.embed_tokens;
    embed.token_ids = token_ids;
    embed.sampled_ids = ws_.sampled_ids;
    embed.y = ws_.hidden;
    embed.num_tokens = tile.num_rows;
    STRAIT_CUDA_RETURN_IF_ERROR(cuda::Embedding(embed, stream_));
  }
  STRAIT_RETURN_IF_ERROR(layers_->Rotate(tile));
  for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer) {
    const DeviceLayer* const next =
        layer + 1 < spec_.layers.size() ? &weights_.layers[layer + 1] : nullptr;
    STRAIT_RETURN_IF_ERROR(
        layers_->Run(weights_.layers[layer], next, tables.segments(layer), tile));
  }
  return absl::OkStatus();
}

absl::Status CudaStageModel::ReplayTile(const CudaTile& tile, const StepTables& tables,
                                        const int32_t* token_ids) {
  auto it = graphs_.find(tile.num_rows);
  if (it == graphs_.end()) {
    STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    const absl::Status captured = RunTile(tile, tables, token_ids);
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
    if (!captured.ok() && graph != nullptr) (void)cudaGraphDestroy(graph);
    STRAIT_RETURN_IF_ERROR(captured);
    STRAIT_CUDA_RETURN_IF_ERROR(ended);
    STRAIT_ASSIGN_OR_RETURN(it, AddGraph(tile.num_rows, graph));
  }
  graph_ledger_.Used(tile.num_rows);
  STRAIT_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(it->second, stream_));
  return absl::OkStatus();
}

absl::StatusOr<std::map<int32_t, cudaGraphExec_t>::iterator> CudaStageModel::AddGraph(
    int32_t num_rows, cudaGraph_t graph) {
  size_t before = 0;
  size_t after = 0;
  size_t total = 0;
  cudaGraphExec_t ready = nullptr;
  cudaError_t error = cudaMemGetInfo(&before, &total);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&ready, graph, 0);
  const cudaError_t destroyed = cudaGraphDestroy(graph);
  if (error == cudaSuccess) error = destroyed;
  if (error == cudaSuccess) error = cudaGraphUpload(ready, stream_);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);  // nothing runs that may go
  if (error == cudaSuccess) error = cudaMemGetInfo(&after, &total);
  if (error != cudaSuccess) {
    if (ready != nullptr) (void)cudaGraphExecDestroy(ready);
    return CudaStatus(error, "making a decode graph");
  }
  const auto it = graphs_.emplace(num_rows, ready).first;
  for (const int32_t rows : graph_ledger_.Add(num_rows, before > after ? before - after : 0)) {
    const cudaGraphExec_t gone = graphs_.at(rows);
    graphs_.erase(rows);
    STRAIT_CUDA_RETURN_IF_ERROR(cudaGraphExecDestroy(gone));
  }
  return it;
}

absl::Status CudaStageModel::Plan(const StageBatch& batch, uint32_t begin, Slot* slot,
                                  CudaTile* tile) {
  const uint32_t end = begin + static_cast<uint32_t>(tile->num_rows);
  plan_sequences_.clear();
  uint32_t row = 0;
  for (uint32_t index = 0; index < batch.sequences.size() && row < end; ++index) {
    const BatchSequence& sequence = batch.sequences[index];
    const uint32_t from = std::max(row, begin);
    const uint32_t to = std::min(row + sequence.num_tokens, end);
    if (from < to) {
      cuda::MlaSequence one;
      one.sequence = static_cast<int32_t>(index);
      one.first_token = static_cast<int32_t>(from - begin);
      one.num_tokens = static_cast<int32_t>(to - from);
      one.first_position = static_cast<int32_t>(sequence.first_position + (from - row));
      // Steps before have ended: copies of this step's tables lie between.
      one.settled_rows = static_cast<int32_t>(sequence.first_position);
      plan_sequences_.push_back(one);
    }
    row += sequence.num_tokens;
  }
  PlanPrompts(plan_sequences_, limits_.expanded_keys, &prompts_);
  if (!prompts_.pieces.empty()) tile->prompts = &prompts_;
  plan_views_.clear();
  if (prompts_.absorbed.empty()) return absl::OkStatus();
  cuda::MlaPlanOptions options;
  options.num_heads = static_cast<int32_t>(config_.num_attention_heads);
  options.deterministic = limits_.deterministic;
  cuda::CutMlaBatch(prompts_.absorbed.data(), static_cast<int32_t>(prompts_.absorbed.size()),
                    options, limits_.mla, &plan_parts_);
  uint64_t used = 0;
  int32_t largest = 0;
  for (size_t part = 0; part + 1 < plan_parts_.begin.size(); ++part) {
    const int32_t first = plan_parts_.begin[part];
    STRAIT_CHECK(cuda::PlanMla(&plan_parts_.sequences[static_cast<size_t>(first)],
                               plan_parts_.begin[part + 1] - first, options, limits_.mla, &plan_),
                 "the plan's limits hold for every part");
    STRAIT_CHECK(used + cuda::MlaPlanUsedBytes(plan_) <= limits_.plan_bytes);
    largest = std::max(largest, cuda::MlaLargestTile(plan_));
    plan_views_.push_back(cuda::ViewMlaPlan(limits_.mla, ws_.plan + used));
    used += static_cast<uint64_t>(cuda::WriteMlaPlan(plan_, slot->plan.data() + used));
  }
  STRAIT_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(ws_.plan, slot->plan.data(), used, cudaMemcpyHostToDevice, stream_));
  tile->plans = plan_views_;
  // The kernel for few rows sums in another order. With --deterministic a row takes one kernel, in
  // whatever step it is computed: a prompt's, a replay's.
  if (!limits_.deterministic) tile->attention_tile_rows = largest;
  return absl::OkStatus();
}

}  // namespace strait
