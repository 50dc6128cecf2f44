// SPDX-License-Identifier: Apache-2.0
//
// Defends: a relayed link carries every byte in both directions and ends with its ends; a silent one
// keeps what it was given until it heals; one that is cut resets old connections and new ones; a
// bounded one lets no byte more through than its rate.
#include "coordinator/cli/link_relay.h"

#include <arpa/inet.h>
#include <errno.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <string_view>
#include <thread>

namespace strait::cli {
namespace {

constexpr int kHangMs = 60'000;  // then the test fails: nothing here takes time by itself

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// One end of a connection.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() { close(fd_); }
  Socket(const Socket&) = delete;

  void Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      ASSERT_GT(n, 0) << strerror(errno);
      bytes.remove_prefix(static_cast<size_t>(n));
    }
  }
  void End() { shutdown(fd_, SHUT_WR); }
  // So many bytes, or fewer and why: "(end)", "(reset)", "(hangs)".
  std::string Receive(size_t size) {
    std::string got;
    while (got.size() < size) {
      pollfd entry = {fd_, POLLIN, 0};
      if (poll(&entry, 1, kHangMs) <= 0) return got + "(hangs)";
      char buffer[4096];
      const ssize_t n = recv(fd_, buffer, std::min(sizeof(buffer), size - got.size()), 0);
      if (n < 0) return got + (errno == ECONNRESET ? "(reset)" : strerror(errno));
      if (n == 0) return got + "(end)";
      got.append(buffer, static_cast<size_t>(n));
    }
    return got;
  }
  bool HasSomething() const {
    pollfd entry = {fd_, POLLIN, 0};
    return poll(&entry, 1, 0) > 0;
  }

 private:
  const int fd_;
};

std::unique_ptr<Socket> Dial(uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Loopback(port);
  EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  return std::make_unique<Socket>(fd);
}

class Listener {
 public:
  Listener() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(fd_, 16), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~Listener() { close(fd_); }
  uint16_t port() const { return port_; }
  std::unique_ptr<Socket> Accept() {
    return std::make_unique<Socket>(accept(fd_, nullptr, nullptr));
  }

 private:
  const int fd_;
  uint16_t port_ = 0;
};

class LinkRelayTest : public testing::Test {
 protected:
  LinkRelayTest() : relay_(*LinkRelay::Create()), port_(*relay_->Add("link", target_.port())) {
    other_port_ = *relay_->Add("other", other_target_.port());
  }
  // The relay has seen all that was done before: it has carried something there and back since, in
  // two rounds of its loop at least.
  void LetItRun() {
    const auto client = Dial(other_port_);
    const auto server = other_target_.Accept();
    for (int i = 0; i < 3; ++i) {
      client->Send("ping");
      ASSERT_EQ(server->Receive(4), "ping");
      server->Send("pong");
      ASSERT_EQ(client->Receive(4), "pong");
    }
  }

  Listener target_, other_target_;
  std::unique_ptr<LinkRelay> relay_;
  const uint16_t port_;
  uint16_t other_port_ = 0;
};

std::string Pattern(size_t size) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 31 + i / 253);
  return bytes;
}

TEST_F(LinkRelayTest, CarriesAllBytesBothWaysAndTheEndsOfEach) {
  const auto client = Dial(port_);
  const auto server = target_.Accept();
  const std::string up = Pattern(3'000'000), down = Pattern(1'000'001);
  std::thread sends_up([&] {
    client->Send(up);
    client->End();
  });
  std::thread sends_down([&] { server->Send(down); });
  std::string got_down;
  std::thread receives_down([&] { got_down = client->Receive(down.size()); });
  const std::string got_up = server->Receive(up.size() + 1);
  sends_up.join();
  sends_down.join();
  receives_down.join();
  EXPECT_TRUE(got_up == up + "(end)") << got_up.size();
  EXPECT_TRUE(got_down == down) << got_down.size();
  // Only one direction has ended.
  server->Send("more");
  EXPECT_EQ(client->Receive(4), "more");
  server->End();
  EXPECT_EQ(client->Receive(1), "(end)");
  EXPECT_EQ(relay_->forwarded_bytes("link"), up.size() + down.size() + 4);
}

