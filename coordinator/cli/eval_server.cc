// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_server.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/api_calls.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::cli {
namespace {

constexpr double kMinusInfinity = -9999;  // as OpenAI's JSON writes it
constexpr std::string_view kProbe = "a";

absl::StatusOr<TokenIds> ReadIds(const json::Array& array) {
  TokenIds ids;
  ids.reserve(array.size());
  for (const json::Value& value : array) {
    if (!value.is_int64() || value.get_int64() < 0 || value.get_int64() > UINT32_MAX) {
      return absl::InternalError("\"tokens\" has an element that is no token id");
    }
    ids.push_back(static_cast<uint32_t>(value.get_int64()));
  }
  return ids;
}

// Whether no alternative is likelier.
absl::StatusOr<bool> IsTop(const json::Value& alternatives, double logprob) {
  if (!alternatives.is_object() || alternatives.get_object().empty()) {
    return absl::InternalError("\"top_logprobs\" has a position without alternatives");
  }
  for (const auto& [name, value] : alternatives.get_object()) {
    if (!value.is_number()) {
      return absl::InternalError("\"top_logprobs\" has a value that is no number");
    }
    if (value.to_number<double>() > logprob) return false;
  }
  return true;
}

}  // namespace

size_t PieceEnd(std::string_view text, size_t begin, size_t max_bytes) {
  if (text.size() - begin <= max_bytes) return text.size();
  const size_t line = text.rfind('\n', begin + max_bytes - 1);
  if (line != std::string_view::npos && line >= begin) return line + 1;
  size_t end = begin + max_bytes;
  while (end > begin + 1 && (text[end] & 0xC0) == 0x80) --end;
  return end;
}

absl::StatusOr<PromptScore> ReadPromptScore(const json::Object& reply, size_t num_tokens,
                                            bool want_top) {
  STRAIT_ASSIGN_OR_RETURN(const json::Array* choices, json::GetArray(reply, "choices", "reply"));
  if (choices->size() != 1 || !(*choices)[0].is_object()) {
    return absl::InternalError("\"choices\" should hold one object");
  }
  STRAIT_ASSIGN_OR_RETURN(const json::Object* logprobs,
                          json::GetObject((*choices)[0].get_object(), "logprobs", "choice"));
  STRAIT_ASSIGN_OR_RETURN(const json::Array* values,
                          json::GetArray(*logprobs, "token_logprobs", "logprobs"));
  const json::Array* tops = nullptr;
  if (want_top) {
    STRAIT_ASSIGN_OR_RETURN(tops, json::GetArray(*logprobs, "top_logprobs", "logprobs"));
  }
  if (values->size() != num_tokens || (tops && tops->size() != num_tokens)) {
    return absl::InternalError(absl::StrCat("log-probabilities of ", values->size(),
                                            " tokens for a prompt of ", num_tokens));
  }
  PromptScore score;
  score.logprobs.reserve(num_tokens);
  for (size_t i = 1; i < num_tokens; ++i) {  // nothing comes before the first token
    const json::Value& value = (*values)[i];
    if (!value.is_number()) {
      return absl::InternalError(absl::StrCat("the log-probability of token ", i, " is ",
                                              ToAbsl(json::TypeName(value)), ", not a number"));
    }
    const double logprob = value.to_number<double>();
    if (!(logprob <= 0 && logprob > kMinusInfinity)) {
      return absl::InternalError(absl::StrCat("the log-probability of token ", i, " is ", logprob));
    }
    score.logprobs.push_back(static_cast<float>(logprob));
    if (tops) {
      STRAIT_ASSIGN_OR_RETURN(const bool top, IsTop((*tops)[i], logprob));
      score.is_top.push_back(top);
    }
  }
  return score;
}

absl::Status EvalServer::Garbage(std::string_view path, std::string_view what) const {
  return absl::InternalError(absl::StrCat(client_->url().Text(), ": the answer of ", ToAbsl(path),
                                          " cannot be used: ", ToAbsl(what),
                                          ". Is it an OpenAI-compatible server?"));
}

