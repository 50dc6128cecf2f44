// SPDX-License-Identifier: Apache-2.0
#include "worker/core/messages.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/address.h"
#include "proto/rpc/status.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
namespace {

v1::FromWorker StateMessage(uint64_t stage_id, v1::StageState::State state) {
  v1::FromWorker message;
  message.mutable_stage_state()->set_stage_id(stage_id);
  message.mutable_stage_state()->set_state(state);
  return message;
}

}  // namespace

v1::FromWorker ProgressMessage(uint64_t stage_id, uint64_t bytes_loaded, uint64_t bytes_total) {
  v1::FromWorker message;
  v1::LoadProgress& progress = *message.mutable_load_progress();
  progress.set_stage_id(stage_id);
  progress.set_bytes_loaded(bytes_loaded);
  progress.set_bytes_total(bytes_total);
  return message;
}

v1::FromWorker LoadedMessage(uint64_t stage_id, const StageModel& model, uint64_t block_bytes) {
  v1::FromWorker message = StateMessage(stage_id, v1::StageState::LOADED);
  message.mutable_stage_state()->set_weight_bytes(model.weight_bytes());
  message.mutable_stage_state()->set_cache_bytes(model.spec().pool_blocks * block_bytes);
  return message;
}

v1::FromWorker ActiveMessage(const Stage& stage) {
  v1::FromWorker message = StateMessage(stage.stage_id(), v1::StageState::ACTIVE);
  ToWire(stage.epoch(), message.mutable_stage_state()->mutable_epoch());
  for (const HeldRows& held : stage.held()) {
    v1::HeldSequence* told = message.mutable_stage_state()->add_held();
    told->set_sequence_id(held.id.value);
    told->set_rows(held.rows);
    told->set_prefix_blocks(held.prefix_blocks);
  }
  return message;
}

v1::FromWorker UnloadedMessage(uint64_t stage_id) {
  return StateMessage(stage_id, v1::StageState::UNLOADED);
}

v1::FromWorker ResizedMessage(uint64_t stage_id, uint64_t cache_bytes, const absl::Status& error) {
  v1::FromWorker message;
  v1::CacheResized& resized = *message.mutable_cache_resized();
  resized.set_stage_id(stage_id);
  resized.set_cache_bytes(cache_bytes);
  if (error.ok()) return message;
  resized.set_error_code(static_cast<uint32_t>(error.code()));
  resized.set_error_message(std::string(rpc::Bounded(error).message()));
  return message;
}

v1::FromWorker MovedMessage(uint64_t stage_id, PipelineEpoch epoch, const HostMoves& moves) {
  v1::FromWorker message;
  v1::PrefixesMoved& moved = *message.mutable_prefixes_moved();
  moved.set_stage_id(stage_id);
  ToWire(epoch, moved.mutable_epoch());
  moved.set_returned(Pack(moves.returned));
  moved.set_lost(Pack(moves.lost));
  moved.set_copied_bytes(moves.copied.bytes);
  moved.set_copying_us(moves.copied.us);
  return message;
}

v1::FromWorker FetchedMessage(uint64_t stage_id, PipelineEpoch epoch,
                              const Importer::Fetched& fetched) {
  v1::FromWorker message;
  v1::RowsFetched& told = *message.mutable_rows_fetched();
  told.set_stage_id(stage_id);
  ToWire(epoch, told.mutable_epoch());
  told.set_sequence_id(fetched.id.value);
  ToWire(fetched.placement, told.mutable_placement());
  told.set_rows(fetched.rows);
  told.set_digest(fetched.digest);
  told.set_fetched_bytes(fetched.bytes);
  told.set_shared_bytes(fetched.shared_bytes);
  told.set_nccl_bytes(fetched.nccl_bytes);
  told.set_fetching_us(fetched.us);
  told.set_refused_frames(fetched.refused_frames);
  if (fetched.status.ok()) return message;
  told.set_error_code(static_cast<uint32_t>(fetched.status.code()));
  told.set_error_message(std::string(rpc::Bounded(fetched.status).message()));
  return message;
}

