// SPDX-License-Identifier: Apache-2.0
//
// Defends: every route answers as README.md says, every wrong request gets OpenAI's error shape
// with the right status and the field at fault, and nothing that was refused reaches the engine.
#include "coordinator/http/openai.h"

#include "tests/coordinator/http/api_fixture.h"

namespace strait {
namespace {

struct BadRequest {
  const char* body;
  int status;
  const char* param;
  const char* in_message;
};

class OpenAiTest : public ApiTest {};

TEST_F(OpenAiTest, CompletionsRefuseWhatIsWrong) {
  const BadRequest cases[] = {
      {"", 400, "", "cut off"},
      {"{", 400, "", "cut off"},
      {"{\"prompt\": \"a\"} x", 400, "", "more text"},
      {"[1]", 400, "", "must be a JSON object"},
      {"null", 400, "", "must be a JSON object"},
      {"{\"prompt\": \"\xff\"}", 400, "", "not valid JSON"},
      {"{\"prompt\": \"\\ud800\"}", 400, "", "not valid JSON"},
      {"{\"prompt\": NaN}", 400, "", "not valid JSON"},
      {"{'prompt': 1}", 400, "", "not valid JSON"},
      {"{}", 400, "prompt", "missing"},
      {R"({"prompt": null})", 400, "prompt", "missing"},
      {R"({"prompt": ""})", 400, "prompt", "empty"},
      {R"({"prompt": []})", 400, "prompt", "empty"},
      {R"({"prompt": [[]]})", 400, "prompt", "empty"},
      {R"({"prompt": ["a", ""]})", 400, "prompt", "empty"},
      {R"({"prompt": 7})", 400, "prompt", "must be a string"},
      {R"({"prompt": {}})", 400, "prompt", "must be a string"},
      {R"({"prompt": ["a", 1]})", 400, "prompt", "all of one kind"},
      {R"({"prompt": [1, "a"]})", 400, "prompt", "token 1 is a string"},
      {R"({"prompt": ["a", [1]]})", 400, "prompt", "all of one kind"},
      {R"({"prompt": [null]})", 400, "prompt", "all of one kind"},
      {R"({"prompt": [1, -1]})", 400, "prompt", "token 1 is -1"},
      {R"({"prompt": [300]})", 400, "prompt", "from 0 to 299"},
      {R"({"prompt": [1.5]})", 400, "prompt", "token 0 is a number"},
      {R"({"prompt": [99999999999999999999]})", 400, "prompt", "from 0 to 299"},
      {R"({"prompt": "a", "model": "other"})", 404, "model", "does not exist"},
      {R"({"prompt": "a", "model": 3})", 400, "model", "must be a string"},
      {R"({"prompt": "a", "max_tokens": 0})", 400, "max_tokens", "echo"},
      {R"({"prompt": "a", "max_tokens": -1})", 400, "max_tokens", "from 0 to"},
      {R"({"prompt": "a", "max_tokens": 1.5})", 400, "max_tokens", "integer"},
      {R"({"prompt": "a", "max_tokens": "5"})", 400, "max_tokens", "not a string"},
      {R"({"prompt": "a", "max_tokens": true})", 400, "max_tokens", "not a boolean"},
      {R"({"prompt": "a", "max_tokens": 1e300})", 400, "max_tokens", "from 0 to"},
      {R"({"prompt": "abc", "max_tokens": 253})", 400, "max_tokens", "at most 252"},
      {R"({"prompt": "a", "temperature": -0.1})", 400, "temperature", "at least 0"},
      {R"({"prompt": "a", "temperature": 2.5})", 400, "temperature", "at most 2"},
      {R"({"prompt": "a", "temperature": 1e999})", 400, "temperature", "at most 2"},
      {R"({"prompt": "a", "temperature": "hot"})", 400, "temperature", "must be a number"},
      {R"({"prompt": "a", "top_p": 0})", 400, "top_p", "greater than 0"},
      {R"({"prompt": "a", "top_p": 1.1})", 400, "top_p", "at most 1"},
      {R"({"prompt": "a", "top_k": -2})", 400, "top_k", "from -1"},
      {R"({"prompt": "a", "min_p": 1.5})", 400, "min_p", "at most 1"},
      {R"({"prompt": "a", "repetition_penalty": 0})", 400, "repetition_penalty", "greater than 0"},
      {R"({"prompt": "a", "presence_penalty": 3})", 400, "presence_penalty", "at most 2"},
      {R"({"prompt": "a", "frequency_penalty": -3})", 400, "frequency_penalty", "at least -2"},
      {R"({"prompt": "a", "n": 0})", 400, "n", "from 1 to 128"},
      {R"({"prompt": "a", "n": 129})", 400, "n", "from 1 to 128"},
      {R"({"prompt": ["a", "b"], "n": 100})", 400, "n", "200 choices"},
      {R"({"prompt": "a", "best_of": 2})", 400, "best_of", "not supported"},
      {R"({"prompt": "a", "suffix": "b"})", 400, "suffix", "not supported"},
      {R"({"prompt": "a", "tools": [1]})", 400, "tools", "not supported"},
      {R"({"prompt": "a", "guided_json": {"a": 1}})", 400, "guided_json", "not supported"},
      {R"({"prompt": "a", "prompt_logprobs": 1})", 400, "prompt_logprobs", "not supported"},
      {R"({"prompt": "a", "response_format": {"type": "json_object"}})", 400, "response_format",
       "text"},
      {R"({"prompt": "a", "response_format": 1})", 400, "response_format", "object"},
      {R"({"prompt": "a", "logprobs": 21})", 400, "logprobs", "from 0 to 20"},
      {R"({"prompt": "a", "logprobs": true})", 400, "logprobs", "must be an integer"},
      {R"({"prompt": "a", "echo": 1})", 400, "echo", "true or false"},
      {R"({"prompt": "a", "stream": "yes"})", 400, "stream", "true or false"},
      {R"({"prompt": "a", "stream_options": {"include_usage": true}})", 400, "stream_options",
       "stream"},
      {R"({"prompt": "a", "stream": true, "stream_options": {"include_usage": 1}})", 400,
       "stream_options", "include_usage"},
      {R"({"prompt": "a", "stop": 1})", 400, "stop", "string or an array"},
      {R"({"prompt": "a", "stop": ["a", 1]})", 400, "stop", "string or an array"},
      {R"({"prompt": "a", "stop": ""})", 400, "stop", "not 0"},
      {R"({"prompt": "a", "stop": ["1","2","3","4","5","6","7","8","9","0","1","2","3","4","5","6","7"]})",
       400, "stop", "17 strings"},
      {R"({"prompt": "a", "stop_token_ids": [300]})", 400, "stop_token_ids", "from 0 to 299"},
      {R"({"prompt": "a", "stop_token_ids": 3})", 400, "stop_token_ids", "array"},
      {R"({"prompt": "a", "seed": "x"})", 400, "seed", "64-bit"},
      {R"({"prompt": "a", "seed": 0.5})", 400, "seed", "64-bit"},
      {R"({"prompt": "a", "logit_bias": {"300": 1}})", 400, "logit_bias", "from 0 to 299"},
      {R"({"prompt": "a", "logit_bias": {"-1": 1}})", 400, "logit_bias", "token ids"},
      {R"({"prompt": "a", "logit_bias": {"1x": 1}})", 400, "logit_bias", "token ids"},
      {R"({"prompt": "a", "logit_bias": {"1": 101}})", 400, "logit_bias", "at most 100"},
      {R"({"prompt": "a", "logit_bias": [1]})", 400, "logit_bias", "object"},
      {R"({"prompt": "a", "min_tokens": 20})", 400, "min_tokens", "more than max_tokens, 16"},
      {R"({"prompt": "a", "ignore_eos": "no"})", 400, "ignore_eos", "true or false"},
  };
  for (const BadRequest& bad : cases) {
    const auto answer = Begin("POST", "/v1/completions", bad.body);
    ExpectError(*answer, bad.status, bad.param, bad.in_message, bad.body);
  }
  EXPECT_TRUE(engine_.specs().empty());
}

TEST_F(OpenAiTest, ChatRefusesWhatIsWrong) {
  const std::string good = R"("messages": [{"role": "user", "content": "a"}])";
  const BadRequest cases[] = {
      {"{}", 400, "messages", "array of 1 to"},
      {R"({"messages": []})", 400, "messages", "array of 1 to"},
      {R"({"messages": "hi"})", 400, "messages", "array of 1 to"},
      {R"({"messages": [1]})", 400, "messages[0]", "object"},
      {R"({"messages": [{"content": "a"}]})", 400, "messages[0].role", "string"},
      {R"({"messages": [{"role": "user"}]})", 400, "messages[0].content", "missing"},
      {R"({"messages": [{"role": "user", "content": 1}]})", 400, "messages[0].content",
       "string or"},
      {R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})", 400,
       "messages[0].content", "text"},
  };
  for (const BadRequest& bad : cases) {
    const auto answer = Begin("POST", "/v1/chat/completions", bad.body);
    ExpectError(*answer, bad.status, bad.param, bad.in_message, bad.body);
  }
  const BadRequest with_messages[] = {
      {R"("top_logprobs": 3)", 400, "top_logprobs", "logprobs"},
      {R"("logprobs": true, "top_logprobs": 21)", 400, "top_logprobs", "from 0 to 20"},
      {R"("logprobs": 3)", 400, "logprobs", "true or false"},
      {R"("max_tokens": 0)", 400, "max_tokens", "from 1"},
      {R"("max_completion_tokens": 5000)", 400, "max_completion_tokens", "256 tokens"},
      {R"("tools": [{"type": "function"}])", 400, "tools", "not supported"},
      {R"("tool_choice": "required")", 400, "tool_choice", "not supported"},
      {R"("functions": [{}])", 400, "functions", "not supported"},
      {R"("modalities": ["audio"])", 400, "modalities", "not supported"},
      {R"("response_format": {"type": "json_schema"})", 400, "response_format", "text"},
      {R"("chat_template_kwargs": 1)", 400, "chat_template_kwargs", "object"},
  };
  for (const BadRequest& bad : with_messages) {
    const std::string body = "{" + good + ", " + bad.body + "}";
    const auto answer = Begin("POST", "/v1/chat/completions", body);
    ExpectError(*answer, bad.status, bad.param, bad.in_message, body);
  }
  EXPECT_TRUE(engine_.specs().empty());
}

