// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_worker.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/epoch_wire.h"
#include "proto/wire/version.h"

namespace strait::sim {
namespace {

// Of the edge that ends at this stage, as if NCCL had made it.
std::string FakeNcclId(uint64_t to_stage_id, PipelineEpoch epoch) {
  std::string id = absl::StrCat("nccl ", to_stage_id, " ", ToString(epoch));
  id.resize(limits::kNcclIdBytes);
  return id;
}

// Three of four workers say that they have NCCL, in two versions.
uint32_t FakeNcclVersion(uint64_t instance) {
  return instance % 4 == 0 ? 0 : instance % 4 == 1 ? 22703 : 22809;
}

}  // namespace

SimWorker::SimWorker(World* world, Network* network, Control* control, const Scenario* scenario,
                     uint64_t instance, uint64_t memory_bytes, uint64_t weights)
    : world_(world),
      control_(control),
      scenario_(scenario),
      instance_(instance),
      memory_bytes_(memory_bytes),
      backend_(&scenario->model, memory_bytes, weights),
      transport_(
          network, absl::StrCat("worker-", instance),
          {[this](const Edge& edge) { OnEdgeUp(edge); },
           [this](const Edge& edge, absl::Status why) { OnEdgeDown(edge, why); },
           [this](uint64_t stage_id, HiddenStep hidden) { OnHidden(stage_id, std::move(hidden)); },
           [this](uint64_t stage_id, SampledStep sampled) {
             OnSampled(stage_id, std::move(sampled));
           }},
          [this](uint64_t delay_us, std::function<void()> what) {
            RunAfter(delay_us, std::move(what));
          }) {
  backend_.rows_ahead = scenario->rows_ahead;
  control_->Dial(this);
}

void SimWorker::RunAfter(uint64_t delay_us, std::function<void()> what) {
  world_->After(delay_us, [this, what = std::move(what)]() mutable {
    inbox_.push_back(std::move(what));
    Drain();
  });
}

void SimWorker::Drain() {
  while (alive_ && !computing_ && world_->now_us() >= stalled_until_us_) {
    if (inbox_.empty()) return TryRun();
    const std::function<void()> what = std::move(inbox_.front());
    inbox_.pop_front();
    what();
  }
}

v1::Hello SimWorker::Hello() const {
  v1::Hello hello;
  hello.set_wire_version(kWireVersion);
  hello.set_name(absl::StrCat("w", instance_));
  hello.set_data_address(absl::StrCat("worker-", instance_));
  hello.set_memory_bytes(memory_bytes_);
  hello.set_model_fingerprint(scenario_->model.fingerprint);
  hello.set_weights_fingerprint(backend_.weights());
  hello.set_cache_row_bytes(
      static_cast<uint32_t>(scenario_->model.block_bytes / limits::kBlockTokens));
  hello.set_numerics_id(backend_.numerics_id());
  hello.set_backend("hash");
  hello.set_instance(instance_);
  hello.set_nccl_version(FakeNcclVersion(instance_));
  return hello;
}

void SimWorker::Send(v1::FromWorker message, bool lie) {
  control_->FromWorker(this, std::move(message), lie);
}

void SimWorker::SendState(uint64_t stage_id, v1::StageState::State state, PipelineEpoch epoch,
                          const absl::Status& error, uint64_t failed_nccl_edge) {
  v1::FromWorker message;
  v1::StageState* out = message.mutable_stage_state();
  out->set_stage_id(stage_id);
  out->set_state(state);
  ToWire(epoch, out->mutable_epoch());
  out->set_error_code(static_cast<uint32_t>(error.code()));
  out->set_error_message(std::string(error.message()));
  out->set_failed_nccl_edge(failed_nccl_edge);
  const auto it = stages_.find(stage_id);
  if (state == v1::StageState::LOADED) {
    out->set_weight_bytes(it->second.stage->model().weight_bytes());
    out->set_cache_bytes(it->second.stage->model().spec().pool_blocks * backend_.block_bytes());
  }
  Send(std::move(message));
}

void SimWorker::SendError(uint64_t stage_id, PipelineEpoch epoch, uint64_t step_id,
                          const absl::Status& error, uint64_t failed_nccl_edge) {
  v1::FromWorker message;
  v1::StageReport* report = message.mutable_report();
  report->set_stage_id(stage_id);
  ToWire(epoch, report->mutable_epoch());
  report->set_step_id(step_id);
  report->set_error_code(static_cast<uint32_t>(error.code()));
  report->set_error_message(std::string(error.message()));
  report->set_failed_nccl_edge(failed_nccl_edge);
  Send(std::move(message));
}

void SimWorker::Receive(const v1::ToWorker& message) {
  switch (message.message_case()) {
    case v1::ToWorker::kWelcome:
      heartbeat_interval_us_ = uint64_t{message.welcome().heartbeat_interval_ms()} * 1000;
      return Heartbeat(stream_);
    case v1::ToWorker::kLoadStage:
      return OnLoad(message.load_stage());
    case v1::ToWorker::kActivateStage:
      return OnActivate(message.activate_stage());
    case v1::ToWorker::kUnloadStage:
      return OnUnload(message.unload_stage().stage_id());
    case v1::ToWorker::kStep:
      return OnStep(message.step());
    default:
      return world_->Violation("a worker got a message that it does not know");
  }
}

void SimWorker::Heartbeat(uint64_t stream) {
  if (stream != stream_) return;
  v1::FromWorker message;
  message.mutable_heartbeat()->set_resident_bytes(backend_.used_bytes());
  Send(std::move(message));
  RunAfter(heartbeat_interval_us_, [this, stream] { Heartbeat(stream); });
}

void SimWorker::StreamEnded() {
  ++stream_;
  for (const auto& [id, hosted] : stages_) {
    transport_.Disconnect(id);
    transport_.Forget(id);
  }
  stages_.clear();
  RunAfter(world_->Random(1'000, 50'000), [this, stream = stream_] {
    if (stream == stream_) control_->Dial(this);
  });
}

void SimWorker::OnLoad(const v1::LoadStage& load) {
  const uint64_t id = load.stage_id();
  if (stages_.contains(id)) return world_->Violation("a stage is loaded twice");
  stages_[id];
  RunAfter(world_->Random(100, scenario_->load_us_max), [this, load, id, stream = stream_] {
    if (stream != stream_ || !stages_.contains(id)) return;  // dropped while it loaded
    const StageSpec spec{{load.layer_begin(), load.layer_end()},
                         static_cast<uint32_t>(load.cache_bytes() / backend_.block_bytes())};
    absl::StatusOr<std::unique_ptr<StageModel>> model =
        backend_.Load(spec, [this, id](uint64_t done, uint64_t total) {
          v1::FromWorker message;
          message.mutable_load_progress()->set_stage_id(id);
          message.mutable_load_progress()->set_bytes_loaded(done);
          message.mutable_load_progress()->set_bytes_total(total);
          Send(std::move(message));
        });
    if (!model.ok()) {
      // Core and worker share the reckoning: what was planned fits.
      if (absl::IsResourceExhausted(model.status())) world_->Violation(model.status().ToString());
      stages_.erase(id);
      return SendState(id, v1::StageState::FAILED, {}, model.status());
    }
    stages_[id].stage = std::make_unique<Stage>(id, *std::move(model), StageTraitsOf(backend_));
    SendState(id, v1::StageState::LOADED, {}, absl::OkStatus());
  });
}

void SimWorker::OnActivate(const v1::ActivateStage& activate) {
  const auto it = stages_.find(activate.stage_id());
  if (it == stages_.end() || it->second.stage == nullptr) {
    return world_->Violation("a stage that is not loaded is activated");
  }
  Hosted& hosted = it->second;
  const PipelineEpoch epoch = FromWire(activate.epoch());
  // A superseded activation is answered, so that each is.
  if (hosted.active.stage_id() != 0 && !hosted.up) {
    SendState(it->first, v1::StageState::FAILED, FromWire(hosted.active.epoch()),
              absl::AbortedError("superseded"));
  }
  const absl::Status status = hosted.stage->Activate(epoch, activate.stage_index(),
                                                     activate.num_stages(), activate.grants());
  if (!status.ok()) {
    return SendState(it->first, v1::StageState::FAILED, epoch, status);
  }
  hosted.active = activate;
  hosted.up = false;
  if (activate.stage_index() > 0) {
    transport_.Expect({activate.previous_stage_id(), it->first, epoch});
    if (activate.edge_over_nccl()) {
      v1::FromWorker message;
      message.mutable_edge_id()->set_stage_id(it->first);
      ToWire(epoch, message.mutable_edge_id()->mutable_epoch());
      message.mutable_edge_id()->set_nccl_id(FakeNcclId(it->first, epoch));
      Send(std::move(message));
    }
  } else if (activate.last_stage_id() != 0) {
    transport_.Expect({.from_stage_id = activate.last_stage_id(),
                       .to_stage_id = it->first,
                       .epoch = epoch,
                       .sampled = true});
  }
  if (activate.first_stage_id() != 0) {
    return transport_.Connect({.from_stage_id = it->first,
                               .to_stage_id = activate.first_stage_id(),
                               .epoch = epoch,
                               .peer_address = activate.first_data_address(),
                               .sampled = true});
  }
  if (activate.next_stage_id() == 0) {
    hosted.up = true;
    return SendState(it->first, v1::StageState::ACTIVE, epoch, absl::OkStatus());
  }
  // What travels is the simulator's, but who is told what is as with NCCL.
  const bool over_nccl = !activate.next_nccl_id().empty();
  if (over_nccl && activate.next_nccl_id() != FakeNcclId(activate.next_stage_id(), epoch)) {
    world_->Violation("a stage is told the NCCL id of another edge or epoch");
  }
  transport_.Connect({it->first, activate.next_stage_id(), epoch, activate.next_data_address()});
}

void SimWorker::OnEdgeUp(const Edge& edge) {
  const auto it = stages_.find(edge.from_stage_id);
  if (it == stages_.end() || FromWire(it->second.active.epoch()) != edge.epoch) return;
  it->second.up = true;
  SendState(it->first, v1::StageState::ACTIVE, edge.epoch, absl::OkStatus());
}

void SimWorker::OnEdgeDown(const Edge& edge, const absl::Status& why) {
  for (const uint64_t id : {edge.from_stage_id, edge.to_stage_id}) {
    const auto it = stages_.find(id);
    if (it == stages_.end() || FromWire(it->second.active.epoch()) != edge.epoch) continue;
    const v1::ActivateStage& active = it->second.active;
    const bool over_nccl =
        id == edge.to_stage_id ? active.edge_over_nccl() : !active.next_nccl_id().empty();
    const uint64_t failed_nccl_edge = over_nccl ? edge.to_stage_id : 0;
    if (it->second.up) {
      SendError(id, edge.epoch, 0, why, failed_nccl_edge);
    } else {
      SendState(id, v1::StageState::FAILED, edge.epoch, why, failed_nccl_edge);
    }
  }
}

void SimWorker::OnUnload(uint64_t stage_id) {
  if (!stages_.contains(stage_id)) {
    return SendState(stage_id, v1::StageState::FAILED, {}, absl::NotFoundError("no such stage"));
  }
  transport_.Disconnect(stage_id);
  transport_.Forget(stage_id);
  stages_.erase(stage_id);
  SendState(stage_id, v1::StageState::UNLOADED, {}, absl::OkStatus());
}

void SimWorker::OnStep(const v1::StepPlan& plan) {
  const auto it = stages_.find(plan.stage_id());
  if (it == stages_.end() || it->second.stage == nullptr) {
    return world_->Violation("a plan for a stage that is not loaded");
  }
  const absl::Status status = it->second.stage->AcceptPlan(plan, world_->now_us());
  if (status.ok() || absl::IsAborted(status)) return;
  // Core and stage share their rules: a refused plan is a bug of one of them.
  world_->Violation(
      absl::StrCat("stage ", plan.stage_id(), " refused a plan: ", status.ToString()));
}

void SimWorker::OnHidden(uint64_t stage_id, HiddenStep hidden) {
  const auto it = stages_.find(stage_id);
  if (it == stages_.end() || it->second.stage == nullptr) return;
  const absl::Status status = it->second.stage->AcceptHidden(std::move(hidden), world_->now_us());
  if (status.ok() || absl::IsAborted(status)) return;
  world_->Violation(
      absl::StrCat("stage ", stage_id, " refused hidden states: ", status.ToString()));
}

void SimWorker::OnSampled(uint64_t stage_id, SampledStep sampled) {
  const auto it = stages_.find(stage_id);
  if (it == stages_.end() || it->second.stage == nullptr) return;
  const absl::Status status = it->second.stage->AcceptSampled(std::move(sampled));
  if (status.ok() || absl::IsAborted(status)) return;
  world_->Violation(absl::StrCat("stage ", stage_id, " refused sampled ids: ", status.ToString()));
}

void SimWorker::TryRun() {
  for (auto& [id, hosted] : stages_) {
    while (hosted.stage != nullptr && hosted.stage->Ready()) {
      steps_ahead_ += hosted.stage->num_begun() > 0;
      hosted.stage->BeginNext([this] { return world_->now_us(); });
      const absl::Status sound = hosted.stage->CheckIntegrity();
      if (!sound.ok()) return world_->Violation(absl::StrCat("stage ", id, ": ", sound.ToString()));
      device_free_us_ = std::max(device_free_us_, world_->now_us()) +
                        world_->Random(10, scenario_->compute_us_max);
      world_->At(device_free_us_, [this, id = id, stream = stream_, epoch = hosted.stage->epoch()] {
        StepEnds(id, stream, epoch);
      });
      computing_ = scenario_->rows_ahead == 0;
      if (computing_) return;
    }
  }
}

void SimWorker::StepEnds(uint64_t stage_id, uint64_t stream, PipelineEpoch epoch) {
  if (!alive_) return;
  if (world_->now_us() < stalled_until_us_) {
    return world_->At(stalled_until_us_,
                      [this, stage_id, stream, epoch] { StepEnds(stage_id, stream, epoch); });
  }
  const auto end = [this, stage_id, stream, epoch] {
    const auto it = stages_.find(stage_id);
    if (stream != stream_ || it == stages_.end() || it->second.stage == nullptr) return;
    const Stage& stage = *it->second.stage;
    if (stage.epoch() == epoch && stage.num_begun() > 0) Finish(stage_id, it->second);
  };
  if (computing_) {
    computing_ = false;
    end();
  } else {
    inbox_.push_back(end);
  }
  Drain();
}

void SimWorker::Finish(uint64_t stage_id, Hosted& hosted) {
  StepOutput output = hosted.stage->FinishNext([this] { return world_->now_us(); });
  if (FromWire(output.report.epoch()) != FromWire(hosted.active.epoch())) {
    return world_->Violation("a step of an old epoch was executed");
  }
  const absl::Status sound = hosted.stage->CheckIntegrity();
  if (!sound.ok()) {
    return world_->Violation(absl::StrCat("stage ", stage_id, ": ", sound.ToString()));
  }
  // A broken edge tells of itself.
  if (output.hidden) {
    const absl::Status sent = transport_.Send(stage_id, *std::move(output.hidden));
    if (!sent.ok()) world_->Trace(absl::StrCat("stage ", stage_id, ": ", sent.ToString()));
  }
  if (output.sampled) {
    const absl::Status sent = transport_.SendSampled(stage_id, *std::move(output.sampled));
    if (!sent.ok()) world_->Trace(absl::StrCat("stage ", stage_id, ": ", sent.ToString()));
  }
  v1::FromWorker message;
  VoidNan(&output.report);
  const bool lie = lie_next_ && Lie(&output.report);
  *message.mutable_report() = std::move(output.report);
  Send(std::move(message), lie);
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

bool SimWorker::Lie(v1::StageReport* report) {
  if (report->error_code() != 0) return false;
  v1::TokenLogprob* sampled = nullptr;
  for (v1::SequenceResult& result : *report->mutable_results()) {
    if (result.has_sampled()) sampled = result.mutable_sampled();
  }
  const uint64_t kind = world_->Random(0, 6);
  if (kind >= 3 && sampled == nullptr) return false;  // next time
  switch (kind) {
    case 0:
      report->set_cache_bytes(report->cache_bytes() + 1);
      break;
    case 1:
      report->set_step_id(report->step_id() + world_->Random(1, 3));
      break;
    case 2:
      report->set_tables_digest(report->tables_digest() ^ 1);
      break;
    case 3:
      sampled->set_token_id(scenario_->model.vocab_size);
      break;
    case 4:
      sampled->set_logprob(std::numeric_limits<float>::quiet_NaN());
      break;
    case 5:
      report->mutable_results()->RemoveLast();
      break;
    case 6:
      report->mutable_results(0)->set_sequence_id(report->results(0).sequence_id() + 1);
      break;
  }
  world_->Trace(absl::StrCat("fault: w", instance_, " lies (kind ", kind, ") about step ",
                             report->step_id()));
  lie_next_ = false;
  lied_ = true;
  return true;
}

void SimWorker::Kill() {
  alive_ = false;
  transport_.Kill();
  stages_.clear();
}

void SimWorker::Stall(uint64_t us) {
  stalled_until_us_ = std::max(stalled_until_us_, world_->now_us() + us);
  world_->At(stalled_until_us_, [this] { Drain(); });
}

void SimWorker::FailNextLoad() { backend_.fail_next_load = absl::DataLossError("a bad disk"); }

void SimWorker::FailNextStep() {
  const absl::Status bad = absl::InternalError("a bad device");
  (world_->Chance(0.5) ? backend_.fail_next_begin : backend_.fail_next_finish) = bad;
}

absl::Status SimWorker::CheckIntegrity() const {
  for (const auto& [id, hosted] : stages_) {
    if (hosted.stage != nullptr) STRAIT_RETURN_IF_ERROR(hosted.stage->CheckIntegrity());
  }
  return absl::OkStatus();
}

uint64_t SimWorker::BlocksHeld() const {
  uint64_t blocks = 0;
  for (const auto& [id, hosted] : stages_) {
    if (hosted.stage != nullptr) blocks += hosted.stage->blocks_used();
  }
  return blocks;
}

}  // namespace strait::sim
