// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/operator_access.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "coordinator/access/operator_key.h"

namespace strait::cli {

absl::StatusOr<std::string> FindOperatorKey(const Url& url, const std::string& file) {
  if (!file.empty()) return ReadOperatorKey(file, "--operator-key-file");
  if (!IsThisMachine(url.host)) return "";
  for (const std::string& path : OperatorKeyPaths(url.port)) {
    absl::StatusOr<std::string> key = ReadOperatorKey(path, "operator key");
    if (!absl::IsNotFound(key.status())) return key;
  }
  return "";
}

namespace {

bool IsLoopback(const addrinfo& a) {
  if (a.ai_family == AF_INET) {
    const auto* address = reinterpret_cast<const sockaddr_in*>(a.ai_addr);
    return ntohl(address->sin_addr.s_addr) >> 24 == 127;
  }
  return a.ai_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(a.ai_addr)->sin6_addr);
}

// Only an address of an interface can be bound.
bool CanBind(const addrinfo& a) {
  const int fd = socket(a.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool bound = bind(fd, a.ai_addr, a.ai_addrlen) == 0;
  close(fd);
  return bound;
}

}  // namespace

bool IsThisMachine(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), "0", &hints, &found) != 0) return false;
  bool all = found != nullptr;
  for (addrinfo* a = found; a != nullptr && all; a = a->ai_next) {
    all = IsLoopback(*a) || CanBind(*a);
  }
  freeaddrinfo(found);
  return all;
}

}  // namespace strait::cli
