// SPDX-License-Identifier: Apache-2.0
//
// Workers that are drained, leave and come.
#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tests/sim/sim_cluster.h"

namespace strait::sim {

void SimCluster::ScheduleProcedures() {
  MakeProcedureAims(seed_);
  const auto at = [this](uint32_t num, void (SimCluster::*what)()) {
    for (uint32_t i = 0; i < num; ++i) {
      world_.After(scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.drains_us),
                   [this, what] { gate_.Pass([this, what] { (this->*what)(); }); });
    }
    return num;
  };
  drains_left_ = at(scenario_.num_drains, &SimCluster::DrainOnce);
  leaves_left_ = at(scenario_.num_leaves, &SimCluster::LeaveOnce);
  joins_left_ = at(scenario_.num_joins, &SimCluster::JoinOnce);
}

void SimCluster::CheckCopies(bool flushed) {
  if (scenario_.replica_bytes == 0) return;
  const json::Value status = Status();
  for (const json::Value& value : status.at("workers").as_array()) {
    if (!value.as_object().contains("replica_bytes_used")) continue;
    uint64_t instance = 0;
    if (!absl::SimpleAtoi(std::string(value.at("name").as_string()).substr(1), &instance)) continue;
    const SimWorker& worker = *workers_[instance - 1];
    if (!worker.alive() || !streams_.at(workers_[instance - 1].get())->open) continue;
    const auto booked = value.at("replica_bytes_used").to_number<uint64_t>();
    const auto violation = [&](auto... what) {
      world_.Violation(absl::StrCat("w", instance, " is booked to have copies of ", booked,
                                    " bytes, ", what...));
    };
    const ReplicaStore& store = worker.replicas();
    // Of those under way neither side can know what becomes of them.
    if (procedures_.AwaitsCopies(&worker) || store.busy()) continue;
    if (flushed && booked > 0) return violation("after a flush");
    const uint64_t has = (store.num_blocks() - store.num_unnamed()) * store.block_bytes();
    // Damaged ones go, and the coordinator does not hear of it.
    const uint64_t damaged = store.num_damaged() * store.block_bytes();
    if (has <= booked && booked <= has + damaged) continue;
    violation("it has ", has, ", ", damaged, " were damaged");
  }
}

void SimCluster::CollectProcedures() {
  for (const auto& worker : workers_) outcome_.rows_restored += worker->rows_restored();
  procedure_counts_.Add(Fault::kNoRoom, Phase::kCopiesCome, core_.Stats().replicas_refused);
  outcome_.procedures.Add(procedure_counts_);
  outcome_.drains_asked = drains_.num_asked();
  outcome_.drains_done = drains_.num_done();
  outcome_.drains_undone = drains_.num_undone();
}

void SimCluster::JoinWorker(uint64_t memory_bytes) {
  StartWorker(memory_bytes);
  procedures_.OnJoins(workers_.back().get());
}

void SimCluster::JoinOnce() {
  --joins_left_;
  ++outcome_.joins;
  world_.Trace("a worker comes");
  JoinWorker(scenario_.worker_memory[world_.Random(0, scenario_.worker_memory.size() - 1)]);
  CheckProcedureAims();
}

void SimCluster::DrainOnce() {
  --drains_left_;
  // Those that the coordinator knows now.
  std::vector<uint64_t> instances;
  const json::Value status = Status();
  for (const json::Value& worker : status.at("workers").as_array()) {
    uint64_t instance = 0;
    if (scenario_.drains_serving && worker.at("stages").as_array().empty()) continue;
    if (absl::SimpleAtoi(std::string(worker.at("name").as_string()).substr(1), &instance)) {
      instances.push_back(instance);
    }
  }
  if (instances.empty()) return;
  drains_.AskForOne(instances);
  PumpSoon();
}

void SimCluster::LeaveOnce() {
  --leaves_left_;
  std::vector<SimWorker*> staying;
  for (const auto& worker : workers_) {
    if (worker->alive() && !worker->is_foreign() && !worker->is_leaving()) {
      staying.push_back(worker.get());
    }
  }
  if (staying.empty()) return;
  SimWorker* const worker = staying[world_.Random(0, staying.size() - 1)];
  world_.Trace(absl::StrCat("w", worker->instance(), " is told to stop"));
  ++outcome_.leaves;
  worker->RunAfter(0, [worker] { worker->Leave(); });
}

void SimCluster::OnDrainEnded(const VerbEnded& ended) {
  const std::optional<uint64_t> drained = drains_.OnMessage(ended);
  if (drained && ((faults_over_ && scenario_.heals) || scenario_.drains_serving)) {
    StartWorker(workers_[*drained - 1]->memory_bytes());
  }
}

void SimCluster::Exit(SimWorker* worker) {
  world_.Trace(absl::StrCat("w", worker->instance(), " ends"));
  // Unless it was told so, it gave up while it still had stages.
  outcome_.left_with_stages += worker->num_stages() > 0;
  ++outcome_.left;
  worker->Kill();
  StreamEnds(worker);
  drains_.OnGone(worker->instance());
  procedures_.OnLost();
  procedures_.OnGone(worker);
  if (faults_over_ && scenario_.heals) StartWorker(worker->memory_bytes());
}

bool SimCluster::AnyLeaves() const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [](const auto& worker) { return worker->alive() && worker->is_leaving(); });
}

}  // namespace strait::sim