TEST_F(OpenAiTest, NestingIsBounded) {
  const std::string body = "{\"x\": " + std::string(100000, '[') + std::string(100000, ']') + "}";
  ExpectError(*Begin("POST", "/v1/completions", body), 400, "", "nested", "deep");
}

TEST_F(OpenAiTest, PromptBeyondTheContextNamesTheNumbers) {
  const std::string body = "{\"prompt\": \"" + std::string(400, 'a') + "\"}";
  const auto answer = Begin("POST", "/v1/completions", body);
  ExpectError(*answer, 400, "prompt", "401 tokens", body);
  EXPECT_NE(answer->sent->body.find("256"), std::string::npos);
  EXPECT_NE(answer->sent->body.find("context_length_exceeded"), std::string::npos);
  const std::string chat =
      "{\"messages\": [{\"role\": \"user\", \"content\": \"" + std::string(400, 'a') + "\"}]}";
  ExpectError(*Begin("POST", "/v1/chat/completions", chat), 400, "messages", "403 tokens", chat);
}

TEST_F(OpenAiTest, FieldsReachTheEngine) {
  Complete(
      R"({"model": "test-model", "prompt": [[1, 2], [3]], "n": 2, "max_tokens": 3, "min_tokens": 2,
      "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
      "presence_penalty": -1, "frequency_penalty": 0.75, "seed": -3, "stop_token_ids": [5, 6],
      "logit_bias": {"9": -100, "4": 2.5}, "logprobs": 2, "ignore_eos": true, "user": "me",
      "unknown_field": {"x": [1]}, "stop": null, "best_of": 2, "suffix": null})");
  ASSERT_EQ(engine_.specs().size(), 1u);
  const RequestSpec spec = engine_.specs()[0];
  ASSERT_EQ(spec.sequences.size(), 4u);
  const std::vector<TokenId> first{1, 2}, second{3};
  for (uint32_t i = 0; i < 4; ++i) {
    const SequenceSpec& sequence = spec.sequences[i];
    EXPECT_EQ(sequence.prompt, i < 2 ? first : second);
    EXPECT_EQ(sequence.choice_index, i % 2);
    EXPECT_EQ(sequence.max_tokens, 3u);
    EXPECT_EQ(sequence.min_tokens, 2u);
    EXPECT_EQ(sequence.temperature, 0.5f);
    EXPECT_EQ(sequence.top_p, 0.25f);
    EXPECT_EQ(sequence.top_k, 7u);
    EXPECT_EQ(sequence.min_p, 0.125f);
    EXPECT_EQ(sequence.repetition_penalty, 1.5f);
    EXPECT_EQ(sequence.presence_penalty, -1.0f);
    EXPECT_EQ(sequence.frequency_penalty, 0.75f);
    EXPECT_EQ(sequence.seed, static_cast<uint64_t>(-3));
    EXPECT_EQ(sequence.stop_token_ids, (std::vector<TokenId>{5, 6}));
    EXPECT_EQ(sequence.logit_bias,
              (std::vector<std::pair<TokenId, float>>{{4, 2.5f}, {9, -100.0f}}));
    EXPECT_TRUE(sequence.want_logprobs);
    EXPECT_FALSE(sequence.score_prompt);
    EXPECT_EQ(sequence.num_top, 2u);
    EXPECT_TRUE(sequence.ignore_eos);
  }
}

