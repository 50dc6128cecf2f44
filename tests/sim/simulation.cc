// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/simulation.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/json.h"
#include "tests/sim/client.h"
#include "tests/sim/gate.h"
#include "tests/sim/hash_model.h"
#include "tests/sim/scenario.h"
#include "tests/sim/sim_worker.h"
#include "tests/sim/world.h"

namespace strait::sim {
namespace {

constexpr uint64_t kTickUs = 50'000;
// After the last fault, everything that lives must have settled within this.
constexpr uint64_t kSettleUs = 240'000'000;
// Messages may be slow until then.
constexpr uint64_t kSlowUs = 60'000'000;

constexpr uint32_t kMostStages = 3;  // that a scale asks for

// A link that carries nothing breaks this often before its worker has no place any more, where there is another for
// it: both ends may be blamed in turn, and be put together otherwise in between.
constexpr uint32_t kSpoiledBreaksMax = 100;

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

class Simulation : public Control {
 public:
  Simulation(uint64_t seed, const SimulationOptions& options)
      : options_(options),
        world_(seed, options.trace),
        scenario_(options.shape == Shape::kAny      ? MakeScenario(&world_)
                  : options.shape == Shape::kGround ? MakeGroundScenario(&world_)
                                                    : MakeSharingScenario(&world_)),
        network_(&world_, scenario_.data_delay_us_max, scenario_.slow_message_chance),
        core_(scenario_.options, scenario_.model),
        clients_(&world_, &scenario_),
        gate_(&world_, [this](uint64_t us) { OnCoreRunsAgain(us); }) {}

  Outcome Run();

  void Dial(SimWorker* worker) override;
  void FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) override;
  void HangUp(SimWorker* worker, absl::Status why) override { Close(streams_[worker], why, true); }

 private:
  struct Stream {
    SimWorker* worker = nullptr;
    WorkerId id;
    bool open = true;
    bool silent = false;        // no more is read of it
    uint64_t to_worker_us = 0;  // of the last delivery
    uint64_t to_core_us = 0;
  };
  using StreamPtr = std::shared_ptr<Stream>;

  uint64_t Delay() {
    const uint64_t delay_us = world_.Random(5, scenario_.control_delay_us_max);
    // With a short heartbeat timeout somebody is evicted all the time, and epochs end before a step:
    // after a minute that has been seen.
    const bool may_be_slow = world_.now_us() < kSlowUs;
    return may_be_slow && world_.Chance(scenario_.slow_message_chance) ? delay_us * 100 : delay_us;
  }
  // Whether a report is of what the core takes for the present.
  bool EpochIsActive(const v1::StageReport& report) const;
  void Pump();      // what the loop does after events
  void PumpSoon();  // now, or together with the events of the next moment
  void Tick();
  void OnCoreRunsAgain(uint64_t us);
  void Deliver(SendToWorker message);
  void Close(const StreamPtr& stream, const absl::Status& why, bool core_learns);
  void OnEvict(const EvictWorker& evict);

  json::Value Status() const;
  void StartWorker(uint64_t memory_bytes, uint64_t weights = kHashWeights);
  void Attach(const StreamPtr& stream);
  void Receive(const StreamPtr& stream, const v1::FromWorker& message, bool lie);
  void Lose(const StreamPtr& stream, const absl::Status& why);
  // A worker with other weights dials: it must be refused, and vanishes.
  void AttachForeign(const StreamPtr& stream);
  void SubmitOne();
  void ScaleOnce();
  void OnScaled(const ScaleAnswered& answer);
  void Fault();
  void Corrupt();
  void Flush();
  void Heal();
  bool Settled() const;
  void CheckIdle();
  void CheckSound();

