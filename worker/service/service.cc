// SPDX-License-Identifier: Apache-2.0
#include "worker/service/service.h"

#include <atomic>
#include <chrono>
#include <map>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "proto/rpc/address.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/queue.h"
#include "proto/rpc/status.h"
#include "proto/wire/epoch_wire.h"
#include "strait/v1/cluster.pb.h"
#include "worker/service/events.h"
#include "worker/service/link.h"
#include "worker/service/loader.h"
#include "worker/service/messages.h"
#include "worker/stage/stage.h"
#include "worker/transport/edges.h"

namespace strait {
namespace {

constexpr std::chrono::seconds kIdleWait(1);

struct Hosted {
  std::unique_ptr<Stage> stage;  // null while it loads
  bool unload_when_loaded = false;
  bool activating = false;   // ACTIVE not yet told
  bool edge_broken = false;  // told, in this epoch
};

}  // namespace

class WorkerProcess::Impl {
 public:
  Impl(WorkerOptions options, Backend* backend)
      : options_(std::move(options)), backend_(backend), queue_(kEventQueue) {}

  absl::Status Start() {
    GrpcTransportOptions transport;
    transport.listen_address = options_.listen_address;
    transport.hidden_row_bytes = backend_->hidden_row_bytes();
    TransportEvents events;
    events.on_edge_up = [this](const Edge& edge) { queue_.Push(EdgeUp{edge}); };
    events.on_edge_down = [this](const Edge& edge, absl::Status why) {
      queue_.Push(EdgeDown{edge, std::move(why)});
    };
    events.on_hidden = [this](uint64_t to, HiddenStep step) {
      queue_.Push(Hidden{to, std::move(step)});
    };
    events.on_sampled = [this](uint64_t to, SampledStep step) {
      queue_.Push(Sampled{to, std::move(step)});
    };
    const auto on_nccl_id = [this](const Edge& edge, std::string id) {
      queue_.Push(NcclIdMade{edge, std::move(id)});
    };
    STRAIT_ASSIGN_OR_RETURN(transport_,
                            Edges::Create(transport, options_.nccl, events, on_nccl_id));
    data_address = options_.advertise_address;
    if (data_address.empty()) {
      STRAIT_ASSIGN_OR_RETURN(rpc::HostPort bound, rpc::ParseHostPort(options_.listen_address));
      bound.port = static_cast<uint16_t>(transport_->port());
      data_address = bound.ToString();
    }
    loader_ = std::make_unique<StageLoader>(
        backend_,
        [this](const LoadJob& job, uint64_t done, uint64_t total) {
          // A lost one is no harm.
          (void)link_->Send(job.session, ProgressMessage(job.stage_id, done, total));
        },
        [this](const LoadJob& job, absl::StatusOr<std::unique_ptr<StageModel>> model) {
          queue_.Push(Loaded{job, std::move(model)});
        });
    ControlLink::Events link;
    link.on_message = [this](LinkSession session, v1::ToWorker message) {
      const bool room = queue_.Push(Control{session, std::move(message)});
      if (!room) link_paused_ = true;
      return room;
    };
    link.on_ended = [this](LinkSession session, absl::Status why) {
      queue_.Push(Detached{session, std::move(why)});
    };
    link_ = std::make_unique<ControlLink>(options_.coordinator_address,
                                          MakeHello(options_, *backend_, data_address), link);
    return absl::OkStatus();
  }

  ~Impl() {
    // Producers of events end first, those that others call last.
    if (link_) link_->Stop();
    loader_.reset();
    transport_.reset();
  }

  void Run() {
    link_->Start();
    for (bool busy = false; !stop_; busy = !stop_ && DoSteps()) {
      const auto timeout = busy ? std::chrono::seconds(0) : kIdleWait;
      for (Event& event : queue_.PopAll(timeout, transport_->eager_wait()))
        std::visit([this](auto& e) { On(e); }, event);
      if (link_paused_.exchange(false)) link_->Resume();
    }
    Log(LogLevel::kInfo, "stopping", {{"stages", stages_.size()}});
    link_->Stop();
    DropStages();
  }

