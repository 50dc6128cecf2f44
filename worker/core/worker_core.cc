// SPDX-License-Identifier: Apache-2.0
#include "worker/core/worker_core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "proto/rpc/status.h"
#include "proto/wire/epoch_wire.h"
#include "worker/core/messages.h"

namespace strait {

WorkerCore::Hosted* WorkerCore::Find(uint64_t stage_id) {
  const auto it = hosted_.find(stage_id);
  return it == hosted_.end() ? nullptr : &it->second;
}

const WorkerCore::Hosted* WorkerCore::Find(uint64_t stage_id) const {
  const auto it = hosted_.find(stage_id);
  return it == hosted_.end() ? nullptr : &it->second;
}

WorkerCore::Hosted* WorkerCore::FindByEdge(uint64_t stage_id, End Hosted::*end, const Edge& edge) {
  Hosted* const hosted = Find(stage_id);
  if (hosted == nullptr || !(hosted->*end).edge || (hosted->*end).edge->id != edge.id) {
    return nullptr;
  }
  return hosted;
}

// ---------------------------------------------------------------- the coordinator

void WorkerCore::FillHello(v1::Hello* hello) const {
  hello->clear_held_stages();
  hello->set_term(term_);
  hello->set_host_cache_bytes(options_.host_cache_bytes);
  hello->set_replica_bytes(options_.replica_bytes);
  hello->set_host_id(options_.host_id);
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr) continue;
    const StageModel& model = hosted.stage->model();
    v1::HeldStage* held = hello->add_held_stages();
    held->set_stage_id(id);
    held->set_layer_begin(model.spec().layers.begin);
    held->set_layer_end(model.spec().layers.end);
    held->set_cache_bytes(shares_.BlocksOf(id) * traits_.block_bytes);
    held->set_weight_bytes(model.weight_bytes());
  }
}

void WorkerCore::OnWelcome(const v1::Welcome& welcome) {
  attached_ = true;
  if (std::exchange(hello_is_stale_, false)) {
    return ports_->DropCoordinator(
        absl::UnavailableError("stages that it was told of have gone meanwhile"));
  }
  // Stages of another coordinator's are not this one's business; it asks for none of them.
  if (welcome.term() != term_) {
    DropStages();
    replicas_.Clear();
  }
  term_ = welcome.term();
}

void WorkerCore::OnDetached(uint64_t now_us) {
  attached_ = false;
  detached_us_ = now_us;
  ports_->CancelLoads(last_serial_);
  for (auto it = hosted_.begin(); it != hosted_.end();) {
    it->second.resize_due = false;  // the next coordinator asks anew
    it->second.linking = false;
    if (it->second.stage != nullptr) {
      it->second.stage->EndTransfers();
      TellRestored(it->second);
      ++it;
      continue;
    }
    shares_.Remove(it->first);
    it = hosted_.erase(it);
  }
  replicas_.EndTransfers();
  told_when_settled_.clear();
  Settle();
}

void WorkerCore::OnTick(uint64_t now_us) {
  if (attached_ || hosted_.empty() || now_us < detached_us_ + options_.orphan_timeout_us) return;
  ports_->Note(LogLevel::kWarning, "no coordinator came back: the stages go",
               {{"stages", hosted_.size()}, {"after_us", now_us - detached_us_}});
  DropStages();
  hello_is_stale_ = true;
}

