// SPDX-License-Identifier: Apache-2.0
//
// Defends: nothing but host:port passes as an address, and no plain-text listener leaves loopback
// unasked.
#include "proto/rpc/address.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace strait::rpc {
namespace {

TEST(Address, ReadsHostAndPort) {
  for (const auto& [text, host, port] : std::vector<std::tuple<std::string, std::string, int>>{
           {"127.0.0.1:7000", "127.0.0.1", 7000},
           {"node-3.cluster:0", "node-3.cluster", 0},
           {"[::1]:65535", "::1", 65535}}) {
    auto address = ParseHostPort(text);
    ASSERT_TRUE(address.ok()) << text;
    EXPECT_EQ(address->host, host);
    EXPECT_EQ(address->port, port);
    EXPECT_EQ(address->ToString(), text);
  }
}

TEST(Address, RefusesEverythingElse) {
  for (std::string text :
       {"", ":", "7000", ":7000", "host:", "host:65536", "host:-1", "host: 1", "host:1x",
        "::1:7000", "[::1:7000", "[nonsense]:1", "a b:1", "unix:/tmp/x:1", "host/path:1"}) {
    EXPECT_EQ(ParseHostPort(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  EXPECT_FALSE(ParseHostPort(std::string(1 << 20, 'a') + ":1").ok());
}

TEST(Address, KnowsLoopback) {
  for (std::string host : {"127.0.0.1", "127.9.9.9", "localhost", "::1"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (std::string host : {"0.0.0.0", "10.0.0.1", "::", "128.0.0.1", "localhost.evil", "node-3"}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

TEST(Address, ListenerOnTheNetworkMustBeAskedFor) {
  EXPECT_TRUE(ParseListenAddress("127.0.0.1:0", "--grpc", false).ok());
  EXPECT_TRUE(ParseListenAddress("0.0.0.0:7000", "--grpc", true).ok());
  const absl::Status refused = ParseListenAddress("0.0.0.0:7000", "--grpc", false).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("--grpc"));
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("--insecure"));
}

}  // namespace
}  // namespace strait::rpc