  void Stop() { queue_.Push(StopLoop{}); }
  bool loading() const { return loader_->busy(); }

  std::string data_address;

 private:
  // ---- Events ----

  void On(StopLoop&) { stop_ = true; }

  void On(Control& control) {
    if (control.message.has_welcome()) {
      session_ = control.session;
      loader_->CancelBefore(session_);
      Log(LogLevel::kInfo, "attached to the coordinator",
          {{"coordinator", options_.coordinator_address},
           {"worker", control.message.welcome().worker_id()}});
      return;
    }
    if (control.session != session_) return;
    v1::ToWorker& message = control.message;
    switch (message.message_case()) {
      case v1::ToWorker::kStep:
        OnPlan(std::move(*message.mutable_step()));
        break;
      case v1::ToWorker::kLoadStage:
        OnLoad(message.load_stage());
        break;
      case v1::ToWorker::kActivateStage:
        OnActivate(message.activate_stage());
        break;
      case v1::ToWorker::kUnloadStage:
        OnUnload(message.unload_stage().stage_id());
        break;
      case v1::ToWorker::kShutdown:
        Log(LogLevel::kInfo, "the coordinator asks to stop",
            {{"reason",
              PrintableText(message.shutdown().reason(), limits::kMaxErrorMessageBytes)}});
        stop_ = true;
        break;
      default:
        link_->Drop(absl::InvalidArgumentError("the coordinator sent a message of unknown kind"));
    }
  }

  void On(Detached& detached) {
    if (detached.session != session_) return;
    session_ = 0;
    DropStages();
  }

  void On(EdgeUp& up) {
    Hosted* hosted = Find(up.edge.from_stage_id);
    if (!hosted || !hosted->stage || !hosted->activating) return;
    if (hosted->stage->epoch() != up.edge.epoch) return;
    hosted->activating = false;
    TellActive(*hosted->stage);
  }

  void On(NcclIdMade& made) {
    Hosted* hosted = Find(made.edge.to_stage_id);
    if (!hosted || !hosted->stage || hosted->stage->epoch() != made.edge.epoch) return;
    Tell(EdgeIdMessage(made.edge.to_stage_id, made.edge.epoch, std::move(made.id)));
  }

  void On(EdgeDown& down) {
    const Edge& edge = down.edge;
    const uint64_t nccl_edge = edge.over_nccl ? edge.to_stage_id : 0;
    for (uint64_t id : {edge.from_stage_id, edge.to_stage_id}) {
      Hosted* hosted = Find(id);
      if (!hosted || !hosted->stage || hosted->stage->epoch() != edge.epoch) continue;
      if (id == edge.from_stage_id && hosted->activating) {
        hosted->activating = false;
        hosted->edge_broken = true;
        TellFailed(id, down.why, edge.epoch, nccl_edge);
      } else {
        BreakEdge(id, *hosted, down.why, nccl_edge);
      }
    }
  }

  void On(Hidden& hidden) {
    Hosted* hosted = Find(hidden.to_stage_id);
    if (!hosted || !hosted->stage) return;
    const StepId step = hidden.step.step;
    const absl::Status accepted =
        hosted->stage->AcceptHidden(std::move(hidden.step), MonotonicMicros());
    if (accepted.ok() || absl::IsAborted(accepted)) return;
    TellStuck(hidden.to_stage_id, hosted->stage->epoch(), step.value, accepted);
  }

  void On(Sampled& sampled) {
    Hosted* hosted = Find(sampled.to_stage_id);
    if (!hosted || !hosted->stage) return;
    const StepId step = sampled.step.step;
    const absl::Status accepted = hosted->stage->AcceptSampled(std::move(sampled.step));
    transport_->Consumed(sampled.to_stage_id, step);
    if (accepted.ok() || absl::IsAborted(accepted)) return;
    TellStuck(sampled.to_stage_id, hosted->stage->epoch(), step.value, accepted);
  }

