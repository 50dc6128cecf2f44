// SPDX-License-Identifier: Apache-2.0
//
// Defends: a status keeps its code over the wire and its message within bounds. Regression: a peer's
// message was taken and sent on whatever its size and bytes.
#include "proto/rpc/status.h"

#include <gtest/gtest.h>

#include <string>

#include "proto/base/limits.h"
#include "strait/v1/cluster.pb.h"

namespace strait::rpc {
namespace {

TEST(StatusTest, CodesSurviveBothWays) {
  for (int code = 0; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "why");
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
    EXPECT_EQ(Bounded(status), status);
  }
  EXPECT_EQ(FromWire(999, "why"), absl::UnknownError("why"));
}

TEST(StatusTest, MessagesAreBoundedBothWays) {
  const std::string long_text(3 << 20, 'x');
  const absl::Status status = absl::InternalError(long_text);
  EXPECT_LE(ToGrpc(status).error_message().size(), limits::kMaxErrorMessageBytes);
  EXPECT_LE(FromWire(13, long_text).message().size(), limits::kMaxErrorMessageBytes);
  EXPECT_LE(FromGrpc(grpc::Status(grpc::INTERNAL, long_text)).message().size(),
            limits::kMaxErrorMessageBytes);
  EXPECT_LE(Bounded(status).message().size(), limits::kMaxErrorMessageBytes);
}

TEST(StatusTest, AMessageOfAnyBytesCanBeSent) {
  v1::StageReport report;
  report.set_error_message(std::string(Bounded(absl::DataLossError("\xff\x1b[2J")).message()));
  v1::StageReport read;
  ASSERT_TRUE(read.ParseFromString(report.SerializeAsString()));
  EXPECT_EQ(read.error_message(), "\\xff\\x1b[2J");
}

}  // namespace
}  // namespace strait::rpc
