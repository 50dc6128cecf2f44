// SPDX-License-Identifier: Apache-2.0
//
// How a WorkerCore takes stages in, lets them go, and divides its cache among them.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/status.h"
#include "worker/core/messages.h"
#include "worker/core/worker_core.h"

namespace strait {

absl::Status WorkerCore::CheckSuccessor(const v1::LoadStage& load) const {
  std::vector<LayerRange> theirs;
  for (const uint64_t before : load.successor_of()) {
    const Stage* const stage = FindStage(before);
    if (stage == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "stage ", before, " is not loaded here, stage ", load.stage_id(), " cannot follow it"));
    }
    const LayerRange layers = stage->model().spec().layers;
    for (const LayerRange& other : theirs) {
      if (layers.begin < other.end && other.begin < layers.end) {
        return absl::InvalidArgumentError(
            absl::StrCat("a layer is in two of the stages that stage ", load.stage_id(),
                         " is to follow, in stage ", before, " the second time"));
      }
    }
    theirs.push_back(layers);
    for (LayerIndex layer = std::max(layers.begin, load.layer_begin());
         layer < std::min(layers.end, load.layer_end()); ++layer) {
      if (!stage->cache().given(layer - layers.begin)) continue;
      return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " of stage ", before,
                                                        " was taken over before, stage ",
                                                        load.stage_id(), " cannot take it"));
    }
  }
  for (const auto& [id, hosted] : hosted_) {
    for (const uint64_t before : shares_.PredecessorsOf(id)) {
      const auto& mine = load.successor_of();
      const LayerRange layers = hosted.layers;
      if (std::find(mine.begin(), mine.end(), before) != mine.end() &&
          load.layer_begin() < layers.end && layers.begin < load.layer_end()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "stages ", id, " and ", load.stage_id(), " would both take a layer of stage ", before));
      }
    }
  }
  return absl::OkStatus();
}

void WorkerCore::OnLoad(const v1::LoadStage& load) {
  const uint64_t id = load.stage_id();
  const auto blocks = static_cast<uint32_t>(load.cache_bytes() / traits_.block_bytes);
  const absl::Status valid = [&]() -> absl::Status {
    if (hosted_.contains(id)) {
      return absl::AlreadyExistsError(absl::StrCat("stage ", id, " is here already"));
    }
    if (hosted_.size() >= kMaxHostedStages) {
      return absl::ResourceExhaustedError(
          absl::StrCat("this worker hosts ", kMaxHostedStages, " stages already"));
    }
    STRAIT_RETURN_IF_ERROR(CheckLoad(load, traits_.num_layers, traits_.block_bytes));
    STRAIT_RETURN_IF_ERROR(CheckSuccessor(load));
    const absl::Status added =
        shares_.Add(id, blocks, {load.successor_of().begin(), load.successor_of().end()});
    return added.ok()
               ? added
               : absl::Status(added.code(), absl::StrCat("a stage of layers ", load.layer_begin(),
                                                         " to ", load.layer_end(), " with ", blocks,
                                                         " latent blocks: ", added.message()));
  }();
  if (!valid.ok()) return TellFailed(id, valid);
  const LayerRange layers = {load.layer_begin(), load.layer_end()};
  const LoadOrder order = {
      .serial = ++last_serial_, .stage_id = id, .spec = {.layers = layers, .pool_blocks = blocks}};
  hosted_[id].load_serial = order.serial;
  hosted_[id].layers = layers;
  ports_->Note(LogLevel::kInfo, "loading stage",
               {{"stage", id},
                {"layer_begin", load.layer_begin()},
                {"layer_end", load.layer_end()},
                {"cache_bytes", load.cache_bytes()}});
  ports_->Load(order);
}

void WorkerCore::OnLoaded(const LoadOrder& order,
                          absl::StatusOr<std::unique_ptr<StageModel>> model) {
  const uint64_t id = order.stage_id;
  Hosted* const hosted = Find(id);
  if (hosted == nullptr || hosted->stage != nullptr || hosted->load_serial != order.serial) return;
  if (hosted->unload_when_loaded) {
    model = absl::CancelledError("unloaded");
    return Release(id, UnloadedMessage(id));
  }
  if (!model.ok()) {
    ports_->Note(LogLevel::kWarning, "stage request failed",
                 {{"stage", id}, {"why", rpc::Bounded(model.status())}});
    return Release(id, FailedMessage(id, model.status(), {}, nullptr));
  }
  v1::FromWorker message = LoadedMessage(id, **model, traits_.block_bytes);
  ports_->Note(LogLevel::kInfo, "stage loaded",
               {{"stage", id},
                {"layer_begin", (*model)->spec().layers.begin},
                {"layer_end", (*model)->spec().layers.end},
                {"weight_bytes", (*model)->weight_bytes()},
                {"cache_bytes", message.stage_state().cache_bytes()}});
  hosted->stage = std::make_unique<Stage>(id, *std::move(model), traits_, shares_.pool(),
                                          &host_budget_, &share_);
  ports_->Tell(std::move(message));
}