  void On(Loaded& loaded) {
    const uint64_t id = loaded.job.stage_id;
    if (loaded.job.session != session_) return;
    Hosted* hosted = Find(id);
    if (!hosted || hosted->stage) return;
    if (hosted->unload_when_loaded) {
      loaded.model = absl::CancelledError("unloaded");
      stages_.erase(id);
      Tell(UnloadedMessage(id));
      return;
    }
    if (!loaded.model.ok()) {
      stages_.erase(id);
      TellFailed(id, loaded.model.status());
      return;
    }
    std::unique_ptr<StageModel> model = std::move(*loaded.model);
    v1::FromWorker message = LoadedMessage(id, *model, backend_->block_bytes());
    Log(LogLevel::kInfo, "stage loaded",
        {{"stage", id},
         {"layer_begin", model->spec().layers.begin},
         {"layer_end", model->spec().layers.end},
         {"weight_bytes", model->weight_bytes()},
         {"cache_bytes", model->cache_bytes()}});
    hosted->stage = std::make_unique<Stage>(id, std::move(model), StageTraitsOf(*backend_));
    Tell(std::move(message));
  }

  // ---- What the coordinator asks ----

  void OnLoad(const v1::LoadStage& load) {
    const uint64_t id = load.stage_id();
    const absl::Status valid = [&]() -> absl::Status {
      if (stages_.contains(id)) {
        return absl::AlreadyExistsError(absl::StrCat("stage ", id, " is here already"));
      }
      if (stages_.size() >= kMaxHostedStages) {
        return absl::ResourceExhaustedError(
            absl::StrCat("this worker hosts ", kMaxHostedStages, " stages already"));
      }
      return CheckLoad(load, backend_->num_layers(), backend_->block_bytes());
    }();
    if (!valid.ok()) {
      TellFailed(id, valid);
      return;
    }
    stages_[id];
    Log(LogLevel::kInfo, "loading stage",
        {{"stage", id},
         {"layer_begin", load.layer_begin()},
         {"layer_end", load.layer_end()},
         {"cache_bytes", load.cache_bytes()}});
    loader_->Enqueue({.session = session_,
                      .stage_id = id,
                      .spec = {.layers = {load.layer_begin(), load.layer_end()},
                               .pool_blocks = static_cast<uint32_t>(load.cache_bytes() /
                                                                    backend_->block_bytes())}});
  }

  void OnUnload(uint64_t id) {
    Hosted* hosted = Find(id);
    if (!hosted) {
      TellFailed(id, absl::NotFoundError(absl::StrCat("stage ", id, " is not here")));
      return;
    }
    if (!hosted->stage) {
      hosted->unload_when_loaded = true;
      return;
    }
    transport_->Disconnect(id);
    transport_->Forget(id);
    stages_.erase(id);
    Log(LogLevel::kInfo, "stage unloaded", {{"stage", id}});
    Tell(UnloadedMessage(id));
  }

