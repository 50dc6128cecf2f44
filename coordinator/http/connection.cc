// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/connection.h"

#include <algorithm>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/beast/core/buffers_range.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/status.hpp>
#include <cstdio>
#include <functional>
#include <utility>

#include "coordinator/http/api_error.h"
#include "proto/base/check.h"
#include "proto/base/log.h"

namespace strait {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return lower;
}

template <class BoostString>
std::string ToString(const BoostString& s) {
  return std::string(s.data(), s.size());
}

// The path of a request target: what stands before the query, and behind the authority if there is
// one.
std::string PathOf(std::string_view target) {
  if (const size_t scheme = target.find("://"); scheme != target.npos && target[0] != '/') {
    const size_t slash = target.find('/', scheme + 3);
    target = slash == target.npos ? std::string_view("/") : target.substr(slash);
  }
  return std::string(target.substr(0, target.find_first_of("?#")));
}

bool IsPlain(std::string_view header_value) {
  return std::all_of(header_value.begin(), header_value.end(),
                     [](unsigned char c) { return c >= 0x20 && c != 0x7f; });
}

}  // namespace

// Every call hops onto the strand, where it is compared with the request that is being answered.
class HttpConnection::ExchangeResponder : public Responder {
 public:
  ExchangeResponder(std::shared_ptr<HttpConnection> connection, uint64_t exchange)
      : connection_(std::move(connection)), exchange_(exchange) {}

  ~ExchangeResponder() override {
    if (!complete_) On(&HttpConnection::Forgotten);
  }

  void Send(HttpResponse response) override {
    complete_ = true;
    On([response = std::move(response)](HttpConnection& c, uint64_t exchange) mutable {
      c.Send(exchange, std::move(response));
    });
  }
  void StartStream(HttpResponse response, std::string keepalive) override {
    On([response = std::move(response), keepalive = std::move(keepalive)](
           HttpConnection& c, uint64_t exchange) mutable {
      c.StartStream(exchange, std::move(response), std::move(keepalive));
    });
  }
  void Write(std::string piece) override {
    On([piece = std::move(piece)](HttpConnection& c, uint64_t exchange) {
      c.WriteStream(exchange, piece);
    });
  }
  void EndStream() override {
    complete_ = true;
    On(&HttpConnection::EndStream);
  }
  void OnAbandon(std::function<void(AbandonReason)> callback) override {
    if (connection_.expired()) {
      // Nobody is left to run it in order with anything else.
      return callback(AbandonReason::kClientGone);
    }
    On([callback = std::move(callback)](HttpConnection& c, uint64_t exchange) mutable {
      c.SetAbandon(exchange, std::move(callback));
    });
  }
  void Post(std::function<void()> work) override {
    if (auto connection = connection_.lock()) {
      // The connection goes along: work that was posted runs, and in order, after the client is
      // gone too.
      asio::post(connection->strand_, [connection, work = std::move(work)] { work(); });
    }
  }

 private:
  template <class F>
  void On(F f) {
    if (auto connection = connection_.lock()) {
      asio::dispatch(connection->strand_,
                     [connection, exchange = exchange_, f = std::move(f)]() mutable {
                       std::invoke(f, *connection, exchange);
                     });
    }
  }

  // Weak, and nothing else of the server's: the engine may keep a listener, and with it this, for longer
  // than the server lives.
  const std::weak_ptr<HttpConnection> connection_;
  const uint64_t exchange_;
  std::atomic<bool> complete_{false};
};

HttpConnection::HttpConnection(std::shared_ptr<HttpServerShared> shared,
                               asio::ip::tcp::socket socket, bool overloaded)
    : shared_(std::move(shared)),
      options_(shared_->options),
      socket_(std::move(socket)),
      strand_(asio::make_strand(shared_->io)),
      timer_(strand_),
      overloaded_(overloaded),
      in_(options_.max_header_bytes + options_.max_read_ahead_bytes + 2 * kReadBytes) {
  std::lock_guard lock(shared_->mu);
  shared_->connections.insert(this);
}

