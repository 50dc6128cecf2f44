// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/http_client.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::cli {
namespace {

constexpr size_t kReadBytes = 64 << 10;

absl::Status Broken(const Url& url, std::string_view what) {
  return absl::UnavailableError(absl::StrCat(url.Text(), ": ", ToAbsl(what)));
}

bool ParseSize(std::string_view text, int base, size_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value, base);
  return error == std::errc() && end != text.data();
}

}  // namespace

std::string Url::Text() const {
  const bool v6 = host.find(':') != std::string::npos;
  return absl::StrCat("http://", v6 ? "[" : "", host, v6 ? "]" : "", ":", port, prefix);
}

absl::StatusOr<Url> ParseUrl(std::string_view text) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError(
        absl::StrCat("address \"", ToAbsl(text), "\": ", ToAbsl(why),
                     "; write http://HOST:PORT, as in http://127.0.0.1:8000"));
  };
  std::string_view rest = text;
  if (rest.starts_with("https://")) {
    return bad("https is not spoken here");
  }
  if (rest.starts_with("http://")) rest.remove_prefix(7);
  Url url;
  if (const size_t slash = rest.find('/'); slash != std::string_view::npos) {
    url.prefix = std::string(rest.substr(slash));
    rest = rest.substr(0, slash);
    while (url.prefix.ends_with('/')) url.prefix.pop_back();
    if (url.prefix.ends_with("/v1")) url.prefix.resize(url.prefix.size() - 3);
  }
  std::string_view port;
  if (rest.starts_with('[')) {
    const size_t close = rest.find(']');
    if (close == std::string_view::npos) return bad("\"[\" without \"]\"");
    url.host = std::string(rest.substr(1, close - 1));
    rest = rest.substr(close + 1);
    if (!rest.empty() && rest[0] != ':') return bad("text after \"]\"");
    if (!rest.empty()) port = rest.substr(1);
  } else {
    const size_t colon = rest.rfind(':');
    url.host = std::string(rest.substr(0, colon));
    if (colon != std::string_view::npos) port = rest.substr(colon + 1);
    if (url.host.find(':') != std::string::npos) return bad("an IPv6 address needs brackets");
  }
  if (url.host.empty()) return bad("no host");
  if (!port.empty()) {
    const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), url.port);
    if (error != std::errc() || end != port.data() + port.size() || url.port == 0) {
      return bad("the port is no number from 1 to 65535");
    }
  }
  return url;
}

namespace {

// A text member of an error body, OpenAI's {"error": {…}} or what is in that; empty: there is none.
std::string ErrorMember(const std::string& body, std::string_view key) {
  const auto parsed = json::Parse(body, "reply");
  if (!parsed.ok() || !parsed->is_object()) return "";
  const json::Object* error = &parsed->get_object();
  if (const json::Value* inner = json::Find(*error, "error"); inner && inner->is_object()) {
    error = &inner->get_object();
  }
  const json::Value* value = json::Find(*error, key);
  return value && value->is_string() ? std::string(json::View(value->get_string())) : "";
}

}  // namespace

std::string HttpReply::ErrorText() const {
  constexpr size_t kShown = 300;
  std::string text = ErrorMember(body, "message");
  if (text.empty()) text = body.substr(0, kShown);
  return absl::StrCat("HTTP ", status, text.empty() ? "" : ": ", text);
}

std::string HttpReply::ErrorCode() const {
  const std::string code = ErrorMember(body, "code");
  return code.empty() ? absl::StrCat("HTTP ", status) : code;
}

// ---------------------------------------------------------------- server-sent events

absl::StatusOr<bool> SseParser::Feed(std::string_view bytes, const OnEvent& on_event) {
  while (!bytes.empty()) {
    const size_t end = bytes.find('\n');
    line_ += bytes.substr(0, end);
    if (line_.size() + data_.size() > kMaxEventBytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("one server-sent event is larger than ", kMaxEventBytes, " bytes"));
    }
    if (end == std::string_view::npos) return true;
    bytes.remove_prefix(end + 1);
    if (line_.ends_with('\r')) line_.pop_back();
    if (line_.empty()) {
      if (has_data_ && !on_event(data_)) return false;
      data_.clear();
      has_data_ = false;
    } else if (std::string_view line = line_; line.starts_with("data:")) {
      line.remove_prefix(5);
      if (line.starts_with(' ')) line.remove_prefix(1);
      if (has_data_) data_ += '\n';
      data_ += line;
      has_data_ = true;
    }
    line_.clear();
  }
  return true;
}

