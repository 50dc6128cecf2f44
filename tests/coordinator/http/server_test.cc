// SPDX-License-Identifier: Apache-2.0
//
// Defends: the server answers every connection, however it behaves, in bounded memory and time;
// answers come in the order of the requests; a client that goes away, stalls or does not read costs
// nobody else anything and has its request cancelled; stopping ends what runs.
#include "coordinator/http/server.h"

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "coordinator/http/openai.h"
#include "gtest/gtest.h"
#include "tests/coordinator/http/byte_tokenizer.h"
#include "tests/coordinator/http/fake_engine.h"
#include "tests/coordinator/http/recording_responder.h"
#include "tests/coordinator/http/test_client.h"

namespace strait {
namespace {

using std::chrono::milliseconds;

// Long enough for a loaded machine; only a failure waits so long.
bool Eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 20000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return false;
}

class ServerTest : public ::testing::Test {
 protected:
  void Start() {
    handler_ = std::make_shared<OpenAiHandler>(OpenAiOptions{TestModel(), {}}, &engine_);
    server_ = std::make_unique<HttpServer>(options_, handler_);
    const absl::Status listening = server_->Listen("127.0.0.1", 0);
    ASSERT_TRUE(listening.ok()) << listening;
    ASSERT_NE(server_->port(), 0);
  }
  void TearDown() override {
    server_.reset();
    // The engine's thread goes on with requests that nobody waits for.
    engine_.StopThread();
    engine_.StepAll();
  }
  uint16_t port() const { return server_->port(); }

  static std::string Completion(const std::string& members) {
    return TestClient::Post("/v1/completions", "{\"prompt\": \"x\", " + members + "}");
  }
  static void ExpectError(const TestClient::Response& response, int status) {
    EXPECT_EQ(response.status, status) << response.head << response.body;
    EXPECT_TRUE(response.complete);
    const auto body = json::Parse(response.body, "error");
    ASSERT_TRUE(body.ok()) << body.status() << response.body;
    EXPECT_TRUE(body->at("error").at("message").is_string());
  }

