// SPDX-License-Identifier: Apache-2.0
//
// Defends: an answer says exactly what the engine generated, the same in a stream and whole; a
// stream has one chunk a token, whole characters, no part of a stop string, and ends as clients
// expect; whoever no longer wants tokens has them cancelled.
#include "tests/coordinator/http/api_fixture.h"

namespace strait {
namespace {

using Events = std::vector<RecordingResponder::Event>;

class CompletionTest : public ApiTest {
 protected:
  // The choices of a stream: texts joined, and their finish reasons.
  struct Joined {
    std::string text;
    std::string finish;
    int chunks = 0;
  };
  static std::vector<Joined> Join(const Events& events, size_t num_choices, bool chat) {
    std::vector<Joined> joined(num_choices);
    for (const auto& event : events) {
      if (event.data == "[DONE]") continue;
      const json::Value chunk = event.Json();
      for (const json::Value& choice : chunk.at("choices").as_array()) {
        Joined& j = joined.at(static_cast<size_t>(choice.at("index").as_int64()));
        const json::Value& text = chat ? choice.at("delta").at("content") : choice.at("text");
        EXPECT_TRUE(j.finish.empty()) << "a chunk after the last one";
        j.text += json::View(text.as_string());
        if (choice.at("finish_reason").is_string()) {
          j.finish = json::View(choice.at("finish_reason").as_string());
        }
        ++j.chunks;
      }
    }
    return joined;
  }
  static std::string Text(const json::Value& answer, size_t choice = 0) {
    return std::string(json::View(answer.at("choices").at(choice).at("text").as_string()));
  }
  static std::vector<TokenId> Bytes(std::string_view text) {
    std::vector<TokenId> ids;
    for (const unsigned char c : text) ids.push_back(c);
    return ids;
  }
};

TEST_F(CompletionTest, WholeCompletion) {
  const json::Value answer = Complete(R"({"prompt": "hey", "max_tokens": 4})")->Json();
  EXPECT_EQ(answer.at("object").as_string(), "text_completion");
  EXPECT_EQ(answer.at("model").as_string(), "test-model");
  EXPECT_TRUE(answer.at("created").is_int64());
  EXPECT_EQ(answer.at("id").as_string().find("cmpl-"), 0u);
  ASSERT_EQ(answer.at("choices").as_array().size(), 1u);
  const json::Object& choice = answer.at("choices").at(0).as_object();
  EXPECT_EQ(choice.at("index").as_int64(), 0);
  EXPECT_EQ(choice.at("text").as_string(), "abcd");
  EXPECT_EQ(choice.at("finish_reason").as_string(), "length");
  EXPECT_TRUE(choice.at("logprobs").is_null());
  EXPECT_FALSE(choice.contains("token_ids"));
  EXPECT_EQ(ToText(answer.at("usage")),
            R"({"prompt_tokens":4,"completion_tokens":4,"total_tokens":8,)"
            R"("prompt_tokens_details":{"cached_tokens":0}})");
  EXPECT_TRUE(engine_.cancelled().empty());
}

TEST_F(CompletionTest, StreamHasOneChunkATokenAndTheLastSaysWhy) {
  const auto responder = Complete(
      R"({"prompt": "hey", "max_tokens": 3, "stream": true, "stream_options": {"include_usage": true}})");
  EXPECT_EQ(responder->stream_head->content_type, "text/event-stream");
  EXPECT_EQ(responder->keepalive, ": ping\n\n");
  const HttpHeaders& headers = responder->stream_head->headers;
  for (const auto& wanted :
       HttpHeaders{{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}) {
    EXPECT_NE(std::find(headers.begin(), headers.end(), wanted), headers.end()) << wanted.first;
  }
  const Events events = responder->Events();
  ASSERT_EQ(events.size(), 5u) << responder->stream;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(events[i].id, std::to_string(4 + i)) << "the token's position";
    const json::Value chunk = events[i].Json();
    EXPECT_EQ(chunk.at("object").as_string(), "text_completion");
    EXPECT_EQ(Text(chunk), std::string(1, static_cast<char>('a' + i)));
    EXPECT_EQ(chunk.at("choices").at(0).at("finish_reason").is_null(), i < 2);
    EXPECT_TRUE(chunk.at("usage").is_null());
  }
  EXPECT_EQ(events[2].Json().at("choices").at(0).at("finish_reason").as_string(), "length");
  const json::Value usage = events[3].Json();
  EXPECT_TRUE(usage.at("choices").as_array().empty());
  EXPECT_EQ(usage.at("usage").at("total_tokens").as_int64(), 7);
  EXPECT_EQ(events[4].data, "[DONE]");
}

TEST_F(CompletionTest, AChunkGoesOutWithItsToken) {
  const auto responder = Begin("POST", "/v1/completions", R"({"prompt": "hey", "stream": true})");
  EXPECT_FALSE(responder->stream_head) << "not admitted yet";
  for (size_t tokens = 1; tokens < 16; ++tokens) {
    engine_.Step();
    responder->RunPosts();
    EXPECT_EQ(responder->Events().size(), tokens);
  }
  engine_.StepAll();
  responder->RunPosts();
  EXPECT_TRUE(responder->stream_ended);
}

TEST_F(CompletionTest, WithoutUsageNoChunkHasIt) {
  const auto responder = Complete(R"({"prompt": "hey", "max_tokens": 3, "stream": true})");
  EXPECT_EQ(responder->stream.find("usage"), std::string::npos);
  EXPECT_EQ(responder->Events().size(), 4u);
}

TEST_F(CompletionTest, WholeChat) {
  const json::Value answer =
      Chat(R"({"messages": [{"role": "user", "content": "hey"}], "max_tokens": 2,
               "logprobs": true, "top_logprobs": 2})")
          ->Json();
  EXPECT_EQ(answer.at("object").as_string(), "chat.completion");
  EXPECT_EQ(answer.at("id").as_string().find("chatcmpl-"), 0u);
  const json::Value& choice = answer.at("choices").at(0);
  EXPECT_EQ(ToText(choice.at("message")), R"({"role":"assistant","content":"ab"})");
  const json::Array& content = choice.at("logprobs").at("content").as_array();
  ASSERT_EQ(content.size(), 2u);
  EXPECT_EQ(content[0].at("token").as_string(), "a");
  EXPECT_EQ(ToText(content[0].at("bytes")), R"([97])");
  EXPECT_EQ(static_cast<float>(content[0].at("logprob").as_double()), FakeEngine::Logprob(0));
  ASSERT_EQ(content[0].at("top_logprobs").as_array().size(), 2u);
  EXPECT_EQ(content[0].at("top_logprobs").at(1).at("token").as_string(), "b");
}

TEST_F(CompletionTest, ChatStream) {
  const auto responder = Chat(
      R"({"messages": [{"role": "user", "content": "hey"}], "max_tokens": 3, "stream": true})");
  const Events events = responder->Events();
  ASSERT_EQ(events.size(), 4u);
  const json::Value first = events[0].Json();
  EXPECT_EQ(first.at("object").as_string(), "chat.completion.chunk");
  EXPECT_EQ(ToText(first.at("choices").at(0).at("delta")), R"({"role":"assistant","content":"a"})");
  EXPECT_EQ(ToText(events[1].Json().at("choices").at(0).at("delta")), R"({"content":"b"})");
  EXPECT_EQ(Join(events, 1, true)[0].text, "abc");
  EXPECT_EQ(events.back().data, "[DONE]");
}

TEST_F(CompletionTest, SeveralPromptsAndChoicesKeepTheirIndexes) {
  const auto responder =
      Complete(R"({"prompt": ["x", "yz"], "n": 2, "max_tokens": 3, "stream": true,
      "return_token_ids": true, "stream_options": {"include_usage": true}})");
  const Events events = responder->Events();
  const auto joined = Join(events, 4, false);
  for (const Joined& choice : joined) {
    EXPECT_EQ(choice.text, "abc");
    EXPECT_EQ(choice.finish, "length");
    EXPECT_EQ(choice.chunks, 3);
  }
  EXPECT_EQ(events[0].id, "0:2");
  EXPECT_EQ(events[2].id, "2:3");
  EXPECT_EQ(ToText(events[2].Json().at("choices").at(0).at("prompt_token_ids")),
            R"([256,121,122])");
  // A prompt counts once, whatever n.
  EXPECT_EQ(events[events.size() - 2].Json().at("usage").at("prompt_tokens").as_int64(), 5);
  EXPECT_EQ(events[events.size() - 2].Json().at("usage").at("completion_tokens").as_int64(), 12);
}