absl::StatusOr<const json::Object*> EvalServer::Post(std::string_view path,
                                                     const json::Object& request,
                                                     json::Value* holder) {
  STRAIT_ASSIGN_OR_RETURN(
      const HttpReply reply,
      client_->Post(path, boost::json::serialize(request), kAnswerIdleTimeoutMs));
  if (reply.status != 200) {
    std::string fix;
    if (path == "/tokenize" || path == "/detokenize") {
      fix =
          ". strait eval scores text: it needs a server that has this route and a model that has "
          "a tokenizer";
    }
    return absl::FailedPreconditionError(
        absl::StrCat(client_->url().Text(), ": POST ", ToAbsl(path), ": ", reply.ErrorText(), fix));
  }
  absl::StatusOr<json::Value> value = json::Parse(reply.body, "reply");
  if (!value.ok()) return Garbage(path, ToStd(value.status().message()));
  *holder = *std::move(value);
  if (!holder->is_object()) return Garbage(path, "it is no JSON object");
  return &holder->get_object();
}

absl::StatusOr<TokenIds> EvalServer::Tokenize(std::string_view text, bool add_special_tokens) {
  TokenIds ids;
  size_t begin = 0;
  do {
    const size_t end = PieceEnd(text, begin, kTokenizeBytes);
    const json::Object request = {{"model", model_},
                                  {"prompt", std::string(text.substr(begin, end - begin))},
                                  {"add_special_tokens", add_special_tokens}};
    json::Value holder;
    STRAIT_ASSIGN_OR_RETURN(const json::Object* reply, Post("/tokenize", request, &holder));
    const absl::StatusOr<const json::Array*> tokens = json::GetArray(*reply, "tokens", "reply");
    if (!tokens.ok()) return Garbage("/tokenize", ToStd(tokens.status().message()));
    const absl::StatusOr<TokenIds> piece = ReadIds(**tokens);
    if (!piece.ok()) return Garbage("/tokenize", ToStd(piece.status().message()));
    ids.insert(ids.end(), piece->begin(), piece->end());
    begin = end;
  } while (begin < text.size());
  return ids;
}

absl::StatusOr<TokenIds> EvalServer::LeadingSpecials() {
  STRAIT_ASSIGN_OR_RETURN(const TokenIds plain, Tokenize(kProbe, false));
  STRAIT_ASSIGN_OR_RETURN(TokenIds special, Tokenize(kProbe, true));
  const auto text = std::search(special.begin(), special.end(), plain.begin(), plain.end());
  special.erase(text, special.end());
  return special;
}

absl::StatusOr<std::string> EvalServer::Detokenize(std::span<const uint32_t> ids) {
  const json::Object request = {{"model", model_}, {"tokens", json::Array(ids.begin(), ids.end())}};
  json::Value holder;
  STRAIT_ASSIGN_OR_RETURN(const json::Object* reply, Post("/detokenize", request, &holder));
  absl::StatusOr<std::string> text = json::GetString(*reply, "prompt", "reply");
  if (!text.ok()) return Garbage("/detokenize", ToStd(text.status().message()));
  return text;
}

absl::StatusOr<PromptScore> EvalServer::Score(std::span<const uint32_t> ids, bool want_top) {
  const json::Object request = {{"model", model_}, {"prompt", json::Array(ids.begin(), ids.end())},
                                {"max_tokens", 0}, {"temperature", 0},
                                {"echo", true},    {"logprobs", want_top ? 1 : 0}};
  json::Value holder;
  STRAIT_ASSIGN_OR_RETURN(const json::Object* reply, Post("/v1/completions", request, &holder));
  absl::StatusOr<PromptScore> score = ReadPromptScore(*reply, ids.size(), want_top);
  if (!score.ok()) return Garbage("/v1/completions", ToStd(score.status().message()));
  return score;
}

absl::StatusOr<std::vector<double>> EvalServer::CacheBytesPerToken() {
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client_->Get("/strait/status", kConnectTimeoutMs));
  const absl::StatusOr<json::Value> status = json::Parse(reply.body, "/strait/status");
  std::vector<double> bytes;
  if (reply.status == 200 && status.ok() && status->is_object()) {
    bytes = CacheBytesPerTokenByLayer(status->get_object());
  }
  if (bytes.empty()) {
    return absl::NotFoundError(
        absl::StrCat("GET /strait/status does not tell",
                     reply.status == 200 ? std::string() : absl::StrCat(": ", reply.ErrorText())));
  }
  return bytes;
}

}  // namespace strait::cli
