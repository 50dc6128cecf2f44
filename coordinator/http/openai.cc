// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/openai.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <random>
#include <utility>

#include "coordinator/http/api_error.h"
#include "coordinator/http/completion_exchange.h"
#include "coordinator/http/completion_request.h"
#include "coordinator/http/fields.h"
#include "coordinator/http/json_writer.h"
#include "coordinator/http/request_input.h"
#include "coordinator/http/verb_exchange.h"
#include "coordinator/http/verb_request.h"
#include "proto/base/text.h"
#include "proto/wire/version.h"

namespace strait {
namespace {

// Time depends on what the client sent, not on what the key is.
bool EqualConstantTime(std::string_view given, std::string_view secret) {
  unsigned difference = given.size() == secret.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    const char other = secret.empty() ? '\0' : secret[i % secret.size()];
    difference |= static_cast<unsigned char>(given[i] ^ other);
  }
  return difference == 0;
}

// What stands behind "Authorization: Bearer"; null: no such header.
std::optional<std::string_view> BearerOf(const HttpRequest& request) {
  const std::string_view header = request.Header("authorization");
  constexpr std::string_view kBearer = "bearer ";
  if (header.size() < kBearer.size()) return std::nullopt;
  for (size_t i = 0; i < kBearer.size(); ++i) {
    const char c =
        header[i] >= 'A' && header[i] <= 'Z' ? static_cast<char>(header[i] + 32) : header[i];
    if (c != kBearer[i]) return std::nullopt;
  }
  return header.substr(kBearer.size());
}

std::string RandomId() {
  constexpr char kHex[] = "0123456789abcdef";
  thread_local std::random_device device;
  std::string id;
  for (int word = 0; word < 4; ++word) {
    uint32_t bits = device();
    for (int i = 0; i < 8; ++i, bits >>= 4) id += kHex[bits & 15];
  }
  return id;
}

// The client's x-request-id, where it is one that may stand in headers and logs.
std::string RequestIdOf(const HttpRequest& request) {
  const std::string_view given = request.Header("x-request-id");
  const bool good =
      !given.empty() && given.size() <= kMaxRequestIdBytes &&
      std::all_of(given.begin(), given.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  return good ? std::string(given) : RandomId();
}

// Of x-request-timeout-ms; 0: none given.
std::variant<uint64_t, ApiError> TimeoutOf(const HttpRequest& request) {
  const std::string_view text = request.Header("x-request-timeout-ms");
  if (text.empty()) return uint64_t{0};
  uint64_t ms = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), ms);
  if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size() || ms == 0 ||
      ms > kMaxTimeoutMs) {
    return ApiError{400,
                    "the header x-request-timeout-ms must be a whole number from 1 to " +
                        std::to_string(kMaxTimeoutMs),
                    "x-request-timeout-ms", ""};
  }
  return ms * 1000;
}

ApiError Stopping() { return {503, "the server is stopping", "", "stopping"}; }

constexpr std::string_view kModelPrefix = "/v1/models/";

// "%2F" is "/"; what is no escape stays as it is.
std::string Unescape(std::string_view text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned byte = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() &&
        std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2) {
      plain += static_cast<char>(byte);
      i += 2;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

HttpResponse Json(JsonWriter& json) {
  HttpResponse response;
  response.body = json.Take();
  return response;
}

HttpResponse Plain(int status, std::string body) {
  HttpResponse response;
  response.status = status;
  response.content_type = body.empty() ? "" : "text/plain; charset=utf-8";
  response.body = std::move(body);
  return response;
}

}  // namespace

struct OpenAiHandler::Call {
  HttpRequest request;
  std::string request_id;
  std::string route;
  std::shared_ptr<Responder> responder;
};

struct OpenAiHandler::Route {
  std::string_view path;
  std::string_view method;
  Access access;
  HttpResponse (OpenAiHandler::*answer)(const Call&);  // at once; null: `begin` answers, later
  void (OpenAiHandler::*begin)(Call&) = nullptr;
};