void WorkerCore::OnMessage(v1::ToWorker message, uint64_t now_us) {
  switch (message.message_case()) {
    case v1::ToWorker::kStep:
      return OnPlan(std::move(*message.mutable_step()), now_us);
    case v1::ToWorker::kLoadStage:
      return OnLoad(message.load_stage());
    case v1::ToWorker::kActivateStage:
      return OnActivate(message.activate_stage(), now_us);
    case v1::ToWorker::kLinkStage:
      return OnLink(message.link_stage());
    case v1::ToWorker::kUnloadStage:
      return OnUnload(message.unload_stage().stage_id());
    case v1::ToWorker::kResizeCache:
      return OnResize(message.resize_cache());
    case v1::ToWorker::kFetchRows:
      return OnFetch(message.fetch_rows(), now_us);
    case v1::ToWorker::kServeRows:
      return OnServe(message.serve_rows());
    case v1::ToWorker::kDropLanded:
      return OnDropLanded(message.drop_landed());
    case v1::ToWorker::kReplicate:
      return replicas_.Replicate(message.replicate(), now_us);
    case v1::ToWorker::kShutdown:
      ports_->Note(
          LogLevel::kInfo, "the coordinator asks to stop",
          {{"reason", PrintableText(message.shutdown().reason(), limits::kMaxErrorMessageBytes)}});
      return ports_->Shutdown();
    default:
      return ports_->DropCoordinator(
          absl::InvalidArgumentError("the coordinator sent a message of unknown kind"));
  }
}

// ---------------------------------------------------------------- epochs and edges

void WorkerCore::OnActivate(const v1::ActivateStage& activate, uint64_t now_us) {
  const uint64_t id = activate.stage_id();
  const PipelineEpoch epoch = FromWire(activate.epoch());
  Hosted* const hosted = Find(id);
  const absl::Status valid = [&]() -> absl::Status {
    if (hosted == nullptr || hosted->stage == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("stage ", id, " is not loaded"));
    }
    STRAIT_RETURN_IF_ERROR(CheckActivate(activate));
    STRAIT_RETURN_IF_ERROR(CheckMade(activate, *hosted));
    STRAIT_RETURN_IF_ERROR(CheckRestores(activate, hosted->layers, traits_));
    const uint64_t block_bytes = hosted->layers.size() * traits_.block_bytes;
    if (activate.host_blocks() <= options_.host_cache_bytes / block_bytes) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("stage ", id, " is to have ", activate.host_blocks(),
                     " prefix blocks in host memory, the worker offers ", options_.host_cache_bytes,
                     " bytes of it"));
  }();
  if (!valid.ok()) return TellFailed(id, valid, epoch);
  const PipelineEpoch before = hosted->stage->epoch();
  const absl::Status entered =
      hosted->stage->Activate(epoch, activate.stage_index(), activate.num_stages(),
                              activate.grants(), activate.host_blocks());
  if (!entered.ok()) return TellFailed(id, entered, epoch);
  if (std::exchange(hosted->activating, false)) {
    TellFailed(id, absl::AbortedError("a newer epoch came"), before);
  }
  if (!std::exchange(hosted->took_over, true)) TakeOver(id, *hosted);
  Restore(id, *hosted, activate, now_us);
  Enter(id, *hosted, activate);
  Settle();  // steps that were begun may have been in the way
}

void WorkerCore::TakeOver(uint64_t stage_id, Hosted& hosted) {
  std::vector<Stage*> predecessors;
  for (const uint64_t before : shares_.PredecessorsOf(stage_id)) {
    Hosted* const it = Find(before);
    if (it == nullptr) continue;
    predecessors.push_back(it->stage.get());
    // A receive that was posted for it would never be matched.
    if (it->is_stuck || it->activating) {
      ForgetEdges(before);
    } else {
      transport_->Retire(before);
    }
    it->in = {};
    it->out = {};
    it->memory = {};
    if (it->restoring) it->activating = false;  // it never will be
  }
  if (predecessors.empty()) return;
  hosted.stage->TakeOver(predecessors);
  ports_->Note(LogLevel::kInfo, "rows taken over",
               {{"stage", stage_id},
                {"predecessors", predecessors.size()},
                {"sequences", hosted.stage->held().size()},
                {"blocks", hosted.stage->blocks_used()}});
}

