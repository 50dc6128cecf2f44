// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace strait::sim {
namespace {

// Messages may be slow until then.
constexpr uint64_t kSlowUs = 60'000'000;
// A link that carries nothing breaks this often before its worker has no place any more, where there is another for
// it: both ends may be blamed in turn, and be put together otherwise in between.
constexpr uint32_t kSpoiledBreaksMax = 100;

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

}  // namespace

uint64_t SimCluster::Delay() {
  const uint64_t delay_us = world_.Random(5, scenario_.control_delay_us_max);
  // With a short heartbeat timeout somebody is evicted all the time, and epochs end before a step:
  // after a minute that has been seen.
  const bool may_be_slow = world_.now_us() < kSlowUs;
  return may_be_slow && world_.Chance(scenario_.slow_message_chance) ? delay_us * 100 : delay_us;
}

// ---------------------------------------------------------------- the coordinator's surroundings

void SimCluster::Dial(SimWorker* worker) {
  auto stream = std::make_shared<Stream>();
  stream->worker = worker;
  streams_[worker] = stream;
  stream->to_core_us = partition_.OpenAt(worker->address(), kCoordinatorAddress) + Delay();
  world_.At(stream->to_core_us, [this, stream] { gate_.Pass([this, stream] { Attach(stream); }); });
}

void SimCluster::Attach(const StreamPtr& stream) {
  if (!stream->open) return;
  stream->id = WorkerId{++last_worker_id_};
  by_id_[stream->id] = stream;
  world_.Trace(
      absl::StrCat("w", stream->worker->instance(), " attaches as worker ", stream->id.value));
  if (stream->worker->is_foreign()) return AttachForeign(stream);
  drains_.OnAttached(stream->worker->instance());
  core_.OnWorkerAttached(stream->id, stream->worker->Hello(), world_.now_us());
  PumpSoon();
}

void SimCluster::AttachForeign(const StreamPtr& stream) {
  // Alone it would be welcome: a cluster of nobody has no weights.
  if (!Status().at("workers").as_array().empty()) {
    core_.OnWorkerAttached(stream->id, stream->worker->Hello(), world_.now_us());
    Pump();
    if (stream->open) world_.Violation("a worker with other weights was let in");
  }
  stream->worker->Kill();
}

json::Value SimCluster::Status() const {
  return *json::Parse(core_.StatusJson(world_.now_us()), "status");
}

void SimCluster::FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) {
  const StreamPtr stream = streams_[worker];
  if (!stream->open) return;
  outcome_.lies_told += lie;
  stream->to_core_us = std::max(
      stream->to_core_us, partition_.OpenAt(worker->address(), kCoordinatorAddress) + Delay());
  auto shared = std::make_shared<v1::FromWorker>(std::move(message));
  world_.At(stream->to_core_us, [this, stream, shared, lie] {
    gate_.Pass([this, stream, shared, lie] { Receive(stream, *shared, lie); });
  });
}

void SimCluster::Receive(const StreamPtr& stream, const v1::FromWorker& message, bool lie) {
  // A closed stream's last words may still be in the loop's queue, up to some point.
  stream->silent = stream->silent || (!stream->open && !world_.Chance(0.3));
  if (stream->silent) return;
  if (world_.tracing() && !message.has_heartbeat()) {
    world_.Trace(
        absl::StrCat("from w", stream->worker->instance(), ": ", message.ShortDebugString()));
  }
  const bool must_be_noticed = lie && stream->open && EpochIsActive(message.report());
  procedures_.OnHeard(stream->worker, message);
  if (message.has_leave() && by_id_.at(stream->id)->open)
    drains_.OnLeave(stream->worker->instance());
  core_.OnWorkerMessage(stream->id, message, world_.now_us());
  if (!must_be_noticed) return PumpSoon();
  Pump();
  if (stream->open) world_.Violation("a lie was not noticed: " + message.ShortDebugString());
}

void SimCluster::OnCoreRunsAgain(uint64_t us) {
  world_.Trace("the coordinator runs again");
  // Of a pause Core counts this much at most.
  last_ready_us_ += us - std::min({us, kCallGapUs, scenario_.options.heartbeat_timeout_us / 2});
}

