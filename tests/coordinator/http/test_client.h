// SPDX-License-Identifier: Apache-2.0
//
// TestClient is a blocking HTTP client over one TCP connection, which may also behave badly.
//
// Thread:  one thread at a time.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

#include "gtest/gtest.h"

namespace strait {

class TestClient {
 public:
  struct Response {
    int status = 0;
    std::string head;
    std::string body;  // chunks joined
    bool complete = false;
  };

  explicit TestClient(uint16_t port, int receive_buffer_bytes = 0) {
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (receive_buffer_bytes > 0) {
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(receive_buffer_bytes));
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~TestClient() { Close(); }
  TestClient(const TestClient&) = delete;
  TestClient& operator=(const TestClient&) = delete;

  void Close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  // What remains unread is thrown away with a reset.
  void Reset() {
    const linger now{1, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    Close();
  }

  // False when the server has closed.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  static std::string Post(std::string_view path, std::string_view body,
                          std::string_view headers = "") {
    return "POST " + std::string(path) +
           " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + std::string(headers) +
           "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + std::string(body);
  }
  static std::string Get(std::string_view path, std::string_view headers = "") {
    return "GET " + std::string(path) + " HTTP/1.1\r\nHost: x\r\n" + std::string(headers) + "\r\n";
  }

  // Reads until `text` has come, or the connection ends. True if it has come.
  bool ReadUntil(std::string_view text) {
    while (in_.find(text) == std::string::npos) {
      if (!ReadMore()) return false;
    }
    return true;
  }
  // Until the server closes (or resets); false if it does not within `ms`.
  bool ReadToEnd(int ms = 20000) {
    while (true) {
      pollfd p{fd_, POLLIN, 0};
      if (::poll(&p, 1, ms) <= 0) return false;
      if (!ReadMore()) return true;
    }
  }

  Response Read() {
    Response response;
    size_t head_end;
    while (true) {
      if (!ReadUntil("\r\n\r\n")) return response;
      head_end = in_.find("\r\n\r\n") + 4;
      response.head = Take(head_end);
      response.status = std::atoi(response.head.c_str() + sizeof("HTTP/1.1"));
      if (response.status != 100) break;
    }
    if (response.head.find("Transfer-Encoding: chunked") != std::string::npos) {
      while (true) {
        if (!ReadUntil("\r\n")) return response;
        const size_t size = std::strtoul(in_.c_str(), nullptr, 16);
        Take(in_.find("\r\n") + 2);
        while (in_.size() < size + 2) {
          if (!ReadMore()) return response;
        }
        response.body += Take(size);
        EXPECT_EQ(Take(2), "\r\n");
        if (size == 0) break;
      }
    } else if (const size_t at = response.head.find("Content-Length: "); at != std::string::npos) {
      const size_t size = std::strtoul(response.head.c_str() + at + 16, nullptr, 10);
      while (in_.size() < size) {
        if (!ReadMore()) return response;
      }
      response.body = Take(size);
    } else {
      while (ReadMore()) {
      }
      response.body = Take(in_.size());
    }
    response.complete = true;
    return response;
  }
  Response Call(std::string_view request) {
    Send(request);
    return Read();
  }

  const std::string& unread() const { return in_; }

 private:
  bool ReadMore() {
    char bytes[65536];
    const ssize_t n = ::recv(fd_, bytes, sizeof(bytes), 0);
    if (n <= 0) return false;
    in_.append(bytes, static_cast<size_t>(n));
    return true;
  }
  std::string Take(size_t size) {
    std::string taken = in_.substr(0, size);
    in_.erase(0, size);
    return taken;
  }

  int fd_ = -1;
  std::string in_;
};

}  // namespace strait