  void OnActivate(const v1::ActivateStage& activate) {
    const uint64_t id = activate.stage_id();
    const PipelineEpoch epoch = FromWire(activate.epoch());
    Hosted* hosted = Find(id);
    const absl::Status valid = [&]() -> absl::Status {
      if (!hosted || !hosted->stage) {
        return absl::FailedPreconditionError(absl::StrCat("stage ", id, " is not loaded"));
      }
      return CheckActivate(activate);
    }();
    if (!valid.ok()) {
      TellFailed(id, valid, epoch);
      return;
    }
    const PipelineEpoch before = hosted->stage->epoch();
    const absl::Status entered = hosted->stage->Activate(epoch, activate.stage_index(),
                                                         activate.num_stages(), activate.grants());
    if (!entered.ok()) {
      TellFailed(id, entered, epoch);
      return;
    }
    if (std::exchange(hosted->activating, false)) {
      TellFailed(id, absl::AbortedError("a newer epoch came"), before);
    }
    hosted->edge_broken = false;
    transport_->Disconnect(id);
    if (activate.stage_index() == 0) {
      transport_->Forget(id);
      if (activate.last_stage_id() != 0) {
        transport_->Expect({.from_stage_id = activate.last_stage_id(),
                            .to_stage_id = id,
                            .epoch = epoch,
                            .nonce = activate.sampled_edge_nonce(),
                            .sampled = true});
      }
    } else {
      transport_->Expect({.from_stage_id = activate.previous_stage_id(),
                          .to_stage_id = id,
                          .epoch = epoch,
                          .nonce = activate.edge_nonce(),
                          .over_nccl = activate.edge_over_nccl(),
                          .max_tokens = activate.max_step_tokens()});
    }
    const std::optional<Edge> out = OutgoingEdge(activate);
    if (!out) {
      TellActive(*hosted->stage);
      return;
    }
    hosted->activating = true;
    transport_->Connect(*out);
  }

  void OnPlan(v1::StepPlan plan) {
    const uint64_t id = plan.stage_id();
    const uint64_t step = plan.step_id();
    const PipelineEpoch epoch = FromWire(plan.epoch());
    Hosted* hosted = Find(id);
    uint32_t num_rows = 0;
    const absl::Status accepted =
        hosted && hosted->stage
            ? hosted->stage->AcceptPlan(std::move(plan), MonotonicMicros(), &num_rows)
            : absl::NotFoundError(absl::StrCat("stage ", id, " is not loaded here"));
    if (num_rows > 0 && !hosted->stage->is_first()) {
      transport_->Due(id, StepId{step}, num_rows);
    }
    // Aborted: of an epoch that is over. Nobody waits for an answer.
    if (accepted.ok() || absl::IsAborted(accepted)) return;
    TellStuck(id, epoch, step, accepted);
  }

  // ---- Steps ----

  // Stages take turns. Null: none is ready.
  Hosted* NextReady() {
    auto it = stages_.upper_bound(last_begun_);
    for (size_t i = 0; i < stages_.size(); ++i, ++it) {
      if (it == stages_.end()) it = stages_.begin();
      if (it->second.stage && it->second.stage->Ready()) return &it->second;
    }
    return nullptr;
  }

  // Tells of steps that are done, or else begins one. Whether there may be more to do: while all
  // that is begun computes, the loop turns, for a step's end must not wait for a sleeping thread.
  bool DoSteps() {
    bool any_begun = false;
    bool any_done = false;
    for (auto& [id, hosted] : stages_) {
      if (!hosted.stage || hosted.stage->num_begun() == 0) continue;
      any_begun = true;
      if (!hosted.stage->Done()) continue;
      any_done = true;
      FinishStep(hosted);
    }
    Hosted* const ready = any_done ? nullptr : NextReady();
    if (ready) BeginStep(*ready);
    if (any_begun && !any_done && !ready) std::this_thread::yield();
    return any_begun || ready;
  }

  void BeginStep(Hosted& hosted) {
    Stage& stage = *hosted.stage;
    last_begun_ = stage.stage_id();
    stage.BeginNext(&MonotonicMicros,
                    [&](size_t bytes) { return transport_->Memory(stage.stage_id(), bytes); });
  }

