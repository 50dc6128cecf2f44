// SPDX-License-Identifier: Apache-2.0
#include "proto/rpc/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>

#include <algorithm>
#include <charconv>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::rpc {
namespace {

absl::Status Malformed(std::string_view text) {
  return absl::InvalidArgumentError(
      absl::StrCat("'", ToAbsl(text.substr(0, kMaxAddressBytes)),
                   "' is no address: use host:port, for example 127.0.0.1:7000 or [::1]:7000"));
}

bool IsHostCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
         c == '-' || c == '_';
}

}  // namespace

std::string HostPort::ToString() const {
  const bool v6 = host.find(':') != std::string::npos;
  return absl::StrCat(v6 ? "[" : "", host, v6 ? "]:" : ":", port);
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  if (text.size() > kMaxAddressBytes) return Malformed(text);
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) return Malformed(text);
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);
  HostPort result;
  const auto [end, error] =
      std::from_chars(port.data(), port.data() + port.size(), result.port, 10);
  if (error != std::errc() || end != port.data() + port.size()) return Malformed(text);
  if (host.front() == '[') {
    if (host.back() != ']') return Malformed(text);
    result.host = std::string(host.substr(1, host.size() - 2));
    in6_addr parsed;
    if (inet_pton(AF_INET6, result.host.c_str(), &parsed) != 1) return Malformed(text);
    return result;
  }
  for (char c : host) {
    if (!IsHostCharacter(c)) return Malformed(text);
  }
  result.host = std::string(host);
  return result;
}

std::string HostOfPeer(std::string_view peer) {
  const bool v4 = peer.starts_with("ipv4:");
  if (!v4 && !peer.starts_with("ipv6:")) return "";
  std::string host = absl::StrReplaceAll(ToAbsl(peer.substr(5)), {{"%5B", "["}, {"%5D", "]"}});
  host.resize(std::min(host.rfind(':'), host.size()));
  if (v4) return host;
  if (host.starts_with('[')) host.erase(0, 1);
  host.resize(std::min(host.find_first_of("]%"), host.size()));
  constexpr std::string_view kMapped = "::ffff:";
  if (host.starts_with(kMapped) && host.find('.') != std::string::npos) {
    host.erase(0, kMapped.size());
  }
  return host;
}

bool IsOfThisMachine(std::string_view host) {
  if (IsLoopback(host)) return true;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return false;
  bool found = false;
  for (const ifaddrs* one = all; one != nullptr && !found; one = one->ifa_next) {
    if (one->ifa_addr == nullptr) continue;
    char text[INET6_ADDRSTRLEN] = "";
    if (one->ifa_addr->sa_family == AF_INET) {
      const auto* v4 = reinterpret_cast<const sockaddr_in*>(one->ifa_addr);
      inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
    } else if (one->ifa_addr->sa_family == AF_INET6) {
      const auto* v6 = reinterpret_cast<const sockaddr_in6*>(one->ifa_addr);
      inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
    }
    found = host == text;
  }
  freeifaddrs(all);
  return found;
}

bool IsLoopback(std::string_view host) {
  if (host == "localhost") return true;
  const std::string text(host);
  in_addr v4;
  if (inet_pton(AF_INET, text.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, text.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::StatusOr<HostPort> ParseListenAddress(std::string_view text, std::string_view flag,
                                            bool insecure) {
  STRAIT_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(text));
  if (!IsLoopback(address.host) && !insecure) {
    return absl::FailedPreconditionError(absl::StrCat(
        ToAbsl(flag), " ", ToAbsl(text),
        " can be reached from other machines, and this listener neither encrypts nor "
        "authenticates: "
        "use a loopback address such as 127.0.0.1:",
        address.port, " for ", ToAbsl(flag), ", or add --insecure if the network is trusted"));
  }
  return address;
}

}  // namespace strait::rpc