v1::FromWorker ServedMessage(uint64_t stage_id, PipelineEpoch epoch,
                             const Exporter::Served& served) {
  v1::FromWorker message;
  v1::RowsServed& told = *message.mutable_rows_served();
  told.set_stage_id(stage_id);
  ToWire(epoch, told.mutable_epoch());
  told.set_sequence_id(served.id.value);
  ToWire(served.placement, told.mutable_placement());
  told.set_rows(served.rows);
  told.set_digest(served.digest);
  return message;
}

v1::FromWorker ReplicatedMessage(const ReplicaStore::Told& told) {
  v1::FromWorker message;
  v1::Replicated& replicated = *message.mutable_replicated();
  replicated.set_stage_id(told.stage_id);
  replicated.set_keys(Pack(told.keys));
  replicated.set_failed(Pack(told.failed));
  replicated.set_fetched_bytes(told.fetched_bytes);
  replicated.set_shared_bytes(told.shared_bytes);
  return message;
}

v1::FromWorker EdgeIdMessage(uint64_t stage_id, PipelineEpoch epoch, std::string nccl_id) {
  v1::FromWorker message;
  v1::EdgeId& id = *message.mutable_edge_id();
  id.set_stage_id(stage_id);
  ToWire(epoch, id.mutable_epoch());
  id.set_nccl_id(std::move(nccl_id));
  return message;
}

namespace {

template <class Message>
void SetFailed(const Edge& edge, Message* message) {
  message->mutable_failed_link()->set_from_stage_id(edge.from_stage_id);
  message->mutable_failed_link()->set_to_stage_id(edge.to_stage_id);
  if (edge.over_nccl) message->set_failed_nccl_edge(edge.to_stage_id);
}

}  // namespace

v1::FromWorker FailedMessage(uint64_t stage_id, const absl::Status& why, PipelineEpoch epoch,
                             const Edge* edge) {
  v1::FromWorker message = StateMessage(stage_id, v1::StageState::FAILED);
  v1::StageState& state = *message.mutable_stage_state();
  state.set_error_code(static_cast<uint32_t>(why.code()));
  state.set_error_message(std::string(rpc::Bounded(why).message()));
  ToWire(epoch, state.mutable_epoch());
  if (edge != nullptr) SetFailed(*edge, &state);
  return message;
}

v1::FromWorker LinkedMessage(uint64_t stage_id, const absl::Status& why, const Edge* edge) {
  v1::FromWorker message;
  v1::StageLinked& linked = *message.mutable_stage_linked();
  linked.set_stage_id(stage_id);
  if (why.ok()) return message;
  linked.set_error_code(static_cast<uint32_t>(why.code()));
  linked.set_error_message(std::string(rpc::Bounded(why).message()));
  if (edge != nullptr) SetFailed(*edge, &linked);
  return message;
}

v1::FromWorker StuckMessage(uint64_t stage_id, PipelineEpoch epoch, uint64_t step_id,
                            const absl::Status& why, const Edge* edge) {
  v1::FromWorker message;
  v1::StageReport& report = *message.mutable_report();
  report.set_stage_id(stage_id);
  report.set_step_id(step_id);
  ToWire(epoch, report.mutable_epoch());
  report.set_error_code(static_cast<uint32_t>(why.code()));
  report.set_error_message(std::string(rpc::Bounded(why).message()));
  if (edge != nullptr) SetFailed(*edge, &report);
  return message;
}