const OpenAiHandler::Route* OpenAiHandler::FindRoute(std::string_view path) {
  using H = OpenAiHandler;
  // A model's own address: its name follows, in one or several segments.
  static constexpr Route kModel = {"/v1/models/{model}", "GET", Access::kClient, &H::Model};
  if (path.substr(0, kModelPrefix.size()) == kModelPrefix) return &kModel;
  static constexpr Route kRoutes[] = {
      {"/v1/completions", "POST", Access::kClient, nullptr, &H::Complete},
      {"/v1/chat/completions", "POST", Access::kClient, nullptr, &H::Complete},
      {"/v1/models", "GET", Access::kClient, &H::Models},
      {"/tokenize", "POST", Access::kClient, &H::Tokenize},
      {"/detokenize", "POST", Access::kClient, &H::Detokenize},
      {"/strait/status", "GET", Access::kClientOrOperator, &H::Status},
      {"/strait/flush", "POST", Access::kClientOrOperator, &H::Flush},
      {"/strait/migrate", "POST", Access::kOperator, nullptr, &H::Migrate},
      {"/strait/drain", "POST", Access::kOperator, nullptr, &H::Drain},
      {"/strait/scale", "POST", Access::kOperator, nullptr, &H::Scale},
      {"/health", "GET", Access::kOpen, &H::Health},
      {"/readyz", "GET", Access::kOpen, &H::Health},
      {"/ping", "GET", Access::kOpen, &H::Health},
      {"/livez", "GET", Access::kOpen, &H::Live},
      {"/version", "GET", Access::kOpen, &H::Version},
      {"/metrics", "GET", Access::kOpen, &H::Metrics},
  };
  const auto found = std::find_if(std::begin(kRoutes), std::end(kRoutes),
                                  [&](const Route& route) { return route.path == path; });
  return found == std::end(kRoutes) ? nullptr : found;
}

OpenAiHandler::OpenAiHandler(OpenAiOptions options, Engine* engine)
    : api_keys_(std::move(options.api_keys)),
      operator_key_(std::move(options.operator_key)),
      state_(std::make_shared<ApiState>()) {
  state_->model = std::move(options.model);
  state_->engine = engine;
}

std::optional<std::string> OpenAiHandler::KeyOf(const HttpRequest& request) const {
  if (api_keys_.empty()) return "";
  const std::optional<std::string_view> given = BearerOf(request);
  if (!given) return std::nullopt;
  std::optional<std::string> shown;  // every key is compared, so that time does not tell which
  for (const std::string& key : api_keys_) {
    if (EqualConstantTime(*given, key)) shown = key;
  }
  return shown;
}

bool OpenAiHandler::HasOperatorKey(const HttpRequest& request) const {
  const std::optional<std::string_view> given = BearerOf(request);
  return given && !operator_key_.empty() && EqualConstantTime(*given, operator_key_);
}

std::optional<ApiError> OpenAiHandler::RefusalOf(Access access, const HttpRequest& request) const {
  if (access == Access::kOpen) return std::nullopt;
  if (access != Access::kClient && HasOperatorKey(request)) return std::nullopt;
  if (access != Access::kOperator) {
    if (KeyOf(request)) return std::nullopt;
    return ApiError{401, "a valid API key is needed, as \"Authorization: Bearer KEY\"", "",
                    "invalid_api_key"};
  }
  if (operator_key_.empty()) {
    return ApiError{403,
                    "this coordinator has no operator key, so nobody may change the cluster: start "
                    "it with --operator-key-file FILE (strait up makes one by itself)",
                    "", "no_operator_key"};
  }
  const bool is_client = !api_keys_.empty() && KeyOf(request);
  if (!BearerOf(request) || is_client) {
    return ApiError{403,
                    "what changes the cluster needs the operator key, as \"Authorization: Bearer "
                    "KEY\"; an API key is none. The strait program finds that of strait up on the "
                    "same machine, and takes another's by --operator-key-file FILE",
                    "", "operator_key_needed"};
  }
  return ApiError{401, "this is not the operator key of this coordinator", "",
                  "invalid_operator_key"};
}

void OpenAiHandler::OnRejected(int status) { state_->metrics.CountAnswer("other", status); }

