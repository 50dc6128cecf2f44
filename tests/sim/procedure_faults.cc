// SPDX-License-Identifier: Apache-2.0
//
// Faults at phases of copying, of replacing workers, of drains and of joins; and partitions.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "tests/sim/sim_cluster.h"

namespace strait::sim {
namespace {

// How long ways may be cut, or rows slow.
constexpr uint64_t kPartUs = 15'000'000;
constexpr uint64_t kAimDelayUs = 3'000;
// From one seed's pairs to the next ones': a prime, so that all come.
constexpr uint64_t kAimStride = 37;

}  // namespace

// ---------------------------------------------------------------- partitions

void SimCluster::PartWorker(SimWorker* worker) {
  ++worker_faults_;
  CountFault(MoveFault::kPartSource, MoveFault::kPartDestination, *worker);
  CountProcedures(Fault::kPartOwn, Fault::kPartPeer, *worker);
  Partition::Wall wall;
  wall.island = {worker->address()};
  // Others may be on its side.
  while (world_.Chance(0.3)) {
    wall.island.insert(workers_[world_.Random(0, workers_.size() - 1)]->address());
  }
  wall.control = world_.Chance(0.7);
  wall.data = !wall.control || world_.Chance(0.6);
  const uint64_t us =
      world_.Random(1'000, world_.Pick({3 * scenario_.options.heartbeat_timeout_us, kPartUs}));
  wall.until_us = world_.now_us() + us;
  world_.Trace(absl::StrCat("fault: w", worker->instance(), " and ", wall.island.size() - 1,
                            " others are parted from ", wall.control ? "the coordinator " : "",
                            wall.data ? "the other workers " : "", "for ", us / 1000, " ms"));
  partition_.Cut(wall);
  if (!wall.control) return;
  // Who hears nothing for so long gives its stream up, too.
  const uint64_t silence_us = scenario_.options.heartbeat_timeout_us;
  for (const auto& each : workers_) {
    if (!each->alive() || !wall.island.contains(each->address())) continue;
    world_.After(silence_us, [this, each = each.get(), stream = streams_[each.get()]] {
      if (!each->alive() || streams_[each] != stream) return;
      if (!partition_.IsCut(each->address(), kCoordinatorAddress)) return;
      Close(stream, absl::UnavailableError("the coordinator was silent"), true, /*by_worker=*/true);
    });
  }
}

// ---------------------------------------------------------------- counts

std::vector<LiveProcedure> SimCluster::LiveProcedures() const {
  std::vector<LiveProcedure> live = procedures_.Live();
  for (const Drains::Live& drain : drains_.Current()) {
    live.push_back({drain.phase, workers_[drain.instance - 1].get(), {}});
  }
  return live;
}

void SimCluster::CountProcedures(Fault of_own, Fault of_peer, const SimWorker& worker) {
  for (const LiveProcedure& each : LiveProcedures()) {
    if (each.own == &worker) {
      procedure_counts_.Add(of_own, each.phase);
    } else if (each.peers.empty() ||
               std::find(each.peers.begin(), each.peers.end(), &worker) != each.peers.end()) {
      procedure_counts_.Add(of_peer, each.phase);
    }
  }
}

void SimCluster::CountProcedures(Fault fault) {
  for (const LiveProcedure& each : LiveProcedures()) {
    if (CanMeet(fault, each.phase)) procedure_counts_.Add(fault, each.phase);
  }
}

void SimCluster::OnRowFault(RowFault fault, SequenceId sequence) {
  moves_.OnRowFault(fault, sequence);
  if (fault == RowFault::kLate) return;
  const Fault counted = fault == RowFault::kBreak     ? Fault::kBreakRows
                        : fault == RowFault::kCorrupt ? Fault::kCorrupt
                                                      : Fault::kDuplicate;
  // Copies are of no sequence. What is of one, and does not move, is restored.
  if (sequence.value == 0) return procedure_counts_.Add(counted, Phase::kCopiesCome);
  const std::vector<LiveMove> moves = moves_.Live();
  const bool moves_now = std::any_of(
      moves.begin(), moves.end(), [&](const LiveMove& move) { return move.sequence == sequence; });
  if (!moves_now) {
    const std::optional<Phase> phase = procedures_.BringsRows();
    if (phase) procedure_counts_.Add(counted, *phase);
    return;
  }
  const std::vector<Drains::Live> drains = drains_.Current();
  if (std::any_of(drains.begin(), drains.end(),
                  [](const Drains::Live& drain) { return drain.phase == Phase::kDrainMoves; })) {
    procedure_counts_.Add(counted, Phase::kDrainMoves);
  }
}

// ---------------------------------------------------------------- faults that wait for a phase

void SimCluster::MakeProcedureAims(uint64_t seed) {
  // All pairs in turn, over many seeds. Without a death nobody takes another's place.
  std::vector<ProcedureAim> pairs;
  for (size_t p = 0; p < kNumPhases; ++p) {
    const auto phase = static_cast<Phase>(p);
    if (ShapeOf(phase) != options_.shape) continue;
    for (size_t f = 0; f < kNumFaults; ++f) {
      if (CanMeet(static_cast<Fault>(f), phase)) pairs.push_back({phase, static_cast<Fault>(f)});
    }
  }
  if (pairs.empty()) return;
  STRAIT_CHECK(pairs.size() % kAimStride != 0);
  for (uint32_t i = 0; i < scenario_.num_procedure_aims; ++i) {
    ProcedureAim aim = pairs[(seed * scenario_.num_procedure_aims + i) * kAimStride % pairs.size()];
    if (i == 0 && options_.shape == Shape::kReplicas) {
      aim.phase = world_.Chance(0.8) ? Phase::kCopiesThere : Phase::kCopiesCome;
      aim.fault = Fault::kKillOwn;
    }
    if (i > 0 && options_.aim) aim = {options_.aim->first, options_.aim->second};
    aim.delay_us = world_.Chance(0.6) ? 0 : world_.Random(1, kAimDelayUs);
    procedure_aims_.push_back(aim);
  }
}

void SimCluster::CheckProcedureAims() {
  if (procedure_aims_.empty() || (!procedures_.any() && !drains_.any())) return;
  const bool wants_drains =
      std::any_of(procedure_aims_.begin(), procedure_aims_.end(),
                  [](const ProcedureAim& aim) { return ShapeOf(aim.phase) == Shape::kDrains; });
  const std::vector<LiveProcedure> live = wants_drains ? LiveProcedures() : procedures_.Live();
  for (const LiveProcedure& each : live) {
    const auto it = std::find_if(procedure_aims_.begin(), procedure_aims_.end(),
                                 [&](const ProcedureAim& aim) { return aim.phase == each.phase; });
    if (it == procedure_aims_.end()) continue;
    const ProcedureAim aim = *it;
    procedure_aims_.erase(it);
    // Several may be in that phase.
    std::vector<SimWorker*> owners;
    for (const LiveProcedure& other : live) {
      if (other.phase == aim.phase) owners.push_back(other.own);
    }
    SimWorker* const own = owners[world_.Random(0, owners.size() - 1)];
    if (aim.delay_us == 0) {
      Strike(aim, own);
    } else {
      world_.After(aim.delay_us, [this, aim, own] {
        if (!faults_over_) Strike(aim, own);
      });
    }
  }
}

SimWorker* SimCluster::PeerOf(const LiveProcedure& procedure) {
  std::vector<SimWorker*> alive;
  for (SimWorker* const peer : procedure.peers) {
    if (peer->alive() && peer != procedure.own) alive.push_back(peer);
  }
  if (procedure.peers.empty()) {
    for (const auto& worker : workers_) {
      const bool may = worker->alive() && !worker->is_foreign() && worker.get() != procedure.own;
      if (may) alive.push_back(worker.get());
    }
  }
  return alive.empty() ? nullptr : alive[world_.Random(0, alive.size() - 1)];
}

void SimCluster::Strike(const ProcedureAim& aim, SimWorker* own) {
  const std::vector<LiveProcedure> live = LiveProcedures();
  const auto it = std::find_if(live.begin(), live.end(), [&](const LiveProcedure& each) {
    return each.phase == aim.phase && each.own == own;
  });
  if (it == live.end() || !own->alive()) return;
  SimWorker* const peer = PeerOf(*it);
  if (peer == nullptr) return;
  world_.After(1'000, [this] { CheckSound(); });
  world_.Trace(absl::StrCat("aimed at \"", Name(aim.phase), "\" of w", own->instance(), ": ",
                            Name(aim.fault)));
  switch (aim.fault) {
    case Fault::kKillOwn:
      return KillWorker(own);
    case Fault::kKillPeer:
      return KillWorker(peer);
    case Fault::kStallOwn:
      return StallWorker(own);
    case Fault::kStallPeer:
      return StallWorker(peer);
    case Fault::kHangOwn:
      return HangWorker(own);
    case Fault::kHangPeer:
      return HangWorker(peer);
    case Fault::kStreamOwn:
      return BreakStream(own);
    case Fault::kStreamPeer:
      return BreakStream(peer);
    case Fault::kPartOwn:
      return PartWorker(own);
    case Fault::kPartPeer:
      return PartWorker(peer);
    case Fault::kBreakRows:
      rows_.BreakOne();
      return;
    case Fault::kCorrupt:
      if (aim.phase != Phase::kCopiesThere) return rows_.CorruptNext();
      if (peer->CorruptReplica()) procedure_counts_.Add(aim.fault, aim.phase);
      return;
    case Fault::kDuplicate:
      return rows_.DuplicateNext();
    case Fault::kSlowLink:
      procedure_counts_.Add(aim.fault, aim.phase);
      rows_.Slow(own->address());
      world_.After(world_.Random(1'000, kPartUs), [this] { rows_.Mend(); });
      return;
    case Fault::kNoRoom:
      return FindNoRoom(aim.phase, own);
    case Fault::kCoordinatorStops:
      return StopCoordinator();
    case Fault::kCoordinatorStops20s:
      return StopCoordinatorFor20s();
  }
}

void SimCluster::FindNoRoom(Phase phase, SimWorker* own) {
  // For copies the memory that a worker offers decides, for sequences what other pipelines have.
  switch (phase) {
    case Phase::kJoinWarms:
    case Phase::kJoinLoads:
    case Phase::kReplaceLoads:
    case Phase::kScaleLoads:
    case Phase::kReplacementLoads:
      break;
    case Phase::kScaleCopies:
    case Phase::kScaleStill:
    case Phase::kReplacementCopies:
    case Phase::kReplacementStill:
      // Counted when it is told: not all of them get rows.
      for (const LiveProcedure& each : procedures_.Live()) {
        if (each.phase == phase) each.own->FailNextLanding();
      }
      return;
    default:
      return;
  }
  ++worker_faults_;
  procedure_counts_.Add(Fault::kNoRoom, phase);
  own->FailNextLoad(absl::ResourceExhaustedError("the device is full"));
}

}  // namespace strait::sim