void WorkerCore::Enter(uint64_t stage_id, Hosted& hosted, const v1::ActivateStage& activate) {
  hosted.is_stuck = false;
  hosted.linking = false;
  const std::optional<Edge> in = IncomingEdge(activate);
  const std::optional<Edge> out = OutgoingEdge(activate);
  DropNcclEdges(stage_id, hosted, in, out);
  SetIncoming(stage_id, hosted, in);
  const bool is_up = SetOutgoing(stage_id, hosted, out);
  // What came for older epochs is refused now, or was dropped.
  transport_->Consumed(stage_id, hosted.stage->epoch(), StepId{0});
  hosted.activating = true;
  hosted.edge_due = !is_up;
  TellActive(hosted);
}

void WorkerCore::OnEdgeUp(const Edge& edge, HiddenMemory memory) {
  Hosted* const hosted = FindByEdge(edge.from_stage_id, &Hosted::out, edge);
  if (hosted == nullptr || hosted->out.is_down) return;
  hosted->out.is_up = true;
  hosted->memory = std::move(memory);
  hosted->edge_due = false;
  if (std::exchange(hosted->linking, false)) {
    ports_->Tell(LinkedMessage(edge.from_stage_id, absl::OkStatus(), nullptr));
  }
  TellActive(*hosted);
}

void WorkerCore::OnEdgeDown(const Edge& edge, const absl::Status& why) {
  if (Hosted* const from = FindByEdge(edge.from_stage_id, &Hosted::out, edge)) {
    from->out.is_up = false;
    from->out.is_down = true;
    if (IsAhead(*from)) {
      TellUnlinked(edge.from_stage_id, *from, why, edge);
    } else if (std::exchange(from->activating, false)) {
      from->is_stuck = true;
      TellFailed(edge.from_stage_id, why, from->stage->epoch(), &edge);
    } else {
      TellStuck(*from, 0, why, &edge);
    }
    if (edge.over_nccl) DropNcclEdges(edge.from_stage_id, *from);
  }
  if (Hosted* const to = FindByEdge(edge.to_stage_id, &Hosted::in, edge)) {
    to->in.is_down = true;
    // As it was told: a receiver knows less of it.
    const Edge told = *to->in.edge;
    if (IsAhead(*to)) {
      TellUnlinked(edge.to_stage_id, *to, why, told);
    } else {
      TellStuck(*to, 0, why, &told);
    }
    // Told first: the other end of an edge that did not break sees it end, too, and is not to be believed.
    if (told.over_nccl) DropNcclEdges(edge.to_stage_id, *to);
  }
}

void WorkerCore::OnNcclId(const Edge& edge, std::string nccl_id) {
  const Hosted* const hosted = FindByEdge(edge.to_stage_id, &Hosted::in, edge);
  if (hosted == nullptr) return;
  ports_->Tell(EdgeIdMessage(edge.to_stage_id, hosted->stage->epoch(), std::move(nccl_id)));
}

void WorkerCore::OnHidden(uint64_t to_stage_id, HiddenStep hidden, uint64_t now_us) {
  Hosted* const hosted = Find(to_stage_id);
  if (hosted == nullptr || hosted->stage == nullptr) return;
  const StepId step = hidden.step;
  const PipelineEpoch epoch = hidden.epoch;
  const absl::Status accepted = hosted->stage->AcceptHidden(std::move(hidden), now_us);
  if (accepted.ok()) return;
  transport_->Consumed(to_stage_id, epoch, step);
  // Aborted: of an epoch that is over.
  if (!absl::IsAborted(accepted)) TellStuck(*hosted, step.value, accepted);
}

void WorkerCore::OnSampled(uint64_t to_stage_id, SampledStep sampled) {
  Hosted* const hosted = Find(to_stage_id);
  if (hosted == nullptr || hosted->stage == nullptr) return;
  const StepId step = sampled.step;
  const PipelineEpoch epoch = sampled.epoch;
  const absl::Status accepted = hosted->stage->AcceptSampled(std::move(sampled));
  transport_->Consumed(to_stage_id, epoch, step);
  if (!accepted.ok() && !absl::IsAborted(accepted)) TellStuck(*hosted, step.value, accepted);
}