HttpConnection::~HttpConnection() { STRAIT_CHECK(state_ == State::kClosed); }

void HttpConnection::Start() {
  self_ = shared_from_this();
  error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  if (options_.send_buffer_bytes > 0) {
    socket_.set_option(asio::socket_base::send_buffer_size(options_.send_buffer_bytes), ignored);
  }
  asio::dispatch(strand_, [self = shared_from_this()] {
    if (self->shared_->stopping) return self->Close();
    if (self->overloaded_) {
      return self->Reject(503, "too many connections; come back later", "overloaded");
    }
    self->Parse();
  });
}

// The set holds only what is not closed, and what is not closed holds itself.
void HttpConnection::Run(void (HttpConnection::*action)()) {
  asio::post(strand_, [self = shared_from_this(), action] { ((*self).*action)(); });
}

void HttpConnection::Drain() {
  asio::post(strand_, [self = shared_from_this()] {
    self->keep_alive_ = false;
    if (self->state_ == State::kIdle) self->Close();
  });
}

void HttpConnection::EndExchange() {
  asio::post(strand_, [self = shared_from_this()] {
    if (self->state_ == State::kBusy) return self->Abandon(AbandonReason::kServerStopping);
    if (self->state_ != State::kLinger) self->Close();
  });
}

void HttpConnection::Kill() { Run(&HttpConnection::Close); }

// ---- Reading ----

void HttpConnection::StartRead() {
  if (reading_ || end_of_input_ || state_ == State::kClosed) return;
  if (state_ == State::kBusy && in_.size() >= options_.max_read_ahead_bytes) return;
  reading_ = true;
  socket_.async_read_some(
      asio::buffer(read_bytes_),
      asio::bind_executor(strand_, [self = shared_from_this()](error_code error, size_t size) {
        self->OnRead(error, size);
      }));
}

void HttpConnection::OnRead(error_code error, size_t size) {
  reading_ = false;
  if (state_ == State::kClosed) return;
  if (error) {
    end_of_input_ = true;
    // An answer that is complete may still reach a client that has only stopped sending.
    if (error == asio::error::eof && state_ == State::kBusy && answered_) return;
    if (error == asio::error::eof && (state_ == State::kHead || state_ == State::kBody)) {
      return Reject(400, "the request is cut off");
    }
    return Close();
  }
  if (state_ == State::kLinger) return StartRead();
  asio::buffer_copy(in_.prepare(size), asio::buffer(read_bytes_, size));
  in_.commit(size);
  state_ == State::kBusy ? StartRead() : Parse();
}

// Takes what has been read as far as it goes. Requires kIdle, kHead or kBody.
void HttpConnection::Parse() {
  const Clock::time_point now = Clock::now();
  if (state_ == State::kIdle) {
    // Line ends between pipelined requests mean nothing (RFC 9112, 2.2).
    while (in_.size() > 0) {
      const char c = *static_cast<const char*>(in_.data().data());
      if (c != '\r' && c != '\n') break;
      in_.consume(1);
    }
    if (in_.size() == 0) {
      // Who has never sent a byte gets no longer than for a header: idling is for kept connections.
      read_deadline_ = now + (exchange_ == 0 ? options_.header_timeout : options_.idle_timeout);
      Arm(read_deadline_);
      return StartRead();
    }
    state_ = State::kHead;
    head_accepted_ = false;
    parser_.emplace();
    parser_->header_limit(options_.max_header_bytes);
    parser_->body_limit(options_.max_body_bytes);
    read_deadline_ = now + options_.header_timeout;
    Arm(read_deadline_);
  }
  while (in_.size() > 0 && !parser_->is_done()) {
    error_code error;
    const size_t used = parser_->put(in_.data(), error);
    in_.consume(used);
    if (error == http::error::need_more) break;
    if (error == http::error::header_limit) {
      return Reject(431, "the request's headers are larger than " +
                             std::to_string(options_.max_header_bytes) + " bytes");
    }
    if (error == http::error::body_limit || error == http::error::buffer_overflow) {
      return Reject(413, "the request's body is larger than " +
                             std::to_string(options_.max_body_bytes) + " bytes");
    }
    if (error) return Reject(400, "malformed HTTP request: " + error.message());
    if (!head_accepted_ && parser_->is_header_done() && !AcceptHead()) return;
  }
  if (parser_->is_done()) return Dispatch();
  // The parser waits for the end of a chunk extension or a trailer however long it grows, and no limit
  // of its own applies to them.
  if (in_.size() > options_.max_header_bytes) {
    return Reject(400, "a chunk extension or trailer is larger than " +
                           std::to_string(options_.max_header_bytes) + " bytes");
  }
  if (state_ == State::kBody) {
    read_deadline_ = now + options_.stall_timeout;
    Arm(read_deadline_);
  }
  StartRead();
}

