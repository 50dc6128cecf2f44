// SPDX-License-Identifier: Apache-2.0
//
// absl::Status to grpc::Status and back: both number their codes alike.
//
// Thread:  any.
// Limits:  kMaxErrorMessageBytes of a message, each way; longer ones are cut. What is no printable
//          UTF-8 is escaped: protobuf would refuse a whole report for one such byte.
#pragma once

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "grpcpp/grpcpp.h"

namespace strait::rpc {

grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// From the error_code/error_message pair of a report; an unknown code becomes Unknown.
absl::Status FromWire(uint32_t code, std::string_view message);

// With a message as it may be sent and logged.
absl::Status Bounded(const absl::Status& status);

}  // namespace strait::rpc
