// SPDX-License-Identifier: Apache-2.0
//
// A worker's end of moving rows over gRPC, for tests: a transfer with a data server, and what it told. Also
// frames, and a peer that answers whatever bytes it is told to.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/queue.h"
#include "proto/rpc/stream.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "tests/worker/transfer/scripted_transfer.h"
#include "worker/transfer/grpc_row_transfer.h"
#include "worker/transfer/rows_message.h"

namespace strait {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

// A gRPC data server with one service.
class DataServer {
 public:
  explicit DataServer(grpc::Service* service, int at_port = 0) {
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, "127.0.0.1:" + std::to_string(at_port), rpc::Traffic::kData,
                         &port);
    builder.RegisterService(service);
    server_ = builder.BuildAndStart();
    EXPECT_TRUE(server_ != nullptr && port != 0);
  }
  ~DataServer() {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port); }
  int port = 0;

 private:
  std::unique_ptr<grpc::Server> server_;
};

class RowsNode {
 public:
  struct Rows {
    AskId id;
    absl::StatusOr<RowsFrame> frame;
  };
  struct Asked {
    PeerAskId id;
    RowsAsk ask;
  };
  struct Served {
    PeerAskId id;
    std::vector<BlockHeader> pieces;
  };
  using Event = std::variant<Rows, Asked, Served>;

  explicit RowsNode(GrpcRowTransferOptions options = {}, int port = 0) {
    RowTransferEvents events;
    events.on_rows = [this](AskId id, absl::StatusOr<RowsFrame> frame) {
      events_.Push(Rows{id, std::move(frame)});
    };
    events.on_ask = [this](PeerAskId id, RowsAsk ask) { events_.Push(Asked{id, ask}); };
    events.on_served = [this](PeerAskId id, std::vector<BlockHeader> pieces) {
      events_.Push(Served{id, std::move(pieces)});
    };
    transfer = std::make_unique<GrpcRowTransfer>(options, std::move(events));
    server = std::make_unique<DataServer>(transfer->service(), port);
  }
  ~RowsNode() {
    transfer->Stop();
    server.reset();
  }

  // The next event of this kind; others before it are dropped.
  template <class T>
  T Next() {
    for (;;) {
      if (ready_.empty()) ready_ = events_.PopAll(30s);
      if (ready_.empty()) {
        ADD_FAILURE() << "no event";
        std::abort();
      }
      Event event = std::move(ready_.front());
      ready_.pop_front();
      if (T* wanted = std::get_if<T>(&event)) return std::move(*wanted);
    }
  }
  bool Silent(std::chrono::microseconds timeout) {
    if (ready_.empty()) ready_ = events_.PopAll(timeout);
    return ready_.empty();
  }
  std::string address() const { return server->address(); }

 private:
  BoundedQueue<Event> events_{1 << 20};
  std::deque<Event> ready_;

 public:
  std::unique_ptr<GrpcRowTransfer> transfer;
  std::unique_ptr<DataServer> server;
};

inline RowsAsk AnAsk(uint32_t num_rows = 200) {
  return {.stage_id = 3,
          .epoch = {1, 5},
          .sequence = SequenceId{7},
          .placement = {1, 9},
          .secret = 0xABCDEF,
          .layers = {2, 5},
          .first_row = 30,
          .num_rows = num_rows};
}
inline RowsFrame AFrame(const RowsAsk& ask) {
  return FrameOf(ask, [](LayerIndex layer, uint32_t position) {
    return uint64_t{layer} * 1'000'003 + position;
  });
}
inline void ExpectEqual(const RowsFrame& a, const RowsFrame& b) {
  EXPECT_EQ(a.sequence, b.sequence);
  EXPECT_EQ(a.placement, b.placement);
  EXPECT_EQ(a.pieces, b.pieces);
  EXPECT_TRUE(a.rows == b.rows);
}

inline const std::shared_ptr<RowBuffers>& Buffers() {
  static const auto buffers = std::make_shared<RowBuffers>();
  return buffers;
}

// Answers each request with what `answer` makes of it.
class EvilPeer final
    : public v1::RowTransfer::WithRawCallbackMethod_Rows<v1::RowTransfer::Service> {
 public:
  using Stream = rpc::ServerStream<grpc::ByteBuffer, grpc::ByteBuffer>;
  using Answer = std::function<std::optional<std::string>(const v1::RowsRequest&)>;
  explicit EvilPeer(Answer answer) : answer_(std::move(answer)), server_(this) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Rows(
      grpc::CallbackServerContext* context) override {
    auto holder = std::make_shared<std::weak_ptr<Stream>>();
    auto stream = std::make_shared<Stream>(
        context,
        rpc::StreamOptions{
            .max_queued_messages = 1000, .max_queued_bytes = 1 << 28, .max_message_bytes = 1 << 28},
        rpc::StreamEvents<grpc::ByteBuffer>{.on_message =
                                                [this, holder](const grpc::ByteBuffer& message) {
                                                  const auto bytes =
                                                      answer_(*ParseRequest(message));
                                                  const auto to = holder->lock();
                                                  if (!bytes || to == nullptr) return true;
                                                  const grpc::Slice slice(*bytes);
                                                  (void)to->Send(grpc::ByteBuffer(&slice, 1));
                                                  return true;
                                                },
                                            .on_end = [](const absl::Status&) {}});
    *holder = stream;
    stream->Start();
    return stream.get();
  }
  std::string address() const { return server_.address(); }

 private:
  const Answer answer_;
  DataServer server_;
};

inline std::string BytesOf(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}
inline grpc::ByteBuffer BufferOf(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace strait
