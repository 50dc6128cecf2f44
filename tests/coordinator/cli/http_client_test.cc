// SPDX-License-Identifier: Apache-2.0
//
// Defends: the client reads any HTTP/1.1 framing and any cutting of server-sent events, ends every
// wait, and tells a wrong server from a missing one.
#include "coordinator/cli/http_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/coordinator/cli/scripted_server.h"

namespace strait::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kTimeoutMs = 10'000;

// ---------------------------------------------------------------- URLs

TEST(UrlTest, Forms) {
  EXPECT_EQ(ParseUrl("http://127.0.0.1:8000")->Text(), "http://127.0.0.1:8000");
  EXPECT_EQ(ParseUrl("localhost:81")->Text(), "http://localhost:81");
  EXPECT_EQ(ParseUrl("http://h/v1/")->Text(), "http://h:80");
  EXPECT_EQ(ParseUrl("http://h:9/deep/v1")->prefix, "/deep");
  EXPECT_EQ(ParseUrl("http://[::1]:8000")->host, "::1");
  EXPECT_EQ(ParseUrl("[::1]:8000")->Text(), "http://[::1]:8000");
}

TEST(UrlTest, BadOnesNameTheFix) {
  for (const char* bad :
       {"", "http://", "https://h:1", "h:0", "h:70000", "h:x", "::1:80", "[::1"}) {
    const auto url = ParseUrl(bad);
    ASSERT_FALSE(url.ok()) << bad;
    EXPECT_EQ(url.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(url.status().message()), HasSubstr("http://HOST:PORT")) << bad;
  }
}

// ---------------------------------------------------------------- events

TEST(SseParserTest, AnyCutGivesTheSameEvents) {
  const std::string text =
      ": ping\n\nid: 4\ndata: {\"a\":1}\n\ndata:two\r\ndata: lines\r\n\r\nevent: x\n\ndata: "
      "[DONE]\n\n";
  for (size_t step = 1; step <= text.size(); ++step) {
    SseParser parser;
    std::vector<std::string> events;
    for (size_t i = 0; i < text.size(); i += step) {
      const auto more =
          parser.Feed(std::string_view(text).substr(i, step), [&](std::string_view data) {
            events.emplace_back(data);
            return true;
          });
      ASSERT_TRUE(more.ok() && *more);
    }
    EXPECT_THAT(events, ElementsAre("{\"a\":1}", "two\nlines", "[DONE]")) << "step " << step;
  }
}

TEST(SseParserTest, OversizedEventIsRefused) {
  SseParser parser;
  const std::string piece = "data: " + std::string(1 << 20, 'x');
  absl::Status status;
  for (size_t i = 0; i <= kMaxEventBytes >> 20 && status.ok(); ++i) {
    status = parser.Feed(piece, [](std::string_view) { return true; }).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
}

// ---------------------------------------------------------------- calls

TEST(HttpClientTest, ReadsEveryFraming) {
  const std::vector<std::string> replies = {
      "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: "
      "1\r\n\r\n",
      "HTTP/1.1 200 OK\r\n\r\nhello",
      "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
  };
  for (const bool dribble : {false, true}) {
    for (const std::string& script : replies) {
      ScriptedServer server({script}, /*hold=*/false, dribble);
      HttpClient client(server.url());
      const auto reply = client.Get("/x", kTimeoutMs);
      ASSERT_TRUE(reply.ok()) << reply.status() << script;
      EXPECT_EQ(reply->status, 200);
      EXPECT_EQ(reply->body, "hello") << script;
    }
  }
}

TEST(HttpClientTest, SendsPathKeyAndBody) {
  ScriptedServer server({"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"});
  HttpClient client(server.url(), "secret");
  ASSERT_TRUE(client.Post("/v1/x", "{\"a\":1}", kTimeoutMs).ok());
  EXPECT_THAT(server.request(), HasSubstr("POST /v1/x HTTP/1.1\r\n"));
  EXPECT_THAT(server.request(), HasSubstr("Authorization: Bearer secret\r\n"));
  EXPECT_THAT(server.request(), HasSubstr("Content-Length: 7\r\n"));
}

TEST(HttpClientTest, StreamsEventsAndKeepsErrorBodies) {
  ScriptedServer server(
      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
       "9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\n\r\n",
       "HTTP/1.1 429 Too Many\r\nContent-Length: 31\r\n\r\n{\"error\":{\"message\":\"it's "
       "full\"}}"});
  HttpClient client(server.url());
  std::vector<std::string> events;
  const auto collect = [&](std::string_view data) {
    events.emplace_back(data);
    return true;
  };
  auto reply = client.PostStream("/s", "{}", kTimeoutMs, collect);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_THAT(events, ElementsAre("a", "b"));
  reply = client.PostStream("/s", "{}", kTimeoutMs, collect);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->status, 429);
  EXPECT_THAT(reply->ErrorText(), HasSubstr("HTTP 429"));
  EXPECT_EQ(events.size(), 2u);
}

