// SPDX-License-Identifier: Apache-2.0
//
// HttpClient talks HTTP/1.1 to one server over one kept connection, and reads server-sent events
// as they come: what the command line needs of a client.
//
// Thread:  one thread a client; calls block, at most as long as their time-out says.
// Errors:  Unavailable (no connection, or it broke), DeadlineExceeded (silence), Cancelled (the
//          cancel descriptor became readable), InvalidArgument (URL), FailedPrecondition (the
//          server's bytes are not HTTP/1.1), ResourceExhausted (a bound below). An HTTP status is
//          no error here: it is in HttpReply.
// Limits:  the constants below.
// Why:     blocking sockets of our own: an asynchronous library costs more to compile than this
//          file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait::cli {

inline constexpr size_t kMaxReplyHeaderBytes = 64 << 10;
inline constexpr size_t kMaxReplyBodyBytes = 64 << 20;
inline constexpr size_t kMaxEventBytes = 16 << 20;
inline constexpr int kConnectTimeoutMs = 5'000;

struct Url {
  std::string host;
  uint16_t port = 80;
  std::string prefix;  // of every path, without a slash at its end; often empty
  std::string Text() const;
};

// "http://host:port/prefix", "host:port", "[::1]:8000"; a trailing "/v1" is dropped, since paths
// name it.
absl::StatusOr<Url> ParseUrl(std::string_view text);

struct HttpReply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;  // without that part which went to a stream's callback

  // The message of an OpenAI error body, or the start of the body, or the status alone.
  std::string ErrorText() const;
  // The code of an OpenAI error body; where it has none, "HTTP 503".
  std::string ErrorCode() const;
};

// Splits a byte stream into server-sent events, wherever the network cut it.
class SseParser {
 public:
  // `on_event` gets the joined `data:` lines of each event; false ends the stream (then false is
  // returned).
  using OnEvent = std::function<bool(std::string_view data)>;
  absl::StatusOr<bool> Feed(std::string_view bytes, const OnEvent& on_event);

 private:
  std::string line_;
  std::string data_;
  bool has_data_ = false;
};

class HttpClient {
 public:
  // `cancel_fd`, when not negative, ends a call as soon as it is readable; it is not read.
  explicit HttpClient(Url url, std::string api_key = "", int cancel_fd = -1);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // `idle_timeout_ms` bounds every wait for the server's next byte.
  absl::StatusOr<HttpReply> Get(std::string_view path, int idle_timeout_ms);
  absl::StatusOr<HttpReply> Post(std::string_view path, std::string_view json, int idle_timeout_ms);
  // Gives the events of a 200 reply to `on_event`; any other reply is returned whole, as Post does.
  absl::StatusOr<HttpReply> PostStream(std::string_view path, std::string_view json,
                                       int idle_timeout_ms, const SseParser::OnEvent& on_event);

  // Gives the lines of a 200 reply (one JSON value each, as application/x-ndjson has it) to `on_line`; false ends
  // it. Any other reply is returned whole, as Post does.
  absl::StatusOr<HttpReply> PostLines(std::string_view path, std::string_view json,
                                      int idle_timeout_ms,
                                      const std::function<bool(std::string_view line)>& on_line);

  const Url& url() const { return url_; }

 private:
  // Gets body bytes as they come; false ends the reply early (and the connection).
  using Sink = std::function<absl::StatusOr<bool>(const HttpReply&, std::string_view bytes)>;

  absl::StatusOr<HttpReply> Call(std::string_view method, std::string_view path,
                                 std::string_view json, const Sink& sink);
  absl::Status Connect();
  void Close();
  absl::Status WaitFor(short events, int timeout_ms);
  absl::Status Send(std::string_view bytes);
  absl::Status Fill();  // at least one more byte into buffer_
  absl::StatusOr<std::string> TakeLine(size_t max_bytes);
  absl::StatusOr<HttpReply> ReadHead();
  absl::Status ReadBody(HttpReply& reply, const Sink& sink);

  const Url url_;
  const std::string api_key_;
  const int cancel_fd_;
  int fd_ = -1;
  int idle_timeout_ms_ = 0;
  std::string buffer_;  // received, not yet used
};

}  // namespace strait::cli