// ---------------------------------------------------------------- HttpClient

HttpClient::HttpClient(Url url, std::string api_key, int cancel_fd)
    : url_(std::move(url)),
      api_key_(api_key.substr(0, api_key.find('\n'))),  // STRAIT_API_KEY may list several
      cancel_fd_(cancel_fd) {}

HttpClient::~HttpClient() { Close(); }

void HttpClient::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
  buffer_.clear();
}

absl::Status HttpClient::WaitFor(short events, int timeout_ms) {
  pollfd fds[2] = {{fd_, events, 0}, {cancel_fd_, POLLIN, 0}};
  for (;;) {
    const int n = poll(fds, cancel_fd_ >= 0 ? 2 : 1, timeout_ms);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Broken(url_, absl::StrCat("poll: ", strerror(errno)));
    if (n == 0) {
      return absl::DeadlineExceededError(
          absl::StrCat(url_.Text(), " was silent for ", timeout_ms, " ms"));
    }
    if (cancel_fd_ >= 0 && fds[1].revents != 0) return absl::CancelledError("cancelled");
    return absl::OkStatus();
  }
}

absl::Status HttpClient::Connect() {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(url_.host.c_str(), std::to_string(url_.port).c_str(), &hints, &found);
  if (error != 0) return Broken(url_, absl::StrCat("host not found: ", gai_strerror(error)));
  absl::Status status = Broken(url_, "host has no address");
  for (addrinfo* a = found; a != nullptr; a = a->ai_next) {
    fd_ = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, a->ai_protocol);
    if (fd_ < 0) continue;
    int failure = 0;
    if (connect(fd_, a->ai_addr, a->ai_addrlen) != 0) {
      failure = errno;
      if (failure == EINPROGRESS) {
        status = WaitFor(POLLOUT, kConnectTimeoutMs);
        socklen_t size = sizeof(failure);
        if (status.ok()) getsockopt(fd_, SOL_SOCKET, SO_ERROR, &failure, &size);
      }
    }
    if (failure == 0) {
      const int on = 1;
      setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
      freeaddrinfo(found);
      return absl::OkStatus();
    }
    if (failure != EINPROGRESS) status = Broken(url_, strerror(failure));
    Close();
    if (absl::IsCancelled(status)) break;
  }
  freeaddrinfo(found);
  return status;
}

absl::Status HttpClient::Send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n >= 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      STRAIT_RETURN_IF_ERROR(WaitFor(POLLOUT, idle_timeout_ms_));
    } else if (errno != EINTR) {
      return Broken(url_, strerror(errno));
    }
  }
  return absl::OkStatus();
}

absl::Status HttpClient::Fill() {
  for (;;) {
    // Asked for also while bytes keep coming, so that a fast stream can be cancelled.
    STRAIT_RETURN_IF_ERROR(WaitFor(POLLIN, idle_timeout_ms_));
    const size_t before = buffer_.size();
    buffer_.resize(before + kReadBytes);
    const ssize_t n = recv(fd_, buffer_.data() + before, kReadBytes, 0);
    const int error = errno;
    buffer_.resize(before + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    if (n > 0) return absl::OkStatus();
    if (n == 0) return Broken(url_, "connection closed by the server");
    if (error != EAGAIN && error != EWOULDBLOCK && error != EINTR) {
      return Broken(url_, strerror(error));
    }
  }
}

absl::StatusOr<std::string> HttpClient::TakeLine(size_t max_bytes) {
  size_t scanned = 0;
  for (;;) {
    if (const size_t end = buffer_.find('\n', scanned); end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      if (line.ends_with('\r')) line.pop_back();
      return line;
    }
    scanned = buffer_.size();
    if (scanned > max_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat(url_.Text(), ": a header line of more than ", max_bytes, " bytes"));
    }
    STRAIT_RETURN_IF_ERROR(Fill());
  }
}

