// SPDX-License-Identifier: Apache-2.0
//
// Defends: no bytes that a client sends crash the server or leave it without an answer: random
// bodies, and good requests with random damage, get 200 or a 4xx in OpenAI's shape; random bytes on
// a connection get a 4xx and nothing else.
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "coordinator/http/server.h"
#include "tests/coordinator/http/api_fixture.h"
#include "tests/coordinator/http/test_client.h"

namespace strait {
namespace {

// Repeat a failure with STRAIT_TEST_SEED.
unsigned Seed() {
  const char* given = std::getenv("STRAIT_TEST_SEED");
  return given ? static_cast<unsigned>(std::strtoul(given, nullptr, 10)) : 20240611u;
}

using Random = std::mt19937;

size_t Below(Random& random, size_t bound) { return random() % bound; }

std::string RandomBytes(Random& random, size_t max_size) {
  std::string bytes(Below(random, max_size) + 1, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

// One to four damages: a byte changed, put in or taken out, a piece doubled, or a tempting token
// put in.
std::string Damage(Random& random, std::string text) {
  static const char* const kTempting[] = {"null",
                                          "-1",
                                          "1e999",
                                          "[]",
                                          "{}",
                                          "\"\"",
                                          "true",
                                          "NaN",
                                          "1.5",
                                          "[[",
                                          "\\u0",
                                          "\r\n",
                                          "\xff",
                                          "\xed\xa0\x80",
                                          "\0",
                                          ",",
                                          ":",
                                          "\"",
                                          "999999999999999999999"};
  for (size_t i = Below(random, 4) + 1; i > 0 && !text.empty(); --i) {
    const size_t at = Below(random, text.size());
    switch (random() % 5) {
      case 0:
        text[at] = static_cast<char>(random());
        break;
      case 1:
        text.insert(at, 1, static_cast<char>(random()));
        break;
      case 2:
        text.erase(at, Below(random, 8) + 1);
        break;
      case 3:
        text.insert(at, text.substr(Below(random, text.size()), Below(random, 30)));
        break;
      default:
        text.insert(at, kTempting[Below(random, std::size(kTempting))]);
    }
  }
  return text;
}

// A good body of each kind, and the route that takes it.
struct GoodBody {
  const char* path;
  const char* body;
};
const GoodBody kGoodBodies[] = {
    {"/v1/completions",
     R"({"model": "test-model", "prompt": ["ab", "c"], "n": 2, "max_tokens": 3, "logprobs": 2, "echo": true,
        "stream": true, "stream_options": {"include_usage": true}, "seed": 12, "temperature": 0.5})"},
    {"/v1/completions",
     R"({"prompt": [[1, 2], [3]], "stop": ["b", "cd"], "stop_token_ids": [5], "logit_bias": {"7": -1.5},
        "top_k": 3, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "ignore_eos": true, "min_tokens": 1, "return_token_ids": true})"},
    {"/v1/chat/completions",
     R"({"messages": [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}]}], "logprobs": true,
        "top_logprobs": 3, "max_completion_tokens": 4, "stream": true, "tools": null})"},
    {"/tokenize", R"({"prompt": "a", "add_special_tokens": true, "return_token_strs": true})"},
    {"/detokenize", R"({"tokens": [256, 104, 195, 169]})"},
};

class FuzzTest : public ApiTest {
 protected:
  void CheckAnswer(RecordingResponder& responder) {
    if (responder.stream_head) {
      EXPECT_TRUE(responder.stream_ended);
      for (const auto& event : responder.Events()) {
        if (event.data != "[DONE]") event.Json();
      }
      return;
    }
    ASSERT_TRUE(responder.sent);
    const int status = responder.sent->status;
    EXPECT_TRUE(status == 200 || (status >= 400 && status < 500)) << status;
    const json::Value body = responder.Json();
    if (status != 200) {
      EXPECT_TRUE(body.at("error").at("message").is_string());
    }
  }
};

TEST_F(FuzzTest, BodiesAreAnsweredOrRefused) {
  const unsigned seed = Seed();
  SCOPED_TRACE("STRAIT_TEST_SEED=" + std::to_string(seed));
  Random random(seed);
  const char* const paths[] = {"/v1/completions", "/v1/chat/completions", "/tokenize",
                               "/detokenize"};
  size_t good = 0, bad = 0;
  for (int i = 0; i < 20000; ++i) {
    const GoodBody& origin = kGoodBodies[Below(random, std::size(kGoodBodies))];
    const char* path = random() % 8 == 0 ? paths[Below(random, 4)] : origin.path;
    const std::string body =
        random() % 10 == 0 ? RandomBytes(random, 200) : Damage(random, origin.body);
    SCOPED_TRACE("request " + std::to_string(i));
    const auto responder = Call("POST", path, body);
    CheckAnswer(*responder);
    (responder->sent && responder->sent->status != 200 ? bad : good) += 1;
    responder->Forget();
    responders_.clear();
    if (HasFailure()) FAIL() << path << " " << body;
  }
  // Both kinds must have been seen, or this test tests nothing.
  EXPECT_GT(good, 500u);
  EXPECT_GT(bad, 1000u);
}

TEST_F(FuzzTest, BytesOnAConnectionAreAnsweredOrRefused) {
  const unsigned seed = Seed();
  SCOPED_TRACE("STRAIT_TEST_SEED=" + std::to_string(seed));
  Random random(seed);
  HttpServerOptions options;
  options.header_timeout = options.stall_timeout = std::chrono::milliseconds(20);
  options.linger_timeout = std::chrono::milliseconds(20);
  auto handler = std::make_shared<OpenAiHandler>(OpenAiOptions{TestModel(), {}}, &engine_);
  HttpServer server(options, handler);
  ASSERT_TRUE(server.Listen().ok());
  engine_.Run();
  for (int i = 0; i < 600; ++i) {
    std::string bytes = RandomBytes(random, 300);
    if (random() % 4 != 0) {
      bytes =
          Damage(random, random() % 2 ? TestClient::Get("/v1/models", "X-A: b\r\nAccept: */*\r\n")
                                      : TestClient::Post("/v1/completions", kGoodBodies[0].body));
    }
    SCOPED_TRACE("connection " + std::to_string(i));
    TestClient client(server.port());
    client.Send(bytes);
    const auto response = client.Read();
    // A line end alone is no request: the connection may just be closed.
    if (bytes.find_first_not_of("\r\n") == std::string::npos) continue;
    EXPECT_TRUE(response.status == 200 || (response.status >= 400 && response.status < 500))
        << response.status << " to " << bytes;
    if (HasFailure()) break;
  }
  TestClient client(server.port());
  EXPECT_EQ(client.Call(TestClient::Get("/livez")).status, 200);
  server.Stop(std::chrono::milliseconds(0));
  engine_.StopThread();
  engine_.StepAll();
}

}  // namespace
}  // namespace strait
