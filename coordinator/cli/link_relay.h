// SPDX-License-Identifier: Apache-2.0
//
// LinkRelay forwards TCP connections on loopback, each link from a port of its own to a port of a
// daemon, and can part a link or bound its rate: a bad network that needs no privilege.
//
// Owns:    one thread; its ports and connections, which end with it.
// Thread:  any, synchronized inside.
// Errors:  Unavailable (no descriptor or port left). A target that refuses has its client's connection
//          reset, as a host without that daemon would.
// Limits:  kRelayBufferBytes of each direction of a connection; kMaxRelayConnections of a link, beyond
//          which clients wait.
// Why:     what is silent keeps its connections and bytes, as a network that loses packets does: TCP
//          sends them again when it heals. Poll, since there are tens of descriptors, not thousands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/byte_bucket.h"

struct pollfd;

namespace strait::cli {

inline constexpr size_t kRelayBufferBytes = 64 << 10;
inline constexpr size_t kMaxRelayConnections = 256;

enum class LinkFlow {
  kOpen,
  kSilent,  // nothing goes through, ends of connections included; all goes on when it is open again
  kCut,     // connections are reset, and new ones at once
};

class LinkRelay {
 public:
  static absl::StatusOr<std::unique_ptr<LinkRelay>> Create();
  ~LinkRelay();
  LinkRelay(const LinkRelay&) = delete;
  LinkRelay& operator=(const LinkRelay&) = delete;

  // Another link to this port of 127.0.0.1, which may have nobody yet. Returns the port from which it
  // leads. REQUIRES: no link has this name.
  absl::StatusOr<uint16_t> Add(const std::string& name, uint16_t target_port);
  // With its connections. These three: false if there is no such link.
  bool Remove(std::string_view name);
  bool SetFlow(std::string_view name, LinkFlow flow);
  // Of each direction, all its connections together; 0: no bound.
  bool SetRate(std::string_view name, double bytes_per_s);

  std::vector<std::string> names() const;
  // Through this link, both directions, since it was added; 0 if there is none.
  uint64_t forwarded_bytes(std::string_view name) const;

 private:
  // One direction of a connection.
  struct Half {
    std::string bytes;   // that came and have not gone
    bool ended = false;  // no more come
    bool told = false;   // the other end knows that
  };
  struct Connection {
    int client = -1;
    int server = -1;
    bool connected = false;  // to the target
    Half up, down;           // to the server, to the client
  };
  struct Link {
    int listener = -1;
    uint16_t target_port = 0;
    LinkFlow flow = LinkFlow::kOpen;
    ByteBucket up, down;
    uint64_t forwarded_bytes = 0;
    std::list<Connection> connections;
  };
  // What a poll found of one connection's two descriptors.
  struct Events {
    short client = 0;
    short server = 0;
  };

  // What becomes of a connection that was served.
  enum class After { kGoesOn, kEnded, kBroken };

  explicit LinkRelay(int wake_fd) : wake_fd_(wake_fd) {}

  void Run();
  void Wake();
  Link* FindLocked(std::string_view name);
  // Who waits for what; returns the milliseconds after which a bucket lets more through, or -1.
  int WantsLocked(std::vector<pollfd>* fds, uint64_t now_us);
  void ServeLocked(const std::map<int, short>& events, uint64_t now_us);
  void AcceptLocked(Link& link);
  static After Serve(Link& link, Connection& connection, Events events, uint64_t now_us);
  static void CloseAll(Link& link);

  const int wake_fd_;
  std::thread thread_;

  mutable std::mutex mu_;  // guards all that follows
  bool ending_ = false;
  std::map<std::string, Link, std::less<>> links_;
};

}  // namespace strait::cli