TEST_F(CompletionTest, EosEndsWithoutText) {
  engine_.script = {'h', 'i', kTestEos};
  const json::Value answer =
      Complete(R"({"prompt": "x", "return_token_ids": true, "skip_special_tokens": false})")
          ->Json();
  EXPECT_EQ(Text(answer), "hi");
  const json::Value& choice = answer.at("choices").at(0);
  EXPECT_EQ(choice.at("finish_reason").as_string(), "stop");
  EXPECT_TRUE(choice.at("stop_reason").is_null());
  EXPECT_EQ(ToText(choice.at("token_ids")), R"([104,105,257])");
  EXPECT_EQ(ToText(choice.at("prompt_token_ids")), R"([256,120])");
  EXPECT_EQ(answer.at("usage").at("completion_tokens").as_int64(), 3);
}

TEST_F(CompletionTest, IgnoredEosIsAToken) {
  engine_.script = {'h', kTestEos, 'i'};
  json::Value answer = Complete(R"({"prompt": "x", "max_tokens": 4, "ignore_eos": true})")->Json();
  EXPECT_EQ(Text(answer), "hid") << "special tokens are not shown";
  answer =
      Complete(
          R"({"prompt": "x", "max_tokens": 3, "ignore_eos": true, "skip_special_tokens": false})")
          ->Json();
  EXPECT_EQ(Text(answer), "h<eos>i");
}

