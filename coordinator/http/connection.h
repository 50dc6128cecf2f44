// SPDX-License-Identifier: Apache-2.0
//
// HttpConnection serves one client: it reads requests one after the other, and writes their
// answers in the same order. Internal to the server.
//
// Owns:    the socket, the bytes read ahead, the bytes not yet written.
// Thread:  its strand, but for the Responders that it gives out.
// Limits:  HttpServerOptions.
// Why:     one read is always outstanding, while a request is answered too: that is how a client
//          that goes away is noticed at once. What it reads meanwhile (pipelined requests) waits
//          in `in_`.
#pragma once

#include <array>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>

#include "coordinator/http/message.h"
#include "coordinator/http/server.h"

namespace strait {

class HttpConnection;

// What the connections of a server share.
struct HttpServerShared {
  HttpServerOptions options;
  std::shared_ptr<HttpHandler> handler;
  boost::asio::io_context io;
  std::optional<boost::asio::thread_pool> pool;
  std::atomic<bool> stopping{false};

  std::mutex mu;  // guards the set: I/O threads add and remove, Stop waits
  std::condition_variable changed;
  std::unordered_set<HttpConnection*> connections;  // open
};

class HttpConnection : public std::enable_shared_from_this<HttpConnection> {
 public:
  using Strand = boost::asio::strand<boost::asio::io_context::executor_type>;
  using Clock = std::chrono::steady_clock;

  // `overloaded`: the connection is one too many and only hears so.
  HttpConnection(std::shared_ptr<HttpServerShared> shared, boost::asio::ip::tcp::socket socket,
                 bool overloaded);
  ~HttpConnection();

  void Start();
  // Stop's three stages: no further request; end the running one; close. Call under shared->mu,
  // while the connection is in the set.
  void Drain();
  void EndExchange();
  void Kill();

 private:
  class ExchangeResponder;
  enum class State { kIdle, kHead, kBody, kBusy, kLinger, kClosed };

  // ---- Reading ----
  void StartRead();
  void OnRead(boost::system::error_code error, size_t size);
  void Parse();
  bool AcceptHead();
  void Dispatch();
  void Reject(int status, std::string message, std::string code = "");

  // ---- Answering; `exchange` names the request that is answered ----
  bool Answers(uint64_t exchange) const;
  void Send(uint64_t exchange, HttpResponse response);
  void StartStream(uint64_t exchange, HttpResponse response, std::string keepalive);
  void WriteStream(uint64_t exchange, std::string_view piece);
  void EndStream(uint64_t exchange);
  void Forgotten(uint64_t exchange);
  void SetAbandon(uint64_t exchange, std::function<void(AbandonReason)> callback);
  std::string Head(const HttpResponse& response, bool stream) const;
  void Complete();
  void AfterAnswer();

  // ---- Writing ----
  void Queue(std::string bytes);
  void StartWrite();
  void OnWritten(boost::system::error_code error, size_t size);

  // ---- Time and end ----
  void Run(void (HttpConnection::*action)());  // on the strand
  void Arm(Clock::time_point when);
  void OnTimer();
  void Abandon(AbandonReason reason);
  void Linger();
  void Close();

  const std::shared_ptr<HttpServerShared> shared_;
  const HttpServerOptions& options_;
  boost::asio::ip::tcp::socket socket_;
  Strand strand_;
  boost::asio::steady_timer timer_;
  Clock::time_point armed_ = Clock::time_point::max();
  const bool overloaded_;
  std::shared_ptr<HttpConnection> self_;  // from Start to Close

  State state_ = State::kIdle;
  static constexpr size_t kReadBytes = 16u << 10;  // asked of the kernel at once
  bool reading_ = false;
  std::array<char, kReadBytes> read_bytes_;  // the outstanding read's: `in_` moves meanwhile
  bool end_of_input_ = false;
  boost::beast::flat_buffer in_;
  std::optional<boost::beast::http::request_parser<boost::beast::http::string_body>> parser_;
  bool head_accepted_ = false;
  Clock::time_point read_deadline_ = Clock::time_point::max();
  Clock::time_point body_deadline_ = Clock::time_point::max();

  uint64_t exchange_ = 0;  // number of the request that is being answered, or was last
  bool keep_alive_ = true;
  bool http10_ = false;
  bool head_only_ = false;  // HEAD
  bool streaming_ = false;
  bool answered_ = false;  // nothing more will be queued for this exchange
  std::string keepalive_;
  size_t largest_piece_ = 0;  // of this stream
  Clock::time_point ping_at_ = Clock::time_point::max();
  std::function<void(AbandonReason)> on_abandon_;

  std::string writing_bytes_;  // being written, from written_ on
  size_t written_ = 0;
  std::string queued_bytes_;
  bool writing_ = false;
  Clock::time_point write_deadline_ = Clock::time_point::max();
};

}  // namespace strait