void OpenAiHandler::Handle(HttpRequest request, std::shared_ptr<Responder> responder) {
  Call call{std::move(request), "", "other", std::move(responder)};
  call.request_id = RequestIdOf(call.request);
  const std::string& method = call.request.method;
  const Route* route = FindRoute(call.request.path);
  HttpResponse response;
  if (route == nullptr) {
    response = ErrorResponse({404, "there is no " + call.request.path + " here", "", "not_found"});
  } else {
    call.route = route->path;
    if (method != route->method && !(method == "HEAD" && route->method == "GET")) {
      response = ErrorResponse(
          {405, call.route + " takes " + std::string(route->method) + ", not " + method, "",
           "method_not_allowed"});
      response.headers.emplace_back("Allow", std::string(route->method));
    } else if (const std::optional<ApiError> refusal = RefusalOf(route->access, call.request)) {
      response = ErrorResponse(*refusal);
    } else if (route->answer == nullptr) {
      return (this->*route->begin)(call);
    } else {
      response = (this->*route->answer)(call);
    }
  }
  response.headers.emplace_back("X-Request-Id", call.request_id);
  state_->metrics.CountAnswer(call.route, response.status);
  call.responder->Send(std::move(response));
}

void OpenAiHandler::Refuse(Call& call, const ApiError& error) {
  HttpResponse response = ErrorResponse(error);
  response.headers.emplace_back("X-Request-Id", call.request_id);
  state_->metrics.CountAnswer(call.route, response.status);
  call.responder->Send(std::move(response));
}