  void FinishStep(Hosted& hosted) {
    Stage& stage = *hosted.stage;
    StepOutput output = stage.FinishNext(&MonotonicMicros);
    absl::Status sent;
    // First what the next stage waits for.
    if (output.hidden) sent = transport_->Send(stage.stage_id(), std::move(*output.hidden));
    if (output.sampled)
      sent = transport_->SendSampled(stage.stage_id(), *std::move(output.sampled));
    const auto step = StepId{output.report.step_id()};
    if (output.report.error_code() != 0) {
      Log(LogLevel::kError, "step failed",
          {{"stage", stage.stage_id()},
           {"step", step.value},
           {"why", rpc::FromWire(output.report.error_code(), output.report.error_message())}});
    }
    v1::FromWorker message;
    *message.mutable_report() = std::move(output.report);
    Tell(std::move(message));
    if (!stage.is_first()) transport_->Consumed(stage.stage_id(), step);
    if (!sent.ok()) BreakEdge(stage.stage_id(), hosted, sent);
  }

  // ---- Telling ----

  void Tell(v1::FromWorker message) {
    const absl::Status sent = link_->Send(session_, std::move(message));
    // Unavailable: the session's end is on its way here. Otherwise something that must be told
    // cannot be.
    if (!sent.ok() && !absl::IsUnavailable(sent)) link_->Drop(sent);
  }

  void TellActive(const Stage& stage) {
    Log(LogLevel::kInfo, "stage active",
        {{"stage", stage.stage_id()}, {"epoch", ToString(stage.epoch())}});
    Tell(ActiveMessage(stage.stage_id(), stage.epoch()));
  }

  void TellFailed(uint64_t id, const absl::Status& why, PipelineEpoch epoch = {},
                  uint64_t nccl_edge = 0) {
    Log(LogLevel::kWarning, "stage request failed", {{"stage", id}, {"why", rpc::Bounded(why)}});
    Tell(FailedMessage(id, why, epoch, nccl_edge));
  }

  void TellStuck(uint64_t id, PipelineEpoch epoch, uint64_t step, const absl::Status& why,
                 uint64_t nccl_edge = 0) {
    Log(LogLevel::kWarning, "stage cannot go on",
        {{"stage", id}, {"epoch", ToString(epoch)}, {"step", step}, {"why", rpc::Bounded(why)}});
    Tell(StuckMessage(id, epoch, step, why, nccl_edge));
  }

  void BreakEdge(uint64_t id, Hosted& hosted, const absl::Status& why, uint64_t nccl_edge = 0) {
    if (std::exchange(hosted.edge_broken, true)) return;
    TellStuck(id, hosted.stage->epoch(), 0, why, nccl_edge);
  }

  Hosted* Find(uint64_t id) {
    auto it = stages_.find(id);
    return it == stages_.end() ? nullptr : &it->second;
  }

  void DropStages() {
    for (auto& [id, hosted] : stages_) {
      transport_->Disconnect(id);
      transport_->Forget(id);
    }
    stages_.clear();
  }

  const WorkerOptions options_;
  Backend* const backend_;
  BoundedQueue<Event> queue_;
  std::atomic<bool> link_paused_ = false;
  std::unique_ptr<Edges> transport_;
  std::unique_ptr<StageLoader> loader_;
  std::unique_ptr<ControlLink> link_;

  // Loop thread only:
  bool stop_ = false;
  LinkSession session_ = 0;  // 0: detached
  std::map<uint64_t, Hosted> stages_;
  uint64_t last_begun_ = 0;  // stage
};

absl::StatusOr<std::unique_ptr<WorkerProcess>> WorkerProcess::Create(WorkerOptions options,
                                                                     Backend* backend) {
  auto impl = std::make_unique<Impl>(std::move(options), backend);
  if (absl::Status started = impl->Start(); !started.ok()) return started;
  return std::unique_ptr<WorkerProcess>(new WorkerProcess(std::move(impl)));
}

WorkerProcess::WorkerProcess(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WorkerProcess::~WorkerProcess() = default;
void WorkerProcess::Run() { impl_->Run(); }
void WorkerProcess::Stop() { impl_->Stop(); }
bool WorkerProcess::loading() const { return impl_->loading(); }
const std::string& WorkerProcess::data_address() const { return impl_->data_address; }

}  // namespace strait