namespace {

// The edge from the last stage to the first, told to these two where there are several and grants.
absl::Status CheckSampledEdge(const v1::ActivateStage& activate) {
  const bool edge = activate.grants() && activate.num_stages() > 1;
  const bool from = edge && activate.stage_index() + 1 == activate.num_stages();
  const bool to = edge && activate.stage_index() == 0;
  if (from != (activate.first_stage_id() != 0) || from == activate.first_data_address().empty() ||
      to != (activate.last_stage_id() != 0) ||
      (from || to) != (activate.sampled_edge_nonce() != 0) ||
      (from || to) != (activate.sampled_edge_id() != 0)) {
    return absl::InvalidArgumentError(
        "with grants the last of several stages has an edge to the first, with an id and a nonce "
        "that are not 0; without, there is none");
  }
  return from ? rpc::ParseHostPort(activate.first_data_address()).status() : absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint32_t> CheckCacheBytes(uint64_t cache_bytes, uint64_t block_bytes) {
  if (cache_bytes < block_bytes || cache_bytes % block_bytes != 0 ||
      cache_bytes / block_bytes > std::numeric_limits<BlockId>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("a cache of ", cache_bytes,
                                                   " bytes is no whole number of latent blocks of ",
                                                   block_bytes, " bytes"));
  }
  return static_cast<uint32_t>(cache_bytes / block_bytes);
}

absl::Status CheckLoad(const v1::LoadStage& load, uint32_t num_layers, uint64_t block_bytes) {
  if (load.stage_id() == 0) return absl::InvalidArgumentError("a stage id is positive");
  if (load.layer_begin() >= load.layer_end() || load.layer_end() > num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers [", load.layer_begin(), ", ",
                                                   load.layer_end(), ") are not of this ",
                                                   num_layers, "-layer model"));
  }
  return CheckCacheBytes(load.cache_bytes(), block_bytes).status();
}

absl::Status CheckActivate(const v1::ActivateStage& activate) {
  const bool last = activate.stage_index() + 1 == activate.num_stages();
  if (activate.num_stages() > limits::kMaxStagesPerPipeline ||
      activate.stage_index() >= activate.num_stages()) {
    return absl::InvalidArgumentError(absl::StrCat("stage index ", activate.stage_index(), " of ",
                                                   activate.num_stages(), " stages"));
  }
  if (last != (activate.next_stage_id() == 0) || last != activate.next_data_address().empty()) {
    return absl::InvalidArgumentError("every stage but the last has a next one");
  }
  const bool first = activate.stage_index() == 0;
  if (first != (activate.previous_stage_id() == 0) || first != (activate.edge_nonce() == 0) ||
      last != (activate.next_edge_nonce() == 0) || first != (activate.edge_id() == 0) ||
      last != (activate.next_edge_id() == 0)) {
    return absl::InvalidArgumentError(
        "an edge has a stage at either end, an id and a nonce that are not 0; where there is no "
        "edge, there is none of them");
  }
  if (!last) {
    STRAIT_RETURN_IF_ERROR(rpc::ParseHostPort(activate.next_data_address()).status());
  }
  const bool over_nccl = activate.edge_over_nccl() || !activate.next_nccl_id().empty();
  if ((activate.edge_made() && !activate.edge_over_nccl()) ||
      (activate.next_edge_made() && activate.next_nccl_id().empty())) {
    return absl::InvalidArgumentError("an edge that was made ahead is NCCL");
  }
  if ((first && activate.edge_over_nccl()) || (last && !activate.next_nccl_id().empty()) ||
      (!activate.next_nccl_id().empty() &&
       activate.next_nccl_id().size() != limits::kNcclIdBytes)) {
    return absl::InvalidArgumentError("an NCCL edge is an edge, and its id has 128 bytes");
  }
  if (over_nccl &&
      (activate.max_step_tokens() == 0 || activate.max_step_tokens() > limits::kMaxStepTokens)) {
    return absl::InvalidArgumentError(absl::StrCat("steps of at most ", activate.max_step_tokens(),
                                                   " tokens, must be 1 to ",
                                                   limits::kMaxStepTokens));
  }
  return CheckSampledEdge(activate);
}

absl::Status CheckLink(const v1::LinkStage& link) {
  const v1::ActivateStage& future = link.future();
  if (future.has_epoch() || future.host_blocks() > 0 || future.restores_size() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("edges of stage ", future.stage_id(), " with an epoch, host memory or rows"));
  }
  if (future.edge_made() || future.next_edge_made()) {
    return absl::InvalidArgumentError(
        absl::StrCat("edges of stage ", future.stage_id(), " are to be made, and were made"));
  }
  return CheckActivate(future);
}

