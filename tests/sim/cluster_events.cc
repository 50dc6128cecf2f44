// SPDX-License-Identifier: Apache-2.0
//
// What happens to a cluster that is no fault.
#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/sim/sim_cluster.h"

namespace strait::sim {
namespace {

constexpr uint32_t kMostStages = 3;  // that a scale asks for
// Where nothing can move, it is tried again within this.
constexpr uint64_t kTryMoveUs = 40'000;

}  // namespace

void SimCluster::StartWorker(uint64_t memory_bytes, uint64_t weights) {
  workers_.push_back(std::make_unique<SimWorker>(&world_, &network_, &rows_, this, &scenario_,
                                                 workers_.size() + 1, memory_bytes, weights,
                                                 options_.check_always));
}

void SimCluster::SubmitOne() {
  --requests_left_;
  ++outcome_.requests;
  RequestId id;
  RequestSpec spec = clients_.Make(&id);
  const size_t num_sequences = spec.sequences.size();
  if (!core_.Ready()) submitted_unready_.insert(id);
  core_.OnSubmit(id, std::move(spec), world_.now_us());
  PumpSoon();
  if (!world_.Chance(scenario_.cancel_chance)) return;
  std::optional<uint32_t> index;
  if (num_sequences > 1 && world_.Chance(0.5)) {
    index = static_cast<uint32_t>(world_.Random(0, num_sequences - 1));
  }
  CancelSoon(id, index, world_.Random(0, world_.Pick({1'000, 50'000, 500'000})));
}

void SimCluster::CancelSoon(RequestId id, std::optional<uint32_t> index, uint64_t delay_us) {
  world_.After(delay_us, [this, id, index] {
    gate_.Pass([this, id, index] {
      world_.Trace(absl::StrCat("cancel ", id.value));
      clients_.OnCancel(id, index);
      core_.OnCancel(id, index, world_.now_us());
      Pump();
      clients_.CheckCancelled(id);
    });
  });
}

void SimCluster::ScaleOnce(uint32_t attempts) {
  // Where scales are what a seed is about, each is asked for when it can be.
  const bool waits =
      options_.shape == Shape::kScales && attempts > 0 &&
      (!scales_.empty() || core_.Stats().pipelines_active < scenario_.options.num_pipelines);
  if (waits) {
    return world_.After(world_.Random(1'000, kTryMoveUs), [this, attempts] {
      gate_.Pass([this, attempts] { ScaleOnce(attempts - 1); });
    });
  }
  --scales_left_;
  const ScaleId id{++outcome_.scales};
  const uint64_t most = scenario_.model.layer_weight_bytes.size();
  const auto num_stages =
      static_cast<uint32_t>(world_.Random(1, std::min<uint64_t>(kMostStages, most)));
  world_.Trace(absl::StrCat("scale ", id.value, " to ", num_stages, " stages"));
  scales_.insert(id);
  core_.OnScale(id, num_stages, world_.now_us());
  PumpSoon();
}

void SimCluster::OnScaled(const ScaleAnswered& answer) {
  world_.Trace(absl::StrCat("scale ", answer.scale.value, ": ", answer.status.ToString()));
  if (scales_.erase(answer.scale) == 0) world_.Violation("a scale is answered twice");
  outcome_.scales_done += answer.status.ok();
  procedure_counts_.AddEnd(absl::StrCat(
      "scale: ", answer.status.ok() ? "done" : absl::StatusCodeToString(answer.status.code())));
  outcome_.scale_kept += answer.reply.rows_kept();
  const absl::StatusCode code = answer.status.code();
  if (code != absl::StatusCode::kOk && code != absl::StatusCode::kAborted &&
      code != absl::StatusCode::kFailedPrecondition &&
      code != absl::StatusCode::kResourceExhausted) {
    world_.Violation(absl::StrCat("a scale ended with ", answer.status.ToString()));
  }
}

void SimCluster::MoveOnce(uint32_t attempts) {
  if (moves_.AskForOne()) {
    --moves_left_;
    CheckAims();
    return PumpSoon();
  }
  if (attempts == 0) {
    --moves_left_;
    return;
  }
  world_.After(world_.Random(1'000, kTryMoveUs),
               [this, attempts] { gate_.Pass([this, attempts] { MoveOnce(attempts - 1); }); });
}

void SimCluster::Flush() {
  world_.Trace("flush");
  core_.OnFlush(world_.now_us());
  PumpSoon();
}

void SimCluster::Heal() {
  faults_over_ = true;
  aims_.clear();
  procedure_aims_.clear();
  rows_.Mend();
  world_.Trace("faults are over");
  if (!scenario_.heals) return;
  std::multiset<uint64_t> missing(scenario_.worker_memory.begin(), scenario_.worker_memory.end());
  for (const auto& worker : workers_) {
    if (!worker->alive() || worker->is_foreign()) continue;
    if (drains_.IsOut(worker->instance()) || worker->is_leaving()) continue;
    const auto it = missing.find(worker->memory_bytes());
    if (it != missing.end()) missing.erase(it);
  }
  // Who cannot pass anything on is needed until another can.
  for (const auto& worker : workers_) {
    if (!worker->alive() || worker->is_foreign() || !network_.IsSpoiled(worker->address()))
      continue;
    missing.insert(worker->memory_bytes());
  }
  for (const uint64_t memory : missing) StartWorker(memory);
  if (scenario_.num_scales == 0) return;
  // Pipelines of more stages may have taken the workers that others lost.
  const uint32_t most = std::max(kMostStages, scenario_.options.num_stages);
  for (uint32_t i = 0; i < most * scenario_.options.num_pipelines; ++i) {
    StartWorker(scenario_.worker_memory.front());
  }
}

}  // namespace strait::sim
