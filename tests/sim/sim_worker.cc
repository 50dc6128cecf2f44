// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_worker.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"
#include "proto/wire/version.h"

namespace strait::sim {
namespace {

// Three of four workers say that they have NCCL, in two versions.
uint32_t FakeNcclVersion(uint64_t instance) {
  return instance % 4 == 0 ? 0 : instance % 4 == 1 ? 22703 : 22809;
}

}  // namespace

SimWorker::SimWorker(World* world, Network* network, RowNetwork* rows, Control* control,
                     const Scenario* scenario, uint64_t instance, uint64_t memory_bytes,
                     uint64_t weights, bool check_always)
    : world_(world),
      control_(control),
      scenario_(scenario),
      instance_(instance),
      memory_bytes_(memory_bytes),
      check_always_(check_always),
      backend_(&scenario->model, memory_bytes, weights),
      transport_(network, absl::StrCat("worker-", instance, ":1"), EventsOfTransport(),
                 [this](uint64_t delay_us, std::function<void()> what) {
                   RunAfter(delay_us, std::move(what));
                 }),
      rows_(rows, transport_.address(), EventsOfRows(),
            [this](uint64_t delay_us, std::function<void()> what) {
              RunAfter(delay_us, std::move(what));
            }),
      core_({.orphan_timeout_us = scenario->orphan_timeout_us,
             .host_cache_bytes = scenario->host_cache_bytes,
             .replica_bytes = scenario->replica_bytes,
             .transfer_frame_bytes = scenario->transfer_frame_bytes},
            StageTraitsOf(backend_), &backend_.cache(), &transport_, this, &rows_) {
  backend_.rows_ahead = scenario->rows_ahead;
  backend_.copy_faults.delay_polls = scenario->copy_polls;
  control_->Dial(this);
}

TransportEvents SimWorker::EventsOfTransport() {
  TransportEvents events;
  events.on_edge_up = [this](const Edge& edge, HiddenMemory memory) {
    Count(edge.from_stage_id, SimEvent::kEdgeUp);
    core_.OnEdgeUp(edge, std::move(memory));
  };
  events.on_edge_down = [this](const Edge& edge, absl::Status why) {
    // Of the end, or ends, that are here.
    const bool sends = core_.StateOf(edge.from_stage_id) != WorkerCore::HostedState::kNone;
    if (sends) Count(edge.from_stage_id, SimEvent::kEdgeDown);
    if (!sends || core_.StateOf(edge.to_stage_id) != WorkerCore::HostedState::kNone) {
      Count(edge.to_stage_id, SimEvent::kEdgeDown);
    }
    core_.OnEdgeDown(edge, why);
  };
  events.on_hidden = [this](uint64_t to, HiddenStep hidden) {
    Count(to, SimEvent::kHidden);
    core_.OnHidden(to, std::move(hidden), world_->now_us());
  };
  events.on_sampled = [this](uint64_t to, SampledStep sampled) {
    Count(to, SimEvent::kSampled);
    core_.OnSampled(to, std::move(sampled));
  };
  events.on_nccl_id = [this](const Edge& edge, std::string id) {
    Count(edge.to_stage_id, SimEvent::kNcclId);
    core_.OnNcclId(edge, std::move(id));
  };
  return events;
}

RowTransferEvents SimWorker::EventsOfRows() {
  RowTransferEvents events;
  events.on_rows = [this](AskId id, absl::StatusOr<RowsFrame> frame) {
    core_.OnRows(id, std::move(frame), world_->now_us());
    CheckSound();
  };
  events.on_ask = [this](PeerAskId id, const RowsAsk& ask) {
    Count(ask.stage_id, SimEvent::kAsk);
    core_.OnAsk(id, ask, world_->now_us());
    CheckSound();
  };
  events.on_served = [this](PeerAskId id, const std::vector<BlockHeader>& pieces) {
    core_.OnServed(id, pieces, world_->now_us());
    CheckSound();
  };
  return events;
}

void SimWorker::RunAfter(uint64_t delay_us, std::function<void()> what) {
  world_->After(delay_us, [this, what = std::move(what)]() mutable {
    inbox_.push_back(std::move(what));
    Drain();
  });
}

void SimWorker::Drain() {
  while (alive_ && !computing_ && world_->now_us() >= stalled_until_us_) {
    if (inbox_.empty()) {
      TryRun();
      return PollSoon();
    }
    const std::function<void()> what = std::move(inbox_.front());
    inbox_.pop_front();
    what();
  }
}

void SimWorker::PollSoon() {
  if (poll_is_due_ || !core_.CopiesRows()) return;
  poll_is_due_ = true;
  RunAfter(world_->Random(10, scenario_->copy_us_max), [this] { Poll(); });
}

void SimWorker::Poll() {
  if (hangs()) return RunAfter(hung_until_us_ - world_->now_us(), [this] { Poll(); });
  poll_is_due_ = false;
  core_.PollCopies(world_->now_us());
  CheckSound();
}

std::string SimWorker::TransfersLeft() const {
  std::string left;
  for (const uint64_t id : core_.stage_ids()) {
    const Stage* const stage = core_.FindStage(id);
    if (stage == nullptr) continue;
    // What was to come goes when it enters an epoch, or unloads: its pipeline may lack a worker for good.
    if (core_.StateOf(id) == WorkerCore::HostedState::kStuck) continue;
    const size_t num_imports = stage->importer().num_imports();
    const Exporter& exporter = stage->exporter();
    const size_t num_services = exporter.num_services() - exporter.serves_prefixes();
    if (num_imports + num_services == 0 && !stage->CopiesRows()) continue;
    absl::StrAppend(&left, num_imports, " imports and ", num_services,
                    " sequences served by stage ", id, stage->CopiesRows() ? ", copies; " : "; ");
  }
  return left;
}

// ---------------------------------------------------------------- the stream

v1::Hello SimWorker::Hello() const {
  v1::Hello hello;
  hello.set_wire_version(kWireVersion);
  hello.set_name(absl::StrCat("w", instance_));
  hello.set_data_address(absl::StrCat("worker-", instance_, ":1"));
  hello.set_memory_bytes(memory_bytes_);
  hello.set_model_fingerprint(scenario_->model.fingerprint);
  hello.set_weights_fingerprint(backend_.weights());
  hello.set_cache_row_bytes(
      static_cast<uint32_t>(scenario_->model.block_bytes / limits::kBlockTokens));
  hello.set_numerics_id(backend_.numerics_id());
  hello.set_backend("hash");
  hello.set_instance(instance_);
  hello.set_nccl_version(FakeNcclVersion(instance_));
  core_.FillHello(&hello);
  return hello;
}

void SimWorker::Receive(const v1::ToWorker& message) {
  if (message.has_welcome()) {
    heartbeat_interval_us_ = uint64_t{message.welcome().heartbeat_interval_ms()} * 1000;
    CountAll(SimEvent::kAttach);
    core_.OnWelcome(message.welcome());
    return Heartbeat(stream_);
  }
  switch (message.message_case()) {
    case v1::ToWorker::kLoadStage:
      Count(message.load_stage().stage_id(), SimEvent::kLoad);
      break;
    case v1::ToWorker::kUnloadStage:
      Count(message.unload_stage().stage_id(), SimEvent::kUnload);
      break;
    case v1::ToWorker::kActivateStage:
      Count(message.activate_stage().stage_id(), SimEvent::kActivate);
      restores_.OnActivate(message.activate_stage());
      break;
    case v1::ToWorker::kResizeCache:
      Count(message.resize_cache().stage_id(), SimEvent::kResize);
      break;
    case v1::ToWorker::kFetchRows:
      Count(message.fetch_rows().stage_id(), SimEvent::kFetch);
      if (landing_finds_no_room_ && RefuseLanding(message.fetch_rows())) return;
      break;
    case v1::ToWorker::kReplicate:
      OnReplicate(message.replicate());
      break;
    case v1::ToWorker::kShutdown:
      break;
    case v1::ToWorker::kServeRows:
      Count(message.serve_rows().stage_id(), SimEvent::kServe);
      break;
    default:
      Count(message.step().stage_id(), SimEvent::kPlan);
  }
  core_.OnMessage(message, world_->now_us());
  CheckSound();
}

void SimWorker::Heartbeat(uint64_t stream) {
  if (stream != stream_) return;
  v1::FromWorker message;
  message.mutable_heartbeat()->set_resident_bytes(backend_.used_bytes());
  Tell(std::move(message));
  RunAfter(heartbeat_interval_us_, [this, stream] { Heartbeat(stream); });
}

void SimWorker::StreamEnded() {
  ++stream_;
  CountAll(SimEvent::kDetach);
  core_.OnDetached(world_->now_us());
  if (leaving_) return Shutdown();  // nobody drains it any more
  RunAfter(world_->Random(1'000, 50'000), [this, stream = stream_] {
    if (stream == stream_) control_->Dial(this);
  });
  Orphaned(stream_);
}

void SimWorker::Orphaned(uint64_t stream) {
  if (stream != stream_ || core_.attached()) return;
  CountAll(SimEvent::kOrphan);
  core_.OnTick(world_->now_us());
  RunAfter(1'000'000, [this, stream] { Orphaned(stream); });
}

void SimWorker::Tell(v1::FromWorker message) {
  bool lie = false;
  if (message.has_report()) {
    VoidNan(message.mutable_report());
    lie = lie_next_ && Lie(message.mutable_report());
  }
  CheckTold(message);
  control_->FromWorker(this, std::move(message), lie);
}

void SimWorker::CheckTold(const v1::FromWorker& message) {
  if (message.has_cache_resized() && message.cache_resized().error_code() != 0) {
    world_->Violation(absl::StrCat(
        "w", instance_, " refuses to resize a cache: ", message.cache_resized().error_message()));
  }
  if (message.has_rows_fetched()) return CheckFetched(message.rows_fetched());
  if (message.stage_state().state() == v1::StageState::ACTIVE) {
    const Stage& stage = *core_.FindStage(message.stage_state().stage_id());
    const std::string wrong = restores_.OnActive(message.stage_state(), stage, backend_.cache());
    if (!wrong.empty()) world_->Violation(absl::StrCat("w", instance_, ": ", wrong));
  }
  const auto code = static_cast<absl::StatusCode>(
      message.has_report() ? message.report().error_code() : message.stage_state().error_code());
  const std::string& what = message.has_report() ? message.report().error_message()
                                                 : message.stage_state().error_message();
  // Core and stage share their rules. What was planned fits.
  if (code == absl::StatusCode::kResourceExhausted && message.has_stage_state() &&
      std::exchange(load_finds_no_room_, false)) {
    return;
  }
  if (code == absl::StatusCode::kInvalidArgument || code == absl::StatusCode::kFailedPrecondition ||
      code == absl::StatusCode::kResourceExhausted || code == absl::StatusCode::kAlreadyExists ||
      (code == absl::StatusCode::kNotFound && message.has_report())) {
    world_->Violation(absl::StrCat("w", instance_, " refuses what the coordinator asks: ", what));
  }
}

// What a stage in its epoch is asked to fetch can be fetched.
void SimWorker::CheckFetched(const v1::RowsFetched& fetched) {
  const auto code = static_cast<absl::StatusCode>(fetched.error_code());
  const bool refuses = code == absl::StatusCode::kInvalidArgument ||
                       code == absl::StatusCode::kFailedPrecondition ||
                       code == absl::StatusCode::kPermissionDenied;
  if (!refuses || core_.StateOf(fetched.stage_id()) != WorkerCore::HostedState::kActive) return;
  world_->Violation(
      absl::StrCat("w", instance_, " does not fetch rows: ", fetched.error_message()));
}

void SimWorker::DropCoordinator(absl::Status why) {
  if (!absl::IsUnavailable(why)) {
    world_->Violation(absl::StrCat("w", instance_, " drops the coordinator: ", why.ToString()));
  }
  control_->HangUp(this, std::move(why));
}

void SimWorker::Load(const LoadOrder& order) {
  RunAfter(world_->Random(100, scenario_->load_us_max), [this, order] { EndLoad(order); });
}

void SimWorker::EndLoad(const LoadOrder& order) {
  if (hangs()) {
    return RunAfter(hung_until_us_ - world_->now_us(), [this, order] { EndLoad(order); });
  }
  auto model = backend_.Load(order.spec, [this, &order](uint64_t done, uint64_t total) {
    v1::FromWorker message;
    message.mutable_load_progress()->set_stage_id(order.stage_id);
    message.mutable_load_progress()->set_bytes_loaded(done);
    message.mutable_load_progress()->set_bytes_total(total);
    Tell(std::move(message));
  });
  Count(order.stage_id, SimEvent::kLoaded);
  core_.OnLoaded(order, std::move(model));
}

void SimWorker::Note(LogLevel, std::string_view what, std::initializer_list<LogField> fields) {
  if (!world_->tracing()) return;
  std::string line = absl::StrCat("w", instance_, " notes: ", std::string(what));
  for (const LogField& field : fields) {
    absl::StrAppend(&line, " ", std::string(field.key), "=", field.value);
  }
  world_->Trace(line);
}

// ---------------------------------------------------------------- steps

void SimWorker::TryRun() {
  const auto clock = [this] { return world_->now_us(); };
  while (const std::optional<uint64_t> id = core_.NextReady()) {
    const Stage& stage = *core_.FindStage(*id);
    steps_ahead_ += stage.num_begun() > 0;
    Count(*id, SimEvent::kBegin);
    core_.BeginStep(*id, clock);
    CheckSound();
    device_free_us_ =
        std::max(device_free_us_, world_->now_us()) + world_->Random(10, scenario_->compute_us_max);
    world_->At(device_free_us_, [this, id = *id, epoch = stage.epoch()] { StepEnds(id, epoch); });
    computing_ = scenario_->rows_ahead == 0;
    if (computing_) return;
  }
}

void SimWorker::StepEnds(uint64_t stage_id, PipelineEpoch epoch) {
  if (!alive_) return;
  const uint64_t until_us = std::max(stalled_until_us_, hung_until_us_);
  if (world_->now_us() < until_us) {
    return world_->At(until_us, [this, stage_id, epoch] { StepEnds(stage_id, epoch); });
  }
  const auto end = [this, stage_id, epoch] {
    const Stage* const stage = core_.FindStage(stage_id);
    if (stage == nullptr || stage->epoch() != epoch || stage->num_begun() == 0) return;
    Count(stage_id, SimEvent::kFinish);
    core_.FinishStep(stage_id, [this] { return world_->now_us(); });
    CheckSound();
  };
  if (computing_) {
    computing_ = false;
    end();
  } else {
    inbox_.push_back(end);
  }
  Drain();
}

void SimWorker::CountAll(SimEvent event) {
  for (const uint64_t id : core_.stage_ids()) Count(id, event);
}

void SimWorker::CheckSound() {
  if (core_.replicas().taken_bytes() > scenario_->replica_bytes) {
    world_->Violation(absl::StrCat("w", instance_, " has copies of ",
                                   core_.replicas().taken_bytes(), " bytes, it offered ",
                                   scenario_->replica_bytes));
  }
  if (!check_always_) return;
  const absl::Status sound = core_.CheckIntegrity();
  if (!sound.ok()) world_->Violation(absl::StrCat("w", instance_, ": ", sound.ToString()));
}

// What no number came of is told by an error of that sequence.
void SimWorker::VoidNan(v1::StageReport* report) {
  for (v1::SequenceResult& result : *report->mutable_results()) {
    if (!std::isnan(result.sampled().logprob())) continue;
    result.clear_scored();
    result.clear_sampled();
    result.set_error_code(static_cast<uint32_t>(absl::StatusCode::kDataLoss));
    result.set_error_message("NaN");
  }
}

// ---------------------------------------------------------------- its end

void SimWorker::Leave() {
  if (leaving_) return;
  leaving_ = true;
  if (!core_.attached()) return Shutdown();
  v1::FromWorker message;
  message.mutable_leave()->set_reason("a signal asked it to stop");
  Tell(std::move(message));
  RunAfter(scenario_->leave_timeout_us, [this] { Shutdown(); });
}

void SimWorker::Shutdown() {
  if (!leaving_) return world_->Violation("a worker is told to stop that did not ask for it");
  // Not within an event of its core.
  world_->After(0, [this] {
    if (alive_) control_->Exit(this);
  });
}

}  // namespace strait::sim
