// SPDX-License-Identifier: Apache-2.0
//
// The messages that a worker sends to its coordinator, made from typed values; and what a LoadStage
// and an ActivateStage must be in themselves.
//
// Thread:  pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/stage/stage.h"
#include "worker/transfer/replica_store.h"
#include "worker/transport/transport.h"

namespace strait {

v1::FromWorker ProgressMessage(uint64_t stage_id, uint64_t bytes_loaded, uint64_t bytes_total);
v1::FromWorker LoadedMessage(uint64_t stage_id, const StageModel& model, uint64_t block_bytes);
// With what the stage holds of earlier epochs.
v1::FromWorker ActiveMessage(const Stage& stage);
v1::FromWorker UnloadedMessage(uint64_t stage_id);
// `error` not ok: the cache is as it was.
v1::FromWorker ResizedMessage(uint64_t stage_id, uint64_t cache_bytes, const absl::Status& error);
v1::FromWorker MovedMessage(uint64_t stage_id, PipelineEpoch epoch, const HostMoves& moves);
v1::FromWorker FetchedMessage(uint64_t stage_id, PipelineEpoch epoch,
                              const Importer::Fetched& fetched);
v1::FromWorker ServedMessage(uint64_t stage_id, PipelineEpoch epoch,
                             const Exporter::Served& served);
v1::FromWorker ReplicatedMessage(const ReplicaStore::Told& told);
v1::FromWorker EdgeIdMessage(uint64_t stage_id, PipelineEpoch epoch, std::string nccl_id);
// `why` not ok: an edge of a stage that is in no epoch yet broke, or was refused; `edge`: which, if it was one.
v1::FromWorker LinkedMessage(uint64_t stage_id, const absl::Status& why, const Edge* edge);
// Answers a request of the coordinator that failed; `epoch` of an activation.
// `edge`: what failed, if it was one; null otherwise.
v1::FromWorker FailedMessage(uint64_t stage_id, const absl::Status& why, PipelineEpoch epoch,
                             const Edge* edge);
// The stage cannot go on in this epoch. `step_id` 0: no step's fault, an edge broke.
v1::FromWorker StuckMessage(uint64_t stage_id, PipelineEpoch epoch, uint64_t step_id,
                            const absl::Status& why, const Edge* edge);

// How many latent blocks these are. InvalidArgument: no whole number of them, none, or too many.
absl::StatusOr<uint32_t> CheckCacheBytes(uint64_t cache_bytes, uint64_t block_bytes);
// InvalidArgument: no stage id, layers that the model has not, a cache that is no whole number of blocks.
absl::Status CheckLoad(const v1::LoadStage& load, uint32_t num_layers, uint64_t block_bytes);
// InvalidArgument: indices, neighbours, nonces and addresses contradict each other.
absl::Status CheckActivate(const v1::ActivateStage& activate);
// InvalidArgument: an activation to come, or what it may not have.
absl::Status CheckLink(const v1::LinkStage& link);
// InvalidArgument: what a stage of these layers is to have before it is active is malformed.
absl::Status CheckRestores(const v1::ActivateStage& activate, LayerRange layers,
                           const StageTraits& traits);
// From which stage it takes what: hidden states from the one before, or the first sampled ids of the last.
// REQUIRES: CheckActivate passed.
std::optional<Edge> IncomingEdge(const v1::ActivateStage& activate);
// What the stage connects: to the next one, or the last to the first if it hands ids back.
// REQUIRES: CheckActivate passed.
std::optional<Edge> OutgoingEdge(const v1::ActivateStage& activate);

}  // namespace strait
