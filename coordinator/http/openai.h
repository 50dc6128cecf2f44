// SPDX-License-Identifier: Apache-2.0
//
// OpenAiHandler answers the OpenAI API (completions, chat, models), vLLM's /tokenize and
// /detokenize, and the routes of operation (health, metrics, status). coordinator/http/README.md
// describes them all.
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
#include <vector>

#include "coordinator/engine.h"
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
};

struct ApiState;

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
  static const Route* FindRoute(std::string_view path);

  // The API key that it came with, "" where none is needed; null: none of ours.
  std::optional<std::string> KeyOf(const HttpRequest& request) const;
  void Complete(Call& call, bool chat);
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
  const std::shared_ptr<ApiState> state_;
  std::atomic<bool> draining_{false};
};

}  // namespace strait