TEST_F(OpenAiTest, Defaults) {
  Complete(R"({"prompt": "abc"})");
  Complete(R"({"prompt": "abc", "top_k": -1})");
  Chat(R"({"messages": [{"role": "user", "content": "abc"}]})");
  Chat(
      R"({"messages": [{"role": "user", "content": "abc"}], "max_tokens": 9, "max_completion_tokens": 4})");
  const std::vector<RequestSpec> specs = engine_.specs();
  ASSERT_EQ(specs.size(), 4u);
  const SequenceSpec& text = specs[0].sequences[0];
  EXPECT_EQ(text.prompt, (std::vector<TokenId>{kTestBos, 'a', 'b', 'c'}));
  EXPECT_EQ(text.max_tokens, 16u);
  EXPECT_EQ(text.temperature, 1.0f);
  EXPECT_EQ(text.top_k, 0u);
  EXPECT_EQ(specs[0].timeout_us, 0u);
  EXPECT_NE(text.seed, specs[1].sequences[0].seed) << "a seed that was not given is random";
  const SequenceSpec& chat = specs[2].sequences[0];
  EXPECT_EQ(chat.prompt,
            (std::vector<TokenId>{kTestBos, kTestUser, 'a', 'b', 'c', kTestAssistant}));
  EXPECT_EQ(chat.max_tokens, 250u);
  EXPECT_EQ(specs[3].sequences[0].max_tokens, 4u);
}

