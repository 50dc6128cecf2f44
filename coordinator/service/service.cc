// SPDX-License-Identifier: Apache-2.0
#include "coordinator/service/service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "coordinator/service/engine_metrics.h"
#include "coordinator/service/loop_events.h"
#include "coordinator/service/loop_queue.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "proto/rpc/clock.h"

namespace strait {
using namespace loop;
namespace {

constexpr uint64_t kTickUs = 50'000;
// The status is built anew this often while someone asks for it, and otherwise rarely: it costs the
// loop time.
constexpr uint64_t kStatusPeriodUs = 100'000;
constexpr uint64_t kIdleStatusPeriodUs = 1'000'000;
constexpr uint64_t kAskedLatelyUs = 5'000'000;
// How long a worker may take to read its stream's end.
constexpr uint64_t kEndGraceUs = 1'000'000;

}  // namespace

class CoordinatorService::Impl {
 public:
  explicit Impl(CoordinatorOptions options)
      : model(options.model),
        queue_(kLoopQueue, kLoopQueueBytes),
        core_(options.core, std::move(options.model)),
        server(std::move(options.attach),
               {.on_attached =
                    [this](WorkerId worker, v1::Hello hello, std::shared_ptr<WorkerStream> stream) {
                      queue_.Push(Attached{worker, std::move(hello), std::move(stream)});
                    },
                .on_message =
                    [this](WorkerId worker, v1::FromWorker message) {
                      const size_t bytes = message.ByteSizeLong();
                      const bool room = queue_.Push(Said{worker, std::move(message)}, bytes);
                      if (!room) streams_paused_ = true;
                      return room;
                    },
                .on_ended =
                    [this](WorkerId worker, absl::Status why) {
                      queue_.Push(Ended{worker, std::move(why)});
                    },
                .status_json = [this] { return StatusJson(); }}) {
    Publish(MonotonicMicros());
  }

  absl::Status Start() {
    STRAIT_RETURN_IF_ERROR(server.Start());
    loop_ = std::thread([this] { Loop(); });
    return absl::OkStatus();
  }

  ~Impl() { Stop(); }

  void Stop() {
    {
      std::lock_guard lock(submit_mu_);
      stopped_ = true;
    }
    if (loop_.joinable()) {
      queue_.Push(StopLoop{});
      loop_.join();
    }
    server.Stop();
  }

  void Submit(RequestSpec spec, std::shared_ptr<RequestListener> listener) {
    {
      std::lock_guard lock(submit_mu_);
      if (!stopped_) {
        queue_.Push(Submitted{RequestId{++last_request_}, std::move(spec), std::move(listener)});
        return;
      }
    }
    listener->OnRefused(absl::UnavailableError("the coordinator stops"));
  }
  void Scale(ScaleSpec spec, ScaleProgress progress, ScaleDone done) {
    {
      std::lock_guard lock(submit_mu_);
      if (!stopped_) {
        queue_.Push(Scaling{spec, std::move(progress), std::move(done)});
        return;
      }
    }
    done(absl::UnavailableError("the coordinator stops"), {});
  }
  void Cancel(RequestId request, std::optional<uint32_t> sequence_index) {
    queue_.Push(Cancelled{request, sequence_index});
  }
  // Migrating, or DrainAsked.
  template <class Asked>
  void Ask(Asked asked) {
    {
      std::lock_guard lock(submit_mu_);
      if (!stopped_) {
        queue_.Push(std::move(asked));
        return;
      }
    }
    asked.listener->OnVerbEnd(absl::UnavailableError("the coordinator stops"));
  }
  void Flush() { queue_.Push(Flushing{}); }

  std::string StatusJson() const {
    asked_us_ = MonotonicMicros();
    std::lock_guard lock(published_mu_);
    return status_json_;
  }
  std::string MetricsText() const {
    CoreStats stats;
    uint64_t workers;
    {
      std::lock_guard lock(published_mu_);
      stats = stats_;
      workers = num_workers_;
    }
    return EngineMetricsText(stats, workers);
  }

