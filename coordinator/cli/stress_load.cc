// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_load.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/measure.h"
#include "coordinator/cli/mix.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/text.h"

namespace strait::cli {
namespace {

constexpr uint32_t kFirstPromptToken = 3;  // below are usually special tokens
constexpr size_t kShownBytes = 300;        // of what a server says

double Fraction(Draws& draws) { return static_cast<double>(draws.Next() >> 11) * 0x1p-53; }

StressRequest MakeRequest(const LoadOptions& options, Draws draws) {
  StressRequest request;
  const double low = std::log(options.min_rows), high = std::log(options.max_rows);
  const auto rows = std::clamp<uint32_t>(
      static_cast<uint32_t>(std::lround(std::exp(low + Fraction(draws) * (high - low)))),
      options.min_rows, options.max_rows);
  // From a quarter of the most on, so that a sequence lives long enough to be disturbed.
  const uint32_t most = std::min(options.output_tokens, rows - 1);
  request.output_tokens = most - static_cast<uint32_t>(draws.Below(most * 3 / 4 + 1));
  request.prompt_tokens = rows - request.output_tokens;
  request.choices = draws.Below(8) == 0 ? 2 : 1;

  json::Array prompt;
  prompt.reserve(request.prompt_tokens);
  for (uint32_t i = 0; i < request.prompt_tokens; ++i) {
    prompt.push_back(kFirstPromptToken + draws.Below(options.vocabulary - kFirstPromptToken));
  }
  json::Object& body = request.body;
  if (!options.model.empty()) body["model"] = options.model;
  body["prompt"] = std::move(prompt);
  body["max_tokens"] = request.output_tokens;
  body["n"] = request.choices;
  const bool greedy = draws.Below(2) == 0;
  body["temperature"] = greedy ? 0.0 : 0.9;
  body["seed"] = draws.Next() >> 1;
  if (!greedy && draws.Below(2) == 0) body["top_p"] = 0.95;
  if (!greedy && draws.Below(4) == 0) body["presence_penalty"] = 0.4;
  body["logprobs"] = 0;
  body["ignore_eos"] = true;
  body["return_token_ids"] = true;
  body["stream"] = true;
  return request;
}

std::string Shown(std::string_view text) { return PrintableText(text, kShownBytes); }

}  // namespace

std::vector<StressRequest> MakeRequests(const LoadOptions& options) {
  std::vector<StressRequest> requests;
  for (uint32_t i = 0; i < options.num_requests; ++i) {
    requests.push_back(MakeRequest(options, Draws{Mix(Mix(options.seed) + i)}));
  }
  return requests;
}

std::string BodyOf(const StressRequest& request, std::string_view salt) {
  if (salt.empty()) return boost::json::serialize(request.body);
  json::Object body = request.body;
  body["cache_salt"] = salt;
  return boost::json::serialize(body);
}

bool StreamReader::Fail(std::string why) {
  if (outcome_.failure.empty()) outcome_.failure = std::move(why);
  return false;
}

bool StreamReader::Take(std::string_view data, double at_s) {
  if (data == "[DONE]") {
    done_ = true;
    return true;
  }
  const absl::StatusOr<json::Value> event = json::Parse(data, "event");
  if (!event.ok() || !event->is_object()) {
    return Fail(absl::StrCat("an event that is no JSON object: ", Shown(data)));
  }
  const json::Object& object = event->get_object();
  if (json::Find(object, "error")) {
    return Fail(absl::StrCat("broken off: ", Shown(data)));
  }
  if (outcome_.name.empty()) outcome_.name = Text(object, "id");
  for (const json::Object* choice : Objects(object, "choices")) {
    if (!TakeChoice(*choice, at_s)) return false;
  }
  return true;
}

bool StreamReader::TakeChoice(const json::Object& choice, double at_s) {
  const double index = Number(choice, "index");
  if (index < 0 || index >= static_cast<double>(outcome_.choices.size())) {
    return Fail("a choice that was not asked for");
  }
  ChoiceOutcome& into = outcome_.choices[static_cast<size_t>(index)];
  if (const json::Value* ids = json::Find(choice, "token_ids"); ids && ids->is_array()) {
    for (const json::Value& id : ids->get_array()) {
      into.ids.push_back(id.is_int64() ? static_cast<uint32_t>(id.get_int64()) : UINT32_MAX);
      into.at_s.push_back(at_s);
    }
  }
  if (const json::Value* logprobs = json::Find(choice, "logprobs");
      logprobs && logprobs->is_object()) {
    if (const json::Value* values = json::Find(logprobs->get_object(), "token_logprobs");
        values && values->is_array()) {
      for (const json::Value& value : values->get_array()) {
        into.logprobs.push_back(value.is_number() ? value.to_number<double>()
                                                  : std::numeric_limits<double>::quiet_NaN());
      }
    }
  }
  if (const std::string finish = Text(choice, "finish_reason"); !finish.empty()) {
    into.finish = finish;
  }
  return true;
}

StreamOutcome StreamReader::End() && {
  if (!done_) Fail("it ended without [DONE]");
  return std::move(outcome_);
}

StreamOutcome RunStream(HttpClient& client, const std::string& body, uint32_t choices,
                        StressClock::time_point start, std::atomic<int64_t>* last_sign_us) {
  StreamReader reader(choices);
  const auto on_event = [&](std::string_view data) {
    const auto at = StressClock::now() - start;
    last_sign_us->store(std::chrono::duration_cast<std::chrono::microseconds>(at).count());
    return reader.Take(data, std::chrono::duration<double>(at).count());
  };
  const absl::StatusOr<HttpReply> reply =
      client.PostStream("/v1/completions", body, /*idle_timeout_ms=*/-1, on_event);
  StreamOutcome outcome = std::move(reader).End();
  if (!reply.ok()) {
    outcome.failure = absl::StrCat("broken: ", std::string(reply.status().message()));
  } else if (reply->status != 200) {
    outcome.failure = absl::StrCat("refused: ", Shown(reply->ErrorText()));
  }
  return outcome;
}

std::string Difference(const StreamOutcome& got, const StreamOutcome& reference) {
  if (!got.failure.empty()) return got.failure;
  for (size_t c = 0; c < reference.choices.size(); ++c) {
    const ChoiceOutcome& a = got.choices[c];
    const ChoiceOutcome& b = reference.choices[c];
    const std::string choice = absl::StrCat("choice ", c, ": ");
    for (size_t i = 0; i < std::min(a.ids.size(), b.ids.size()); ++i) {
      if (a.ids[i] != b.ids[i]) {
        return absl::StrCat(choice, "token ", i, " is ", a.ids[i], " instead of ", b.ids[i]);
      }
    }
    if (a.ids.size() != b.ids.size()) {
      return absl::StrCat(choice, a.ids.size(), " tokens instead of ", b.ids.size());
    }
    if (a.logprobs.size() != b.logprobs.size()) {
      return absl::StrCat(choice, a.logprobs.size(), " log-probabilities instead of ",
                          b.logprobs.size());
    }
    for (size_t i = 0; i < a.logprobs.size(); ++i) {
      if (std::bit_cast<uint64_t>(a.logprobs[i]) != std::bit_cast<uint64_t>(b.logprobs[i])) {
        return absl::StrCat(choice, "the log-probability of token ", i, " is ",
                            boost::json::serialize(json::Value(a.logprobs[i])), " instead of ",
                            boost::json::serialize(json::Value(b.logprobs[i])));
      }
    }
    if (a.finish != b.finish) {
      return absl::StrCat(choice, "it ended by \"", a.finish, "\" instead of \"", b.finish, "\"");
    }
  }
  return "";
}

std::optional<double> PauseMs(const ChoiceOutcome& choice, uint32_t prompt_tokens,
                              uint64_t rows_at_switch) {
  if (rows_at_switch < prompt_tokens) return std::nullopt;
  const uint64_t last = rows_at_switch - prompt_tokens;  // index of the old pipeline's last token
  if (last < kMinGapsBefore || last + 1 >= choice.at_s.size()) return std::nullopt;
  std::vector<double> before;
  for (uint64_t i = last - std::min<uint64_t>(last, kGapsBefore); i < last; ++i) {
    before.push_back(choice.at_s[i + 1] - choice.at_s[i]);
  }
  const double gap = choice.at_s[last + 1] - choice.at_s[last];
  return (gap - Percentile(std::move(before), 0.5)) * 1e3;
}

}  // namespace strait::cli