TEST(HttpClientTest, ReconnectsWhenTheServerClosedAKeptConnection) {
  const std::string ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
  ScriptedServer server({ok, ok});  // closes after each
  HttpClient client(server.url());
  ASSERT_TRUE(client.Get("/1", kTimeoutMs).ok());
  const auto second = client.Get("/2", kTimeoutMs);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->body, "ok");
}

TEST(HttpClientTest, BrokenStreamIsAnError) {
  ScriptedServer server({"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\ndata: a\n\n"});
  HttpClient client(server.url());
  const auto reply =
      client.PostStream("/s", "{}", kTimeoutMs, [](std::string_view) { return true; });
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kUnavailable);
}

TEST(HttpClientTest, NobodyListensAndWrongProtocolAreToldApart) {
  Url nobody;
  {
    ScriptedServer server({});
    nobody = server.url();
  }
  EXPECT_EQ(HttpClient(nobody).Get("/", kTimeoutMs).status().code(),
            absl::StatusCode::kUnavailable);

  ScriptedServer grpc({std::string("\0\0\x12\x04\0\0\0\0\0\0", 10)});
  const auto reply = HttpClient(grpc.url()).Get("/", kTimeoutMs);
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(reply.status().message()), HasSubstr("gRPC port"));
}

TEST(HttpClientTest, SilenceEndsAtTheTimeout) {
  ScriptedServer server({""}, /*hold=*/true);
  HttpClient client(server.url());
  EXPECT_EQ(client.Get("/", 50).status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(HttpClientTest, CancelDescriptorEndsACall) {
  ScriptedServer server({"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"}, /*hold=*/true);
  const int cancel = eventfd(0, EFD_CLOEXEC);
  {
    HttpClient client(server.url(), "", cancel);
    std::thread canceller([&] {
      const uint64_t one = 1;
      EXPECT_EQ(write(cancel, &one, sizeof(one)), static_cast<ssize_t>(sizeof(one)));
    });
    EXPECT_EQ(client.Get("/", kTimeoutMs).status().code(), absl::StatusCode::kCancelled);
    canceller.join();
  }
  close(cancel);
}

TEST(HttpClientTest, EndlessHeadersAreRefused) {
  std::string script = "HTTP/1.1 200 OK\r\n";
  for (int i = 0; i < 2000; ++i)
    script += "X-" + std::to_string(i) + ": " + std::string(60, 'y') + "\r\n";
  ScriptedServer server({script}, /*hold=*/true);
  HttpClient client(server.url());
  EXPECT_EQ(client.Get("/", kTimeoutMs).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(HttpClientTest, LinesComeWholeWhereverTheNetworkCutThem) {
  const std::string head =
      "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (const bool dribble : {false, true}) {
    ScriptedServer server({head + "6\r\n{}\n\n{\"\r\n6\r\na\":1}\n\r\n0\r\n\r\n"}, false, dribble);
    HttpClient client(server.url());
    std::vector<std::string> lines;
    const auto reply = client.PostLines("/x", "{}", kTimeoutMs, [&lines](std::string_view line) {
      lines.emplace_back(line);
      return true;
    });
    ASSERT_TRUE(reply.ok()) << reply.status();
    EXPECT_THAT(lines, ElementsAre("{}", "{\"a\":1}"));
  }
  ScriptedServer refusing({"HTTP/1.1 409 Conflict\r\nContent-Length: 3\r\n\r\nno\n"});
  HttpClient client(refusing.url());
  const auto reply = client.PostLines("/x", "{}", kTimeoutMs, [](std::string_view) {
    ADD_FAILURE() << "a refusal is no line";
    return true;
  });
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->status, 409);
  EXPECT_EQ(reply->body, "no\n");
}

}  // namespace
}  // namespace strait::cli