// ---------------------------------------------------------------- steps

void WorkerCore::OnPlan(v1::StepPlan plan, uint64_t now_us) {
  const uint64_t id = plan.stage_id();
  const uint64_t step = plan.step_id();
  const PipelineEpoch epoch = FromWire(plan.epoch());
  Hosted* const hosted = Find(id);
  if (hosted == nullptr || hosted->stage == nullptr) {
    return ports_->Tell(StuckMessage(
        id, epoch, step, absl::NotFoundError(absl::StrCat("stage ", id, " is not loaded here")),
        nullptr));
  }
  if (const std::vector<uint64_t> before = shares_.WaitsFor(id); !before.empty()) {
    return TellStuck(*hosted, step,
                     absl::FailedPreconditionError(absl::StrCat(
                         "a plan came for stage ", id, ", which follows others: first stage ",
                         absl::StrJoin(before, ", "), " must be unloaded")));
  }
  uint32_t num_rows = 0;
  const absl::Status accepted = hosted->stage->AcceptPlan(std::move(plan), now_us, &num_rows);
  if (num_rows > 0 && !hosted->stage->is_first()) {
    ports_->RowsDue(id, epoch, StepId{step}, num_rows);
  }
  // Aborted: of an epoch that is over. Nobody waits for an answer.
  if (accepted.ok() || absl::IsAborted(accepted)) return;
  TellStuck(*hosted, step, accepted);
}

std::optional<uint64_t> WorkerCore::NextReady() const {
  if (holds_steps_) return std::nullopt;
  auto it = hosted_.upper_bound(last_begun_);
  for (size_t i = 0; i < hosted_.size(); ++i, ++it) {
    if (it == hosted_.end()) it = hosted_.begin();
    if (it->second.stage != nullptr && it->second.stage->Ready()) return it->first;
  }
  return std::nullopt;
}

void WorkerCore::BeginStep(uint64_t stage_id, const Clock& clock) {
  Hosted& hosted = *Find(stage_id);
  last_begun_ = stage_id;
  hosted.stage->BeginNext(clock, hosted.memory);
  Settle();  // it may have closed what is in the way
}

std::optional<uint64_t> WorkerCore::NextDone(bool* any_begun) const {
  *any_begun = false;
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr || hosted.stage->num_begun() == 0) continue;
    *any_begun = true;
    if (hosted.stage->Done()) return id;
  }
  return std::nullopt;
}

void WorkerCore::FinishStep(uint64_t stage_id, const Clock& clock) {
  Hosted& hosted = *Find(stage_id);
  Stage& stage = *hosted.stage;
  StepOutput output = stage.FinishNext(clock);
  const auto step = StepId{output.report.step_id()};
  absl::Status sent;
  // First what the next stage waits for.
  if (output.hidden) sent = transport_->Send(stage_id, *std::move(output.hidden));
  if (output.sampled) sent = transport_->SendSampled(stage_id, *std::move(output.sampled));
  if (output.report.error_code() != 0) {
    hosted.is_stuck = true;
    ports_->Note(
        LogLevel::kError, "step failed",
        {{"stage", stage_id},
         {"step", step.value},
         {"why", rpc::FromWire(output.report.error_code(), output.report.error_message())}});
  }
  v1::FromWorker message;
  *message.mutable_report() = std::move(output.report);
  ports_->Tell(std::move(message));
  if (!stage.is_first()) transport_->Consumed(stage_id, stage.epoch(), step);
  if (!sent.ok()) {
    hosted.out.is_down = true;
    TellStuck(hosted, 0, sent, hosted.out.edge ? &*hosted.out.edge : nullptr);
  }
  Settle();
}

void WorkerCore::DropStages() {
  for (const auto& [id, hosted] : hosted_) ForgetEdges(id);
  ports_->CancelLoads(last_serial_);
  hosted_.clear();
  shares_.Clear();
  told_when_settled_.clear();
  Settle();
}

