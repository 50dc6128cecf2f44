// SPDX-License-Identifier: Apache-2.0
//
// HttpServer accepts HTTP/1.1 connections, reads requests within bounds, hands them to an
// HttpHandler and carries the answers back, whole or as a stream.
//
// Owns:    listening socket, connections, I/O threads, a pool for large requests.
// Borrows: nothing; it shares the handler.
// Thread:  Create, Listen and Stop from one thread that is none of its own; the getters from any.
// Errors:  Listen: InvalidArgument (no such address), Unavailable (address taken or not ours).
//          Towards clients, with a JSON error: 400 malformed, 408 stalled while sending, 411 no
//          length, 413 body too large, 431 headers too large, 503 too many connections. A client
//          that stops reading, or reads more slowly than a stream grows beyond max_output_bytes,
//          is cut off.
// Limits:  HttpServerOptions.
// Why:     half a close is a close: a client that shuts its sending side down while it waits is
//          taken for gone and its request cancelled, because a vanished client looks the same and
//          holds cache.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "coordinator/http/message.h"

namespace strait {

struct HttpServerOptions {
  uint32_t num_io_threads = 2;
  uint32_t num_pool_threads = 2;  // handle requests with bodies over inline_body_bytes
  size_t inline_body_bytes = 16u << 10;

  uint32_t max_connections = 1024;
  uint32_t max_header_bytes = 32u << 10;
  size_t max_body_bytes = 16u << 20;
  size_t max_read_ahead_bytes = 64u << 10;  // of pipelined requests, while one is being answered
  size_t max_output_bytes = 4u << 20;       // of one stream, waiting, besides its largest piece
  int send_buffer_bytes = 0;                // of the kernel, per connection; 0: its default

  std::chrono::milliseconds idle_timeout{75'000};  // between requests
  std::chrono::milliseconds header_timeout{
      10'000};  // from a request's first byte to its last header
  std::chrono::milliseconds stall_timeout{10'000};  // between two pieces of a body
  std::chrono::milliseconds body_timeout{120'000};  // for a whole body
  std::chrono::milliseconds write_timeout{30'000};  // between two bytes that the client takes
  std::chrono::milliseconds ping_interval{5'000};   // of silence in a stream
  std::chrono::milliseconds linger_timeout{2'000};  // for the client to read an error and close
};

class HttpServer {
 public:
  HttpServer(HttpServerOptions options, std::shared_ptr<HttpHandler> handler);
  ~HttpServer();  // Stop without grace
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Starts serving at the first address of `host` that can be bound. Port 0: one that is free. Call
  // once.
  absl::Status Listen(const std::string& host = "127.0.0.1", uint16_t port = 0);
  uint16_t port() const;

  // Stops accepting, lets running requests go on for `grace`, then ends them with an error; returns
  // when every connection is closed. Later calls do nothing.
  void Stop(std::chrono::milliseconds grace);

  size_t num_connections() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
