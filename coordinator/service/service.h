// SPDX-License-Identifier: Apache-2.0
//
// CoordinatorService runs Core: it brings it what workers and clients say, and carries out what it
// answers.
//
// Owns:    Core, the AttachServer, one loop thread.
// Thread:  the loop thread owns Core, worker streams and listeners; gRPC and HTTP threads only
//          enqueue. Create and Stop from one thread; Engine's methods from any.
// Errors:  Create: InvalidArgument (options), Unavailable (the address is taken). A worker that
//          does not read what it is sent is ended with ResourceExhausted.
// Limits:  kLoopQueue events and kLoopQueueBytes of messages waiting, then workers are read no
//          further. HTTP's connections bound the rest.
// Why:     all events that wait are given to Core before it forms steps, so that one step serves
//          them all.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/core/core.h"
#include "coordinator/engine.h"
#include "coordinator/service/attach_server.h"

namespace strait {

inline constexpr size_t kLoopQueue = 65'536;
inline constexpr size_t kLoopQueueBytes = size_t{64} << 20;  // as they come over the wire

struct CoordinatorOptions {
  CoreOptions core;
  ModelShape model;
  AttachServerOptions attach;
};

class CoordinatorService final : public Engine {
 public:
  static absl::StatusOr<std::unique_ptr<CoordinatorService>> Create(CoordinatorOptions options);
  ~CoordinatorService() override;

  // Cancels what runs, ends every worker's stream and the loop. Requests that come later are
  // refused; every request gets its one end, however it races with this.
  void Stop();
  int grpc_port() const;

  void Submit(RequestSpec request, std::shared_ptr<RequestListener> listener) override;
  void Cancel(RequestId id, std::optional<uint32_t> sequence_index) override;
  bool Ready() const override;
  uint32_t max_positions() const override;
  uint32_t vocab_size() const override;
  const std::vector<TokenId>& eos_token_ids() const override;
  void Migrate(MigrateSpec spec, std::shared_ptr<VerbListener> listener) override;
  void Drain(DrainSpec spec, std::shared_ptr<VerbListener> listener) override;
  void Scale(ScaleSpec spec, ScaleProgress progress, ScaleDone done) override;
  void Flush() override;
  std::string StatusJson() const override;
  std::string MetricsText() const override;

 private:
  class Impl;
  explicit CoordinatorService(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
