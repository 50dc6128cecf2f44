// SPDX-License-Identifier: Apache-2.0
//
// How every gRPC channel and server of the project is set up, both ends in one place: a client
// that pings more often than its server allows is cut off ("Too many pings").
//
// Thread:  any.
// Limits:  control messages proto/base/limits.h kMaxControlMessageBytes, data kMaxDataMessageBytes,
//          transfers and what data servers send kMaxTransferMessageBytes.
#pragma once

#include <memory>
#include <string>

#include "grpcpp/grpcpp.h"

namespace strait::rpc {

// These never share a connection: bulk must not delay a heartbeat, and rows that move must not delay hidden states.
// A data server takes both kData and kTransfer.
enum class Traffic { kControl, kData, kTransfer };

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, Traffic traffic);

// Sets limits and keepalive, and adds health checking and reflection. `*port` receives the bound port after
// BuildAndStart (0: the address was taken or is invalid).
void ConfigureServer(grpc::ServerBuilder& builder, const std::string& listen_address,
                     Traffic traffic, int* port);

}  // namespace strait::rpc