// Decides by the headers whether the body is wanted. False: the request has been refused.
bool HttpConnection::AcceptHead() {
  head_accepted_ = true;
  const auto& head = parser_->get();
  http10_ = head.version() < 11;
  const bool has_length = parser_->content_length().has_value();
  if (!http10_ && head.find(http::field::host) == head.end()) {
    Reject(400, "the Host header is missing");
    return false;
  }
  if (head.find(http::field::transfer_encoding) != head.end() && !parser_->chunked()) {
    Reject(400, "Transfer-Encoding must be chunked");
    return false;
  }
  if (head.method() == http::verb::post && !has_length && !parser_->chunked()) {
    Reject(411, "a POST request needs a Content-Length");
    return false;
  }
  if (const auto expect = head.find(http::field::expect); expect != head.end()) {
    if (Lower(ToString(expect->value())) != "100-continue") {
      Reject(417, "Expect can only be 100-continue");
      return false;
    }
    if (!http10_ && !parser_->is_done()) Queue("HTTP/1.1 100 Continue\r\n\r\n");
  }
  state_ = State::kBody;
  const Clock::time_point now = Clock::now();
  read_deadline_ = now + options_.stall_timeout;
  body_deadline_ = now + options_.body_timeout;
  Arm(std::min(read_deadline_, body_deadline_));
  return true;
}

void HttpConnection::Dispatch() {
  auto message = parser_->release();
  parser_.reset();
  HttpRequest request;
  request.method = ToString(message.method_string());
  request.path = PathOf(ToString(message.target()));
  for (const auto& field : message) {
    request.headers.emplace_back(Lower(ToString(field.name_string())), ToString(field.value()));
  }
  request.body = std::move(message.body());

  state_ = State::kBusy;
  read_deadline_ = body_deadline_ = Clock::time_point::max();
  keep_alive_ = message.keep_alive() && !shared_->stopping;
  head_only_ = message.method() == http::verb::head;
  streaming_ = answered_ = false;
  ++exchange_;
  StartRead();
  auto responder = std::make_shared<ExchangeResponder>(shared_from_this(), exchange_);
  if (request.body.size() <= options_.inline_body_bytes) {
    return shared_->handler->Handle(std::move(request), std::move(responder));
  }
  asio::post(*shared_->pool, [handler = shared_->handler, request = std::move(request),
                              responder = std::move(responder)]() mutable {
    handler->Handle(std::move(request), std::move(responder));
  });
}

// Answers what is no request, and closes.
void HttpConnection::Reject(int status, std::string message, std::string code) {
  shared_->handler->OnRejected(status);
  state_ = State::kBusy;
  read_deadline_ = body_deadline_ = Clock::time_point::max();
  keep_alive_ = head_only_ = http10_ = streaming_ = answered_ = false;
  ++exchange_;
  StartRead();
  Send(exchange_, ErrorResponse({status, std::move(message), "", std::move(code)}));
}

// ---- Answering ----

bool HttpConnection::Answers(uint64_t exchange) const {
  return state_ == State::kBusy && exchange == exchange_ && !answered_;
}