TEST_F(CompletionTest, StopTokenIdIsHiddenUnlessAskedFor) {
  json::Value answer = Complete(R"({"prompt": "x", "stop_token_ids": [99]})")->Json();
  EXPECT_EQ(Text(answer), "ab");
  EXPECT_EQ(answer.at("choices").at(0).at("stop_reason").as_int64(), 99);
  answer =
      Complete(R"({"prompt": "x", "stop_token_ids": [99], "include_stop_str_in_output": true})")
          ->Json();
  EXPECT_EQ(Text(answer), "abc");
  // The last token that was asked for may be a stop token as well.
  answer = Complete(R"({"prompt": "x", "stop_token_ids": [99], "max_tokens": 3})")->Json();
  EXPECT_EQ(answer.at("choices").at(0).at("finish_reason").as_string(), "stop");
}

TEST_F(CompletionTest, StopStringEndsTheTextAndCancels) {
  const auto whole = Complete(R"({"prompt": "x", "stop": ["zzz", "def"]})");
  const json::Value answer = whole->Json();
  EXPECT_EQ(Text(answer), "abc");
  EXPECT_EQ(answer.at("choices").at(0).at("finish_reason").as_string(), "stop");
  EXPECT_EQ(answer.at("choices").at(0).at("stop_reason").as_string(), "def");
  EXPECT_EQ(answer.at("usage").at("completion_tokens").as_int64(), 6);
  EXPECT_FALSE(engine_.cancelled().empty());

  const auto stream = Complete(R"({"prompt": "x", "stop": "def", "stream": true})");
  const auto joined = Join(stream->Events(), 1, false);
  EXPECT_EQ(joined[0].text, "abc");
  EXPECT_EQ(joined[0].finish, "stop");
  EXPECT_EQ(joined[0].chunks, 6);
  const json::Value kept =
      Complete(R"({"prompt": "x", "stop": "def", "include_stop_str_in_output": true})")->Json();
  EXPECT_EQ(Text(kept), "abcdef");
}

TEST_F(CompletionTest, WhatOnlyBeganAStopStringIsShown) {
  const auto stream =
      Complete(R"({"prompt": "x", "stop": "cdX", "stream": true, "max_tokens": 4})");
  EXPECT_EQ(Join(stream->Events(), 1, false)[0].text, "abcd");
}

TEST_F(CompletionTest, AStopStringCancelsItsOwnChoice) {
  const auto stream = Complete(R"({"prompt": ["x", "y"], "stop": "c", "stream": true})");
  const auto joined = Join(stream->Events(), 2, false);
  EXPECT_EQ(joined[0].text, "ab");
  EXPECT_EQ(joined[1].text, "ab");
  ASSERT_GE(engine_.cancelled().size(), 2u);
  EXPECT_EQ(engine_.cancelled()[0].second, std::optional<uint32_t>(0));
  EXPECT_EQ(engine_.cancelled()[1].second, std::nullopt) << "with the last choice the request ends";
}