  const SimulationOptions options_;
  World world_;
  const Scenario scenario_;
  Network network_;
  Core core_;
  Clients clients_;
  Gate gate_;
  std::vector<std::unique_ptr<SimWorker>> workers_;
  std::map<SimWorker*, StreamPtr> streams_;  // the newest of each
  std::map<WorkerId, StreamPtr> by_id_;
  std::set<uint64_t> stalled_;             // instances that were ever stalled, or slow
  std::set<RequestId> submitted_unready_;  // while no pipeline served
  uint64_t last_worker_id_ = 0;
  uint64_t last_ready_us_ = 0;
  bool pump_is_due_ = false;
  uint32_t requests_left_ = 0;
  uint32_t scales_left_ = 0;
  std::set<ScaleId> scales_;  // not answered
  bool faults_over_ = false;
  uint32_t worker_faults_ = 0;  // of workers and their links: only these excuse an eviction
  Outcome outcome_;
};

// ---------------------------------------------------------------- the coordinator's surroundings

void Simulation::Dial(SimWorker* worker) {
  auto stream = std::make_shared<Stream>();
  stream->worker = worker;
  streams_[worker] = stream;
  stream->to_core_us = world_.now_us() + Delay();
  world_.At(stream->to_core_us, [this, stream] { gate_.Pass([this, stream] { Attach(stream); }); });
}

void Simulation::Attach(const StreamPtr& stream) {
  if (!stream->open) return;
  stream->id = WorkerId{++last_worker_id_};
  by_id_[stream->id] = stream;
  world_.Trace(
      absl::StrCat("w", stream->worker->instance(), " attaches as worker ", stream->id.value));
  if (stream->worker->is_foreign()) return AttachForeign(stream);
  core_.OnWorkerAttached(stream->id, stream->worker->Hello(), world_.now_us());
  PumpSoon();
}

void Simulation::AttachForeign(const StreamPtr& stream) {
  // Alone it would be welcome: a cluster of nobody has no weights.
  if (!Status().at("workers").as_array().empty()) {
    core_.OnWorkerAttached(stream->id, stream->worker->Hello(), world_.now_us());
    Pump();
    if (stream->open) world_.Violation("a worker with other weights was let in");
  }
  stream->worker->Kill();
}

json::Value Simulation::Status() const {
  return *json::Parse(core_.StatusJson(world_.now_us()), "status");
}

void Simulation::FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) {
  const StreamPtr stream = streams_[worker];
  if (!stream->open) return;
  outcome_.lies_told += lie;
  stream->to_core_us = std::max(stream->to_core_us, world_.now_us() + Delay());
  auto shared = std::make_shared<v1::FromWorker>(std::move(message));
  world_.At(stream->to_core_us, [this, stream, shared, lie] {
    gate_.Pass([this, stream, shared, lie] { Receive(stream, *shared, lie); });
  });
}

void Simulation::Receive(const StreamPtr& stream, const v1::FromWorker& message, bool lie) {
  // A closed stream's last words may still be in the loop's queue, up to some point.
  stream->silent = stream->silent || (!stream->open && !world_.Chance(0.3));
  if (stream->silent) return;
  if (world_.tracing() && !message.has_heartbeat()) {
    world_.Trace(
        absl::StrCat("from w", stream->worker->instance(), ": ", message.ShortDebugString()));
  }
  const bool must_be_noticed = lie && stream->open && EpochIsActive(message.report());
  core_.OnWorkerMessage(stream->id, message, world_.now_us());
  if (!must_be_noticed) return PumpSoon();
  Pump();
  if (stream->open) world_.Violation("a lie was not noticed: " + message.ShortDebugString());
}

void Simulation::OnCoreRunsAgain(uint64_t us) {
  world_.Trace("the coordinator runs again");
  // Of a pause Core counts this much at most.
  last_ready_us_ += us - std::min({us, kCallGapUs, scenario_.options.heartbeat_timeout_us / 2});
}

