// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/link_relay.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/rpc/clock.h"

namespace strait::cli {
namespace {

constexpr int kBacklog = 64;
constexpr size_t kReadBytes = 16 << 10;    // at once
constexpr size_t kWorthAWakeBytes = 1024;  // a bucket that fills is looked at after so many
constexpr uint64_t kLongestWaitUs = 1'000'000;

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int NewSocket() { return socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }

// The relay adds no wait of its own to a small message.
void SendAtOnce(int fd) {
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

// So that the peer sees a reset, not an end.
void Reset(int fd) {
  const linger at_once = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
  close(fd);
}

absl::StatusOr<int> Listen(uint16_t* port) {
  const int fd = NewSocket();
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(fd, kBacklog) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    const std::string why = strerror(errno);
    if (fd >= 0) close(fd);
    return absl::UnavailableError(absl::StrCat("no port for a relayed link: ", why));
  }
  *port = ntohs(address.sin_port);
  return fd;
}

bool Again() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

// False: the connection broke.
bool Read(int fd, std::string* bytes, bool* ended) {
  char buffer[kReadBytes];
  const size_t room = std::min(sizeof(buffer), kRelayBufferBytes - bytes->size());
  if (room == 0 || *ended) return true;
  const ssize_t n = recv(fd, buffer, room, 0);
  if (n < 0) return Again();
  if (n == 0) *ended = true;
  bytes->append(buffer, static_cast<size_t>(n));
  return true;
}

// The same. `bucket`, `forwarded` are of its link.
bool Write(int fd, std::string* bytes, ByteBucket* bucket, uint64_t* forwarded, uint64_t now_us) {
  const size_t size = std::min(bytes->size(), bucket->Allowed(now_us));
  if (size == 0) return true;
  const ssize_t n = send(fd, bytes->data(), size, MSG_NOSIGNAL);
  if (n < 0) return Again();
  bucket->Take(static_cast<size_t>(n));
  *forwarded += static_cast<uint64_t>(n);
  bytes->erase(0, static_cast<size_t>(n));
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LinkRelay>> LinkRelay::Create() {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) return absl::UnavailableError(absl::StrCat("eventfd: ", strerror(errno)));
  std::unique_ptr<LinkRelay> relay(new LinkRelay(fd));
  relay->thread_ = std::thread([relay = relay.get()] { relay->Run(); });
  return relay;
}

LinkRelay::~LinkRelay() {
  {
    std::lock_guard lock(mu_);
    ending_ = true;
  }
  Wake();
  thread_.join();
  for (auto& [name, link] : links_) {
    CloseAll(link);
    close(link.listener);
  }
  close(wake_fd_);
}

void LinkRelay::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof(one));
}

LinkRelay::Link* LinkRelay::FindLocked(std::string_view name) {
  const auto found = links_.find(name);
  return found == links_.end() ? nullptr : &found->second;
}

absl::StatusOr<uint16_t> LinkRelay::Add(const std::string& name, uint16_t target_port) {
  uint16_t port = 0;
  const absl::StatusOr<int> listener = Listen(&port);
  if (!listener.ok()) return listener.status();
  {
    std::lock_guard lock(mu_);
    const auto [link, fresh] = links_.try_emplace(name);
    STRAIT_CHECK(fresh, "two links of one name");
    link->second.listener = *listener;
    link->second.target_port = target_port;
  }
  Wake();
  return port;
}

bool LinkRelay::Remove(std::string_view name) {
  std::lock_guard lock(mu_);
  const auto found = links_.find(name);
  if (found == links_.end()) return false;
  CloseAll(found->second);
  close(found->second.listener);
  links_.erase(found);
  Wake();
  return true;
}

bool LinkRelay::SetFlow(std::string_view name, LinkFlow flow) {
  std::lock_guard lock(mu_);
  Link* const link = FindLocked(name);
  if (link == nullptr) return false;
  link->flow = flow;
  if (flow == LinkFlow::kCut) CloseAll(*link);
  Wake();
  return true;
}

bool LinkRelay::SetRate(std::string_view name, double bytes_per_s) {
  std::lock_guard lock(mu_);
  Link* const link = FindLocked(name);
  if (link == nullptr) return false;
  link->up.SetRate(bytes_per_s);
  link->down.SetRate(bytes_per_s);
  Wake();
  return true;
}

std::vector<std::string> LinkRelay::names() const {
  std::lock_guard lock(mu_);
  std::vector<std::string> names;
  for (const auto& [name, link] : links_) names.push_back(name);
  return names;
}

uint64_t LinkRelay::forwarded_bytes(std::string_view name) const {
  std::lock_guard lock(mu_);
  const auto found = links_.find(name);
  return found == links_.end() ? 0 : found->second.forwarded_bytes;
}

void LinkRelay::CloseAll(Link& link) {
  for (const Connection& connection : link.connections) {
    Reset(connection.client);
    Reset(connection.server);
  }
  link.connections.clear();
}