TEST_F(LinkRelayTest, SilentOneKeepsConnectionsAndBytesUntilItHeals) {
  const auto client = Dial(port_);
  const auto server = target_.Accept();
  client->Send("a");
  ASSERT_EQ(server->Receive(1), "a");
  ASSERT_TRUE(relay_->SetFlow("link", LinkFlow::kSilent));
  client->Send("b");
  client->End();
  const auto late = Dial(port_);
  late->Send("c");
  LetItRun();
  EXPECT_FALSE(server->HasSomething());
  EXPECT_EQ(relay_->forwarded_bytes("link"), 1u);
  ASSERT_TRUE(relay_->SetFlow("link", LinkFlow::kOpen));
  EXPECT_EQ(server->Receive(2), "b(end)");
  server->Send("d");
  EXPECT_EQ(client->Receive(1), "d");
  // The one that came meanwhile as well. Its connection had been there, unheard.
  EXPECT_EQ(target_.Accept()->Receive(1), "c");
}

TEST_F(LinkRelayTest, CutResetsOldConnectionsAndNewOnesUntilItHeals) {
  const auto client = Dial(port_);
  const auto server = target_.Accept();
  client->Send("a");
  ASSERT_EQ(server->Receive(1), "a");
  ASSERT_TRUE(relay_->SetFlow("link", LinkFlow::kCut));
  EXPECT_EQ(client->Receive(1), "(reset)");
  EXPECT_EQ(server->Receive(1), "(reset)");
  EXPECT_EQ(Dial(port_)->Receive(1), "(reset)");
  ASSERT_TRUE(relay_->SetFlow("link", LinkFlow::kOpen));
  const auto again = Dial(port_);
  again->Send("b");
  EXPECT_EQ(target_.Accept()->Receive(1), "b");
}

TEST_F(LinkRelayTest, BoundedOneLetsItsBurstThroughAndThenWhatTimeAllows) {
  const auto client = Dial(port_);
  const auto server = target_.Accept();
  // So slow that no second byte comes in a test's life.
  ASSERT_TRUE(relay_->SetRate("link", 1e-6));
  const std::string bytes = Pattern(ByteBucket::kBurstBytes * 3);
  client->Send(bytes);
  EXPECT_TRUE(server->Receive(ByteBucket::kBurstBytes) == bytes.substr(0, ByteBucket::kBurstBytes));
  LetItRun();
  EXPECT_FALSE(server->HasSomething());
  EXPECT_EQ(relay_->forwarded_bytes("link"), ByteBucket::kBurstBytes);
  ASSERT_TRUE(relay_->SetRate("link", 0));
  EXPECT_TRUE(server->Receive(bytes.size() - ByteBucket::kBurstBytes) ==
              bytes.substr(ByteBucket::kBurstBytes));
}

TEST_F(LinkRelayTest, TargetThatIsNotThereIsAReset) {
  uint16_t port = 0;
  {
    Listener gone;
    port = *relay_->Add("gone", gone.port());
  }
  EXPECT_EQ(Dial(port)->Receive(1), "(reset)");
}

TEST_F(LinkRelayTest, LinksAreKnownByNameAndEndWithTheirConnections) {
  EXPECT_EQ(relay_->names(), (std::vector<std::string>{"link", "other"}));
  EXPECT_FALSE(relay_->SetFlow("none", LinkFlow::kCut));
  EXPECT_FALSE(relay_->SetRate("none", 1));
  EXPECT_FALSE(relay_->Remove("none"));
  const auto client = Dial(port_);
  const auto server = target_.Accept();
  EXPECT_TRUE(relay_->Remove("link"));
  EXPECT_EQ(client->Receive(1), "(reset)");
  EXPECT_EQ(relay_->names(), (std::vector<std::string>{"other"}));
  LetItRun();
}

TEST(ByteBucketTest, LetsThroughABurstAndThenTheRate) {
  ByteBucket bucket;
  EXPECT_GT(bucket.Allowed(1), size_t{1} << 60);
  bucket.SetRate(1000);
  const size_t burst = ByteBucket::kBurstBytes;
  EXPECT_EQ(bucket.Allowed(5'000'000), burst);
  bucket.Take(burst);
  EXPECT_EQ(bucket.Allowed(5'000'000), 0u);
  EXPECT_EQ(bucket.Allowed(5'100'000), 100u);
  EXPECT_EQ(bucket.WaitUs(300), 200'001u);
  bucket.Take(60);
  EXPECT_EQ(bucket.Allowed(6'100'000), 1040u);
  // Time that goes back gives and takes nothing.
  EXPECT_EQ(bucket.Allowed(6'000'000), 1040u);
  EXPECT_EQ(bucket.Allowed(900'000'000), burst);
  EXPECT_EQ(bucket.WaitUs(SIZE_MAX), 0u);
}

}  // namespace
}  // namespace strait::cli
