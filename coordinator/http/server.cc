// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/server.h"

#include <boost/asio/post.hpp>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/http/connection.h"
#include "proto/base/check.h"
#include "proto/base/log.h"

namespace strait {
namespace {

using boost::asio::ip::tcp;

// After this many above max_connections, a further one is closed without a word.
constexpr size_t kMaxOverloaded = 64;
// How long accepting rests when the process has no file descriptor left.
constexpr std::chrono::milliseconds kAcceptPause{100};
// How long clients may take to read the error that ends their stream, when the server stops.
constexpr std::chrono::milliseconds kLastWords{1'000};

}  // namespace

struct HttpServer::Impl {
  const std::shared_ptr<HttpServerShared> shared_owner = std::make_shared<HttpServerShared>();
  HttpServerShared& shared = *shared_owner;
  std::optional<boost::asio::executor_work_guard<boost::asio::io_context::executor_type>> work;
  tcp::acceptor acceptor{shared.io};
  boost::asio::steady_timer pause{shared.io};
  std::vector<std::thread> threads;
  uint16_t port = 0;

  void Accept() {
    acceptor.async_accept(boost::asio::make_strand(shared.io),
                          [this](boost::system::error_code error, tcp::socket socket) {
                            OnAccept(error, std::move(socket));
                          });
  }

  void OnAccept(boost::system::error_code error, tcp::socket socket) {
    if (shared.stopping || error == boost::asio::error::operation_aborted) return;
    if (error) {
      Log(LogLevel::kWarning, "cannot accept an HTTP connection", {{"reason", error.message()}});
      pause.expires_after(kAcceptPause);
      pause.async_wait([this](boost::system::error_code) {
        if (!shared.stopping) Accept();
      });
      return;
    }
    size_t others = 0;
    {
      std::lock_guard lock(shared.mu);
      others = shared.connections.size();
    }
    if (others < shared.options.max_connections + kMaxOverloaded) {
      const bool overloaded = others >= shared.options.max_connections;
      std::make_shared<HttpConnection>(shared_owner, std::move(socket), overloaded)->Start();
    }
    Accept();
  }

  absl::Status Bind(const tcp::endpoint& endpoint) {
    boost::system::error_code error;
    acceptor.open(endpoint.protocol(), error);
    if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor.bind(endpoint, error);
    if (!error) acceptor.listen(boost::asio::socket_base::max_listen_connections, error);
    if (!error) return absl::OkStatus();
    boost::system::error_code ignored;
    acceptor.close(ignored);
    return absl::UnavailableError(absl::StrCat("cannot listen on ", endpoint.address().to_string(),
                                               ":", endpoint.port(), ": ", error.message(),
                                               "; choose another address or port"));
  }

  // An I/O thread. What a handler throws costs its own connection (its deadline ends it), never the
  // process: a client must not be able to end everybody's service.
  void Run() {
    for (;;) {
      try {
        shared.io.run();
        return;
      } catch (const std::exception& e) {
        Log(LogLevel::kError, "an HTTP connection failed", {{"reason", e.what()}});
      }
    }
  }

  // Waits until no connection is left, at most `time`.
  bool WaitEmpty(std::chrono::milliseconds time) {
    std::unique_lock lock(shared.mu);
    return shared.changed.wait_for(lock, time, [this] { return shared.connections.empty(); });
  }

  void ForEach(void (HttpConnection::*action)()) {
    std::lock_guard lock(shared.mu);
    for (HttpConnection* connection : shared.connections) (connection->*action)();
  }
};

HttpServer::HttpServer(HttpServerOptions options, std::shared_ptr<HttpHandler> handler)
    : impl_(std::make_unique<Impl>()) {
  impl_->shared.options = options;
  impl_->shared.handler = std::move(handler);
}

HttpServer::~HttpServer() { Stop(std::chrono::milliseconds(0)); }

absl::Status HttpServer::Listen(const std::string& host, uint16_t port) {
  STRAIT_CHECK(impl_->threads.empty() && !impl_->shared.stopping, "Listen once");
  boost::system::error_code error;
  const auto addresses = tcp::resolver(impl_->shared.io)
                             .resolve(host, std::to_string(port), tcp::resolver::passive, error);
  if (error || addresses.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("no such address to listen on: ", host, ": ", error.message()));
  }
  absl::Status bound;
  for (const auto& entry : addresses) {
    bound = impl_->Bind(entry.endpoint());
    if (bound.ok()) break;
  }
  if (!bound.ok()) return bound;
  impl_->port = impl_->acceptor.local_endpoint(error).port();

  impl_->shared.pool.emplace(impl_->shared.options.num_pool_threads);
  impl_->work.emplace(impl_->shared.io.get_executor());
  impl_->Accept();
  for (uint32_t i = 0; i < impl_->shared.options.num_io_threads; ++i) {
    impl_->threads.emplace_back([this] { impl_->Run(); });
  }
  return absl::OkStatus();
}

uint16_t HttpServer::port() const { return impl_->port; }

size_t HttpServer::num_connections() const {
  std::lock_guard lock(impl_->shared.mu);
  return impl_->shared.connections.size();
}

void HttpServer::Stop(std::chrono::milliseconds grace) {
  if (impl_->shared.stopping.exchange(true) || impl_->threads.empty()) return;
  boost::asio::post(impl_->shared.io, [impl = impl_.get()] {
    boost::system::error_code ignored;
    impl->acceptor.close(ignored);
    impl->pause.cancel();
  });
  impl_->ForEach(&HttpConnection::Drain);
  if (!impl_->WaitEmpty(grace)) {
    impl_->ForEach(&HttpConnection::EndExchange);
    impl_->WaitEmpty(kLastWords);
  }
  // Requests in the pool may still answer connections; then nothing can, and the rest is closed.
  impl_->shared.pool->join();
  impl_->ForEach(&HttpConnection::Kill);
  // Without work, run() returns when every handler has run: none is dropped with what it owns.
  impl_->work.reset();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace strait