void OpenAiHandler::Complete(Call& call) {
  const Engine& engine = *state_->engine;
  const bool chat = call.route == "/v1/chat/completions";
  const RequestContext context{state_->model, engine.max_positions(), engine.vocab_size(),
                               engine.eos_token_ids(),
                               api_keys_.empty() ? "" : "key " + *KeyOf(call.request)};
  std::variant<uint64_t, ApiError> timeout = TimeoutOf(call.request);
  CompletionOrError parsed = Stopping();
  if (ApiError* error = std::get_if<ApiError>(&timeout)) {
    parsed = std::move(*error);
  } else if (!draining_) {
    parsed =
        chat ? ParseChat(call.request.body, context) : ParseCompletion(call.request.body, context);
  }
  if (const ApiError* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  CompletionRequest& completion = std::get<CompletionRequest>(parsed);
  completion.spec.timeout_us = std::get<uint64_t>(timeout);
  completion.spec.client_id = call.request_id;
  completion.spec.name = (chat ? "chatcmpl-" : "cmpl-") + call.request_id;
  std::make_shared<CompletionExchange>(state_, std::move(call.route), std::move(call.request_id),
                                       std::move(completion), std::move(call.responder))
      ->Start();
}

template <class Spec>
void OpenAiHandler::BeginVerb(Call& call, std::variant<Spec, ApiError> (*parse)(std::string_view),
                              void (VerbExchange::*begin)(Spec)) {
  std::variant<Spec, ApiError> parsed = Stopping();
  if (!draining_) parsed = parse(call.request.body);
  if (const ApiError* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  const auto exchange = std::make_shared<VerbExchange>(
      state_, std::move(call.route), std::move(call.request_id), std::move(call.responder));
  ((*exchange).*begin)(std::move(std::get<Spec>(parsed)));
}

void OpenAiHandler::Migrate(Call& call) { BeginVerb(call, ParseMigrate, &VerbExchange::Migrate); }

void OpenAiHandler::Drain(Call& call) { BeginVerb(call, ParseDrain, &VerbExchange::Drain); }

void OpenAiHandler::Scale(Call& call) { BeginVerb(call, ParseScale, &VerbExchange::Scale); }

HttpResponse OpenAiHandler::Health(const Call&) {
  if (state_->engine->Ready() && !draining_) return Plain(200, "");
  return ErrorResponse({503,
                        draining_ ? "the server is stopping"
                                  : "no pipeline serves yet: workers are missing or loading",
                        "", "unavailable"});
}

HttpResponse OpenAiHandler::Live(const Call&) { return Plain(200, ""); }

HttpResponse OpenAiHandler::Version(const Call&) {
  JsonWriter json;
  json.BeginObject().Key("version").String(kVersion).EndObject();
  return Json(json);
}

HttpResponse OpenAiHandler::Metrics(const Call&) {
  HttpResponse response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = state_->metrics.Text() + state_->engine->MetricsText();
  return response;
}

HttpResponse OpenAiHandler::Status(const Call&) {
  HttpResponse response;
  response.body = state_->engine->StatusJson();
  return response;
}

HttpResponse OpenAiHandler::Flush(const Call&) {
  state_->engine->Flush();
  return Plain(200, "");
}

std::string OpenAiHandler::ModelJson() const {
  const ServedModel& model = state_->model;
  JsonWriter json;
  json.BeginObject();
  json.Key("id").String(model.name).Key("object").String("model").Key("created").Int(model.created);
  json.Key("owned_by").String("strait").Key("root").String(model.root);
  json.Key("max_model_len").Int(state_->engine->max_positions());
  json.EndObject();
  return json.Take();
}

HttpResponse OpenAiHandler::Models(const Call&) {
  JsonWriter json;
  json.BeginObject().Key("object").String("list");
  json.Key("data").BeginArray().Raw(ModelJson()).EndArray().EndObject();
  return Json(json);
}

HttpResponse OpenAiHandler::Model(const Call& call) {
  const std::string name =
      Unescape(std::string_view(call.request.path).substr(kModelPrefix.size()));
  if (name != state_->model.name) {
    return ErrorResponse(
        {404, "the model \"" + name + "\" does not exist", "model", "model_not_found"});
  }
  HttpResponse response;
  response.body = ModelJson();
  return response;
}

// {"prompt": text} or {"messages": […]}, as the completions routes would read them.
HttpResponse OpenAiHandler::Tokenize(const Call& call) {
  std::variant<json::Object, ApiError> body = ParseBody(call.request.body);
  if (const ApiError* error = std::get_if<ApiError>(&body)) return ErrorResponse(*error);
  Fields fields(std::get<json::Object>(body));
  CheckModel(fields, state_->model);
  const bool chat = fields.Any("messages") != nullptr;
  const bool add_special = fields.Bool("add_special_tokens", !chat);
  const bool strings = fields.Bool("return_token_strs", false);
  const std::optional<std::string> prompt = fields.String("prompt");
  if (!chat && !prompt) fields.Fail("prompt", "\"prompt\" is missing");
  std::string text;
  if (fields.ok()) text = chat ? RenderChat(fields, state_->model) : *prompt;
  std::vector<TokenId> ids;
  if (fields.ok()) {
    ids = EncodeText(fields, state_->model, text, add_special, chat ? "messages" : "prompt");
  }
  if (!fields.ok()) return ErrorResponse(*fields.error());

  JsonWriter json;
  json.BeginObject().Key("count").Int(ids.size());
  json.Key("max_model_len").Int(state_->engine->max_positions());
  json.Key("tokens").BeginArray();
  for (const TokenId id : ids) json.Int(id);
  json.EndArray();
  if (strings) {
    json.Key("token_strs").BeginArray();
    for (const TokenId id : ids) json.String(state_->model.tokenizer->IdToToken(id).value_or(""));
    json.EndArray();
  }
  json.EndObject();
  return Json(json);
}

HttpResponse OpenAiHandler::Detokenize(const Call& call) {
  std::variant<json::Object, ApiError> body = ParseBody(call.request.body);
  if (const ApiError* error = std::get_if<ApiError>(&body)) return ErrorResponse(*error);
  Fields fields(std::get<json::Object>(body));
  CheckModel(fields, state_->model);
  const json::Value* tokens = fields.Any("tokens");
  if (!state_->model.tokenizer) {
    fields.Fail("tokens", "the model's directory has no tokenizer.json", "no_tokenizer");
  } else if (tokens == nullptr || !tokens->is_array()) {
    fields.Fail("tokens", "\"tokens\" must be an array of token ids");
  }
  if (!fields.ok()) return ErrorResponse(*fields.error());
  const std::vector<TokenId> ids =
      ReadTokenIds(fields, tokens->get_array(), state_->engine->vocab_size(), "tokens");
  if (!fields.ok()) return ErrorResponse(*fields.error());
  const absl::StatusOr<std::string> text =
      state_->model.tokenizer->Decode(ids, /*skip_special_tokens=*/false);
  if (!text.ok()) {
    return ErrorResponse({400, std::string(ToStd(text.status().message())), "tokens", ""});
  }
  JsonWriter json;
  json.BeginObject().Key("prompt").String(*text).EndObject();
  return Json(json);
}

}  // namespace strait