  const ModelShape model;
  std::atomic<bool> ready = false;

 private:
  void Loop() {
    uint64_t next_tick_us = MonotonicMicros();
    while (!stop_) {
      uint64_t now_us = MonotonicMicros();
      const uint64_t wait_us = next_tick_us > now_us ? next_tick_us - now_us : 0;
      queue_.HandleAll(std::chrono::microseconds(wait_us), [this](Event& event) {
        const uint64_t at_us = MonotonicMicros();
        std::visit([&](auto& e) { On(e, at_us); }, event);
      });
      now_us = MonotonicMicros();
      const bool tick = now_us >= next_tick_us;
      if (tick) {
        core_.OnTick(now_us);
        next_tick_us = now_us + kTickUs;
      }
      Carry(core_.Take(now_us));
      ready = core_.Ready();
      if (streams_paused_.exchange(false)) {
        for (auto& [worker, stream] : streams_) stream->Resume();
      }
      if (tick) Tick(now_us);
    }
    // What still runs ends for its listeners, in order.
    const uint64_t now_us = MonotonicMicros();
    std::vector<RequestId> running;
    for (const auto& [request, listener] : listeners_) running.push_back(request);
    for (RequestId request : running) core_.OnCancel(request, std::nullopt, now_us);
    for (CoreMessage& message : core_.Take(now_us)) {
      if (!std::holds_alternative<SendToWorker>(message)) {
        std::visit([this](auto& m) { Do(m); }, message);
      }
    }
    for (auto& [request, listener] : listeners_) {
      listener->OnRefused(absl::UnavailableError("the coordinator stops"));
    }
    listeners_.clear();
    for (auto& [scale, asked] : scales_) {
      asked.done(absl::UnavailableError("the coordinator stops"), {});
    }
    scales_.clear();
    for (auto& [verb, listener] : verbs_) {
      listener->OnVerbEnd(absl::UnavailableError("the coordinator stops"));
    }
    verbs_.clear();
    streams_.clear();
    ready = false;
  }

  void Tick(uint64_t now_us) {
    std::erase_if(ending_, [&](const auto& entry) {
      if (entry.first > now_us) return false;
      entry.second->Abort();
      return true;
    });
    const bool asked = asked_us_ + kAskedLatelyUs > now_us;
    if (now_us >= published_us_ + (asked ? kStatusPeriodUs : kIdleStatusPeriodUs)) Publish(now_us);
    std::lock_guard lock(published_mu_);
    stats_ = core_.Stats();
    num_workers_ = streams_.size();
  }

  void Publish(uint64_t now_us) {
    std::string json = core_.StatusJson(now_us);
    published_us_ = now_us;
    std::lock_guard lock(published_mu_);
    status_json_ = std::move(json);
  }

  // ---- Events ----

  void On(Attached& attached, uint64_t now_us) {
    Log(LogLevel::kInfo, "worker attached",
        {{"worker", attached.worker.value},
         {"name", attached.hello.name()},
         {"peer", attached.stream->peer()},
         {"data_address", attached.hello.data_address()},
         {"memory_bytes", attached.hello.memory_bytes()},
         {"numerics", attached.hello.numerics_id()},
         {"nccl", attached.hello.nccl_version()},
         {"process", attached.hello.process_id()}});
    const uint32_t nccl = attached.hello.nccl_version();
    if (nccl != 0 && last_nccl_version_ != 0 && nccl != last_nccl_version_) {
      Log(LogLevel::kWarning, "workers have different NCCL versions; edges between them are gRPC",
          {{"worker", attached.hello.name()}, {"nccl", nccl}, {"others", last_nccl_version_}});
    }
    if (nccl != 0) last_nccl_version_ = nccl;
    streams_[attached.worker] = std::move(attached.stream);
    core_.OnWorkerAttached(attached.worker, attached.hello, now_us);
  }

