// SPDX-License-Identifier: Apache-2.0
//
// OpenAiHandler answers the OpenAI API (completions, chat, models), vLLM's /tokenize and
// /detokenize, the routes of operation (health, metrics, status) and the elastic verbs (migrate,
// drain, scale). coordinator/http/README.md describes them all.
//
// Borrows: the engine, which outlives it and every server that uses it.
// Thread:  Handle, OnRejected, SetDraining: any.
// Errors:  answers, in OpenAI's JSON shape.
// Limits:  kMaxRequestIdBytes, kMaxTimeoutMs; the rest in completion_request.h and proto/base/limits.h.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/http/api_error.h"
#include "coordinator/http/message.h"
#include "coordinator/http/served_model.h"

namespace strait {

inline constexpr size_t kMaxRequestIdBytes = 128;          // a longer x-request-id is replaced
inline constexpr uint64_t kMaxTimeoutMs = 24u * 3600'000;  // of x-request-timeout-ms

struct OpenAiOptions {
  ServedModel model;
  // Any of these as "Authorization: Bearer …" opens /v1/*, /tokenize, /detokenize and /strait/*;
  // none: all is open.
  std::vector<std::string> api_keys;
  // The same opens the elastic verbs, and /strait/* besides; empty: nothing opens the verbs.
  std::string operator_key = {};
};

struct ApiState;
class VerbExchange;

class OpenAiHandler : public HttpHandler {
 public:
  OpenAiHandler(OpenAiOptions options, Engine* engine);

  void Handle(HttpRequest request, std::shared_ptr<Responder> responder) override;
  void OnRejected(int status) override;

  // While draining, readiness and new completions are answered 503.
  void SetDraining(bool draining) { draining_ = draining; }

 private:
  struct Route;
  struct Call;
  // Who may: anybody; who has an API key, if there are any; the operator, too; the operator alone.
  enum class Access { kOpen, kClient, kClientOrOperator, kOperator };
  static const Route* FindRoute(std::string_view path);

  // The API key that it came with, "" where none is needed; null: none of ours.
  std::optional<std::string> KeyOf(const HttpRequest& request) const;
  bool HasOperatorKey(const HttpRequest& request) const;
  std::optional<ApiError> RefusalOf(Access access, const HttpRequest& request) const;
  void Refuse(Call& call, const ApiError& error);
  // Of an elastic verb: reads the body, and hands what it says to an exchange of its own.
  template <class Spec>
  void BeginVerb(Call& call, std::variant<Spec, ApiError> (*parse)(std::string_view),
                 void (VerbExchange::*begin)(Spec));
  // These answer later:
  void Complete(Call& call);
  void Migrate(Call& call);
  void Drain(Call& call);
  void Scale(Call& call);
  HttpResponse Health(const Call& call);
  HttpResponse Live(const Call& call);
  HttpResponse Version(const Call& call);
  HttpResponse Metrics(const Call& call);
  HttpResponse Status(const Call& call);
  HttpResponse Flush(const Call& call);
  HttpResponse Models(const Call& call);
  HttpResponse Model(const Call& call);
  std::string ModelJson() const;
  HttpResponse Tokenize(const Call& call);
  HttpResponse Detokenize(const Call& call);

  const std::vector<std::string> api_keys_;
  const std::string operator_key_;
  const std::shared_ptr<ApiState> state_;
  std::atomic<bool> draining_{false};
};

}  // namespace strait
