// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/procedures.h"

#include <algorithm>

#include "proto/model/content_key.h"
#include "tests/sim/sim_worker.h"

namespace strait::sim {
namespace {

uint32_t NumKeys(const std::string& packed) {
  const auto keys = ParseContentKeys(packed);
  return keys.ok() ? static_cast<uint32_t>(keys->size()) : 0;
}

Phase PhaseOf(const ChangeUnderWay& change) {
  constexpr const char* kNames[kNumChangePhases] = {"making room", "loading",  "copying",
                                                    "still",       "switched", "growing"};
  size_t at = 0;
  while (at + 1 < kNumChangePhases && std::string(change.phase) != kNames[at]) ++at;
  return static_cast<Phase>(
      static_cast<size_t>(change.drains ? Phase::kReplacementRoom : Phase::kScaleRoom) + at);
}

}  // namespace

bool ByInstance::operator()(const SimWorker* a, const SimWorker* b) const {
  return a->instance() < b->instance();
}

void Procedures::OnJoins(SimWorker* worker) {
  joins_[worker] = Phase::kJoinGreets;
  counts_->AddReached(Phase::kJoinGreets);
}

void Procedures::EnterBegin(uint64_t stage_id, Phase phase) {
  const auto it = begins_.find(stage_id);
  if (it == begins_.end() || it->second.phase == phase) return;
  it->second.phase = phase;
  counts_->AddReached(phase);
}

void Procedures::OnSent(SimWorker* to, const v1::ToWorker& message) {
  const auto joins = joins_.find(to);
  const auto join = [&](Phase from, Phase phase) {
    if (joins == joins_.end() || joins->second != from) return;
    joins->second = phase;
    counts_->AddReached(phase);
  };
  switch (message.message_case()) {
    case v1::ToWorker::kWelcome:
      by_address_[to->address()] = to;
      return join(Phase::kJoinGreets, Phase::kJoinIdles);
    case v1::ToWorker::kLoadStage: {
      const uint64_t id = message.load_stage().stage_id();
      stages_[id] = to;
      join(Phase::kJoinIdles, Phase::kJoinLoads);  // unless OnWarms was called
      if (!any_lost_) return;
      begins_[id] = {to, Phase::kReplaceLoads, {}};
      return counts_->AddReached(Phase::kReplaceLoads);
    }
    case v1::ToWorker::kActivateStage: {
      const v1::ActivateStage& activate = message.activate_stage();
      join(Phase::kJoinLoads, Phase::kJoinActivates);
      join(Phase::kJoinWarms, Phase::kJoinActivates);
      const auto begins = begins_.find(activate.stage_id());
      if (begins == begins_.end()) return;
      begins->second.keepers.clear();
      for (const v1::FetchRows& restore : activate.restores()) {
        for (const v1::RowsSource& source : restore.sources()) {
          const auto keeper = by_address_.find(source.data_address());
          if (keeper != by_address_.end()) begins->second.keepers.insert(keeper->second);
        }
      }
      return EnterBegin(activate.stage_id(), activate.restores_size() > 0
                                                 ? Phase::kReplaceRestores
                                                 : Phase::kReplaceActivates);
    }
    case v1::ToWorker::kUnloadStage:
      begins_.erase(message.unload_stage().stage_id());
      stages_.erase(message.unload_stage().stage_id());
      return;
    case v1::ToWorker::kReplicate: {
      const uint32_t num = NumKeys(message.replicate().keys());
      if (num == 0) return;
      uint32_t& coming = copies_[to][message.replicate().source().stage_id()];
      if (coming == 0) counts_->AddReached(Phase::kCopiesCome);
      coming += num;
      return;
    }
    default:
      return;
  }
}

void Procedures::OnHeard(SimWorker* from, const v1::FromWorker& message) {
  if (message.has_replicated()) {
    const v1::Replicated& told = message.replicated();
    const auto buddy = copies_.find(from);
    if (buddy == copies_.end()) return;
    const auto it = buddy->second.find(told.stage_id());
    if (it == buddy->second.end()) return;
    it->second -= std::min(it->second, NumKeys(told.keys()) + NumKeys(told.failed()));
    if (it->second == 0) counts_->AddReached(Phase::kCopiesThere);
    return;
  }
  if (message.has_rows_fetched()) {
    const bool no_room = message.rows_fetched().error_code() ==
                         static_cast<uint32_t>(absl::StatusCode::kResourceExhausted);
    if (no_room && change_ && CanMeet(Fault::kCorrupt, change_->phase)) {
      counts_->Add(Fault::kNoRoom, change_->phase);
    }
    return;
  }
  const auto joins = joins_.find(from);
  if (message.stage_state().state() == v1::StageState::ACTIVE) {
    EnterBegin(message.stage_state().stage_id(), Phase::kReplaceBegins);
    if (joins != joins_.end() && joins->second == Phase::kJoinActivates) {
      joins->second = Phase::kJoinBegins;
      counts_->AddReached(Phase::kJoinBegins);
    }
    return;
  }
  if (!message.has_report() || message.report().error_code() != 0) return;
  if (!begins_.empty()) begins_.erase(message.report().stage_id());
  if (joins != joins_.end() && joins->second == Phase::kJoinBegins) {
    counts_->AddEnd("a worker that came is used");
    joins_.erase(joins);
  }
}

bool Procedures::AwaitsPlace(SimWorker* worker) const {
  const auto it = joins_.find(worker);
  return it != joins_.end() && it->second == Phase::kJoinIdles;
}

void Procedures::OnWarms(SimWorker* worker) {
  joins_[worker] = Phase::kJoinWarms;
  counts_->AddReached(Phase::kJoinWarms);
}

void Procedures::OnChange(const std::optional<ChangeUnderWay>& change,
                          const std::function<SimWorker*(WorkerId)>& worker_of) {
  if (!change) return change_.reset();
  const Phase phase = PhaseOf(*change);
  const bool is_new = !change_ || change_->pipeline != change->pipeline || phase < change_->phase;
  const auto workers = [&](const std::vector<WorkerId>& ids) {
    std::set<SimWorker*, ByInstance> each;
    for (const WorkerId id : ids) each.insert(worker_of(id));
    return each;
  };
  // It may stand still twice.
  if (is_new) {
    const auto hosts = workers(change->hosts);
    auto left = workers(change->serve);
    std::erase_if(left, [&](SimWorker* each) { return hosts.contains(each); });
    change_ =
        Change{change->pipeline, phase, {hosts.begin(), hosts.end()}, {left.begin(), left.end()}};
  }
  if (is_new || change_->phase != phase) counts_->AddReached(phase);
  change_->phase = phase;
}

std::optional<Phase> Procedures::BringsRows() const {
  if (change_ && CanMeet(Fault::kCorrupt, change_->phase)) return change_->phase;
  const bool restores = std::any_of(begins_.begin(), begins_.end(), [](const auto& entry) {
    return entry.second.phase == Phase::kReplaceRestores;
  });
  return restores ? std::optional(Phase::kReplaceRestores) : std::nullopt;
}

void Procedures::OnGone(SimWorker* worker) {
  copies_.erase(worker);
  std::erase_if(begins_, [&](const auto& entry) { return entry.second.worker == worker; });
  if (!worker->alive()) {
    joins_.erase(worker);
    std::erase_if(stages_, [&](const auto& entry) { return entry.second == worker; });
  }
}

bool Procedures::AwaitsCopies(const SimWorker* buddy) const {
  return std::any_of(copies_.begin(), copies_.end(), [&](const auto& entry) {
    return (buddy == nullptr || entry.first == buddy) &&
           std::any_of(entry.second.begin(), entry.second.end(),
                       [](const auto& coming) { return coming.second > 0; });
  });
}

std::vector<LiveProcedure> Procedures::Live() const {
  std::vector<LiveProcedure> live;
  for (const auto& [buddy, stages] : copies_) {
    for (const auto& [stage_id, coming] : stages) {
      const auto source = stages_.find(stage_id);
      if (source == stages_.end()) continue;
      live.push_back(
          {coming > 0 ? Phase::kCopiesCome : Phase::kCopiesThere, source->second, {buddy}});
    }
  }
  for (const auto& [stage_id, begin] : begins_) {
    live.push_back({begin.phase, begin.worker, {begin.keepers.begin(), begin.keepers.end()}});
  }
  for (const auto& [worker, phase] : joins_) live.push_back({phase, worker, {}});
  if (!change_) return live;
  for (SimWorker* const host : change_->hosts) {
    if (host->alive()) live.push_back({change_->phase, host, change_->left});
  }
  return live;
}

}  // namespace strait::sim
