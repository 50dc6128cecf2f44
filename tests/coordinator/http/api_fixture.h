// SPDX-License-Identifier: Apache-2.0
//
// ApiTest calls the API as the server would, without a socket, over a FakeEngine.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "coordinator/http/openai.h"
#include "gtest/gtest.h"
#include "proto/base/json.h"
#include "tests/coordinator/http/byte_tokenizer.h"
#include "tests/coordinator/http/fake_engine.h"
#include "tests/coordinator/http/recording_responder.h"

namespace strait {

// Comparable, and printable by GoogleTest, which a json::Value is not.
inline std::string ToText(const json::Value& value) { return boost::json::serialize(value); }

class ApiTest : public ::testing::Test {
 protected:
  void SetUp() override { Use(TestModel()); }
  void TearDown() override {
    for (auto& responder : responders_) responder->Forget();
  }

  void Use(ServedModel model, std::vector<std::string> keys = {}, std::string operator_key = "") {
    handler_ = std::make_unique<OpenAiHandler>(
        OpenAiOptions{std::move(model), std::move(keys), std::move(operator_key)}, &engine_);
  }

  // Gives the request to the API; whatever the engine has to do is left to the caller.
  std::shared_ptr<RecordingResponder> Begin(std::string method, std::string path,
                                            std::string body = "", HttpHeaders headers = {}) {
    auto responder = std::make_shared<RecordingResponder>();
    responders_.push_back(responder);
    handler_->Handle({std::move(method), std::move(path), std::move(headers), std::move(body)},
                     responder);
    responder->RunPosts();
    return responder;
  }
  std::shared_ptr<RecordingResponder> Call(std::string method, std::string path,
                                           std::string body = "", HttpHeaders headers = {}) {
    auto responder = Begin(std::move(method), std::move(path), std::move(body), std::move(headers));
    // Posts run between the steps: every token is a chunk of its own, as it comes.
    for (int i = 0; i < 1000 && !responder->answered(); ++i) {
      engine_.Step();
      responder->RunPosts();
    }
    EXPECT_TRUE(responder->answered());
    engine_.StepAll();
    responder->RunPosts();
    EXPECT_EQ(engine_.num_live(), 0u);
    return responder;
  }
  std::shared_ptr<RecordingResponder> Complete(std::string body) {
    return Call("POST", "/v1/completions", std::move(body));
  }
  std::shared_ptr<RecordingResponder> Chat(std::string body) {
    return Call("POST", "/v1/chat/completions", std::move(body));
  }

  // The refusal of a request: its status, and OpenAI's shape.
  void ExpectError(const RecordingResponder& responder, int status, const std::string& param,
                   const std::string& in_message, const std::string& body) {
    SCOPED_TRACE(body);
    ASSERT_TRUE(responder.sent);
    EXPECT_EQ(responder.sent->status, status) << responder.sent->body;
    const json::Value json = responder.Json();
    ASSERT_TRUE(json.is_object() && json.at("error").is_object()) << responder.sent->body;
    const json::Object& error = json.at("error").get_object();
    EXPECT_EQ(error.size(), 4u);
    EXPECT_TRUE(error.at("message").is_string() && error.at("type").is_string());
    const json::Value& given = error.at("param");
    EXPECT_EQ(given.is_null() ? "" : std::string(json::View(given.get_string())), param)
        << responder.sent->body;
    EXPECT_NE(responder.sent->body.find(in_message), std::string::npos) << responder.sent->body;
  }

  FakeEngine engine_;
  std::unique_ptr<OpenAiHandler> handler_;
  std::vector<std::shared_ptr<RecordingResponder>> responders_;
};

}  // namespace strait