  void On(Said& said, uint64_t now_us) {
    auto it = streams_.find(said.worker);
    if (it == streams_.end()) return;  // evicted
    if (said.message.has_heartbeat()) {
      v1::ToWorker ping;
      ping.mutable_ping()->set_heartbeat_sent_us(said.message.heartbeat().sent_us());
      (void)it->second->Send(std::move(ping));  // if it cannot be sent, plans cannot either
    } else if (said.message.has_stage_state()) {
      const v1::StageState& state = said.message.stage_state();
      if (state.state() == v1::StageState::FAILED) {
        Log(LogLevel::kWarning, "stage request failed",
            {{"worker", said.worker.value},
             {"stage", state.stage_id()},
             {"why", state.error_message()}});
      }
    } else if (said.message.has_report() && said.message.report().error_code() != 0) {
      Log(LogLevel::kWarning, "stage cannot go on",
          {{"worker", said.worker.value},
           {"stage", said.message.report().stage_id()},
           {"step", said.message.report().step_id()},
           {"why", said.message.report().error_message()}});
    }
    core_.OnWorkerMessage(said.worker, said.message, now_us);
  }

  void On(Ended& ended, uint64_t now_us) {
    if (streams_.erase(ended.worker) == 0) return;  // evicted, and Core has forgotten it
    Log(LogLevel::kWarning, "worker lost", {{"worker", ended.worker.value}, {"why", ended.why}});
    core_.OnWorkerLost(ended.worker, std::move(ended.why), now_us);
  }

  void On(Submitted& submitted, uint64_t now_us) {
    listeners_[submitted.request] = std::move(submitted.listener);
    core_.OnSubmit(submitted.request, std::move(submitted.spec), now_us);
  }

  void On(Cancelled& cancelled, uint64_t now_us) {
    core_.OnCancel(cancelled.request, cancelled.sequence_index, now_us);
  }

  void On(Scaling& scaling, uint64_t now_us) {
    const ScaleId id{++last_scale_};
    const ScaleSpec spec = scaling.spec;
    Log(LogLevel::kInfo, spec.dry_run ? "scale, as a dry run" : "scale",
        {{"scale", id.value}, {"stages", spec.num_stages}});
    scales_[id] = std::move(scaling);
    core_.OnScale(id, spec, now_us);
  }

  void On(Migrating& migrating, uint64_t now_us) {
    const VerbId id{++last_verb_};
    Log(LogLevel::kInfo, "migrate",
        {{"verb", id.value},
         {"sequence", PrintableText(migrating.spec.sequence, limits::kMaxErrorMessageBytes)},
         {"to", migrating.spec.to.value}});
    verbs_[id] = std::move(migrating.listener);
    core_.OnMigrate(id, std::move(migrating.spec), now_us);
  }

  void On(DrainAsked& asked, uint64_t now_us) {
    const VerbId id{++last_verb_};
    Log(LogLevel::kInfo, asked.spec.undo ? "drain undone" : "drain",
        {{"verb", id.value},
         {"worker", PrintableText(asked.spec.worker, limits::kMaxErrorMessageBytes)}});
    verbs_[id] = std::move(asked.listener);
    core_.OnDrain(id, std::move(asked.spec), now_us);
  }

  void On(Flushing&, uint64_t now_us) {
    Log(LogLevel::kInfo, "prefix blocks are flushed");
    core_.OnFlush(now_us);
  }

  void On(StopLoop&, uint64_t) { stop_ = true; }

  // ---- Core's answers ----

  void Carry(std::vector<CoreMessage> messages) {
    for (CoreMessage& message : messages) {
      std::visit([this](auto& m) { Do(m); }, message);
    }
  }

  void Do(SendToWorker& send) {
    auto it = streams_.find(send.worker);
    if (it == streams_.end()) return;
    const absl::Status sent = it->second->Send(std::move(send.message));
    // Unavailable: its end is on the way here. Otherwise a plan would be missing: the end as well.
    if (!sent.ok() && !absl::IsUnavailable(sent)) it->second->Abort();
  }

