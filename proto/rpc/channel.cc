// SPDX-License-Identifier: Apache-2.0
#include "proto/rpc/channel.h"

#include <mutex>

#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "proto/base/limits.h"

namespace strait::rpc {
namespace {

// Of data sooner: a link that carries nothing any more should show before the coordinator's patience with a step is
// over, or it would blame the stage that waits.
struct Keepalive {
  int time_ms;
  int timeout_ms;
  int server_min_ping_ms;  // that a server allows
};
constexpr Keepalive kControlKeepalive{10'000, 5'000, 5'000};
constexpr Keepalive kDataKeepalive{3'000, 3'000, 1'000};
constexpr int kMaxReconnectBackoffMs = 2'000;
// gRPC takes the least reconnect back-off as the time that one attempt to connect may last. A busy peer
// can need a while for the handshake.
constexpr int kConnectTimeoutMs = 5'000;

int MaxMessageBytes(Traffic traffic) {
  return traffic == Traffic::kControl ? limits::kMaxControlMessageBytes
         : traffic == Traffic::kData  ? limits::kMaxDataMessageBytes
                                      : limits::kMaxTransferMessageBytes;
}

const Keepalive& KeepaliveOf(Traffic traffic) {
  return traffic == Traffic::kControl ? kControlKeepalive : kDataKeepalive;
}

}  // namespace

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, Traffic traffic) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(MaxMessageBytes(traffic));
  args.SetMaxSendMessageSize(MaxMessageBytes(traffic));
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, KeepaliveOf(traffic).time_ms);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KeepaliveOf(traffic).timeout_ms);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectTimeoutMs);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxReconnectBackoffMs);
  // A proxy from the environment must never see cluster traffic.
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

void ConfigureServer(grpc::ServerBuilder& builder, const std::string& listen_address,
                     Traffic traffic, int* port) {
  static std::once_flag once;
  std::call_once(once, [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
  builder.AddListeningPort(listen_address, grpc::InsecureServerCredentials(), port);
  builder.SetMaxReceiveMessageSize(MaxMessageBytes(traffic));
  // One server answers both kinds; streams hold what they send to limits of their own.
  builder.SetMaxSendMessageSize(
      MaxMessageBytes(traffic == Traffic::kData ? Traffic::kTransfer : traffic));
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             KeepaliveOf(traffic).server_min_ping_ms);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, KeepaliveOf(traffic).time_ms);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KeepaliveOf(traffic).timeout_ms);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

}  // namespace strait::rpc