bool Simulation::EpochIsActive(const v1::StageReport& report) const {
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

void Simulation::Deliver(SendToWorker message) {
  const auto it = by_id_.find(message.worker);
  if (it == by_id_.end()) return world_.Violation("a message to a worker that never was");
  const StreamPtr stream = it->second;
  if (!stream->open) return;
  stream->to_worker_us = std::max(stream->to_worker_us, world_.now_us() + Delay());
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

void Simulation::Close(const StreamPtr& stream, const absl::Status& why, bool core_learns) {
  if (!stream->open) return;
  stream->open = false;
  world_.After(Delay(), [stream] {
    stream->worker->RunAfter(0, [stream] { stream->worker->StreamEnded(); });
  });
  if (!core_learns || stream->id.value == 0) return;
  world_.After(Delay(),
               [this, stream, why] { gate_.Pass([this, stream, why] { Lose(stream, why); }); });
}

void Simulation::Lose(const StreamPtr& stream, const absl::Status& why) {
  core_.OnWorkerLost(stream->id, why, world_.now_us());
  PumpSoon();
}

void Simulation::OnEvict(const EvictWorker& evict) {
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

void Simulation::PumpSoon() {
  if (pump_is_due_) return;
  if (world_.Chance(0.5)) return Pump();
  pump_is_due_ = true;
  world_.After(world_.Random(0, 100), [this] {
    pump_is_due_ = false;
    gate_.Pass([this] { Pump(); });
  });
}

void Simulation::Pump() {
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
                     clients_.OnMessage(m, no_pipeline_us, core_.Stats().workers_lost);
                   },
                   [&](const ScaleAnswered& m) { OnScaled(m); },
                   [&](const MoveTold&) {},
                   [&](const VerbEnded&) {},
                   [&](const auto& m) { clients_.OnMessage(m); },
               },
               message);
  }
  if (core_.Ready()) last_ready_us_ = world_.now_us();
}