std::string HttpConnection::Head(const HttpResponse& response, bool stream) const {
  const auto reason =
      http::obsolete_reason(http::int_to_status(static_cast<unsigned>(response.status)));
  std::string head =
      "HTTP/1.1 " + std::to_string(response.status) + " " + ToString(reason) + "\r\n";
  if (!response.content_type.empty()) head += "Content-Type: " + response.content_type + "\r\n";
  for (const auto& [name, value] : response.headers) {
    STRAIT_CHECK(IsPlain(value), "a header value with control characters");
    head += name + ": " + value + "\r\n";
  }
  if (!stream) {
    head += "Content-Length: " + std::to_string(response.body.size()) + "\r\n";
  } else if (!http10_) {
    head += "Transfer-Encoding: chunked\r\n";
  }
  if (!keep_alive_) {
    head += "Connection: close\r\n";
  } else if (http10_) {
    head += "Connection: keep-alive\r\n";
  }
  return head + "\r\n";
}

void HttpConnection::Send(uint64_t exchange, HttpResponse response) {
  if (!Answers(exchange) || streaming_) return;
  std::string head = Head(response, false);
  if (!head_only_) head += response.body;
  Queue(std::move(head));
  Complete();
}

void HttpConnection::StartStream(uint64_t exchange, HttpResponse response, std::string keepalive) {
  if (!Answers(exchange) || streaming_) return;
  streaming_ = true;
  largest_piece_ = 0;
  if (http10_) keep_alive_ = false;  // the end of the stream is the end of the connection
  keepalive_ = std::move(keepalive);
  Queue(Head(response, true));
  WriteStream(exchange, response.body);
  ping_at_ = Clock::now() + options_.ping_interval;
  if (!keepalive_.empty()) Arm(ping_at_);
}

void HttpConnection::WriteStream(uint64_t exchange, std::string_view piece) {
  if (!Answers(exchange) || !streaming_ || piece.empty() || head_only_) return;
  const size_t waiting = writing_bytes_.size() - written_ + queued_bytes_.size();
  // A piece of any size may go (an echoed prompt with scores is large); piling up may not.
  largest_piece_ = std::max(largest_piece_, piece.size());
  if (waiting + piece.size() > options_.max_output_bytes + largest_piece_) {
    Log(LogLevel::kWarning, "HTTP client reads too slowly; cut off", {{"waiting_bytes", waiting}});
    return Close();
  }
  if (!keepalive_.empty()) ping_at_ = Clock::now() + options_.ping_interval;
  if (http10_) return Queue(std::string(piece));
  char size[20];
  const int digits = std::snprintf(size, sizeof(size), "%zx\r\n", piece.size());
  std::string chunk;
  chunk.reserve(static_cast<size_t>(digits) + piece.size() + 2);
  chunk.append(size, static_cast<size_t>(digits)).append(piece).append("\r\n");
  Queue(std::move(chunk));
}

void HttpConnection::EndStream(uint64_t exchange) {
  if (!Answers(exchange) || !streaming_) return;
  if (!http10_ && !head_only_) Queue("0\r\n\r\n");
  Complete();
}

// The handler let its client down. A stream can only be cut: its length is not known.
void HttpConnection::Forgotten(uint64_t exchange) {
  if (!Answers(exchange)) return;
  if (streaming_) return Close();
  Send(exchange, ErrorResponse({500, "the request was dropped", "", "internal_error"}));
}

void HttpConnection::SetAbandon(uint64_t exchange, std::function<void(AbandonReason)> callback) {
  if (Answers(exchange)) {
    on_abandon_ = std::move(callback);
  } else if (state_ == State::kClosed || exchange != exchange_) {
    callback(AbandonReason::kClientGone);
  }
}

void HttpConnection::Complete() {
  answered_ = true;
  on_abandon_ = nullptr;
  ping_at_ = Clock::time_point::max();
  if (!writing_) AfterAnswer();
}

void HttpConnection::AfterAnswer() {
  if (end_of_input_) return Close();
  if (!keep_alive_ || shared_->stopping) return Linger();
  state_ = State::kIdle;
  Parse();
}

