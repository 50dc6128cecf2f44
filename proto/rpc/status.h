// SPDX-License-Identifier: Apache-2.0
//
// absl::Status to grpc::Status and back: both number their codes alike.
//
// Thread:  any.
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

}  // namespace strait::rpc