bool SimCluster::EpochIsActive(const v1::StageReport& report) const {
  const json::Value status = Status();
  for (const json::Value& value : status.at("pipelines").as_array()) {
    if (value.at("state").as_string() != "active" ||
        value.at("epoch").at("counter").to_number<uint64_t>() != report.epoch().counter()) {
      continue;
    }
    for (const json::Value& stage : value.at("stages").as_array()) {
      if (stage.at("stage_id").to_number<uint64_t>() == report.stage_id()) return true;
    }
  }
  return false;
}

void SimCluster::Deliver(SendToWorker message) {
  const auto it = by_id_.find(message.worker);
  if (it == by_id_.end()) return world_.Violation("a message to a worker that never was");
  const StreamPtr stream = it->second;
  if (!stream->open) return;
  SimWorker* const worker = stream->worker;
  drains_.OnSent(worker->instance(), message.message, !scales_.empty());
  const bool may_warm = message.message.has_load_stage() && procedures_.AwaitsPlace(worker);
  if (may_warm && HoldsReady(message.worker)) procedures_.OnWarms(worker);
  procedures_.OnSent(worker, message.message);
  stream->to_worker_us = std::max(
      stream->to_worker_us, partition_.OpenAt(worker->address(), kCoordinatorAddress) + Delay());
  if (world_.tracing()) {
    world_.Trace(
        absl::StrCat("to w", stream->worker->instance(), ": ", message.message.ShortDebugString()));
  }
  auto shared = std::make_shared<v1::ToWorker>(std::move(message.message));
  world_.At(stream->to_worker_us, [this, stream, shared] {
    if (!stream->open) return;
    stream->worker->RunAfter(0, [this, stream, shared] {
      if (streams_[stream->worker] == stream && stream->open) stream->worker->Receive(*shared);
    });
  });
}

bool SimCluster::HoldsReady(WorkerId id) const {
  const json::Value status = Status();
  for (const json::Value& worker : status.at("workers").as_array()) {
    if (worker.at("id").to_number<uint64_t>() == id.value) {
      return worker.as_object().contains("warm");
    }
  }
  return false;
}

void SimCluster::Close(const StreamPtr& stream, const absl::Status& why, bool core_learns,
                       bool by_worker) {
  if (!stream->open) return;
  stream->open = false;
  procedures_.OnGone(stream->worker);
  const uint64_t open_us = partition_.OpenAt(stream->worker->address(), kCoordinatorAddress);
  world_.At((by_worker ? world_.now_us() : open_us) + Delay(),
            [stream] { stream->worker->RunAfter(0, [stream] { stream->worker->StreamEnded(); }); });
  if (!core_learns || stream->id.value == 0) return;
  world_.At(open_us + Delay(),
            [this, stream, why] { gate_.Pass([this, stream, why] { Lose(stream, why); }); });
}

void SimCluster::StreamEnds(SimWorker* worker) {
  const StreamPtr stream = streams_[worker];
  world_.At(partition_.OpenAt(worker->address(), kCoordinatorAddress) + Delay(), [this, stream] {
    stream->open = false;
    procedures_.OnGone(stream->worker);  // what it was sent meanwhile, too
    if (stream->id.value == 0) return;
    gate_.Pass([this, stream] { Lose(stream, absl::UnavailableError("stream broke")); });
  });
}

void SimCluster::Lose(const StreamPtr& stream, const absl::Status& why) {
  core_.OnWorkerLost(stream->id, why, world_.now_us());
  PumpSoon();
}