absl::StatusOr<HttpReply> HttpClient::ReadHead() {
  for (;;) {
    if (buffer_.empty()) STRAIT_RETURN_IF_ERROR(Fill());
    if (!std::string_view("HTTP/1.").starts_with(std::string_view(buffer_).substr(0, 7))) {
      return absl::FailedPreconditionError(absl::StrCat(
          url_.Text(),
          " does not answer in HTTP/1.1. Is this the coordinator's gRPC port? Give its HTTP ",
          "address (usually port 8000)"));
    }
    STRAIT_ASSIGN_OR_RETURN(const std::string first, TakeLine(kMaxReplyHeaderBytes));
    HttpReply reply;
    size_t status = 0;
    if (first.size() < 12 || !ParseSize(std::string_view(first).substr(9, 3), 10, &status)) {
      return absl::FailedPreconditionError(absl::StrCat(url_.Text(), ": bad status line"));
    }
    reply.status = static_cast<int>(status);
    size_t header_bytes = 0;
    for (;;) {
      STRAIT_ASSIGN_OR_RETURN(const std::string line, TakeLine(kMaxReplyHeaderBytes));
      if (line.empty()) break;
      header_bytes += line.size();
      if (header_bytes > kMaxReplyHeaderBytes) {
        return absl::ResourceExhaustedError(
            absl::StrCat(url_.Text(), ": headers of more than ", kMaxReplyHeaderBytes, " bytes"));
      }
      const size_t colon = line.find(':');
      if (colon == std::string::npos) continue;
      reply.headers[absl::AsciiStrToLower(line.substr(0, colon))] =
          std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
    }
    if (reply.status >= 200) return reply;  // 1xx: the real reply follows
  }
}

absl::Status HttpClient::ReadBody(HttpReply& reply, const Sink& sink) {
  bool keep = !absl::EqualsIgnoreCase(reply.headers["connection"], "close");
  bool more = true;
  // Hands over `n` body bytes as they arrive.
  const auto pass = [&](size_t n) -> absl::Status {
    while (n > 0 && more) {
      if (buffer_.empty()) STRAIT_RETURN_IF_ERROR(Fill());
      const size_t take = std::min(n, buffer_.size());
      STRAIT_ASSIGN_OR_RETURN(more, sink(reply, std::string_view(buffer_).substr(0, take)));
      buffer_.erase(0, take);
      n -= take;
    }
    return absl::OkStatus();
  };
  if (reply.status == 204 || reply.status == 304) {
  } else if (absl::EqualsIgnoreCase(reply.headers["transfer-encoding"], "chunked")) {
    while (more) {
      STRAIT_ASSIGN_OR_RETURN(const std::string line, TakeLine(kMaxReplyHeaderBytes));
      size_t size = 0;
      if (!ParseSize(line, 16, &size)) {
        return absl::FailedPreconditionError(absl::StrCat(url_.Text(), ": bad chunk size"));
      }
      STRAIT_RETURN_IF_ERROR(pass(size));
      if (!more) break;
      for (;;) {  // the end of a chunk, or the trailers of the last
        STRAIT_ASSIGN_OR_RETURN(const std::string end, TakeLine(kMaxReplyHeaderBytes));
        if (end.empty()) break;
      }
      if (size == 0) break;
    }
  } else if (const auto it = reply.headers.find("content-length"); it != reply.headers.end()) {
    size_t size = 0;
    if (!ParseSize(it->second, 10, &size)) {
      return absl::FailedPreconditionError(absl::StrCat(url_.Text(), ": bad Content-Length"));
    }
    STRAIT_RETURN_IF_ERROR(pass(size));
  } else {  // until the server closes
    keep = false;
    for (;;) {
      STRAIT_RETURN_IF_ERROR(pass(buffer_.size()));
      if (!more) break;
      const absl::Status status = Fill();
      if (absl::IsUnavailable(status)) break;
      STRAIT_RETURN_IF_ERROR(status);
    }
  }
  if (!keep || !more) Close();
  return absl::OkStatus();
}

