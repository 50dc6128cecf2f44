// SPDX-License-Identifier: Apache-2.0
//
// Faults of a cluster: at random times, and at phases of moves.
#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "tests/sim/sim_cluster.h"

namespace strait::sim {
namespace {

// How long links may be slow, or parted.
constexpr uint64_t kLinkFaultUs = 15'000'000;
// Longer than a load, a step or an activation may take.
constexpr uint64_t kHangUs = 45'000'000;
// A fault that is aimed at a phase strikes at once, or a moment later.
constexpr uint64_t kAimDelayUs = 3'000;
// Requests that come where a destination is to be short of room.
constexpr uint32_t kCrowd = 6;

std::string NameOf(const SimWorker& worker) { return absl::StrCat("fault: w", worker.instance()); }

}  // namespace

void SimCluster::KillWorker(SimWorker* worker) {
  ++worker_faults_;
  CountFault(MoveFault::kKillSource, MoveFault::kKillDestination, *worker);
  CountProcedures(Fault::kKillOwn, Fault::kKillPeer, *worker);
  // The host may vanish without a word: then only the missing heartbeats tell.
  const bool silent = world_.Chance(0.3);
  world_.Trace(absl::StrCat(NameOf(*worker), silent ? " vanishes" : " dies"));
  const bool leaves = worker->is_leaving();
  worker->Kill(silent);
  if (leaves) drains_.OnGone(worker->instance());
  procedures_.OnLost();
  procedures_.OnGone(worker);
  if (!silent) StreamEnds(worker);
  if (!world_.Chance(scenario_.replacement_chance)) return;
  world_.After(world_.Random(1'000, 1'000'000),
               [this, memory = worker->memory_bytes()] { JoinWorker(memory); });
}

void SimCluster::BreakStream(SimWorker* worker) {
  ++worker_faults_;
  CountFault(MoveFault::kStreamSource, MoveFault::kStreamDestination, *worker);
  CountProcedures(Fault::kStreamOwn, Fault::kStreamPeer, *worker);
  world_.Trace(NameOf(*worker) + "'s stream breaks");
  Close(streams_[worker], absl::UnavailableError("stream broke"), true);
}

void SimCluster::StallWorker(SimWorker* worker) {
  ++worker_faults_;
  CountFault(MoveFault::kStallSource, MoveFault::kStallDestination, *worker);
  CountProcedures(Fault::kStallOwn, Fault::kStallPeer, *worker);
  const uint64_t us = world_.Random(1'000, 3 * scenario_.options.heartbeat_timeout_us);
  world_.Trace(absl::StrCat(NameOf(*worker), " stalls for ", us / 1000, " ms"));
  worker->Stall(us);
}

void SimCluster::HangWorker(SimWorker* worker) {
  ++worker_faults_;
  CountFault(MoveFault::kHangSource, MoveFault::kHangDestination, *worker);
  CountProcedures(Fault::kHangOwn, Fault::kHangPeer, *worker);
  const uint64_t us = world_.Random(1'000, world_.Pick({uint64_t{1'000'000}, kHangUs}));
  world_.Trace(absl::StrCat(NameOf(*worker), "'s device hangs for ", us / 1000, " ms"));
  worker->Hang(us);
}

void SimCluster::StopCoordinatorFor20s() {
  CountFault(MoveFault::kCoordinatorStops20s);
  CountProcedures(Fault::kCoordinatorStops20s);
  world_.Trace("fault: the coordinator stands still for 20 s");
  gate_.Shut(20'000'000);
}

void SimCluster::StopCoordinator() {
  CountFault(MoveFault::kCoordinatorStops);
  CountProcedures(Fault::kCoordinatorStops);
  const uint64_t us = world_.Random(
      1'000, world_.Pick({3 * scenario_.options.heartbeat_timeout_us, uint64_t{30'000'000}}));
  world_.Trace(absl::StrCat("fault: the coordinator stands still for ", us / 1000, " ms"));
  gate_.Shut(us);
}

void SimCluster::FaultOnce() {
  world_.After(1'000, [this] { CheckSound(); });
  std::vector<SimWorker*> alive;
  for (const auto& worker : workers_) {
    if (worker->alive() && !worker->is_foreign()) alive.push_back(worker.get());
  }
  if (alive.empty()) return;
  SimWorker* worker = alive[world_.Random(0, alive.size() - 1)];
  switch (world_.Random(0, 14)) {
    case 0:
    case 1:
    case 2:
    case 3:
      return KillWorker(worker);
    case 4:
      return BreakStream(worker);
    case 5:
    case 6:
      return StallWorker(worker);
    case 7:
      ++worker_faults_;
      return network_.BreakOne();
    case 8:
      ++worker_faults_;
      world_.Trace(NameOf(*worker) + "'s next step fails");
      return worker->FailNextStep();
    case 9:
      ++worker_faults_;
      world_.Trace(NameOf(*worker) + "'s next load fails");
      return worker->FailNextLoad();
    case 10:
      ++worker_faults_;
      world_.Trace(NameOf(*worker) + "'s links carry nothing");
      clients_.ExpectManyFailures();
      return network_.Spoil(worker->address());
    case 11:
      world_.Trace("fault: a worker with other weights joins");
      return StartWorker(worker->memory_bytes(), kHashWeights + 1);
    case 12:
    case 13:
      return StopCoordinator();
    case 14:
      rows_.BreakOne();
  }
}

void SimCluster::Corrupt() {
  SimWorker& worker = *workers_[world_.Random(0, workers_.size() - 1)];
  if (!worker.alive()) return;
  const bool fails = world_.Chance(0.3);
  if (fails) {
    moves_.ExpectFailedCopies();
    worker.FailNextCopy();
  }
  if (!fails && !worker.CorruptHost()) return;
  ++outcome_.corruptions;
  world_.Trace(
      absl::StrCat(NameOf(worker), fails ? "'s next copy fails" : "'s host memory changes"));
}

// ---------------------------------------------------------------- faults of moves

void SimCluster::CountFault(MoveFault of_source, MoveFault of_destination,
                            const SimWorker& worker) {
  const auto has = [&](const std::vector<WorkerId>& ids) {
    return std::any_of(ids.begin(), ids.end(),
                       [&](WorkerId id) { return by_id_.at(id)->worker == &worker; });
  };
  for (const LiveMove& move : moves_.Live()) {
    if (has(move.sources)) moves_.counts().Add(of_source, move.phase);
    if (has(move.destinations)) moves_.counts().Add(of_destination, move.phase);
  }
}

void SimCluster::CountFault(MoveFault fault) {
  for (const LiveMove& move : moves_.Live()) moves_.counts().Add(fault, move.phase);
}

void SimCluster::MakeAims() {
  for (uint32_t i = 0; i < scenario_.num_aimed; ++i) {
    Aim aim;
    // Later phases are short, and fewer moves get there.
    aim.phase = static_cast<MovePhase>(world_.Pick({0, 0, 1, 2, 2, 3, 3, 3, 4, 4}));
    do {
      aim.fault = static_cast<MoveFault>(world_.Random(0, kNumMoveFaults - 1));
    } while (!CanMeet(aim.fault, aim.phase));
    // Not every destination that is crowded is short of room.
    if (CanMeet(MoveFault::kNoRoom, aim.phase) && world_.Chance(0.15)) {
      aim.fault = MoveFault::kNoRoom;
    }
    aim.delay_us = world_.Chance(0.6) ? 0 : world_.Random(1, kAimDelayUs);
    aims_.push_back(aim);
  }
}

void SimCluster::BreakScale() {
  std::set<uint64_t> numbers;
  std::vector<WorkerId> workers;  // of a pipeline that has its old stages yet
  const json::Value status = Status();
  for (const json::Value& pipeline : status.at("pipelines").as_array()) {
    numbers.insert(pipeline.at("num_stages").to_number<uint64_t>());
    workers.clear();
    for (const json::Value& stage : pipeline.at("stages").as_array()) {
      if (!stage.as_object().contains("worker_id")) continue;
      workers.push_back(WorkerId{stage.at("worker_id").to_number<uint64_t>()});
    }
  }
  if (numbers.size() < 2) return;
  scale_is_broken_ = true;
  if (SimWorker* const worker = AliveOf(workers)) BreakStream(worker);
}

void SimCluster::CheckAims() {
  if (scenario_.breaks_scale && !scale_is_broken_ && !scales_.empty()) BreakScale();
  CheckProcedureAims();
  if (aims_.empty() || !moves_.pending()) return;
  for (const LiveMove& move : moves_.Live()) {
    const auto it = std::find_if(aims_.begin(), aims_.end(),
                                 [&](const Aim& aim) { return aim.phase == move.phase; });
    if (it == aims_.end()) continue;
    const Aim aim = *it;
    aims_.erase(it);
    if (aim.delay_us == 0) {
      Strike(aim.fault, move.sequence);
    } else {
      world_.After(aim.delay_us, [this, aim, sequence = move.sequence] {
        if (!faults_over_) Strike(aim.fault, sequence);
      });
    }
  }
}

SimWorker* SimCluster::AliveOf(const std::vector<WorkerId>& ids) {
  std::vector<SimWorker*> alive;
  for (const WorkerId id : ids) {
    SimWorker* const worker = by_id_.at(id)->worker;
    if (worker->alive()) alive.push_back(worker);
  }
  return alive.empty() ? nullptr : alive[world_.Random(0, alive.size() - 1)];
}

void SimCluster::CrowdDestination(SimWorker* source) {
  world_.Trace(NameOf(*source) + " stands still for a moment, and requests come");
  const uint64_t timeout_us = scenario_.options.heartbeat_timeout_us;
  source->Stall(world_.Random(timeout_us / 4, timeout_us * 3 / 4));
  requests_left_ += kCrowd;
  for (uint32_t i = 0; i < kCrowd; ++i) {
    world_.After(world_.Random(1, 10'000), [this] { gate_.Pass([this] { SubmitOne(); }); });
  }
}

void SimCluster::Strike(MoveFault fault, SequenceId sequence) {
  const std::vector<LiveMove> live = moves_.Live();
  const auto move = std::find_if(live.begin(), live.end(),
                                 [&](const LiveMove& m) { return m.sequence == sequence; });
  if (move == live.end()) return;
  world_.After(1'000, [this] { CheckSound(); });
  SimWorker* const source = AliveOf(move->sources);
  SimWorker* const destination = AliveOf(move->destinations);
  if (source == nullptr || destination == nullptr) return;
  const auto until = [this] {
    world_.After(world_.Random(1'000, kLinkFaultUs), [this] { rows_.Mend(); });
  };
  switch (fault) {
    case MoveFault::kKillSource:
      return KillWorker(source);
    case MoveFault::kKillDestination:
      return KillWorker(destination);
    case MoveFault::kStallSource:
      return StallWorker(source);
    case MoveFault::kStallDestination:
      return StallWorker(destination);
    case MoveFault::kHangSource:
      return HangWorker(source);
    case MoveFault::kHangDestination:
      return HangWorker(destination);
    case MoveFault::kStreamSource:
      return BreakStream(source);
    case MoveFault::kStreamDestination:
      return BreakStream(destination);
    case MoveFault::kBreakRows:
      world_.Trace("fault: a connection for rows breaks");
      rows_.BreakOne();
      return;
    case MoveFault::kCorruptFrame:
      world_.Trace("fault: the next frame is damaged");
      return rows_.CorruptNext();
    case MoveFault::kDuplicateFrame:
      world_.Trace("fault: the next frame comes twice");
      return rows_.DuplicateNext();
    case MoveFault::kSlowLink:
      CountFault(fault);
      world_.Trace(NameOf(*source) + "'s rows go slowly");
      rows_.Slow(source->address());
      return until();
    case MoveFault::kPartition:
      CountFault(fault);
      world_.Trace(absl::StrCat(NameOf(*source), " and w", destination->instance(), " are parted"));
      rows_.Part(source->address(), destination->address());
      return until();
    case MoveFault::kPartSource:
      return PartWorker(source);
    case MoveFault::kPartDestination:
      return PartWorker(destination);
    case MoveFault::kNoRoom:
      return CrowdDestination(source);
    case MoveFault::kCoordinatorStops:
      return StopCoordinator();
    case MoveFault::kCoordinatorStops20s:
      return StopCoordinatorFor20s();
    case MoveFault::kCancel:
      if (move->request.value == 0) return;
      CountFault(fault);
      return CancelSoon(move->request, move->choice, 0);
  }
}

}  // namespace strait::sim