// ---- Writing ----

void HttpConnection::Queue(std::string bytes) {
  if (queued_bytes_.empty()) {
    queued_bytes_ = std::move(bytes);
  } else {
    queued_bytes_ += bytes;
  }
  if (!writing_) StartWrite();
}

void HttpConnection::StartWrite() {
  if (written_ == writing_bytes_.size()) {
    writing_bytes_ = std::move(queued_bytes_);
    queued_bytes_.clear();
    written_ = 0;
  }
  writing_ = true;
  write_deadline_ = Clock::now() + options_.write_timeout;
  Arm(write_deadline_);
  socket_.async_write_some(
      asio::buffer(writing_bytes_.data() + written_, writing_bytes_.size() - written_),
      asio::bind_executor(strand_, [self = shared_from_this()](error_code error, size_t size) {
        self->OnWritten(error, size);
      }));
}

void HttpConnection::OnWritten(error_code error, size_t size) {
  writing_ = false;
  if (state_ == State::kClosed) return;
  if (error) return Close();
  written_ += size;
  if (written_ < writing_bytes_.size() || !queued_bytes_.empty()) return StartWrite();
  writing_bytes_.clear();
  written_ = 0;
  write_deadline_ = Clock::time_point::max();
  if (state_ == State::kBusy && answered_) AfterAnswer();
}

// ---- Time and end ----

// The timer runs to the earliest deadline that was ever asked for: a deadline that moves on, as
// most do, costs nothing until then.
void HttpConnection::Arm(Clock::time_point when) {
  if (when >= armed_ || state_ == State::kClosed) return;
  armed_ = when;
  timer_.expires_at(when);
  timer_.async_wait([self = shared_from_this()](error_code error) {
    if (!error) self->OnTimer();
  });
}

void HttpConnection::OnTimer() {
  if (state_ == State::kClosed) return;
  armed_ = Clock::time_point::max();
  const Clock::time_point now = Clock::now();
  if (write_deadline_ <= now) {
    Log(LogLevel::kWarning, "HTTP client stopped reading; cut off");
    return Close();
  }
  if (read_deadline_ <= now || body_deadline_ <= now) {
    if (state_ == State::kHead || state_ == State::kBody) {
      return Reject(408, "the request took too long to arrive");
    }
    return Close();
  }
  if (ping_at_ <= now) {
    // Bytes that wait for the client are sign of life enough.
    if (!writing_) WriteStream(exchange_, keepalive_);
    ping_at_ = now + options_.ping_interval;
  }
  if (state_ == State::kClosed) return;
  Arm(std::min({write_deadline_, read_deadline_, body_deadline_,
                keepalive_.empty() ? Clock::time_point::max() : ping_at_}));
}

void HttpConnection::Abandon(AbandonReason reason) {
  // Taken out first: the callback may answer, which drops it.
  if (auto callback = std::exchange(on_abandon_, nullptr)) {
    callback(reason);
  } else if (reason == AbandonReason::kServerStopping && !answered_) {
    Close();
  }
}

// Says that nothing more comes, and lets the client finish: closing with unread bytes in the kernel
// would destroy the answer on its way.
void HttpConnection::Linger() {
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  state_ = State::kLinger;
  in_.clear();
  read_deadline_ = Clock::now() + options_.linger_timeout;
  Arm(read_deadline_);
  StartRead();
}

void HttpConnection::Close() {
  if (state_ == State::kClosed) return;
  const bool answering = state_ == State::kBusy && !answered_;
  state_ = State::kClosed;
  if (answering) Abandon(AbandonReason::kClientGone);
  on_abandon_ = nullptr;
  timer_.cancel();
  error_code ignored;
  socket_.close(ignored);
  {
    std::lock_guard lock(shared_->mu);
    shared_->connections.erase(this);
    if (shared_->connections.empty()) shared_->changed.notify_all();
  }
  self_.reset();
}

}  // namespace strait
