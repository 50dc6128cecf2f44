// SPDX-License-Identifier: Apache-2.0
#include "proto/rpc/status.h"

#include <string>

#include "proto/text.h"

namespace strait::rpc {

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::Status FromGrpc(const grpc::Status& status) {
  return FromWire(static_cast<uint32_t>(status.error_code()), status.error_message());
}

absl::Status FromWire(uint32_t code, std::string_view message) {
  constexpr auto kLast = static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);
  if (code > kLast) return absl::UnknownError(ToAbsl(message));
  return absl::Status(static_cast<absl::StatusCode>(code), ToAbsl(message));
}

}  // namespace strait::rpc
