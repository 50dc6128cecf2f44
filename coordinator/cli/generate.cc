// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

// A long prompt may be computed for minutes before its first token; the server pings meanwhile.
constexpr int kIdleTimeoutMs = 600'000;

struct GenerateFlags {
  ServerFlags server;
  std::string prompt;
  std::string system;
  std::string model;
  bool chat = false;
  bool quiet = false;
  uint32_t max_tokens = 128;
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<uint64_t> seed;
  bool ignore_eos = false;
  std::vector<std::string> stop;
};

json::Object RequestOf(const GenerateFlags& flags) {
  json::Object request;
  if (!flags.model.empty()) request["model"] = flags.model;
  if (flags.chat) {
    json::Array messages;
    if (!flags.system.empty()) {
      messages.push_back(json::Object{{"role", "system"}, {"content", flags.system}});
    }
    messages.push_back(json::Object{{"role", "user"}, {"content", flags.prompt}});
    request["messages"] = std::move(messages);
  } else {
    request["prompt"] = flags.prompt;
  }
  request["max_tokens"] = flags.max_tokens;
  if (flags.temperature) request["temperature"] = *flags.temperature;
  if (flags.top_p) request["top_p"] = *flags.top_p;
  if (flags.seed) request["seed"] = *flags.seed;
  if (flags.ignore_eos) request["ignore_eos"] = true;
  if (!flags.stop.empty()) request["stop"] = json::Array(flags.stop.begin(), flags.stop.end());
  request["stream"] = true;
  request["stream_options"] = json::Object{{"include_usage", true}};
  return request;
}

using Clock = std::chrono::steady_clock;

// What a stream of events said so far.
struct Stream {
  std::optional<Clock::time_point> first;
  Clock::time_point last;
  int64_t num_events = 0;
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;
  std::string finish_reason;
  std::string error;
  bool ended_line = true;

  bool Take(std::string_view data) {
    if (data == "[DONE]") return true;
    const absl::StatusOr<json::Value> event = json::Parse(data, "event");
    if (!event.ok() || !event->is_object()) {
      error = "the server sent an event that is no JSON object";
      return false;
    }
    const json::Object& object = event->get_object();
    if (json::Find(object, "error")) {
      HttpReply reply;
      reply.body = std::string(data);
      reply.status = 200;
      error = reply.ErrorText();
      return false;
    }
    if (const json::Value* usage = json::Find(object, "usage"); usage && usage->is_object()) {
      const json::Object& u = usage->get_object();
      prompt_tokens = json::GetIntOr(u, "prompt_tokens", 0, "usage").value_or(0);
      output_tokens = json::GetIntOr(u, "completion_tokens", 0, "usage").value_or(0);
    }
    const json::Value* choices = json::Find(object, "choices");
    if (!choices || !choices->is_array() || choices->get_array().empty()) return true;
    const json::Value& choice = choices->get_array()[0];
    if (!choice.is_object()) return true;
    const json::Object* holder = &choice.get_object();
    if (const json::Value* reason = json::Find(*holder, "finish_reason");
        reason && reason->is_string()) {
      finish_reason = std::string(json::View(reason->get_string()));
    }
    const char* key = "text";
    if (const json::Value* delta = json::Find(*holder, "delta"); delta && delta->is_object()) {
      holder = &delta->get_object();
      key = "content";
      if (json::Find(*holder, "role") && !json::Find(*holder, "content")) return true;
    }
    last = Clock::now();
    if (!first) first = last;
    ++num_events;
    if (const json::Value* text = json::Find(*holder, key); text && text->is_string()) {
      const std::string_view shown = json::View(text->get_string());
      std::fwrite(shown.data(), 1, shown.size(), stdout);
      std::fflush(stdout);
      if (!shown.empty()) ended_line = shown.ends_with('\n');
    }
    return true;
  }
};

