// SPDX-License-Identifier: Apache-2.0
//
// The events of a worker's loop: what other threads have to tell it.
//
// Thread:  plain values, made on any thread, handled on the loop thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "strait/v1/cluster.pb.h"
#include "worker/hidden_step.h"
#include "worker/service/link.h"
#include "worker/service/loader.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transport/transport.h"

namespace strait {

struct Control {
  LinkSession session;
  v1::ToWorker message;
};
struct Detached {
  LinkSession session;
  absl::Status why;
};
struct EdgeUp {
  Edge edge;
  HiddenMemory memory;
};
struct EdgeDown {
  Edge edge;
  absl::Status why;
};
struct NcclIdMade {
  Edge edge;
  std::string id;
};
struct Hidden {
  uint64_t to_stage_id;
  HiddenStep step;
};
struct Sampled {
  uint64_t to_stage_id;
  SampledStep step;
};
struct RowsCame {
  AskId id;
  absl::StatusOr<RowsFrame> frame;
};
struct PeerAsked {
  PeerAskId id;
  RowsAsk ask;
};
struct FrameServed {
  PeerAskId id;
  std::vector<BlockHeader> pieces;
};
struct Loaded {
  LoadOrder order;
  absl::StatusOr<std::unique_ptr<StageModel>> model;
};
struct LeaveCluster {};
struct StopLoop {};
// What the loop thread takes from its queue, one at a time.
using Event = std::variant<Control, Detached, EdgeUp, EdgeDown, NcclIdMade, Hidden, Sampled,
                           RowsCame, PeerAsked, FrameServed, Loaded, LeaveCluster, StopLoop>;

}  // namespace strait
