// SPDX-License-Identifier: Apache-2.0
//
// StoppedPath forwards TCP to a port of this machine until it is stopped: from then on it takes bytes and passes none,
// either way, and connections stay open. So it looks like a path that drops packets.
//
// Owns:    its sockets, a thread.
// Thread:  the test's; Stop any.
#pragma once

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace strait {

class StoppedPath {
 public:
  explicit StoppedPath(int to_port) : to_port_(to_port) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = Loopback(0);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 16), 0);
    socklen_t size = sizeof(address);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~StoppedPath() {
    over_ = true;
    thread_.join();
    for (const auto& [a, b] : pairs_) {
      close(a);
      close(b);
    }
    close(listener_);
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  void Stop() { stopped_ = true; }

 private:
  static sockaddr_in Loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    return address;
  }
  void Run() {
    while (!over_) {
      std::vector<pollfd> fds = {{listener_, POLLIN, 0}};
      for (const auto& [a, b] : pairs_) {
        fds.push_back({a, POLLIN, 0});
        fds.push_back({b, POLLIN, 0});
      }
      if (poll(fds.data(), fds.size(), 20) <= 0) continue;
      for (size_t i = 1; i < fds.size(); ++i) {
        if (fds[i].revents != 0) Forward(fds[i].fd, fds[i % 2 == 1 ? i + 1 : i - 1].fd);
      }
      if (fds[0].revents != 0) Take();
    }
  }
  void Take() {
    const int inner = accept(listener_, nullptr, nullptr);
    const int outer = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = Loopback(to_port_);
    EXPECT_EQ(connect(outer, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    pairs_.emplace_back(inner, outer);
  }
  void Forward(int from, int to) {
    char bytes[65536];
    const ssize_t count = read(from, bytes, sizeof(bytes));
    if (count <= 0) {
      shutdown(to, SHUT_RDWR);
      usleep(1000);
    } else if (!stopped_) {
      EXPECT_EQ(write(to, bytes, count), count);
    }
  }

  const int to_port_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopped_ = false;
  std::atomic<bool> over_ = false;
  std::vector<std::pair<int, int>> pairs_;
  std::thread thread_;
};

}  // namespace strait
