// SPDX-License-Identifier: Apache-2.0
//
// HttpRequest, HttpResponse, Responder and HttpHandler are what the API and the server say to each
// other: the API knows no sockets, the server no routes.
//
// Thread:  a Responder's methods may be called from any thread and take effect in the order of the
//          calls of one thread; functions given to Post and OnAbandon run one at a time.
// Errors:  none: a call to a Responder whose client is gone, or that has answered, does nothing.
// Limits:  what waits for a slow client is bounded by the server
//          (HttpServerOptions::max_output_bytes).
// Why:     the whole API is tested through a Responder that records, without a socket.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace strait {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;   // "GET"
  std::string path;     // of the target, without the query
  HttpHeaders headers;  // names in lower case
  std::string body;

  // The first value of a header, `name` in lower case; empty when absent.
  std::string_view Header(std::string_view name) const {
    for (const auto& [key, value] : headers) {
      if (key == name) return value;
    }
    return {};
  }
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";  // empty: no such header
  HttpHeaders headers;
  std::string body;
};

enum class AbandonReason {
  kClientGone,      // nothing that is written reaches anybody
  kServerStopping,  // say so to the client, and end
};

// One request's way back to its client: either Send, or StartStream, Write…, EndStream.
class Responder {
 public:
  virtual ~Responder() = default;

  virtual void Send(HttpResponse response) = 0;

  // `response.body` is the first piece. `keepalive` is sent whenever nothing else was for a while.
  virtual void StartStream(HttpResponse response, std::string keepalive) = 0;
  virtual void Write(std::string piece) = 0;
  virtual void EndStream() = 0;

  // Called at most once, and not after the answer is complete. Set it before answering.
  virtual void OnAbandon(std::function<void(AbandonReason)> callback) = 0;

  // Runs `work` soon, after what was posted before; never inside the call.
  virtual void Post(std::function<void()> work) = 0;
};

class HttpHandler {
 public:
  virtual ~HttpHandler() = default;

  // Any thread, several at a time. Answers through `responder`, now or later; must not wait.
  virtual void Handle(HttpRequest request, std::shared_ptr<Responder> responder) = 0;

  // The server has refused what never became a request (malformed, too large, too many
  // connections).
  virtual void OnRejected(int status) = 0;
};

}  // namespace strait
