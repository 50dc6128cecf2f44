// SPDX-License-Identifier: Apache-2.0
//
// ScriptedServer answers HTTP clients with bytes that a test has written down.
//
// Thread:  one of its own; request() from any.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "coordinator/cli/http_client.h"

namespace strait::cli {

// Answers the i-th connection with the i-th script, whatever is asked; a script is sent byte by
// byte when `dribble` is set, then the connection stays open until the client closes (`hold`) or is
// closed.
class ScriptedServer {
 public:
  ScriptedServer(std::vector<std::string> scripts, bool hold = false, bool dribble = false)
      : scripts_(std::move(scripts)), hold_(hold), dribble_(dribble) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 4), 0);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    url_.host = "127.0.0.1";
    url_.port = ntohs(address.sin_port);
    thread_ = std::thread([this] { Serve(); });
  }
  ~ScriptedServer() {
    shutdown(listener_, SHUT_RDWR);  // ends an accept that nobody came to
    thread_.join();
    close(listener_);
  }
  const Url& url() const { return url_; }
  std::string request() {  // the last one
    const std::lock_guard<std::mutex> lock(mu_);
    return request_;
  }

 private:
  void Serve() {
    for (const std::string& script : scripts_) {
      const int fd = accept(listener_, nullptr, nullptr);
      if (fd < 0) return;
      char buffer[4096];
      const ssize_t n = recv(fd, buffer, sizeof(buffer), 0);
      if (n > 0) {
        const std::lock_guard<std::mutex> lock(mu_);
        request_.assign(buffer, static_cast<size_t>(n));
      }
      const size_t step = dribble_ ? 1 : script.size();
      for (size_t i = 0; i < script.size(); i += step) {
        if (send(fd, script.data() + i, std::min(step, script.size() - i), MSG_NOSIGNAL) < 0) break;
      }
      while (hold_ && recv(fd, buffer, sizeof(buffer), 0) > 0) {
      }
      close(fd);
    }
  }

  std::vector<std::string> scripts_;
  const bool hold_, dribble_;
  int listener_ = -1;
  Url url_;
  std::mutex mu_;
  std::string request_;  // guarded by mu_
  std::thread thread_;
};

}  // namespace strait::cli
