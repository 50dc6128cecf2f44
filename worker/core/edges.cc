// SPDX-License-Identifier: Apache-2.0
//
// How a WorkerCore opens and drops a stage's edges: with its epochs, and before the first, so that none has to be made then.
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/status.h"
#include "worker/core/messages.h"
#include "worker/core/worker_core.h"

namespace strait {

void WorkerCore::SetIncoming(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& next) {
  if (hosted.in.Continues(next)) return;
  const bool had_one = hosted.in.edge.has_value();
  hosted.in = {.edge = next};
  if (next) {
    transport_->Expect(*next);
  } else if (had_one) {
    transport_->Forget(stage_id);
  }
}

bool WorkerCore::SetOutgoing(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& next) {
  if (hosted.out.Continues(next)) {
    // That it worked is no proof that it does: who answers now is there.
    if (hosted.out.is_up) transport_->Probe(stage_id);
    return false;
  }
  const bool had_one = hosted.out.edge.has_value();
  hosted.out = {.edge = next};
  hosted.memory = {};
  if (next) {
    transport_->Connect(*next);
  } else if (had_one) {
    transport_->Disconnect(stage_id);
  }
  return !next;
}

void WorkerCore::ForgetEdges(uint64_t stage_id) {
  transport_->Disconnect(stage_id);
  transport_->Forget(stage_id);
}

void WorkerCore::DropNcclEdges(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& in,
                               const std::optional<Edge>& out) {
  const auto ends = [](const End& end, const std::optional<Edge>& next) {
    return end.edge && end.edge->over_nccl && !end.Continues(next);
  };
  if (ends(hosted.out, out)) {
    transport_->Disconnect(stage_id);
    hosted.out = {};
    hosted.memory = {};
  }
  if (ends(hosted.in, in)) {
    transport_->Forget(stage_id);
    hosted.in = {};
  }
}

bool WorkerCore::IsAhead(const Hosted& hosted) {
  return hosted.stage != nullptr && hosted.stage->epoch() == PipelineEpoch{};
}

void WorkerCore::OnLink(const v1::LinkStage& link) {
  const v1::ActivateStage& future = link.future();
  const uint64_t id = future.stage_id();
  Hosted* const hosted = Find(id);
  const absl::Status valid = [&]() -> absl::Status {
    if (hosted == nullptr || !IsAhead(*hosted)) {
      return absl::FailedPreconditionError(
          absl::StrCat("stage ", id, " is not loaded, or in an epoch already"));
    }
    if (hosted->in.edge || hosted->out.edge) {
      return absl::AlreadyExistsError(absl::StrCat("stage ", id, " has edges already"));
    }
    return CheckLink(link);
  }();
  if (!valid.ok()) {
    ports_->Note(LogLevel::kWarning, "edges not made ahead",
                 {{"stage", id}, {"why", rpc::Bounded(valid)}});
    return ports_->Tell(LinkedMessage(id, valid, nullptr));
  }
  std::optional<Edge> in = IncomingEdge(future);
  std::optional<Edge> out = OutgoingEdge(future);
  for (std::optional<Edge>* edge : {&in, &out}) {
    if (*edge) (*edge)->ahead = true;
  }
  hosted->linking = true;
  SetIncoming(id, *hosted, in);
  const bool is_alone = SetOutgoing(id, *hosted, out);
  if (is_alone && std::exchange(hosted->linking, false)) {
    ports_->Tell(LinkedMessage(id, absl::OkStatus(), nullptr));
  }
}

void WorkerCore::TellUnlinked(uint64_t stage_id, Hosted& hosted, const absl::Status& why,
                              const Edge& edge) {
  hosted.linking = false;
  ports_->Note(LogLevel::kInfo, "an edge that was made ahead broke",
               {{"stage", stage_id}, {"why", rpc::Bounded(why)}});
  ports_->Tell(LinkedMessage(stage_id, why, &edge));
}

absl::Status WorkerCore::CheckMade(const v1::ActivateStage& activate, const Hosted& hosted) {
  const bool in = !activate.edge_made() || hosted.in.Continues(IncomingEdge(activate));
  const bool out = !activate.next_edge_made() ||
                   (hosted.out.Continues(OutgoingEdge(activate)) && hosted.out.is_up);
  if (in && out) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the edge ", in ? "from" : "to", " stage ",
                                             activate.stage_id(),
                                             ", which was made ahead, is not there any more"));
}

}  // namespace strait