int RunGenerate(GenerateFlags flags) {
  // Before signals are blocked, so that Ctrl-C still ends the reading.
  if (flags.prompt == "-") {
    flags.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  const absl::StatusOr<Url> url = ParseUrl(flags.server.url);
  if (!url.ok()) return Fail(url.status());
  HttpClient client(*url, flags.server.api_key, signals->fd());
  if (flags.model.empty()) {
    // Other servers insist on a model's name; the first one they have will do.
    if (auto reply = client.Get("/v1/models", kConnectTimeoutMs); !reply.ok()) {
      return Fail(reply.status(), url->Text());
    } else if (auto parsed = json::Parse(reply->body, "models");
               parsed.ok() && parsed->is_object()) {
      auto data = json::GetArray(parsed->get_object(), "data", "models");
      if (data.ok() && !(*data)->empty() && (**data)[0].is_object()) {
        flags.model = json::GetStringOr((**data)[0].get_object(), "id", "", "models").value_or("");
      }
    }
  }

  Stream stream;
  const auto start = Clock::now();
  const absl::StatusOr<HttpReply> reply =
      client.PostStream(flags.chat ? "/v1/chat/completions" : "/v1/completions",
                        boost::json::serialize(RequestOf(flags)), kIdleTimeoutMs,
                        [&](std::string_view data) { return stream.Take(data); });
  if (!stream.ended_line) std::printf("\n");
  std::fflush(stdout);
  if (!reply.ok()) return Fail(reply.status(), stream.num_events == 0 ? url->Text() : "");
  if (reply->status != 200) return Fail(absl::InternalError(reply->ErrorText()));
  if (!stream.error.empty()) return Fail(absl::InternalError(stream.error));
  if (flags.quiet) return 0;

  const int64_t tokens = stream.output_tokens > 0 ? stream.output_tokens : stream.num_events;
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  std::string line = absl::StrCat("[", tokens, " token", tokens == 1 ? "" : "s");
  if (stream.first) {
    absl::StrAppend(&line, ", first after ", FormatNumber(seconds(*stream.first - start)), " s");
    const double span = seconds(stream.last - *stream.first);
    if (tokens > 1 && span > 0) {
      absl::StrAppend(&line, ", then ", FormatNumber(static_cast<double>(tokens - 1) / span),
                      " tokens/s");
    }
  }
  if (stream.prompt_tokens > 0) absl::StrAppend(&line, "; prompt ", stream.prompt_tokens);
  if (!stream.finish_reason.empty()) absl::StrAppend(&line, "; ended by ", stream.finish_reason);
  std::fprintf(stderr, "%s]\n", line.c_str());
  return 0;
}

}  // namespace

void AddGenerate(CLI::App& app, Run* run) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* verb = app.add_subcommand("generate", "Stream a completion to the terminal");
  verb->add_option("prompt", flags->prompt, "The prompt; - reads standard input")->required();
  AddServerFlags(*verb, &flags->server);
  verb->add_flag("--chat", flags->chat, "The prompt is a user's message, set in the chat template");
  verb->add_option("--system", flags->system, "With --chat: the system's message");
  verb->add_option("--model", flags->model, "The model's name (default: the server's first)");
  verb->add_option("--max-tokens", flags->max_tokens, "Tokens at most")->capture_default_str();
  verb->add_option("--temperature", flags->temperature, "0: always the likeliest token");
  verb->add_option("--top-p", flags->top_p,
                   "Sample from the likeliest tokens of this total probability");
  verb->add_option("--seed", flags->seed, "Equal seeds give equal text");
  verb->add_flag("--ignore-eos", flags->ignore_eos, "Go on past the model's end of text");
  verb->add_option("--stop", flags->stop, "Stop before this text; may be repeated")
      ->allow_extra_args(false);
  verb->add_flag("--quiet,-q", flags->quiet, "No figures at the end");
  verb->callback([=] { *run = [flags] { return RunGenerate(*flags); }; });
}

}  // namespace strait::cli
