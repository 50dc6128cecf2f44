// SPDX-License-Identifier: Apache-2.0
//
// Disturber is what disturbances of `strait stress` have in common: a client of each kind, the status,
// chance.
//
// Thread:  as Disturbance.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/mix.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/stress_disturb.h"
#include "proto/base/json.h"

namespace strait::cli {

class Disturber : public Disturbance {
 public:
  Disturber(const DisturbContext& context, Draws draws)
      : context_(context),
        draws_(draws),
        client_(context.url, context.api_key, context.cancel_fd),
        operator_client_(context.url, context.operator_key, context.cancel_fd) {}

 protected:
  // Empty: there is no answer, and so nothing to do now.
  json::Object Status() {
    const absl::StatusOr<HttpReply> reply = client_.Get("/strait/status", kStatusTimeoutMs);
    if (!reply.ok() || reply->status != 200) return {};
    absl::StatusOr<json::Value> status = json::Parse(reply->body, "/strait/status");
    return status.ok() && status->is_object() ? std::move(status->get_object()) : json::Object();
  }
  template <class T>
  const T& Pick(const std::vector<T>& from) {
    return from[draws_.Below(from.size())];
  }
  // A worker's process; 0: none.
  int64_t PickProcess() {
    const json::Object status = Status();
    const auto workers = Objects(status, "workers");
    return workers.empty() ? 0 : static_cast<int64_t>(Number(*Pick(workers), "process_id"));
  }
  // A worker's name; empty: none.
  std::string PickName() {
    const json::Object status = Status();
    const auto workers = Objects(status, "workers");
    return workers.empty() ? "" : Text(*Pick(workers), "name");
  }
  int Between(int low, int high) {
    return low + static_cast<int>(draws_.Below(static_cast<uint64_t>(high - low)));
  }

  static constexpr int kStatusTimeoutMs = 30'000;

  const DisturbContext context_;
  Draws draws_;
  HttpClient client_;
  HttpClient operator_client_;
};

}  // namespace strait::cli