TEST_F(OpenAiTest, ContentMayBeParts) {
  Chat(R"({"max_tokens": 1, "messages": [{"role": "user",
      "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]})");
  EXPECT_EQ(engine_.specs()[0].sequences[0].prompt,
            (std::vector<TokenId>{kTestBos, kTestUser, 'a', '\n', 'b', kTestAssistant}));
}

TEST_F(OpenAiTest, TheLastOfDuplicateKeysCounts) {
  Complete(R"({"prompt": "abc", "max_tokens": 5, "max_tokens": 2})");
  EXPECT_EQ(engine_.specs()[0].sequences[0].max_tokens, 2u);
}

TEST_F(OpenAiTest, TimeoutAndRequestIdHeaders) {
  auto answer = Call("POST", "/v1/completions", R"({"prompt": "a"})",
                     {{"x-request-id", "my-id-7"}, {"x-request-timeout-ms", "1500"}});
  EXPECT_EQ(engine_.specs()[0].timeout_us, 1'500'000u);
  EXPECT_EQ(engine_.specs()[0].client_id, "my-id-7");
  EXPECT_EQ(answer->Json().at("id").as_string(), "cmpl-my-id-7");
  EXPECT_NE(std::find(answer->sent->headers.begin(), answer->sent->headers.end(),
                      std::pair<std::string, std::string>("X-Request-Id", "my-id-7")),
            answer->sent->headers.end());
  for (const char* wrong : {"0", "-1", "x", "1.5", "999999999999999999999999"}) {
    answer =
        Begin("POST", "/v1/completions", R"({"prompt": "a"})", {{"x-request-timeout-ms", wrong}});
    ExpectError(*answer, 400, "x-request-timeout-ms", "whole number", wrong);
  }
  // An id that cannot stand in a header is replaced, not repeated.
  answer = Begin("GET", "/livez", "", {{"x-request-id", std::string("a\r\nb")}});
  EXPECT_EQ(answer->sent->headers.back().first, "X-Request-Id");
  EXPECT_EQ(answer->sent->headers.back().second.size(), 32u);
}

