// SPDX-License-Identifier: Apache-2.0
#include "worker/service/service.h"

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/address.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/queue.h"
#include "strait/v1/cluster.pb.h"
#include "worker/core/messages.h"
#include "worker/core/worker_core.h"
#include "worker/service/events.h"
#include "worker/service/hello.h"
#include "worker/service/link.h"
#include "worker/service/loader.h"
#include "worker/transfer/grpc_row_transfer.h"
#include "worker/transfer/row_links.h"
#include "worker/transport/edges.h"

namespace strait {
namespace {

constexpr std::chrono::microseconds kIdleWait = std::chrono::seconds(1);
// While rows are copied to or from host memory; and while such copies are between two workers, where a client may wait
// for the last of them.
constexpr std::chrono::microseconds kCopyWait(1000);
constexpr std::chrono::microseconds kMoveWait(50);

}  // namespace

class WorkerProcess::Impl final : private WorkerPorts {
 public:
  Impl(WorkerOptions options, Backend* backend)
      : options_(std::move(options)), backend_(backend), queue_(kEventQueue) {}

  absl::Status Start() {
    GrpcTransportOptions transport;
    transport.listen_address = options_.listen_address;
    transport.hidden_row_bytes = backend_->hidden_row_bytes();
    GrpcRowTransferOptions rows;
    rows.shares_memory = options_.shares_row_memory;
    rows.lock_pages = [this](absl::Span<std::byte> memory) { return backend_->LockPages(memory); };
    if (options_.links_rows) {
      STRAIT_ASSIGN_OR_RETURN(
          rows.links,
          RowLinks::Create({.on_one_device = options_.links_one_device}, options_.nccl));
    }
    rows_ = std::make_unique<GrpcRowTransfer>(rows, EventsOfRows());
    transport.services = {rows_->service()};
    STRAIT_ASSIGN_OR_RETURN(transport_,
                            Edges::Create(transport, options_.nccl, EventsOfTransport()));
    core_.emplace(options_.core, StageTraitsOf(*backend_, options_.weights_fingerprint),
                  &backend_->cache(), transport_.get(), static_cast<WorkerPorts*>(this),
                  rows_.get());
    data_address = options_.advertise_address;
    if (data_address.empty()) {
      STRAIT_ASSIGN_OR_RETURN(rpc::HostPort bound, rpc::ParseHostPort(options_.listen_address));
      bound.port = static_cast<uint16_t>(transport_->port());
      data_address = bound.ToString();
    }
    if (options_.shares_row_memory) rows_->SetAddress(data_address);
    hello_ = MakeHello(options_, *backend_, data_address);
    core_->FillHello(&hello_);
    loader_ = std::make_unique<StageLoader>(
        backend_,
        [this](const LoadOrder& order, uint64_t done, uint64_t total) {
          // A lost one is no harm.
          (void)link_->Send(told_session_, ProgressMessage(order.stage_id, done, total));
        },
        [this](const LoadOrder& order, absl::StatusOr<std::unique_ptr<StageModel>> model) {
          queue_.Push(Loaded{order, std::move(model)});
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
    link_ = std::make_unique<ControlLink>(options_.coordinator_address, link);
    return absl::OkStatus();
  }

  ~Impl() override {
    // Producers of events end first, those that others call last.
    if (link_) link_->Stop();
    loader_.reset();
    if (rows_) rows_->Stop();
    transport_.reset();  // and the server that has the rows' service
    core_.reset();
    rows_.reset();
  }

  void Run() {
    link_->Dial(hello_);
    for (bool busy = false; !stop_; busy = !stop_ && DoSteps()) {
      const std::chrono::microseconds timeout = busy                  ? std::chrono::seconds(0)
                                                : core_->MovesRows()  ? kMoveWait
                                                : core_->CopiesRows() ? kCopyWait
                                                                      : kIdleWait;
      for (Event& event : queue_.PopAll(timeout, transport_->eager_wait()))
        std::visit([this](auto& e) { On(e); }, event);
      if (link_paused_.exchange(false)) link_->Resume();
      if (core_->CopiesRows()) core_->PollCopies(MonotonicMicros());
      if (!core_->attached()) OnTick();
      if (leave_by_us_ && MonotonicMicros() >= *leave_by_us_) {
        Log(LogLevel::kWarning, "not drained in time");
        stop_ = true;
      }
    }
    const RowTransferBytes moved = rows_->bytes();
    Log(LogLevel::kInfo, "stopping",
        {{"stages", core_->num_stages()},
         {"row_bytes_came_shared", moved.came_shared},
         {"row_bytes_came_by_grpc", moved.came_by_grpc},
         {"row_bytes_went_shared", moved.went_shared},
         {"row_bytes_went_by_grpc", moved.went_by_grpc}});
    link_->Stop();
    core_->DropStages();
  }

  void Stop() { queue_.Push(StopLoop{}); }
  void Leave() { queue_.Push(LeaveCluster{}); }
  bool loading() const { return loader_->busy(); }

  std::string data_address;

 private:
  TransportEvents EventsOfTransport() {
    TransportEvents events;
    events.on_edge_up = [this](const Edge& edge, HiddenMemory memory) {
      queue_.Push(EdgeUp{edge, std::move(memory)});
    };
    events.on_edge_down = [this](const Edge& edge, absl::Status why) {
      queue_.Push(EdgeDown{edge, std::move(why)});
    };
    events.on_hidden = [this](uint64_t to, HiddenStep step) {
      queue_.Push(Hidden{to, std::move(step)});
    };
    events.on_sampled = [this](uint64_t to, SampledStep step) {
      queue_.Push(Sampled{to, std::move(step)});
    };
    events.on_nccl_id = [this](const Edge& edge, std::string id) {
      queue_.Push(NcclIdMade{edge, std::move(id)});
    };
    return events;
  }

  RowTransferEvents EventsOfRows() {
    RowTransferEvents events;
    events.on_rows = [this](AskId id, absl::StatusOr<RowsFrame> frame) {
      queue_.Push(RowsCame{id, std::move(frame)});
    };
    events.on_ask = [this](PeerAskId id, RowsAsk ask) { queue_.Push(PeerAsked{id, ask}); };
    events.on_served = [this](PeerAskId id, std::vector<BlockHeader> pieces) {
      queue_.Push(FrameServed{id, std::move(pieces)});
    };
    return events;
  }

  // Without a coordinator.
  void OnTick() {
    const size_t before = core_->num_stages();
    core_->OnTick(MonotonicMicros());
    if (core_->num_stages() == before) return;
    core_->FillHello(&hello_);
    link_->Dial(hello_);
  }

  // ---- Events ----

  void On(StopLoop&) { stop_ = true; }

  void On(LeaveCluster&) {
    if (session_ == 0 || options_.drain_timeout_us == 0) {
      stop_ = true;
      return;
    }
    Log(LogLevel::kInfo, "asks to be drained", {{"stages", core_->num_stages()}});
    leave_by_us_ = MonotonicMicros() + options_.drain_timeout_us;
    v1::FromWorker message;
    message.mutable_leave()->set_reason("a signal asked it to stop");
    Tell(std::move(message));
  }

  void On(Control& control) {
    if (control.message.has_welcome()) {
      told_session_ = session_ = control.session;
      Log(LogLevel::kInfo, "attached to the coordinator",
          {{"coordinator", options_.coordinator_address},
           {"worker", control.message.welcome().worker_id()},
           {"stages_kept", core_->num_stages()}});
      return core_->OnWelcome(control.message.welcome());
    }
    if (control.session == session_)
      core_->OnMessage(std::move(control.message), MonotonicMicros());
  }

  void On(Detached& detached) {
    if (detached.session == session_) {
      session_ = 0;
      core_->OnDetached(MonotonicMicros());
      stop_ = stop_ || leave_by_us_;  // nobody drains it any more
    }
    core_->FillHello(&hello_);
    link_->Dial(hello_);
  }

  void On(EdgeUp& up) { core_->OnEdgeUp(up.edge, std::move(up.memory)); }
  void On(EdgeDown& down) { core_->OnEdgeDown(down.edge, down.why); }
  void On(NcclIdMade& made) { core_->OnNcclId(made.edge, std::move(made.id)); }
  void On(Hidden& hidden) {
    core_->OnHidden(hidden.to_stage_id, std::move(hidden.step), MonotonicMicros());
  }
  void On(Sampled& sampled) { core_->OnSampled(sampled.to_stage_id, std::move(sampled.step)); }
  void On(RowsCame& rows) { core_->OnRows(rows.id, std::move(rows.frame), MonotonicMicros()); }
  void On(PeerAsked& asked) { core_->OnAsk(asked.id, asked.ask, MonotonicMicros()); }
  void On(FrameServed& served) { core_->OnServed(served.id, served.pieces, MonotonicMicros()); }
  void On(Loaded& loaded) { core_->OnLoaded(loaded.order, std::move(loaded.model)); }

  // Tells of steps that are done, or else begins one. Whether there may be more to do: while all
  // that is begun computes, the loop turns, for a step's end must not wait for a sleeping thread.
  bool DoSteps() {
    bool any_begun = false;
    if (const std::optional<uint64_t> done = core_->NextDone(&any_begun)) {
      core_->FinishStep(*done, &MonotonicMicros);
      return true;
    }
    const std::optional<uint64_t> ready = core_->NextReady();
    if (ready) core_->BeginStep(*ready, &MonotonicMicros);
    if (any_begun && !ready) std::this_thread::yield();
    return any_begun || ready;
  }

  // ---- WorkerPorts ----

  void Tell(v1::FromWorker message) override {
    const absl::Status sent = link_->Send(session_, std::move(message));
    // Unavailable: the session's end is on its way here. Otherwise something that must be told
    // cannot be.
    if (!sent.ok() && !absl::IsUnavailable(sent)) link_->Drop(sent);
  }
  void DropCoordinator(absl::Status why) override { link_->Drop(std::move(why)); }
  void Shutdown() override { stop_ = true; }
  void Load(const LoadOrder& order) override { loader_->Enqueue(order); }
  void CancelLoads(uint64_t up_to_serial) override { loader_->CancelUpTo(up_to_serial); }
  void RowsDue(uint64_t stage_id, PipelineEpoch epoch, StepId step, uint32_t num_rows) override {
    transport_->Due(stage_id, epoch, step, num_rows);
  }
  void Note(LogLevel level, std::string_view what,
            std::initializer_list<LogField> fields) override {
    Log(level, what, fields);
  }

  const WorkerOptions options_;
  Backend* const backend_;
  BoundedQueue<Event> queue_;
  std::atomic<bool> link_paused_ = false;
  std::atomic<LinkSession> told_session_ = 0;  // session_, for the loader's threads
  std::unique_ptr<GrpcRowTransfer> rows_;
  std::unique_ptr<Edges> transport_;
  std::unique_ptr<StageLoader> loader_;
  std::unique_ptr<ControlLink> link_;

  // Loop thread only:
  std::optional<WorkerCore> core_;
  v1::Hello hello_;
  bool stop_ = false;
  std::optional<uint64_t> leave_by_us_;  // it has asked to be drained
  LinkSession session_ = 0;              // 0: detached
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
void WorkerProcess::Leave() { impl_->Leave(); }
bool WorkerProcess::loading() const { return impl_->loading(); }
const std::string& WorkerProcess::data_address() const { return impl_->data_address; }

}  // namespace strait