namespace {

absl::Status CheckRestore(const v1::FetchRows& fetch, LayerRange layers,
                          const StageTraits& traits) {
  STRAIT_ASSIGN_OR_RETURN(const std::vector<ContentKey> keys, ParseContentKeys(fetch.keys()));
  if (fetch.begin_row() != 0 || keys.empty() || fetch.end_row() > traits.max_positions ||
      fetch.end_row() != keys.size() * limits::kBlockTokens ||
      static_cast<uint32_t>(fetch.tokens().ids_size()) != fetch.end_row()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rows ", fetch.begin_row(), " to ", fetch.end_row(), " with ", keys.size(), " keys and ",
        fetch.tokens().ids_size(), " tokens: whole blocks from row 0 are wanted, each with a key"));
  }
  for (const uint32_t token : fetch.tokens().ids()) {
    if (token < traits.vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token id ", token, ", the vocabulary has ", traits.vocab_size));
  }
  LayerIndex next = layers.begin;
  for (const v1::RowsSource& source : fetch.sources()) {
    if (source.layer_begin() != next || source.layer_end() <= next ||
        source.data_address().empty() || source.secret() == 0) {
      break;
    }
    next = source.layer_end();
  }
  if (next == layers.end) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("no source of layer ", next, " of layers ", layers.begin, " to ", layers.end));
}

}  // namespace

absl::Status CheckRestores(const v1::ActivateStage& activate, LayerRange layers,
                           const StageTraits& traits) {
  uint64_t last = 0;
  for (const v1::FetchRows& fetch : activate.restores()) {
    const absl::Status checked = [&]() -> absl::Status {
      if (fetch.sequence_id() <= last || fetch.stage_id() != activate.stage_id() ||
          FromWire(fetch.epoch()) != FromWire(activate.epoch())) {
        return absl::InvalidArgumentError(absl::StrCat(
            "of stage ", fetch.stage_id(), " in epoch ", ToString(FromWire(fetch.epoch())),
            " behind sequence ", last, ": those of this stage and epoch are wanted, by rising id"));
      }
      return CheckRestore(fetch, layers, traits);
    }();
    if (!checked.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("restore of sequence ", fetch.sequence_id(), ": ", checked.message()));
    }
    last = fetch.sequence_id();
  }
  return absl::OkStatus();
}

std::optional<Edge> IncomingEdge(const v1::ActivateStage& activate) {
  Edge edge{.to_stage_id = activate.stage_id()};
  if (activate.previous_stage_id() != 0) {
    edge.id = activate.edge_id();
    edge.from_stage_id = activate.previous_stage_id();
    edge.nonce = activate.edge_nonce();
    edge.over_nccl = activate.edge_over_nccl();
    edge.max_tokens = activate.max_step_tokens();
    return edge;
  }
  if (activate.last_stage_id() == 0) return std::nullopt;
  edge.id = activate.sampled_edge_id();
  edge.from_stage_id = activate.last_stage_id();
  edge.nonce = activate.sampled_edge_nonce();
  edge.sampled = true;
  return edge;
}

std::optional<Edge> OutgoingEdge(const v1::ActivateStage& activate) {
  Edge edge{.from_stage_id = activate.stage_id()};
  if (activate.next_stage_id() != 0) {
    edge.id = activate.next_edge_id();
    edge.to_stage_id = activate.next_stage_id();
    edge.peer_address = activate.next_data_address();
    edge.nonce = activate.next_edge_nonce();
    edge.over_nccl = !activate.next_nccl_id().empty();
    edge.nccl_id = activate.next_nccl_id();
    edge.max_tokens = activate.max_step_tokens();
    return edge;
  }
  if (activate.first_stage_id() == 0) return std::nullopt;
  edge.id = activate.sampled_edge_id();
  edge.to_stage_id = activate.first_stage_id();
  edge.peer_address = activate.first_data_address();
  edge.nonce = activate.sampled_edge_nonce();
  edge.sampled = true;
  return edge;
}

}  // namespace strait