TEST_F(OpenAiTest, EngineRefusalsKeepTheirMeaning) {
  const struct {
    absl::Status why;
    int status;
    const char* type;
    bool retry;
  } cases[] = {
      {absl::InvalidArgumentError("needs 9 blocks, has 3"), 400, "invalid_request_error", false},
      {absl::ResourceExhaustedError("queue is full"), 429, "rate_limit_exceeded", true},
      {absl::UnavailableError("no pipeline"), 503, "server_error", true},
      {absl::DeadlineExceededError("too long"), 504, "server_error", false},
      {absl::InternalError("bug"), 500, "server_error", false},
  };
  for (const auto& c : cases) {
    for (const char* stream : {"false", "true"}) {
      engine_.refusal = c.why;
      const auto answer = Complete(std::string(R"({"prompt": "a", "stream": )") + stream + "}");
      ExpectError(*answer, c.status, "", std::string(c.why.message()), c.why.ToString());
      EXPECT_EQ(answer->Json().at("error").at("type").as_string(), c.type);
      const bool retry = std::any_of(answer->sent->headers.begin(), answer->sent->headers.end(),
                                     [](const auto& h) { return h.first == "Retry-After"; });
      EXPECT_EQ(retry, c.retry);
    }
  }
}

TEST_F(OpenAiTest, KeysGuardWhatNeedsThem) {
  Use(TestModel(), {"secret-1", "secret-22"});
  const char* guarded[] = {"/v1/models", "/strait/status"};
  for (const char* path : guarded) {
    for (const char* header : {"", "Bearer", "Bearer ", "Bearer secret-", "Bearer secret-11",
                               "Bearer secret-2", "Basic secret-1", "secret-1"}) {
      const auto answer = Begin("GET", path, "", {{"authorization", header}});
      ExpectError(*answer, 401, "", "API key", header);
      EXPECT_EQ(answer->Json().at("error").at("type").as_string(), "authentication_error");
    }
    EXPECT_EQ(Begin("GET", path, "", {{"authorization", "Bearer secret-1"}})->sent->status, 200);
    EXPECT_EQ(Begin("GET", path, "", {{"authorization", "bearer secret-22"}})->sent->status, 200);
  }
  for (const char* path : {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}) {
    ExpectError(*Begin("POST", path, "{}"), 401, "", "API key", path);
  }
  for (const char* path : {"/health", "/livez", "/readyz", "/ping", "/version", "/metrics"}) {
    EXPECT_EQ(Begin("GET", path)->sent->status, 200) << path;
  }
}