TEST_F(CompletionTest, NeverHalfACharacter) {
  engine_.script = Bytes("é漢😀x");
  const auto stream =
      Complete(R"({"prompt": "x", "max_tokens": 10, "stream": true, "logprobs": 0})");
  const Events events = stream->Events();
  ASSERT_EQ(events.size(), 11u) << "a chunk a token, empty or not";
  EXPECT_EQ(Join(events, 1, false)[0].text, "é漢😀x");
  EXPECT_EQ(Text(events[0].Json()), "");
  EXPECT_EQ(Text(events[1].Json()), "é");
  EXPECT_EQ(events[0].Json().at("choices").at(0).at("logprobs").at("tokens").at(0).as_string(),
            "bytes:\\xc3");
  // Characters, not bytes.
  EXPECT_EQ(events[9].Json().at("choices").at(0).at("logprobs").at("text_offset").at(0).as_int64(),
            3);
  // An end inside a character shows that something is missing.
  const json::Value cut = Complete(R"({"prompt": "x", "max_tokens": 4})")->Json();
  EXPECT_EQ(Text(cut), "é\uFFFD");
}

TEST_F(CompletionTest, EchoWithScores) {
  const json::Value answer =
      Complete(R"({"prompt": "héy", "max_tokens": 0, "echo": true, "logprobs": 2})")->Json();
  EXPECT_EQ(Text(answer), "héy");
  EXPECT_EQ(answer.at("choices").at(0).at("finish_reason").as_string(), "length");
  EXPECT_EQ(answer.at("usage").at("completion_tokens").as_int64(), 0);
  const json::Value& logprobs = answer.at("choices").at(0).at("logprobs");
  EXPECT_EQ(ToText(logprobs.at("tokens")), R"(["<bos>","h","bytes:\\xc3","bytes:\\xa9","y"])");
  EXPECT_EQ(ToText(logprobs.at("text_offset")), R"([0,0,1,1,2])");
  EXPECT_TRUE(logprobs.at("token_logprobs").at(0).is_null());
  EXPECT_TRUE(logprobs.at("top_logprobs").at(0).is_null());
  for (size_t i = 1; i < 5; ++i) {
    EXPECT_EQ(static_cast<float>(logprobs.at("token_logprobs").at(i).as_double()),
              FakeEngine::PromptLogprob(i));
    EXPECT_EQ(logprobs.at("top_logprobs").at(i).as_object().size(), 2u);
  }
  const SequenceSpec spec = engine_.specs()[0].sequences[0];
  EXPECT_TRUE(spec.score_prompt);
  EXPECT_FALSE(spec.want_logprobs);
  EXPECT_EQ(spec.max_tokens, 0u);
}

TEST_F(CompletionTest, EchoOfTokenIdsAndGeneration) {
  const auto whole = Complete(
      R"({"prompt": [256, 104, 105], "max_tokens": 2, "echo": true, "logprobs": 1, "return_token_ids": true})");
  const json::Value answer = whole->Json();
  EXPECT_EQ(Text(answer), "hiab");
  const json::Value& logprobs = answer.at("choices").at(0).at("logprobs");
  EXPECT_EQ(ToText(logprobs.at("tokens")), R"(["<bos>","h","i","a","b"])");
  EXPECT_EQ(ToText(logprobs.at("text_offset")), R"([0,0,1,2,3])");
  EXPECT_EQ(static_cast<float>(logprobs.at("token_logprobs").at(3).as_double()),
            FakeEngine::Logprob(0));
  EXPECT_EQ(ToText(answer.at("choices").at(0).at("token_ids")), R"([97,98])");

  const auto stream = Complete(
      R"({"prompt": [256, 104, 105], "max_tokens": 2, "echo": true, "logprobs": 1, "stream": true})");
  const Events events = stream->Events();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[0].id, "2") << "the prompt's last position";
  EXPECT_EQ(Text(events[0].Json()), "hi");
  EXPECT_EQ(events[1].id, "3");
  EXPECT_EQ(Join(events, 1, false)[0].text, "hiab");
}

TEST_F(CompletionTest, EchoOfATextPromptIsThatText) {
  const json::Value answer =
      Complete(R"({"prompt": ["a <eos> b", "c"], "max_tokens": 1, "echo": true})")->Json();
  EXPECT_EQ(Text(answer, 0), "a <eos> ba");
  EXPECT_EQ(Text(answer, 1), "ca");
}

TEST_F(CompletionTest, TopLogprobsIncludeTheTokenItself) {
  engine_.script = {'q'};
  const json::Value answer = Complete(R"({"prompt": "x", "max_tokens": 1, "logprobs": 0})")->Json();
  const json::Object& top =
      answer.at("choices").at(0).at("logprobs").at("top_logprobs").at(0).as_object();
  ASSERT_EQ(top.size(), 1u);
  EXPECT_TRUE(top.contains("q"));
  const json::Value ids =
      Complete(
          R"({"prompt": "x", "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": true})")
          ->Json();
  EXPECT_EQ(ToText(ids.at("choices").at(0).at("logprobs").at("tokens")), R"(["token_id:113"])");
}