  void Do(EvictWorker& evict) {
    auto it = streams_.find(evict.worker);
    if (it == streams_.end()) return;
    Log(LogLevel::kWarning, "worker evicted", {{"worker", evict.worker.value}, {"why", evict.why}});
    it->second->Close(std::move(evict.why));
    ending_.emplace_back(MonotonicMicros() + kEndGraceUs, std::move(it->second));
    streams_.erase(it);
  }

  void Do(RequestRefused& refused) {
    if (auto listener = TakeListener(refused.request)) listener->OnRefused(std::move(refused.why));
  }
  void Do(RequestAdmitted& admitted) {
    if (auto* listener = Find(admitted.request)) listener->OnAdmitted(admitted.request);
  }
  void Do(PromptCached& cached) {
    if (auto* listener = Find(cached.request)) {
      listener->OnPromptCached(cached.sequence_index, cached.cached_tokens);
    }
  }
  void Do(PromptScored& scored) {
    if (auto* listener = Find(scored.request)) {
      listener->OnPromptScores(scored.sequence_index, std::move(scored.scores));
    }
  }
  void Do(TokenEmitted& emitted) {
    if (auto* listener = Find(emitted.request)) {
      listener->OnToken(emitted.sequence_index, std::move(emitted.token));
    }
  }
  void Do(SequenceEnded& ended) {
    auto* listener = Find(ended.request);
    if (!listener) return;
    listener->OnSequenceEnd(ended.sequence_index, ended.reason, ended.stop_token,
                            std::move(ended.status));
    if (ended.last_of_request) TakeListener(ended.request);
  }

  void Do(ScaleAnswered& answered) {
    const v1::ScaleReply& reply = answered.reply;
    Log(answered.status.ok() ? LogLevel::kInfo : LogLevel::kWarning, "scaled",
        {{"scale", answered.scale.value},
         {"why", answered.status},
         {"pipelines", reply.pipelines()},
         {"pause_us", reply.pause_us()},
         {"residents", reply.residents()},
         {"resident_pause_p50_us", reply.resident_pause_p50_us()},
         {"resident_pause_max_us", reply.resident_pause_max_us()},
         {"rows_lost", reply.rows_lost()},
         {"moved_bytes", reply.moved_bytes()}});
    auto node = scales_.extract(answered.scale);
    if (!node) return;
    // Who asked looks at the status next, and is to see what came of it.
    Publish(MonotonicMicros());
    node.mapped().done(std::move(answered.status),
                       {.pipelines = reply.pipelines(),
                        .pause_us = reply.pause_us(),
                        .rows_kept = reply.rows_kept(),
                        .rows_lost = reply.rows_lost(),
                        .moved_bytes = reply.moved_bytes(),
                        .pauses = {.residents = reply.residents(),
                                   .min_us = reply.resident_pause_min_us(),
                                   .p50_us = reply.resident_pause_p50_us(),
                                   .max_us = reply.resident_pause_max_us()}});
  }

  void Do(ScaleTold& told) { scales_.at(told.scale).progress(std::move(told.report)); }

  void Do(MoveTold& told) { verbs_.at(told.verb)->OnMove(std::move(told.report)); }
  void Do(DrainTold& told) { verbs_.at(told.verb)->OnDrain(std::move(told.report)); }
  void Do(VerbEnded& ended) {
    Log(ended.status.ok() ? LogLevel::kInfo : LogLevel::kWarning, "verb ended",
        {{"verb", ended.verb.value}, {"why", ended.status}});
    auto node = verbs_.extract(ended.verb);
    if (!node) return;
    // Who asked looks at the status next, and is to see what came of it.
    Publish(MonotonicMicros());
    node.mapped()->OnVerbEnd(std::move(ended.status));
  }

