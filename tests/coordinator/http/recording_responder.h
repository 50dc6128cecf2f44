// SPDX-License-Identifier: Apache-2.0
//
// RecordingResponder keeps what the API answers; posts run when the test says so.
//
// Thread:  one thread at a time, but for Post.
#pragma once

#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/http/message.h"
#include "gtest/gtest.h"
#include "proto/base/json.h"

namespace strait {

class RecordingResponder : public Responder {
 public:
  std::optional<HttpResponse> sent;
  std::optional<HttpResponse> stream_head;
  std::string stream;
  bool stream_ended = false;
  std::string keepalive;

  void Send(HttpResponse response) override {
    EXPECT_FALSE(sent || stream_head) << "answered twice";
    sent = std::move(response);
  }
  void StartStream(HttpResponse response, std::string ping) override {
    EXPECT_FALSE(sent || stream_head) << "answered twice";
    stream = response.body;
    stream_head = std::move(response);
    keepalive = std::move(ping);
  }
  void Write(std::string piece) override {
    EXPECT_TRUE(stream_head && !stream_ended);
    stream += piece;
  }
  void EndStream() override {
    EXPECT_TRUE(stream_head && !stream_ended);
    stream_ended = true;
  }
  void OnAbandon(std::function<void(AbandonReason)> callback) override {
    abandon_ = std::move(callback);
  }
  void Post(std::function<void()> work) override {
    std::lock_guard lock(mu_);
    posts_.push_back(std::move(work));
  }

  void RunPosts() {
    while (true) {
      std::function<void()> work;
      {
        std::lock_guard lock(mu_);
        if (posts_.empty()) return;
        work = std::move(posts_.front());
        posts_.pop_front();
      }
      work();
    }
  }
  // As the server does when the client goes, or when it stops.
  void Abandon(AbandonReason reason) {
    if (auto callback = std::exchange(abandon_, nullptr)) callback(reason);
  }
  // Breaks the circle of exchange and responder, as the server does when the answer is complete.
  void Forget() { abandon_ = nullptr; }

  bool answered() const { return sent || stream_ended; }

  json::Value Json() const {
    EXPECT_TRUE(sent) << "not answered";
    if (!sent) return nullptr;
    auto value = json::Parse(sent->body, "answer");
    EXPECT_TRUE(value.ok()) << value.status() << "\n" << sent->body;
    return value.ok() ? *value : json::Value(nullptr);
  }

  // The events of the stream: the value of id (or empty), and of data.
  struct Event {
    std::string id;
    std::string data;
    json::Value Json() const { return json::Parse(data, "event").value(); }
  };
  std::vector<Event> Events() const { return ParseEvents(stream); }

  static std::vector<Event> ParseEvents(const std::string& stream) {
    std::vector<Event> events;
    size_t at = 0;
    while (at < stream.size()) {
      const size_t end = stream.find("\n\n", at);
      EXPECT_NE(end, std::string::npos) << "half an event: " << stream.substr(at);
      if (end == std::string::npos) break;
      Event event;
      bool comment = false;
      for (size_t line = at; line < end;) {
        const size_t stop = std::min(stream.find('\n', line), end);
        const std::string text = stream.substr(line, stop - line);
        if (text.rfind("id: ", 0) == 0) {
          event.id = text.substr(4);
        } else if (text.rfind("data: ", 0) == 0) {
          event.data = text.substr(6);
        } else {
          EXPECT_EQ(text.substr(0, 1), ":") << text;
          comment = true;
        }
        line = stop + 1;
      }
      if (!comment) events.push_back(event);
      at = end + 2;
    }
    return events;
  }

 private:
  std::mutex mu_;
  std::deque<std::function<void()>> posts_;
  std::function<void(AbandonReason)> abandon_;
};

}  // namespace strait