void Simulation::CheckSound() {
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

void Simulation::Tick() {
  core_.OnTick(world_.now_us());
  Pump();
  clients_.CheckDeadlines(2 * kTickUs + gate_.shut_us());
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

// ---------------------------------------------------------------- what happens to it

void Simulation::StartWorker(uint64_t memory_bytes, uint64_t weights) {
  workers_.push_back(std::make_unique<SimWorker>(&world_, &network_, this, &scenario_,
                                                 workers_.size() + 1, memory_bytes, weights,
                                                 options_.check_always));
}

void Simulation::SubmitOne() {
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
  world_.After(world_.Random(0, world_.Pick({1'000, 50'000, 500'000})), [this, id, index] {
    gate_.Pass([this, id, index] {
      world_.Trace(absl::StrCat("cancel ", id.value));
      clients_.OnCancel(id, index);
      core_.OnCancel(id, index, world_.now_us());
      Pump();
      clients_.CheckCancelled(id);
    });
  });
}

void Simulation::ScaleOnce() {
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

void Simulation::OnScaled(const ScaleAnswered& answer) {
  world_.Trace(absl::StrCat("scale ", answer.scale.value, ": ", answer.status.ToString()));
  if (scales_.erase(answer.scale) == 0) world_.Violation("a scale is answered twice");
  outcome_.scales_done += answer.status.ok();
  outcome_.scale_kept += answer.reply.rows_kept();
  const absl::StatusCode code = answer.status.code();
  if (code != absl::StatusCode::kOk && code != absl::StatusCode::kAborted &&
      code != absl::StatusCode::kFailedPrecondition &&
      code != absl::StatusCode::kResourceExhausted) {
    world_.Violation(absl::StrCat("a scale ended with ", answer.status.ToString()));
  }
}

void Simulation::Fault() {
  world_.After(1'000, [this] { CheckSound(); });
  std::vector<SimWorker*> alive;
  for (const auto& worker : workers_) {
    if (worker->alive() && !worker->is_foreign()) alive.push_back(worker.get());
  }
  if (alive.empty()) return;
  SimWorker* worker = alive[world_.Random(0, alive.size() - 1)];
  const std::string name = absl::StrCat("fault: w", worker->instance());
  const StreamPtr stream = streams_[worker];
  const uint64_t kind = world_.Random(0, 13);
  worker_faults_ += kind < 11;
  switch (kind) {
    case 0:
    case 1:
    case 2:
    case 3: {
      // The host may vanish without a word: then only the missing heartbeats tell.
      const bool silent = world_.Chance(0.3);
      world_.Trace(absl::StrCat(name, silent ? " vanishes" : " dies"));
      worker->Kill();
      if (!silent) {
        world_.After(Delay(), [this, stream] {
          stream->open = false;
          if (stream->id.value == 0) return;
          gate_.Pass([this, stream] { Lose(stream, absl::UnavailableError("stream broke")); });
        });
      }
      if (!world_.Chance(scenario_.replacement_chance)) return;
      return world_.After(world_.Random(1'000, 1'000'000),
                          [this, memory = worker->memory_bytes()] { StartWorker(memory); });
    }
    case 4:
      world_.Trace(name + "'s stream breaks");
      return Close(stream, absl::UnavailableError("stream broke"), true);
    case 5:
    case 6: {
      const uint64_t us = world_.Random(1'000, 3 * scenario_.options.heartbeat_timeout_us);
      world_.Trace(absl::StrCat(name, " stalls for ", us / 1000, " ms"));
      return worker->Stall(us);
    }
    case 7:
      return network_.BreakOne();
    case 8:
      world_.Trace(name + "'s next step fails");
      return worker->FailNextStep();
    case 9:
      world_.Trace(name + "'s next load fails");
      return worker->FailNextLoad();
    case 10:
      world_.Trace(name + "'s links carry nothing");
      clients_.ExpectManyFailures();
      return network_.Spoil(worker->address());
    case 11:
      world_.Trace("fault: a worker with other weights joins");
      return StartWorker(worker->memory_bytes(), kHashWeights + 1);
    case 12:
    case 13: {
      const uint64_t us = world_.Random(
          1'000, world_.Pick({3 * scenario_.options.heartbeat_timeout_us, uint64_t{30'000'000}}));
      world_.Trace(absl::StrCat("fault: the coordinator stands still for ", us / 1000, " ms"));
      return gate_.Shut(us);
    }
  }
}

void Simulation::Corrupt() {
  SimWorker& worker = *workers_[world_.Random(0, workers_.size() - 1)];
  if (!worker.alive()) return;
  const bool fails = world_.Chance(0.3);
  if (fails) worker.FailNextCopy();
  if (!fails && !worker.CorruptHost()) return;
  ++outcome_.corruptions;
  world_.Trace(absl::StrCat("fault: w", worker.instance(),
                            fails ? "'s next copy fails" : "'s host memory changes"));
}

void Simulation::Flush() {
  world_.Trace("flush");
  core_.OnFlush(world_.now_us());
  PumpSoon();
}

void Simulation::Heal() {
  faults_over_ = true;
  world_.Trace("faults are over");
  if (!scenario_.heals) return;
  std::multiset<uint64_t> missing(scenario_.worker_memory.begin(), scenario_.worker_memory.end());
  for (const auto& worker : workers_) {
    if (!worker->alive() || worker->is_foreign()) continue;
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

bool Simulation::Settled() const {
  if (scales_left_ > 0 || !scales_.empty() || requests_left_ > 0 || !faults_over_ ||
      clients_.num_live() > 0)
    return false;
  const CoreStats stats = core_.Stats();
  if (stats.cache_bytes_used > stats.cache_bytes_free_prefixes) return false;
  return !scenario_.heals || stats.pipelines_active == scenario_.options.num_pipelines;
}

void Simulation::CheckIdle() {
  CheckSound();
  const CoreStats stats = core_.Stats();
  if (!scenario_.options.prefix_cache && stats.host_bytes_used > 0) {
    world_.Violation(absl::StrCat("at idle ", stats.host_bytes_used,
                                  " bytes are parked of sequences that ended"));
  }
  if (stats.running + stats.waiting != 0 ||
      stats.cache_bytes_used != stats.cache_bytes_free_prefixes) {
    return world_.Violation(absl::StrCat("at idle ", stats.running, " run, ", stats.waiting,
                                         " wait, ", stats.cache_bytes_used,
                                         " bytes of cache are used"));
  }
  if (stats.pipelines_active < scenario_.options.num_pipelines) return;
  uint64_t held_bytes = 0;
  bool any_dead = false;  // whose end a coordinator that stood still may not know yet
  for (const auto& worker : workers_) {
    any_dead = any_dead || !worker->alive();
    if (worker->alive()) held_bytes += worker->BlocksHeld() * scenario_.model.block_bytes;
  }
  if (held_bytes == stats.cache_bytes_free_prefixes) return;
  if (held_bytes < stats.cache_bytes_free_prefixes && any_dead) return;
  world_.Violation(absl::StrCat("at idle workers hold ", held_bytes, " bytes, ",
                                stats.cache_bytes_free_prefixes, " are of prefix blocks"));
}

Outcome Simulation::Run() {
  last_ready_us_ = world_.now_us();
  const uint64_t begin_us = world_.now_us();
  for (const uint64_t memory : scenario_.worker_memory) {
    const uint64_t delay_us = world_.Random(0, 20'000);
    world_.After(delay_us, [this, memory] { StartWorker(memory); });
  }
  requests_left_ = scenario_.num_requests;
  for (uint32_t i = 0; i < scenario_.num_requests; ++i) {
    // Some come before anybody can serve them.
    world_.After(world_.Chance(0.1)
                     ? 0
                     : scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { gate_.Pass([this] { SubmitOne(); }); });
  }
  const uint64_t faults_from_us = world_.Chance(0.5) ? 0 : scenario_.load_us_max;
  for (uint32_t i = 0; i < scenario_.num_faults; ++i) {
    world_.After(faults_from_us + world_.Random(0, scenario_.faults_us), [this] { Fault(); });
  }
  for (uint32_t i = 0; i < scenario_.num_lies; ++i) {
    // Later than the last worker's start.
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 200'000),
                 [this] { workers_[world_.Random(0, workers_.size() - 1)]->LieOnce(); });
  }
  for (uint32_t i = 0; i < scenario_.num_corruptions; ++i) {
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { Corrupt(); });
  }
  for (uint32_t i = 0; i < scenario_.num_flushes; ++i) {
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { gate_.Pass([this] { Flush(); }); });
  }
  scales_left_ = scenario_.num_scales;
  for (uint32_t i = 0; i < scenario_.num_scales; ++i) {
    world_.After(scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.scales_us),
                 [this] { gate_.Pass([this] { ScaleOnce(); }); });
  }
  // Replacements of killed workers come up to a second later.
  world_.After(faults_from_us + scenario_.faults_us + 1'100'000, [this] { Heal(); });
  Tick();

  const uint64_t limit_us = begin_us + scenario_.load_us_max + scenario_.faults_us +
                            scenario_.arrival_us + scenario_.scales_us +
                            scenario_.options.no_pipeline_grace_us + kSettleUs;
  while (world_.RunOne()) {
    if (world_.now_us() > limit_us + gate_.shut_us()) {
      world_.Violation(absl::StrCat("not settled: ", clients_.num_live(), " requests live:",
                                    clients_.Stuck(), "; ", core_.StatusJson(world_.now_us())));
    }
    if (Settled()) break;
  }
  // What is under way arrives, stalled workers wake up, nothing more happens.
  const uint64_t end_us = world_.now_us() + 3'000'000 +
                          (scenario_.num_faults + 1) * 3 * scenario_.options.heartbeat_timeout_us;
  while (world_.violation().empty() && world_.now_us() < end_us) world_.RunOne();
  if (world_.violation().empty()) CheckIdle();
  if (world_.violation().empty()) {
    std::optional<uint64_t> until_us;
    gate_.Pass([&] {
      Flush();
      until_us = world_.now_us() + 3'000'000;
    });
    while (world_.violation().empty() && (!until_us || world_.now_us() < *until_us)) {
      world_.RunOne();
    }
    const CoreStats stats = core_.Stats();
    if (stats.cache_bytes_used + stats.host_bytes_used > 0) {
      world_.Violation(absl::StrCat("after a flush ", stats.cache_bytes_used, " and ",
                                    stats.host_bytes_used, " bytes are used"));
    }
    if (world_.violation().empty()) CheckIdle();
  }
  outcome_.violation = world_.violation();
  outcome_.stats = core_.Stats();
  outcome_.sequences_finished = clients_.num_finished();
  outcome_.sequences_nan = clients_.num_nan();
  outcome_.cached_tokens = clients_.num_cached();
  for (const auto& worker : workers_) {
    outcome_.steps_ahead += worker->steps_ahead();
    outcome_.late_ids += worker->late_ids();
    outcome_.events.Add(worker->event_counts());
  }
  outcome_.virtual_us = world_.now_us() - begin_us;
  return outcome_;
}

}  // namespace

Outcome RunSimulation(uint64_t seed, const SimulationOptions& options) {
  return Simulation(seed, options).Run();
}

}  // namespace strait::sim
