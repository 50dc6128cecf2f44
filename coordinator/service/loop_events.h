// SPDX-License-Identifier: Apache-2.0
//
// Event is what the coordinator's loop is told, by its streams and by those who ask the Engine.
//
// Owns:    its data.
// Thread:  plain values.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <variant>

#include "absl/status/status.h"
#include "coordinator/engine.h"
#include "coordinator/service/attach_server.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait::loop {

struct Attached {
  WorkerId worker;
  v1::Hello hello;
  std::shared_ptr<WorkerStream> stream;
};
struct Said {
  WorkerId worker;
  v1::FromWorker message;
};
struct Ended {
  WorkerId worker;
  absl::Status why;
};
struct Submitted {
  RequestId request;
  RequestSpec spec;
  std::shared_ptr<RequestListener> listener;
};
struct Cancelled {
  RequestId request;
  std::optional<uint32_t> sequence_index;
};
struct Scaling {
  ScaleSpec spec;
  Engine::ScaleProgress progress;
  Engine::ScaleDone done;
};
struct Migrating {
  MigrateSpec spec;
  std::shared_ptr<VerbListener> listener;
};
struct DrainAsked {
  DrainSpec spec;
  std::shared_ptr<VerbListener> listener;
};
struct Flushing {};
struct StopLoop {};
using Event = std::variant<Attached, Said, Ended, Submitted, Cancelled, Scaling, Migrating,
                           DrainAsked, Flushing, StopLoop>;

}  // namespace strait::loop