void WorkerCore::OnUnload(uint64_t stage_id) {
  Hosted* const hosted = Find(stage_id);
  if (hosted == nullptr) {
    return TellFailed(stage_id,
                      absl::NotFoundError(absl::StrCat("stage ", stage_id, " is not here")));
  }
  if (hosted->stage == nullptr) {
    hosted->unload_when_loaded = true;
    return;
  }
  ForgetEdges(stage_id);
  ports_->Note(LogLevel::kInfo, "stage unloaded", {{"stage", stage_id}});
  Release(stage_id, UnloadedMessage(stage_id));
}

void WorkerCore::Release(uint64_t stage_id, v1::FromWorker told) {
  hosted_.erase(stage_id);
  shares_.Remove(stage_id);
  told_when_settled_.push_back(std::move(told));
  Settle();
}

void WorkerCore::OnResize(const v1::ResizeCache& resize) {
  const uint64_t id = resize.stage_id();
  Hosted* const hosted = Find(id);
  const absl::Status valid = [&]() -> absl::Status {
    if (hosted == nullptr || hosted->stage == nullptr) {
      return absl::NotFoundError(absl::StrCat("stage ", id, " is not loaded here"));
    }
    if (hosted->resize_due) {
      return absl::FailedPreconditionError(
          absl::StrCat("the cache of stage ", id, " is being resized already"));
    }
    STRAIT_ASSIGN_OR_RETURN(const uint32_t blocks,
                            CheckCacheBytes(resize.cache_bytes(), traits_.block_bytes));
    const uint32_t before = shares_.BlocksOf(id);
    STRAIT_RETURN_IF_ERROR(shares_.Change(id, blocks));
    const absl::Status set = hosted->stage->SetCapacity(blocks);
    if (!set.ok()) {
      STRAIT_CHECK(shares_.Change(id, before).ok(), "it had as much before");
      Settle();
    }
    return set;
  }();
  if (!valid.ok()) {
    ports_->Note(LogLevel::kWarning, "cache not resized",
                 {{"stage", id}, {"why", rpc::Bounded(valid)}});
    return ports_->Tell(ResizedMessage(id, 0, valid));
  }
  ports_->Note(LogLevel::kInfo, "cache resized",
               {{"stage", id}, {"cache_bytes", resize.cache_bytes()}});
  hosted->resize_due = true;
  Settle();
}

void WorkerCore::Settle() {
  holds_steps_ = false;
  bool is_quiet = true;
  bool waits_for_quiet = false;
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr) continue;
    // Plans from before a resize may not have run yet, and need as much as it had.
    if (!shares_.IsSettled(id) && hosted.stage->peak_blocks() <= shares_.BlocksOf(id)) {
      shares_.Settle(id);
    }
    is_quiet = is_quiet && hosted.stage->num_begun() == 0 && hosted.stage->IsQuiet();
    waits_for_quiet = waits_for_quiet || (shares_.IsSettled(id) && hosted.stage->NeedsSettling());
  }
  waits_for_quiet = waits_for_quiet || shares_.ShrinkIsDue();
  holds_steps_ = waits_for_quiet && !is_quiet;
  share_.holds_copies = holds_steps_;
  if (holds_steps_) return;
  if (waits_for_quiet) {
    for (const auto& [id, hosted] : hosted_) {
      if (hosted.stage != nullptr && shares_.IsSettled(id)) hosted.stage->SettleCapacity();
    }
  }
  if (shares_.ShrinkIsDue()) {
    shares_.Shrink([this](BlockId end, std::vector<BlockMove>* moves) {
      for (const auto& [id, hosted] : hosted_) {
        if (hosted.stage != nullptr) hosted.stage->Compact(end, moves);
      }
    });
  }
  for (v1::FromWorker& told : std::exchange(told_when_settled_, {})) ports_->Tell(std::move(told));
  for (auto& [id, hosted] : hosted_) {
    if (!hosted.resize_due || !shares_.IsSettled(id)) continue;
    hosted.resize_due = false;
    ports_->Tell(ResizedMessage(id, shares_.BlocksOf(id) * traits_.block_bytes, absl::OkStatus()));
  }
}

}  // namespace strait
