// SPDX-License-Identifier: Apache-2.0
//
// How the caches of stages get smaller and larger while their pipeline serves.
//
// A smaller one counts for plans at once: what does not fit is closed by a plan before ResizeCache. Its memory
// counts as free when the worker says so. A larger one counts for memory at once, for plans when the
// worker says so.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"

namespace strait {
namespace {

// A growth for which the worker lacks memory is asked again so often, each wait twice the one before.
constexpr uint32_t kMaxGrowthsFailed = 5;
constexpr uint64_t kGrowBackoffUs = 100'000;

}  // namespace

uint64_t Cluster::FreeBytes(const Worker& worker) const {
  return worker.memory_bytes -
         BookedBytes(context_->options, context_->model, worker.memory(), worker.stages);
}

void Cluster::SendResize(Worker* worker, uint64_t stage_id, uint64_t cache_bytes, uint64_t now_us) {
  HostedStage& stage = worker->stages.at(stage_id);
  STRAIT_CHECK(!stage.resize && cache_bytes > 0);
  stage.resize = {cache_bytes, now_us};
  SendToWorker out{worker->id, {}};
  out.message.mutable_resize_cache()->set_stage_id(stage_id);
  out.message.mutable_resize_cache()->set_cache_bytes(cache_bytes);
  context_->Send(std::move(out));
}

void Cluster::ResizeSlots(Pipeline* pipeline, const std::vector<uint64_t>& cache_bytes,
                          uint64_t now_us) {
  if (pipeline->scheduler.started()) {
    const auto plan = pipeline->scheduler.Resize(cache_bytes, now_us);
    if (plan) SendStep(*pipeline, *plan);
  }
  for (size_t i = 0; i < cache_bytes.size(); ++i) pipeline->slots[i].cache_bytes = cache_bytes[i];
}

void Cluster::GrowCaches(Pipeline* pipeline, uint64_t now_us) {
  if (pipeline->state != Pipeline::State::kActive || pipeline->scaled_rows) return;
  for (StageSlot& slot : pipeline->slots) {
    if (slot.wanted_cache_bytes <= slot.cache_bytes || now_us < slot.grow_after_us) continue;
    Worker* worker = FindWorker(slot.worker);
    // What goes there may share with it.
    if (worker->stages.at(slot.stage_id).resize || worker->Has(HostedStage::Role::kUnloading) ||
        worker->Has(HostedStage::Role::kFollowed)) {
      continue;
    }
    const uint64_t more =
        CacheMemoryBytes(context_->model, worker->memory(), slot.wanted_cache_bytes) -
        CacheMemoryBytes(context_->model, worker->memory(), slot.cache_bytes);
    if (more > FreeBytes(*worker)) continue;
    SendResize(worker, slot.stage_id, slot.wanted_cache_bytes, now_us);
  }
}

bool Cluster::Grown(const Pipeline& pipeline) const {
  for (const auto& [id, worker] : workers_) {
    for (const auto& [stage_id, stage] : worker.stages) {
      if (stage.pipeline == pipeline.id &&
          (stage.role != HostedStage::Role::kPlace || stage.resize)) {
        return false;
      }
    }
  }
  return std::all_of(pipeline.slots.begin(), pipeline.slots.end(), [](const StageSlot& slot) {
    return slot.cache_bytes >= slot.wanted_cache_bytes;
  });
}

void Cluster::OnCacheResized(Worker* worker, const v1::CacheResized& resized, uint64_t now_us) {
  HostedStage* stage = worker->Find(resized.stage_id());
  if (stage == nullptr || !stage->resize) {
    return Evict(
        worker->id,
        absl::FailedPreconditionError(absl::StrCat("tells the cache of stage ", resized.stage_id(),
                                                   " to be resized, which was not asked for")),
        now_us);
  }
  const uint64_t asked = stage->resize->cache_bytes;
  if (resized.error_code() == 0 && resized.cache_bytes() != asked) {
    return Evict(worker->id,
                 absl::FailedPreconditionError(absl::StrCat(
                     "resized the cache of stage ", resized.stage_id(), " to ",
                     resized.cache_bytes(), " bytes, not to the ", asked, " asked for")),
                 now_us);
  }
  stage->resize.reset();
  if (resized.error_code() == 0) stage->cache_bytes = asked;
  const Seat seat = SeatOf(worker, resized.stage_id());
  if (seat.slot == nullptr) return;  // of a stage that is given up
  // After a failure as before the request.
  if (seat.slot->cache_bytes != stage->cache_bytes) {
    std::vector<uint64_t> cache_bytes;
    for (const StageSlot& slot : seat.pipeline->slots) cache_bytes.push_back(slot.cache_bytes);
    cache_bytes[stage->slot_index] = stage->cache_bytes;
    ResizeSlots(seat.pipeline, cache_bytes, now_us);
  }
  if (resized.error_code() == 0) {
    seat.slot->growths_failed = 0;
    return;
  }
  const absl::Status why(static_cast<absl::StatusCode>(resized.error_code()),
                         absl::StrCat("worker ", worker->name, " could not resize a cache to ",
                                      asked, " bytes: ", resized.error_message()));
  worker->last_error = std::string(why.message());
  // An edge that is torn down has its memory a little longer than the books say.
  if (asked > stage->cache_bytes && absl::IsResourceExhausted(why) &&
      ++seat.slot->growths_failed <= kMaxGrowthsFailed) {
    seat.slot->grow_after_us = now_us + (kGrowBackoffUs << seat.slot->growths_failed);
    return;
  }
  if (seat.slot->was_warm) return GiveUpWarm(seat.pipeline, stage->slot_index, now_us);
  // It stays as it is, rather than be asked again and again.
  if (asked > stage->cache_bytes) seat.slot->wanted_cache_bytes = stage->cache_bytes;
  AbortScale(seat.pipeline->id, why);
}

}  // namespace strait
