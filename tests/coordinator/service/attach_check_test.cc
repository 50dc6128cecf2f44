// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker of another machine that tells a loopback address for its data is refused with the flags that mend it;
// on this machine that is how clusters are.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/service/attach_server.h"
#include "proto/rpc/address.h"

namespace strait {
namespace {

using testing::HasSubstr;

absl::Status Check(const std::string& data_address, const std::string& peer) {
  v1::Hello hello;
  hello.set_name("w1");
  hello.set_data_address(data_address);
  return CheckReachable(hello, peer);
}

// The bug: it was let in, and every link to it failed.
TEST(AttachCheckTest, ALoopbackAddressFromAnotherMachineIsRefused) {
  for (const char* address : {"127.0.0.1:4000", "127.1.2.3:4000", "localhost:4000", "[::1]:4000"}) {
    // 192.0.2.0/24 and 2001:db8::/32 are for documentation: no machine has them.
    for (const char* peer : {"ipv4:192.0.2.7:5000", "ipv6:[2001:db8::7]:5000",
                             "ipv6:%5B2001:db8::7%5D:5000", "ipv6:[::ffff:192.0.2.7]:5000"}) {
      const absl::Status refused = Check(address, peer);
      EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << address << " " << peer;
      for (const char* what : {"--listen", "--advertise", address, "w1"}) {
        EXPECT_THAT(std::string(refused.message()), HasSubstr(what));
      }
    }
  }
}

TEST(AttachCheckTest, OnOneMachineItIsHowClustersAre) {
  for (const char* peer : {"ipv4:127.0.0.1:5000", "ipv6:[::1]:5000", "ipv6:%5B::1%5D:5000",
                           "ipv6:[::ffff:127.0.0.1]:5000", "unix:/tmp/socket", ""}) {
    EXPECT_TRUE(Check("127.0.0.1:4000", peer).ok()) << peer;
  }
  EXPECT_TRUE(Check("192.0.2.7:4000", "ipv4:192.0.2.7:5000").ok());
  EXPECT_TRUE(Check("node-3:4000", "ipv4:192.0.2.7:5000").ok());
}

TEST(AttachCheckTest, PeersHosts) {
  EXPECT_EQ(rpc::HostOfPeer("ipv4:10.0.0.2:4711"), "10.0.0.2");
  EXPECT_EQ(rpc::HostOfPeer("ipv6:[fe80::1%25eth0]:4711"), "fe80::1");
  EXPECT_EQ(rpc::HostOfPeer("ipv6:%5Bfe80::1%5D:4711"), "fe80::1");
  EXPECT_EQ(rpc::HostOfPeer("ipv6:[::ffff:10.0.0.2]:4711"), "10.0.0.2");
  for (const char* peer : {"", "ipv4:", "ipv6:", "unix:x", "ipv6:[", "ipv4::"}) {
    EXPECT_EQ(rpc::HostOfPeer(peer), "") << peer;
  }
  EXPECT_FALSE(rpc::IsOfThisMachine("192.0.2.7"));
}

}  // namespace
}  // namespace strait