TEST_F(CompletionTest, LogprobsReadBackToTheSameFloat) {
  const std::string body =
      Complete(R"({"prompt": "x", "max_tokens": 9, "logprobs": 0})")->sent->body;
  // 0.1f times 3 is 0.3 in float32, not 0.30000001192092896; times 9 it is the float above 0.9.
  EXPECT_NE(body.find("\"token_logprobs\":[-0.1,-0.2,-0.3,-0.4,-0.5,-0.6,-0.7,-0.8,-0.90000004]"),
            std::string::npos)
      << body;
}

TEST_F(CompletionTest, FailureBeforeTheAnswerHasAStatus) {
  engine_.failure.emplace(2, absl::InternalError("stage 1 is on fire"));
  const auto answer = Complete(R"({"prompt": "x"})");
  ExpectError(*answer, 500, "", "on fire", "");
}

TEST_F(CompletionTest, FailureInAStreamIsAnEvent) {
  engine_.failure.emplace(2, absl::UnavailableError("the pipeline is gone"));
  const auto responder = Complete(R"({"prompt": ["x", "y"], "stream": true})");
  const Events events = responder->Events();
  ASSERT_EQ(events.size(), 5u);
  const json::Value error = events.back().Json();
  EXPECT_EQ(error.at("error").at("type").as_string(), "server_error");
  EXPECT_EQ(error.at("error").at("message").as_string(), "the pipeline is gone");
  EXPECT_TRUE(responder->stream_ended);
  EXPECT_EQ(responder->stream.find("[DONE]"), std::string::npos) << "it is not done";
  EXPECT_FALSE(engine_.cancelled().empty()) << "the other choice must not go on";
}

TEST_F(CompletionTest, AClientThatGoesCancels) {
  for (const char* stream : {"false", "true"}) {
    SCOPED_TRACE(stream);
    const size_t before = engine_.cancelled().size();
    const auto responder = Begin("POST", "/v1/completions",
                                 std::string(R"({"prompt": "x", "stream": )") + stream + "}");
    engine_.Step();
    engine_.Step();
    responder->RunPosts();
    responder->Abandon(AbandonReason::kClientGone);
    ASSERT_EQ(engine_.cancelled().size(), before + 1);
    EXPECT_EQ(engine_.cancelled().back().second, std::nullopt);
    const std::string said = responder->stream;
    engine_.StepAll();
    responder->RunPosts();
    EXPECT_EQ(responder->stream, said);
    EXPECT_FALSE(responder->sent);
  }
  EXPECT_NE(Begin("GET", "/metrics")->sent->body.find("code=\"499\""), std::string::npos);
}

TEST_F(CompletionTest, AClientThatGoesBeforeAdmissionCancelsOnAdmission) {
  const auto responder = Begin("POST", "/v1/completions", R"({"prompt": "x"})");
  responder->Abandon(AbandonReason::kClientGone);
  EXPECT_TRUE(engine_.cancelled().empty()) << "no id is known yet";
  engine_.Step();
  ASSERT_EQ(engine_.cancelled().size(), 1u);
  engine_.StepAll();
  EXPECT_EQ(engine_.num_live(), 0u);
}

TEST_F(CompletionTest, AClientThatGoesWhileTheAdmissionIsUnreadCancels) {
  const auto responder = Begin("POST", "/v1/completions", R"({"prompt": "x"})");
  engine_.Step();  // admitted, but the post has not run
  responder->Abandon(AbandonReason::kClientGone);
  EXPECT_EQ(engine_.cancelled().size(), 1u);
  responder->RunPosts();
  engine_.StepAll();
}

TEST_F(CompletionTest, AServerThatStopsSaysSo) {
  const auto stream = Begin("POST", "/v1/completions", R"({"prompt": "x", "stream": true})");
  const auto whole = Begin("POST", "/v1/completions", R"({"prompt": "x"})");
  engine_.Step();
  stream->RunPosts();
  whole->RunPosts();
  stream->Abandon(AbandonReason::kServerStopping);
  whole->Abandon(AbandonReason::kServerStopping);
  EXPECT_TRUE(stream->stream_ended);
  EXPECT_EQ(stream->Events().back().Json().at("error").at("type").as_string(), "server_error");
  ExpectError(*whole, 503, "", "stopping", "");
  EXPECT_EQ(engine_.cancelled().size(), 2u);
  engine_.StepAll();
}

}  // namespace
}  // namespace strait