TEST_F(OpenAiTest, RoutesAndMethods) {
  ExpectError(*Begin("GET", "/nothing"), 404, "", "/nothing", "");
  const auto answer = Begin("GET", "/v1/completions");
  ExpectError(*answer, 405, "", "takes POST", "");
  EXPECT_EQ(answer->sent->headers[0], (std::pair<std::string, std::string>("Allow", "POST")));
  ExpectError(*Begin("DELETE", "/health"), 405, "", "takes GET", "");
  EXPECT_EQ(Begin("HEAD", "/health")->sent->status, 200);
}

TEST_F(OpenAiTest, HealthFollowsTheEngineAndDraining) {
  EXPECT_EQ(Begin("GET", "/health")->sent->body, "");
  engine_.ready = false;
  for (const char* path : {"/health", "/readyz", "/ping"}) {
    ExpectError(*Begin("GET", path), 503, "", "no pipeline", path);
  }
  EXPECT_EQ(Begin("GET", "/livez")->sent->status, 200);
  engine_.ready = true;
  handler_->SetDraining(true);
  EXPECT_EQ(Begin("GET", "/readyz")->sent->status, 503);
  ExpectError(*Begin("POST", "/v1/completions", R"({"prompt": "a"})"), 503, "", "stopping", "");
}

TEST_F(OpenAiTest, ModelsVersionStatus) {
  const json::Value models = Begin("GET", "/v1/models")->Json();
  EXPECT_EQ(models.at("object").as_string(), "list");
  const json::Object& model = models.at("data").at(0).as_object();
  EXPECT_EQ(model.at("id").as_string(), "test-model");
  EXPECT_EQ(model.at("object").as_string(), "model");
  EXPECT_EQ(model.at("created").as_int64(), 1700000000);
  EXPECT_EQ(model.at("root").as_string(), "/models/test");
  EXPECT_EQ(model.at("max_model_len").as_int64(), 256);
  EXPECT_EQ(Begin("GET", "/v1/models/test-model")->Json().at("id").as_string(), "test-model");
  EXPECT_EQ(Begin("GET", "/v1/models/test%2Dmodel")->sent->status, 200);
  ExpectError(*Begin("GET", "/v1/models/a%2Fb"), 404, "model", "a/b", "");
  ExpectError(*Begin("GET", "/v1/models/%"), 404, "model", "exist", "");
  EXPECT_TRUE(Begin("GET", "/version")->Json().at("version").is_string());
  EXPECT_TRUE(Begin("GET", "/strait/status")->Json().at("fake").as_bool());
}

TEST_F(OpenAiTest, MetricsCountAnswersAndLatencies) {
  Complete(R"({"prompt": "a", "max_tokens": 3})");
  Begin("POST", "/v1/completions", "{");
  Begin("GET", "/made/up/by/a/client");
  handler_->OnRejected(431);
  const std::string text = Begin("GET", "/metrics")->sent->body;
  for (const char* line : {
           "strait_http_requests_total{code=\"200\",route=\"/v1/completions\"} 1",
           "strait_http_requests_total{code=\"400\",route=\"/v1/completions\"} 1",
           "strait_http_requests_total{code=\"404\",route=\"other\"} 1",
           "strait_http_requests_total{code=\"431\",route=\"other\"} 1",
           "strait_time_to_first_token_seconds_count 1",
           "strait_time_to_first_token_seconds_bucket{le=\"0.001\"}",
           "strait_time_to_first_token_seconds_bucket{le=\"2560\"} 1",
           "strait_time_per_output_token_seconds_count 2",
           "strait_time_per_output_token_seconds_bucket{le=\"80\"} 2",
           "strait_e2e_request_latency_seconds_count 1",
           "strait_e2e_request_latency_seconds_bucket{le=\"7680\"} 1",
           "strait_http_generation_tokens_total 3",
           "strait_http_prompt_tokens_total 2",
           "strait_http_requests_in_flight 0",
           "fake_up 1",
       }) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "\n" << text;
  }
}

