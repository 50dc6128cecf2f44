// SPDX-License-Identifier: Apache-2.0
#include "proto/rpc/status.h"

#include <string>

#include "proto/base/limits.h"
#include "proto/base/text.h"

namespace strait::rpc {

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                      std::string(Bounded(status).message()));
}

absl::Status FromGrpc(const grpc::Status& status) {
  return FromWire(static_cast<uint32_t>(status.error_code()), status.error_message());
}

absl::Status FromWire(uint32_t code, std::string_view message) {
  constexpr auto kLast = static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);
  if (code == 0) return absl::OkStatus();
  const std::string bounded = PrintableText(message, limits::kMaxErrorMessageBytes);
  if (code > kLast) return absl::UnknownError(bounded);
  return absl::Status(static_cast<absl::StatusCode>(code), bounded);
}

absl::Status Bounded(const absl::Status& status) {
  return FromWire(static_cast<uint32_t>(status.code()), ToStd(status.message()));
}

}  // namespace strait::rpc