  RequestListener* Find(RequestId request) {
    auto it = listeners_.find(request);
    return it == listeners_.end() ? nullptr : it->second.get();
  }
  std::shared_ptr<RequestListener> TakeListener(RequestId request) {
    auto node = listeners_.extract(request);
    return node ? std::move(node.mapped()) : nullptr;
  }

  LoopQueue<Event> queue_;
  std::atomic<bool> streams_paused_ = false;
  std::mutex submit_mu_;       // what is asked before Stop is in the queue before StopLoop
  bool stopped_ = false;       // guarded by submit_mu_
  uint64_t last_request_ = 0;  // guarded by submit_mu_
  mutable std::atomic<uint64_t> asked_us_ = 0;

  mutable std::mutex published_mu_;  // the loop writes, HTTP threads read
  std::string status_json_;          // guarded by published_mu_
  CoreStats stats_;                  // guarded by published_mu_
  uint64_t num_workers_ = 0;         // guarded by published_mu_

  // Loop thread only:
  Core core_;
  bool stop_ = false;
  uint64_t published_us_ = 0;
  std::unordered_map<WorkerId, std::shared_ptr<WorkerStream>> streams_;
  uint32_t last_nccl_version_ = 0;                                          // that a worker told
  std::vector<std::pair<uint64_t, std::shared_ptr<WorkerStream>>> ending_;  // (abort at, stream)
  std::unordered_map<RequestId, std::shared_ptr<RequestListener>> listeners_;
  uint64_t last_scale_ = 0;
  std::unordered_map<ScaleId, Scaling> scales_;  // not answered
  uint64_t last_verb_ = 0;
  std::unordered_map<VerbId, std::shared_ptr<VerbListener>> verbs_;  // not ended

  std::thread loop_;

 public:
  AttachServer server;  // its events use the members above
};

absl::StatusOr<std::unique_ptr<CoordinatorService>> CoordinatorService::Create(
    CoordinatorOptions options) {
  STRAIT_RETURN_IF_ERROR(ValidateOptions(options.core, options.model));
  auto impl = std::make_unique<Impl>(std::move(options));
  if (absl::Status started = impl->Start(); !started.ok()) return started;
  return std::unique_ptr<CoordinatorService>(new CoordinatorService(std::move(impl)));
}

CoordinatorService::CoordinatorService(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CoordinatorService::~CoordinatorService() = default;
void CoordinatorService::Stop() { impl_->Stop(); }
int CoordinatorService::grpc_port() const { return impl_->server.port(); }
void CoordinatorService::Submit(RequestSpec request, std::shared_ptr<RequestListener> listener) {
  impl_->Submit(std::move(request), std::move(listener));
}
void CoordinatorService::Cancel(RequestId id, std::optional<uint32_t> sequence_index) {
  impl_->Cancel(id, sequence_index);
}
void CoordinatorService::Migrate(MigrateSpec spec, std::shared_ptr<VerbListener> listener) {
  impl_->Ask(Migrating{std::move(spec), std::move(listener)});
}
void CoordinatorService::Drain(DrainSpec spec, std::shared_ptr<VerbListener> listener) {
  impl_->Ask(DrainAsked{std::move(spec), std::move(listener)});
}
void CoordinatorService::Scale(ScaleSpec spec, ScaleProgress progress, ScaleDone done) {
  impl_->Scale(spec, std::move(progress), std::move(done));
}
void CoordinatorService::Flush() { impl_->Flush(); }
bool CoordinatorService::Ready() const { return impl_->ready; }
uint32_t CoordinatorService::max_positions() const { return impl_->model.max_positions; }
uint32_t CoordinatorService::vocab_size() const { return impl_->model.vocab_size; }
const std::vector<TokenId>& CoordinatorService::eos_token_ids() const {
  return impl_->model.eos_token_ids;
}
std::string CoordinatorService::StatusJson() const { return impl_->StatusJson(); }
std::string CoordinatorService::MetricsText() const { return impl_->MetricsText(); }

}  // namespace strait