int LinkRelay::WantsLocked(std::vector<pollfd>* fds, uint64_t now_us) {
  fds->assign(1, {wake_fd_, POLLIN, 0});
  uint64_t wait_us = UINT64_MAX;
  // A descriptor of which nothing is wanted is left out: poll would tell of its peer's end for ever.
  const auto want = [&](int fd, short events) {
    if (events != 0) fds->push_back({fd, events, 0});
  };
  const auto may_go = [&](const Half& half, ByteBucket& bucket) {
    if (half.bytes.empty()) return false;
    const size_t worth = std::min(half.bytes.size(), kWorthAWakeBytes);
    if (bucket.Allowed(now_us) >= worth) return true;
    wait_us = std::min(wait_us, bucket.WaitUs(worth));
    return false;
  };
  for (auto& [name, link] : links_) {
    if (link.connections.size() < kMaxRelayConnections) want(link.listener, POLLIN);
    if (link.flow != LinkFlow::kOpen) continue;
    for (const Connection& c : link.connections) {
      if (!c.connected) {
        want(c.server, POLLOUT);
        continue;
      }
      const auto reads = [](const Half& half) {
        return !half.ended && half.bytes.size() < kRelayBufferBytes ? POLLIN : 0;
      };
      want(c.client, static_cast<short>(reads(c.up) | (may_go(c.down, link.down) ? POLLOUT : 0)));
      want(c.server, static_cast<short>(reads(c.down) | (may_go(c.up, link.up) ? POLLOUT : 0)));
    }
  }
  if (wait_us == UINT64_MAX) return -1;
  return static_cast<int>(std::min(wait_us, kLongestWaitUs) / 1000) + 1;
}

void LinkRelay::AcceptLocked(Link& link) {
  while (link.connections.size() < kMaxRelayConnections) {
    const int client = accept4(link.listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (client < 0) return;
    const int server = link.flow == LinkFlow::kCut ? -1 : NewSocket();
    const sockaddr_in target = Loopback(link.target_port);
    if (server < 0 ||
        (connect(server, reinterpret_cast<const sockaddr*>(&target), sizeof(target)) != 0 &&
         errno != EINPROGRESS)) {
      if (server >= 0) close(server);
      Reset(client);
      continue;
    }
    SendAtOnce(client);
    SendAtOnce(server);
    Connection& connection = link.connections.emplace_back();
    connection.client = client;
    connection.server = server;
  }
}

LinkRelay::After LinkRelay::Serve(Link& link, Connection& c, Events events, uint64_t now_us) {
  if (!c.connected) {
    if (events.server == 0) return After::kGoesOn;
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(c.server, SOL_SOCKET, SO_ERROR, &error, &size);
    c.connected = error == 0;
    return c.connected ? After::kGoesOn : After::kBroken;
  }
  // One that has an error is read, which tells of it.
  constexpr short kReads = POLLIN | POLLHUP | POLLERR;
  if (((events.client & kReads) && !Read(c.client, &c.up.bytes, &c.up.ended)) ||
      ((events.server & kReads) && !Read(c.server, &c.down.bytes, &c.down.ended)) ||
      !Write(c.server, &c.up.bytes, &link.up, &link.forwarded_bytes, now_us) ||
      !Write(c.client, &c.down.bytes, &link.down, &link.forwarded_bytes, now_us)) {
    return After::kBroken;
  }
  for (const auto& [half, to] : {std::pair(&c.up, c.server), std::pair(&c.down, c.client)}) {
    if (half->ended && half->bytes.empty() && !std::exchange(half->told, true)) {
      shutdown(to, SHUT_WR);
    }
  }
  return c.up.told && c.down.told ? After::kEnded : After::kGoesOn;
}

void LinkRelay::ServeLocked(const std::map<int, short>& events, uint64_t now_us) {
  const auto found = [&](int fd) {
    const auto at = events.find(fd);
    return at == events.end() ? short{0} : at->second;
  };
  for (auto& [name, link] : links_) {
    if (link.flow == LinkFlow::kOpen) {
      for (auto c = link.connections.begin(); c != link.connections.end();) {
        const Events of_both = {found(c->client), found(c->server)};
        const After after = Serve(link, *c, of_both, now_us);
        if (after == After::kGoesOn) {
          ++c;
          continue;
        }
        // What was sent last may still be on its way to an end that hears no reset.
        for (const int fd : {c->client, c->server}) {
          after == After::kEnded ? static_cast<void>(close(fd)) : Reset(fd);
        }
        c = link.connections.erase(c);
      }
    }
    if (found(link.listener) != 0) AcceptLocked(link);
  }
}

void LinkRelay::Run() {
  std::vector<pollfd> fds;
  for (;;) {
    int wait_ms = -1;
    {
      std::lock_guard lock(mu_);
      if (ending_) return;
      wait_ms = WantsLocked(&fds, MonotonicMicros());
    }
    poll(fds.data(), fds.size(), wait_ms);
    uint64_t ignored;
    [[maybe_unused]] const ssize_t n = read(wake_fd_, &ignored, sizeof(ignored));
    std::map<int, short> events;
    for (const pollfd& fd : fds) {
      if (fd.revents != 0) events[fd.fd] = fd.revents;
    }
    std::lock_guard lock(mu_);
    ServeLocked(events, MonotonicMicros());
  }
}

}  // namespace strait::cli