absl::StatusOr<HttpReply> HttpClient::Call(std::string_view method, std::string_view path,
                                           std::string_view json, const Sink& sink) {
  std::string request =
      absl::StrCat(ToAbsl(method), " ", url_.prefix, ToAbsl(path), " HTTP/1.1\r\nHost: ", url_.host,
                   ":", url_.port, "\r\nAccept: */*\r\n");
  if (!api_key_.empty()) absl::StrAppend(&request, "Authorization: Bearer ", api_key_, "\r\n");
  if (method == "POST") {
    absl::StrAppend(&request, "Content-Type: application/json\r\nContent-Length: ", json.size(),
                    "\r\n");
  }
  absl::StrAppend(&request, "\r\n", ToAbsl(json));

  for (;;) {
    const bool kept = fd_ >= 0;
    if (!kept) STRAIT_RETURN_IF_ERROR(Connect());
    absl::Status status = Send(request);
    if (status.ok() && buffer_.empty()) status = Fill();
    if (!status.ok()) {
      Close();
      // A server may close a kept connection between two calls; nothing of this request was
      // answered then.
      if (kept && absl::IsUnavailable(status)) continue;
      return status;
    }
    absl::StatusOr<HttpReply> reply = ReadHead();
    if (reply.ok()) {
      status = ReadBody(*reply, sink);
      if (status.ok()) return reply;
    } else {
      status = reply.status();
    }
    Close();
    return status;
  }
}

namespace {

absl::StatusOr<bool> Collect(std::string* body, std::string_view bytes) {
  if (body->size() + bytes.size() > kMaxReplyBodyBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a reply of more than ", kMaxReplyBodyBytes, " bytes"));
  }
  *body += bytes;
  return true;
}

}  // namespace

absl::StatusOr<HttpReply> HttpClient::Get(std::string_view path, int idle_timeout_ms) {
  idle_timeout_ms_ = idle_timeout_ms;
  std::string body;
  STRAIT_ASSIGN_OR_RETURN(HttpReply reply,
                          Call("GET", path, "", [&](const HttpReply&, std::string_view bytes) {
                            return Collect(&body, bytes);
                          }));
  reply.body = std::move(body);
  return reply;
}

absl::StatusOr<HttpReply> HttpClient::Post(std::string_view path, std::string_view json,
                                           int idle_timeout_ms) {
  idle_timeout_ms_ = idle_timeout_ms;
  std::string body;
  STRAIT_ASSIGN_OR_RETURN(HttpReply reply,
                          Call("POST", path, json, [&](const HttpReply&, std::string_view bytes) {
                            return Collect(&body, bytes);
                          }));
  reply.body = std::move(body);
  return reply;
}

absl::StatusOr<HttpReply> HttpClient::PostStream(std::string_view path, std::string_view json,
                                                 int idle_timeout_ms,
                                                 const SseParser::OnEvent& on_event) {
  idle_timeout_ms_ = idle_timeout_ms;
  std::string body;
  SseParser parser;
  STRAIT_ASSIGN_OR_RETURN(
      HttpReply reply,
      Call("POST", path, json,
           [&](const HttpReply& head, std::string_view bytes) -> absl::StatusOr<bool> {
             if (head.status != 200) return Collect(&body, bytes);
             return parser.Feed(bytes, on_event);
           }));
  reply.body = std::move(body);
  return reply;
}

absl::StatusOr<HttpReply> HttpClient::PostLines(
    std::string_view path, std::string_view json, int idle_timeout_ms,
    const std::function<bool(std::string_view line)>& on_line) {
  idle_timeout_ms_ = idle_timeout_ms;
  std::string body;
  std::string rest;  // of a line whose end has not come
  STRAIT_ASSIGN_OR_RETURN(
      HttpReply reply,
      Call("POST", path, json,
           [&](const HttpReply& head, std::string_view bytes) -> absl::StatusOr<bool> {
             if (head.status != 200) return Collect(&body, bytes);
             rest += bytes;
             size_t begin = 0;
             for (size_t end; (end = rest.find('\n', begin)) != std::string::npos;
                  begin = end + 1) {
               const std::string_view line = std::string_view(rest).substr(begin, end - begin);
               if (!line.empty() && !on_line(line)) return false;
             }
             rest.erase(0, begin);
             if (rest.size() <= kMaxEventBytes) return true;
             return absl::ResourceExhaustedError(
                 absl::StrCat(url_.Text(), ": a line of more than ", kMaxEventBytes, " bytes"));
           }));
  reply.body = std::move(body);
  return reply;
}

}  // namespace strait::cli
