// SPDX-License-Identifier: Apache-2.0
//
// host:port addresses as flags and peers give them.
//
// Thread:  any.
// Errors:  InvalidArgument names the text and the form that is wanted; FailedPrecondition a
//          listener that others could reach and that nobody asked for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait::rpc {

struct HostPort {
  std::string host;  // without brackets
  uint16_t port = 0;
  std::string ToString() const;  // an IPv6 host in brackets
};

inline constexpr size_t kMaxAddressBytes = 256;

// "127.0.0.1:7000", "[::1]:0", "node-3.cluster:7000".
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);

// 127.0.0.0/8, ::1 or "localhost".
bool IsLoopback(std::string_view host);

// The host in what gRPC calls a peer: "ipv4:10.0.0.2:4711", "ipv6:[fe80::1%25eth0]:4711" or with %5B and %5D for
// brackets; of an IPv4 address in IPv6 that one. Empty: it is no IP address.
std::string HostOfPeer(std::string_view peer);

// Whether it is loopback or an address that an interface of this machine has.
bool IsOfThisMachine(std::string_view host);

// Plain text is for loopback only: any other address needs `insecure`. `flag` names the listener's
// flag.
absl::StatusOr<HostPort> ParseListenAddress(std::string_view text, std::string_view flag,
                                            bool insecure);

}  // namespace strait::rpc