  FakeEngine engine_;
  HttpServerOptions options_;
  std::shared_ptr<OpenAiHandler> handler_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(ServerTest, KeepAliveServesOneRequestAfterTheOther) {
  Start();
  engine_.Run();
  TestClient client(port());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(client.Call(TestClient::Get("/livez")).status, 200);
    const auto response = client.Call(Completion("\"max_tokens\": 3"));
    EXPECT_EQ(response.status, 200);
    EXPECT_NE(response.body.find("\"text\":\"abc\""), std::string::npos) << response.body;
    const auto stream = client.Call(Completion("\"max_tokens\": 3, \"stream\": true"));
    EXPECT_EQ(stream.status, 200);
    EXPECT_EQ(RecordingResponder::ParseEvents(stream.body).size(), 4u) << stream.body;
  }
  EXPECT_EQ(server_->num_connections(), 1u);
}

TEST_F(ServerTest, PipelinedRequestsAreAnsweredInOrder) {
  Start();
  engine_.Run(std::chrono::microseconds(200));
  TestClient client(port());
  std::string requests;
  for (int i = 1; i <= 40; ++i) {
    requests += Completion("\"max_tokens\": " + std::to_string(i % 5 + 1) +
                           (i % 2 ? ", \"stream\": true" : ""));
    requests += TestClient::Get("/livez") + "\r\n";
    requests += TestClient::Get("/nothing/" + std::to_string(i));
  }
  // The client writes while it reads: the server does not read ahead without bound.
  std::thread writer([&] { EXPECT_TRUE(client.Send(requests)); });
  for (int i = 1; i <= 40; ++i) {
    const auto response = client.Read();
    EXPECT_EQ(response.status, 200);
    const std::string last(1, static_cast<char>('a' + i % 5));
    EXPECT_NE(
        response.body.find(i % 2 ? "\"text\":\"" + last : "abcde"[i % 5] + std::string("\",")),
        std::string::npos)
        << response.body;
    EXPECT_EQ(client.Read().status, 200);
    const auto missing = client.Read();
    EXPECT_EQ(missing.status, 404);
    EXPECT_NE(missing.body.find("/nothing/" + std::to_string(i) + " "), std::string::npos);
  }
  writer.join();
}

TEST_F(ServerTest, RequestsMayComeByteByByte) {
  Start();
  engine_.Run();
  TestClient client(port());
  const std::string request =
      "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
      "8\r\n{\"prompt\r\n1a\r\n\": \"hi\", \"max_tokens\": 2} \r\n0\r\n\r\n";
  for (const char c : request) ASSERT_TRUE(client.Send(std::string(1, c)));
  const auto response = client.Read();
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_NE(response.body.find("\"text\":\"ab\""), std::string::npos);
}

TEST_F(ServerTest, LargeRequestsGoThroughThePool) {
  engine_.context = 200000;
  Start();
  engine_.Run();
  TestClient client(port());
  const std::string body = "{\"max_tokens\": 1, \"prompt\": \"" + std::string(100000, 'a') + "\"}";
  const auto response = client.Call(TestClient::Post("/v1/completions", body));
  EXPECT_EQ(response.status, 200);
  EXPECT_NE(response.body.find("\"prompt_tokens\":100001"), std::string::npos) << response.body;
}

TEST_F(ServerTest, MalformedRequestsGetAnErrorAndAreClosed) {
  Start();
  const struct {
    const char* request;
    int status;
  } cases[] = {
      {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n", 400},
      {"GET\r\n\r\n", 400},
      {"GET / HTTP/9.9\r\n\r\n", 400},
      {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: x\r\nbad name : 1\r\n\r\n", 400},
      {"GET /livez HTTP/1.1\r\n\r\n", 400},  // no Host
      {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: "
       "chunked\r\n\r\n0\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400},
      {"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 411},
      {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: tea\r\n\r\n", 417},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.request);
    TestClient client(port());
    const auto response = client.Call(c.request);
    ExpectError(response, c.status);
    EXPECT_NE(response.head.find("Connection: close"), std::string::npos);
    EXPECT_TRUE(client.ReadToEnd());
  }
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
}

TEST_F(ServerTest, OversizedHeadersAndBodies) {
  options_.max_body_bytes = 1000;
  options_.max_header_bytes = 2000;
  Start();
  {
    TestClient client(port());
    ExpectError(client.Call(TestClient::Get("/livez", "X: " + std::string(3000, 'x') + "\r\n")),
                431);
  }
  {
    TestClient client(port());  // headers without end
    ASSERT_TRUE(client.Send("GET / HTTP/1.1\r\nHost: x\r\nX: "));
    client.Send(std::string(5000, 'x'));
    ExpectError(client.Read(), 431);
  }
  {
    TestClient client(port());  // announced
    ExpectError(
        client.Call("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n"),
        413);
  }
  {
    TestClient client(port());  // sent whole before the answer is read
    ExpectError(client.Call(TestClient::Post("/v1/completions", std::string(5'000'000, ' '))), 413);
  }
  {
    TestClient client(port());  // in chunks
    ExpectError(
        client.Call("POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                    "400\r\n" +
                    std::string(1024, ' ') + "\r\n0\r\n\r\n"),
        413);
  }
  // Chunk extensions and trailers without end: the parser itself knows no limit for them, and a read
  // buffer that outgrew its bound once ended the process.
  for (const char* before_flood : {"5;x=", "0\r\nX: "}) {
    TestClient client(port());
    ASSERT_TRUE(client.Send(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"));
    ASSERT_TRUE(client.Send(before_flood));
    for (int i = 0; i < 200 && client.Send(std::string(4096, 'x')); ++i) {
    }
    ExpectError(client.Read(), 400);
  }
  TestClient client(port());
  EXPECT_EQ(client.Call(TestClient::Post("/tokenize", "{\"prompt\": \"a\"}")).status, 200);
}

TEST_F(ServerTest, ExpectContinue) {
  Start();
  TestClient client(port());
  ASSERT_TRUE(client.Send(
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n"));
  ASSERT_TRUE(client.ReadUntil("HTTP/1.1 100 Continue\r\n\r\n"));
  ASSERT_TRUE(client.Send("{\"prompt\": \"a\"}"));
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(ServerTest, Http10) {
  Start();
  engine_.Run();
  const std::string body = "{\"prompt\": \"x\", \"max_tokens\": 2, \"stream\": true}";
  TestClient client(port());
  const auto response = client.Call("POST /v1/completions HTTP/1.0\r\nContent-Length: " +
                                    std::to_string(body.size()) + "\r\n\r\n" + body);
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.head.find("chunked"), std::string::npos);
  EXPECT_EQ(RecordingResponder::ParseEvents(response.body).back().data, "[DONE]");
}

TEST_F(ServerTest, HeadHasNoBody) {
  Start();
  TestClient client(port());
  ASSERT_TRUE(client.Send("HEAD /version HTTP/1.1\r\nHost: x\r\n\r\n" + TestClient::Get("/livez")));
  ASSERT_TRUE(client.ReadUntil("\r\n\r\nHTTP/1.1 200 OK\r\n"));
}

TEST_F(ServerTest, AClientThatGoesAwayWhileStreamingCancels) {
  engine_.context = 1 << 20;
  Start();
  engine_.Run(std::chrono::microseconds(500));
  for (const bool reset : {false, true}) {
    const size_t before = engine_.cancelled().size();
    TestClient client(port());
    client.Send(Completion("\"max_tokens\": 1000000, \"stream\": true"));
    ASSERT_TRUE(client.ReadUntil("\"text\":\"c\""));
    reset ? client.Reset() : client.Close();
    EXPECT_TRUE(Eventually([&] { return engine_.cancelled().size() > before; }));
    EXPECT_TRUE(Eventually([&] { return engine_.num_live() == 0; }));
  }
}

TEST_F(ServerTest, AClientThatGoesAwayWhileWaitingCancels) {
  engine_.generate = false;
  Start();
  engine_.Run();
  for (const char* stream : {"true", "false"}) {
    const size_t before = engine_.cancelled().size();
    TestClient client(port());
    client.Send(Completion(std::string("\"stream\": ") + stream));
    ASSERT_TRUE(Eventually([&] { return engine_.num_live() == 1; }));
    client.Close();
    EXPECT_TRUE(Eventually([&] { return engine_.cancelled().size() > before; }));
    EXPECT_TRUE(Eventually([&] { return engine_.num_live() == 0; }));
  }
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
}

TEST_F(ServerTest, AClientThatGoesAwayInTheQueueIsCancelledOnAdmission) {
  engine_.admit = false;
  Start();
  TestClient client(port());
  client.Send(Completion("\"stream\": true"));
  ASSERT_TRUE(Eventually([&] { return engine_.num_live() == 1; }));
  client.Close();
  ASSERT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
  engine_.admit = true;
  engine_.Step();
  EXPECT_TRUE(Eventually([&] { return engine_.cancelled().size() == 1; }));
}

TEST_F(ServerTest, ASlowReaderIsCutOffWithinBoundedMemory) {
  options_.max_output_bytes = 64 << 10;
  options_.send_buffer_bytes = 16 << 10;
  engine_.context = 1 << 24;
  Start();
  engine_.Run();
  TestClient client(port(), 4 << 10);
  client.Send(Completion("\"max_tokens\": 10000000, \"stream\": true"));
  // It never reads. Others are served meanwhile.
  ASSERT_TRUE(Eventually([&] { return engine_.cancelled().size() == 1; }));
  EXPECT_TRUE(Eventually([&] { return engine_.num_live() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
  TestClient other(port());
  EXPECT_EQ(other.Call(Completion("\"max_tokens\": 2")).status, 200);
  EXPECT_TRUE(client.ReadToEnd());
  EXPECT_EQ(client.unread().find("[DONE]"), std::string::npos);
}

TEST_F(ServerTest, AClientThatStopsReadingIsCutOffAfterTheDeadline) {
  options_.max_output_bytes = 1 << 30;  // so that only the deadline can
  options_.send_buffer_bytes = 16 << 10;
  options_.write_timeout = milliseconds(200);
  engine_.context = 1 << 24;
  Start();
  engine_.Run(std::chrono::microseconds(20));
  TestClient client(port(), 4 << 10);
  client.Send(Completion("\"max_tokens\": 10000000, \"stream\": true"));
  ASSERT_TRUE(Eventually([&] { return engine_.cancelled().size() == 1; }));
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
}

TEST_F(ServerTest, StalledSendersAreAnswered408) {
  options_.header_timeout = milliseconds(100);
  options_.stall_timeout = milliseconds(100);
  Start();
  for (const char* begin :
       {"GET /live", "POST /tokenize HTTP/1.1\r\nHost: x\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        "POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"}) {
    SCOPED_TRACE(begin);
    TestClient client(port());
    ExpectError(client.Call(begin), 408);
    EXPECT_TRUE(client.ReadToEnd());
  }
}

TEST_F(ServerTest, ABodyThatTricklesIsAnswered408) {
  options_.body_timeout = milliseconds(300);
  Start();
  TestClient client(port());
  client.Send("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n");
  std::atomic<bool> done{false};
  std::thread sender([&] {
    while (!done && client.Send(" ")) std::this_thread::sleep_for(milliseconds(10));
  });
  const auto response = client.Read();
  done = true;
  sender.join();
  ExpectError(response, 408);
}

TEST_F(ServerTest, IdleConnectionsAreClosed) {
  options_.idle_timeout = milliseconds(100);
  options_.header_timeout = milliseconds(100);  // for a connection that never asks for anything
  Start();
  TestClient fresh(port()), used(port());
  EXPECT_EQ(used.Call(TestClient::Get("/livez")).status, 200);
  EXPECT_TRUE(fresh.ReadToEnd());
  EXPECT_TRUE(used.ReadToEnd());
  EXPECT_EQ(fresh.unread() + used.unread(), "") << "closed without a word";
}

TEST_F(ServerTest, ConnectionsAreBounded) {
  options_.max_connections = 3;
  Start();
  std::vector<std::unique_ptr<TestClient>> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(std::make_unique<TestClient>(port()));
    EXPECT_EQ(clients.back()->Call(TestClient::Get("/livez")).status, 200);
  }
  {
    TestClient extra(port());
    const auto response = extra.Call(TestClient::Get("/livez"));
    ExpectError(response, 503);
    EXPECT_NE(response.head.find("Retry-After: "), std::string::npos);
    EXPECT_TRUE(extra.ReadToEnd());
  }
  clients.pop_back();
  ASSERT_TRUE(Eventually([&] { return server_->num_connections() == 2; }));
  TestClient again(port());
  EXPECT_EQ(again.Call(TestClient::Get("/livez")).status, 200);
}

TEST_F(ServerTest, SilenceInAStreamIsPinged) {
  options_.ping_interval = milliseconds(30);
  engine_.generate = false;
  Start();
  engine_.Run();
  TestClient client(port());
  client.Send(Completion("\"stream\": true"));
  EXPECT_TRUE(client.ReadUntil(": ping\n\n\r\n8\r\n: ping\n\n")) << "at least two";
}

TEST_F(ServerTest, RefusalsOfTheEngineAreStatuses) {
  engine_.refusal = absl::ResourceExhaustedError("the queue is full");
  Start();
  engine_.Run();
  TestClient client(port());
  auto response = client.Call(Completion("\"stream\": true"));
  ExpectError(response, 429);
  EXPECT_NE(response.head.find("Retry-After: 1\r\n"), std::string::npos);
  response = client.Call(TestClient::Post("/v1/completions", "{"));
  ExpectError(response, 400);
}

TEST_F(ServerTest, ManyStreamsAtOnce) {
  Start();
  engine_.Run();
  constexpr int kClients = 64;
  constexpr int kRequests = 5;
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      TestClient client(port());
      for (int r = 0; r < kRequests; ++r) {
        const int tokens = 1 + (c * 7 + r * 13) % 60;
        const auto response = client.Call(
            Completion("\"n\": 2, \"stream\": true, \"max_tokens\": " + std::to_string(tokens)));
        if (response.status != 200 || !response.complete) continue;
        std::string texts[2];
        for (const auto& event : RecordingResponder::ParseEvents(response.body)) {
          if (event.data == "[DONE]") continue;
          const json::Value chunk = event.Json();
          const json::Value& choice = chunk.at("choices").at(0);
          texts[choice.at("index").as_int64()] += json::View(choice.at("text").as_string());
        }
        std::string wanted;
        for (int i = 0; i < tokens; ++i) wanted += static_cast<char>('a' + i % 26);
        if (texts[0] == wanted && texts[1] == wanted) ++good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, kClients * kRequests);
  EXPECT_TRUE(engine_.cancelled().empty());
}

TEST_F(ServerTest, StopLetsRunningRequestsEnd) {
  Start();
  engine_.Run(std::chrono::microseconds(2000));
  TestClient client(port()), idle(port());
  client.Send(Completion("\"max_tokens\": 50, \"stream\": true"));
  ASSERT_TRUE(client.ReadUntil("\"text\":\"b\""));
  std::thread stop([&] { server_->Stop(milliseconds(20000)); });
  EXPECT_TRUE(idle.ReadToEnd());
  EXPECT_TRUE(client.ReadUntil("[DONE]"));
  EXPECT_TRUE(client.ReadToEnd());
  client.Close();
  stop.join();
  EXPECT_EQ(server_->num_connections(), 0u);
}

TEST_F(ServerTest, StopEndsStreamsThatTakeTooLong) {
  engine_.context = 1 << 24;
  Start();
  engine_.Run(std::chrono::microseconds(500));
  TestClient stream(port()), whole(port());
  stream.Send(Completion("\"max_tokens\": 10000000, \"stream\": true"));
  whole.Send(Completion("\"max_tokens\": 10000000"));
  ASSERT_TRUE(stream.ReadUntil("\"text\":\"b\""));
  ASSERT_TRUE(Eventually([&] { return engine_.num_live() == 2; }));
  std::thread stop([&] { server_->Stop(milliseconds(100)); });
  EXPECT_TRUE(stream.ReadToEnd());
  EXPECT_NE(stream.unread().find("the server is stopping"), std::string::npos);
  ExpectError(whole.Read(), 503);
  stream.Close();
  whole.Close();
  stop.join();
  EXPECT_EQ(engine_.cancelled().size(), 2u);
}

TEST_F(ServerTest, ATakenPortIsAnErrorThatNamesIt) {
  Start();
  HttpServer other(options_, handler_);
  const absl::Status status = other.Listen("127.0.0.1", port());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find(std::to_string(port())), absl::string_view::npos);
  HttpServer nowhere(options_, handler_);
  EXPECT_EQ(nowhere.Listen("no.such.host.invalid", 0).code(), absl::StatusCode::kInvalidArgument);
}

// A handler that never answers, or forgets its client.
class BadHandler : public HttpHandler {
 public:
  void Handle(HttpRequest request, std::shared_ptr<Responder> responder) override {
    if (request.path == "/stream") responder->StartStream({}, "");
    if (request.path == "/twice") {
      responder->Send({});
      responder->Send({});
      responder->Write("x");
      responder->EndStream();
    }
  }
  void OnRejected(int) override {}
};

TEST(ServerHandlerTest, ARequestThatTheHandlerDropsIsAnswered) {
  HttpServer server({}, std::make_shared<BadHandler>());
  ASSERT_TRUE(server.Listen().ok());
  TestClient client(server.port());
  EXPECT_EQ(client.Call(TestClient::Get("/drop")).status, 500);
  EXPECT_EQ(client.Call(TestClient::Get("/twice")).status, 200);
  EXPECT_EQ(client.Call(TestClient::Get("/twice")).status, 200);
  client.Send(TestClient::Get("/stream"));
  EXPECT_TRUE(client.ReadToEnd());
}

}  // namespace
}  // namespace strait