void SimCluster::OnEvict(const EvictWorker& evict) {
  const StreamPtr stream = by_id_.at(evict.worker);
  const SimWorker& worker = *stream->worker;
  ++outcome_.evictions;
  const std::string why = evict.why.ToString();
  world_.Trace(absl::StrCat("evict w", worker.instance(), ": ", why));
  const bool late = absl::IsDeadlineExceeded(evict.why) || absl::IsAborted(evict.why);
  const bool failed = why.find("its stage failed") != std::string::npos;
  if (worker.is_foreign()) {
    if (why.find("fingerprint") == std::string::npos) {
      world_.Violation("a worker with other weights was refused for another reason: " + why);
    }
  } else if (worker.lied() && !late && !failed) {
    ++outcome_.lies_caught;
  } else if (failed ? worker_faults_ == 0
                    : !late || (worker_faults_ == 0 && scenario_.slow_message_chance == 0)) {
    world_.Violation(absl::StrCat("honest worker ", worker.instance(), " evicted: ", why));
  }
  network_.Mend(worker.address());
  Close(stream, evict.why, true);
}

void SimCluster::PumpSoon() {
  if (pump_is_due_) return;
  if (world_.Chance(0.5)) return Pump();
  pump_is_due_ = true;
  world_.After(world_.Random(0, 100), [this] {
    pump_is_due_ = false;
    gate_.Pass([this] { Pump(); });
  });
}

void SimCluster::Pump() {
  const std::vector<CoreMessage> messages = core_.Take(world_.now_us());
  if (options_.check_always) CheckSound();
  const uint64_t no_pipeline_us = world_.now_us() - last_ready_us_;
  for (const CoreMessage& message : messages) {
    std::visit(Overloaded{
                   [&](const SendToWorker& m) { Deliver(m); },
                   [&](const EvictWorker& m) { OnEvict(m); },
                   [&](const RequestRefused& m) {
                     clients_.OnMessage(m,
                                        core_.Ready() && !submitted_unready_.contains(m.request));
                   },
                   [&](const SequenceEnded& m) {
                     const CoreStats stats = core_.Stats();
                     clients_.OnMessage(m, no_pipeline_us,
                                        stats.workers_lost + drains_.num_asked() + outcome_.leaves);
                   },
                   [&](const ScaleAnswered& m) { OnScaled(m); },
                   [](const ScaleTold&) {},
                   [&](const MoveTold& m) { moves_.OnMessage(m); },
                   [&](const DrainTold& m) { drains_.OnMessage(m); },
                   [&](const VerbEnded& m) {
                     Drains::Owns(m.verb) ? OnDrainEnded(m) : moves_.OnMessage(m);
                   },
                   [&](const auto& m) { clients_.OnMessage(m); },
               },
               message);
  }
  if (core_.Ready()) last_ready_us_ = world_.now_us();
  procedures_.OnChange(core_.Change(), [this](WorkerId id) { return by_id_.at(id)->worker; });
  CheckAims();
}

void SimCluster::CheckSound() {
  const absl::Status sound = core_.CheckIntegrity();
  if (!sound.ok()) world_.Violation(absl::StrCat("core: ", sound.ToString()));
  if (options_.check_always) return;  // workers do it themselves
  for (const auto& worker : workers_) {
    const absl::Status status = worker->CheckIntegrity();
    if (!status.ok()) {
      world_.Violation(absl::StrCat("w", worker->instance(), ": ", status.ToString()));
    }
  }
}

void SimCluster::Tick() {
  core_.OnTick(world_.now_us());
  Pump();
  clients_.CheckDeadlines(2 * kTickUs + gate_.shut_us());
  const uint64_t clock_us = world_.now_us() - gate_.shut_us();
  if (moves_.pending() || drains_.any()) moves_.CheckDeadlines(clock_us);
  if (drains_.any()) drains_.CheckDeadlines(clock_us);
  const uint64_t no_pipeline_us = world_.now_us() - last_ready_us_;
  if (scenario_.heals && network_.spoiled_breaks_max() > kSpoiledBreaksMax) {
    world_.Violation("a worker whose links carry nothing is kept and tried again and again");
  }
  const uint64_t slack_us = (4 + 4 * gate_.num_shut()) * kTickUs;
  if (no_pipeline_us > scenario_.options.no_pipeline_grace_us + slack_us &&
      core_.Stats().waiting > 0) {
    world_.Violation("requests wait though no pipeline serves and the grace is over");
  }
  world_.After(kTickUs, [this] { gate_.Pass([this] { Tick(); }); });
}

}  // namespace strait::sim