// ---------------------------------------------------------------- telling

void WorkerCore::TellActive(Hosted& hosted) {
  if (!hosted.activating || hosted.edge_due || hosted.restoring) return;
  hosted.activating = false;
  const Stage& stage = *hosted.stage;
  ports_->Note(LogLevel::kInfo, "stage active",
               {{"stage", stage.stage_id()}, {"epoch", ToString(stage.epoch())}});
  ports_->Tell(ActiveMessage(stage));
}

void WorkerCore::TellFailed(uint64_t stage_id, const absl::Status& why, PipelineEpoch epoch,
                            const Edge* edge) {
  ports_->Note(LogLevel::kWarning, "stage request failed",
               {{"stage", stage_id}, {"why", rpc::Bounded(why)}});
  ports_->Tell(FailedMessage(stage_id, why, epoch, edge));
}

void WorkerCore::TellStuck(Hosted& hosted, uint64_t step, const absl::Status& why,
                           const Edge* edge) {
  if (std::exchange(hosted.is_stuck, true)) return;
  const Stage& stage = *hosted.stage;
  ports_->Note(LogLevel::kWarning, "stage cannot go on",
               {{"stage", stage.stage_id()},
                {"epoch", ToString(stage.epoch())},
                {"step", step},
                {"why", rpc::Bounded(why)}});
  ports_->Tell(StuckMessage(stage.stage_id(), stage.epoch(), step, why, edge));
}

// ---------------------------------------------------------------- what others may ask

WorkerCore::HostedState WorkerCore::StateOf(uint64_t stage_id) const {
  const Hosted* const hosted = Find(stage_id);
  if (hosted == nullptr) return HostedState::kNone;
  if (hosted->stage == nullptr) return HostedState::kLoading;
  if (hosted->stage->epoch() == PipelineEpoch()) return HostedState::kLoaded;
  if (hosted->is_stuck) return HostedState::kStuck;
  return hosted->activating ? HostedState::kActivating : HostedState::kActive;
}

const Stage* WorkerCore::FindStage(uint64_t stage_id) const {
  const Hosted* const hosted = Find(stage_id);
  return hosted == nullptr ? nullptr : hosted->stage.get();
}

std::vector<uint64_t> WorkerCore::stage_ids() const {
  std::vector<uint64_t> ids;
  for (const auto& [id, hosted] : hosted_) ids.push_back(id);
  return ids;
}

uint64_t WorkerCore::BlocksHeld() const {
  uint64_t blocks = 0;
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage != nullptr) blocks += hosted.stage->blocks_used();
  }
  return blocks;
}

absl::Status WorkerCore::CheckIntegrity() const {
  std::vector<uint64_t> holder(shares_.pool().size(), 0);
  uint64_t held = 0;
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr) continue;
    STRAIT_RETURN_IF_ERROR(hosted.stage->CheckIntegrity());
    if (hosted.stage->peak_blocks() > shares_.MostOf(id)) {
      return absl::InternalError(absl::StrCat("stage ", id, " will hold ",
                                              hosted.stage->peak_blocks(), " latent blocks, ",
                                              shares_.MostOf(id), " are kept for it"));
    }
    const uint64_t stage_id = id;
    absl::Status twice;
    hosted.stage->cache().ForBlocks([&](BlockId block) {
      if (const uint64_t other = std::exchange(holder[block], stage_id); other != 0) {
        twice = absl::InternalError(
            absl::StrCat("block ", block, " is in stages ", other, " and ", stage_id));
      }
      ++held;
    });
    STRAIT_RETURN_IF_ERROR(twice);
  }
  STRAIT_RETURN_IF_ERROR(CheckTransfers());
  if (held == shares_.pool().used()) return shares_.CheckIntegrity();
  return absl::InternalError(
      absl::StrCat("stages hold ", held, " latent blocks, the pool lent ", shares_.pool().used()));
}

}  // namespace strait