TEST_F(OpenAiTest, TokenizeAndDetokenize) {
  json::Value value = Begin("POST", "/tokenize",
                            R"({"model": "test-model", "prompt": "hé", "return_token_strs": true})")
                          ->Json();
  EXPECT_EQ(ToText(value.at("tokens")), R"([256,104,195,169])");
  EXPECT_EQ(value.at("count").as_int64(), 4);
  EXPECT_EQ(value.at("max_model_len").as_int64(), 256);
  EXPECT_EQ(value.at("token_strs").as_array().size(), 4u);
  value = Begin("POST", "/tokenize", R"({"prompt": "h", "add_special_tokens": false})")->Json();
  EXPECT_EQ(ToText(value.at("tokens")), R"([104])");
  value = Begin("POST", "/tokenize", R"({"messages": [{"role": "user", "content": "h"}]})")->Json();
  EXPECT_EQ(ToText(value.at("tokens")), R"([256,258,104,259])");
  value = Begin("POST", "/detokenize", R"({"tokens": [256, 104, 195, 169]})")->Json();
  EXPECT_EQ(value.at("prompt").as_string(), "<bos>hé");

  ExpectError(*Begin("POST", "/tokenize", "{}"), 400, "prompt", "missing", "");
  ExpectError(*Begin("POST", "/tokenize", R"({"model": "x", "prompt": "a"})"), 404, "model",
              "exist", "");
  ExpectError(*Begin("POST", "/detokenize", "{}"), 400, "tokens", "array", "");
  ExpectError(*Begin("POST", "/detokenize", R"({"tokens": [1000]})"), 400, "tokens", "token 0", "");
  // Within the model's vocabulary, but no token of the tokenizer's.
  ExpectError(*Begin("POST", "/detokenize", R"({"tokens": [299]})"), 400, "tokens", "299", "");
}

TEST_F(OpenAiTest, WithoutTokenizerOnlyTokenIdsWork) {
  Use(TestModel(false));
  ExpectError(*Begin("POST", "/v1/completions", R"({"prompt": "a"})"), 400, "prompt", "token ids",
              "");
  ExpectError(*Begin("POST", "/v1/completions", R"({"prompt": [1], "stop": "a"})"), 400, "stop",
              "stop_token_ids", "");
  ExpectError(
      *Begin("POST", "/v1/chat/completions", R"({"messages": [{"role": "user", "content": "a"}]})"),
      400, "messages", "tokenizer", "");
  ExpectError(*Begin("POST", "/tokenize", R"({"prompt": "a"})"), 400, "prompt", "tokenizer", "");
  ExpectError(*Begin("POST", "/detokenize", R"({"tokens": [1]})"), 400, "tokens", "tokenizer", "");

  const json::Value value =
      Complete(R"({"prompt": [1, 2], "max_tokens": 2, "logprobs": 1, "return_token_ids": true})")
          ->Json();
  const json::Value& choice = value.at("choices").at(0);
  EXPECT_EQ(choice.at("text").as_string(), "");
  EXPECT_EQ(ToText(choice.at("logprobs").at("tokens")), R"(["token_id:97","token_id:98"])");
  EXPECT_EQ(ToText(choice.at("token_ids")), R"([97,98])");

  Use(TestModel(true, false));
  ExpectError(
      *Begin("POST", "/v1/chat/completions", R"({"messages": [{"role": "user", "content": "a"}]})"),
      400, "messages", "chat template", "");
}

}  // namespace
}  // namespace strait
