// SPDX-License-Identifier: Apache-2.0
//
// `strait bench`: closed-loop clients, one thread and one connection each; the main thread keeps
// the own cluster, if there is one, and waits for signals.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/cli/api_calls.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/measure.h"
#include "coordinator/cli/mix.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"
#include "proto/wire/version.h"

namespace strait::cli {
namespace {

constexpr int kProgressMs = 200;
constexpr uint32_t kMaxConcurrency = 4096;
constexpr uint32_t kFirstPromptToken = 3;     // below are usually special tokens
constexpr uint32_t kUnknownVocabulary = 256;  // ids that every byte-level vocabulary has
constexpr size_t kMaxConfigBytes = 16 << 20;

struct BenchFlags {
  ServerFlags server;
  LocalClusterOptions cluster;
  std::string model;  // a name, or a folder: then an own cluster
  std::vector<uint32_t> concurrency = {1};
  uint32_t prompt_tokens = 128;
  uint32_t output_tokens = 64;
  uint32_t requests = 0;  // per level; 0: four per client, at least eight
  uint32_t warmup = 1;
  uint32_t vocabulary = 0;
  uint64_t seed = 1;
  bool text_prompts = false;
  std::string json_path;
};

class Bench {
 public:
  Bench(const BenchFlags& flags, Url url, Terminal* terminal, int cancel_fd)
      : flags_(flags), url_(std::move(url)), terminal_(terminal), cancel_fd_(cancel_fd) {}

  // Runs all levels; errors are those that leave nothing to measure.
  absl::Status Drive() {
    STRAIT_RETURN_IF_ERROR(Prepare());
    for (const uint32_t concurrency : flags_.concurrency) {
      STRAIT_ASSIGN_OR_RETURN(RunResult run, RunLevel(concurrency));
      summaries_.push_back(Summarize(run));
    }
    return absl::OkStatus();
  }

  // After Drive, also one that failed half way.
  const std::vector<json::Object>& summaries() const { return summaries_; }
  json::Object Report() const;

 private:
  absl::Status Prepare();
  absl::Status FindModel(HttpClient& client);
  void FindVocabulary(HttpClient& client);
  std::string Request(uint64_t key, uint32_t output_tokens) const;
  RequestResult Measure(HttpClient& client, uint64_t key, uint32_t output_tokens) const;
  absl::StatusOr<RunResult> RunLevel(uint32_t concurrency);

  const BenchFlags& flags_;
  const Url url_;
  Terminal* const terminal_;
  const int cancel_fd_;
  std::string model_;
  uint32_t vocabulary_ = kUnknownVocabulary;
  bool token_ids_ = true;
  std::vector<json::Object> summaries_;
};

absl::Status Bench::FindModel(HttpClient& client) {
  if (!flags_.model.empty() && flags_.cluster.model.empty()) {
    model_ = flags_.model;
    return absl::OkStatus();
  }
  absl::StatusOr<ModelInfo> found = FirstModel(client);
  if (absl::IsInternal(found.status())) {
    return absl::InternalError(
        absl::StrCat(std::string(found.status().message()), "; name the model with --model"));
  }
  STRAIT_RETURN_IF_ERROR(found.status());
  model_ = std::move(found->id);
  return absl::OkStatus();
}

void Bench::FindVocabulary(HttpClient& client) {
  const auto take = [&](const absl::StatusOr<json::Value>& parsed) {
    if (!parsed.ok() || !parsed->is_object()) return false;
    const int64_t size = json::GetIntOr(parsed->get_object(), "vocab_size", 0, "").value_or(0);
    if (size <= kFirstPromptToken) return false;
    vocabulary_ = static_cast<uint32_t>(std::min<int64_t>(size, UINT32_MAX));
    return true;
  };
  if (flags_.vocabulary > 0) {
    vocabulary_ = flags_.vocabulary;
  } else if (!flags_.cluster.model.empty()) {
    take(json::ParseFile(flags_.cluster.model + "/config.json", kMaxConfigBytes));
  } else if (auto reply = client.Get("/strait/status", kConnectTimeoutMs);
             reply.ok() && reply->status == 200) {
    take(json::Parse(reply->body, "/strait/status"));
  }
}

absl::Status Bench::Prepare() {
  HttpClient client(url_, flags_.server.api_key, cancel_fd_);
  STRAIT_RETURN_IF_ERROR(FindModel(client));
  FindVocabulary(client);
  token_ids_ = !flags_.text_prompts;
  const auto warm = [&](uint32_t i) {
    return Measure(client, Mix(flags_.seed) ^ (0xFFFF0000ull + i),
                   std::min(flags_.output_tokens, 8u));
  };
  terminal_->Progress("Warming up", -1);
  RequestResult first = warm(0);
  if (!first.error.empty() && token_ids_) {
    const std::string refused = first.error;
    token_ids_ = false;
    first = warm(0);
    if (first.error.empty()) {
      terminal_->Say(
          absl::StrCat("Prompts as token ids were refused (", refused, "): text is sent instead."));
    } else {
      first.error = refused;
    }
  }
  if (!first.error.empty())
    return absl::UnavailableError(absl::StrCat("first request: ", first.error));
  for (uint32_t i = 1; i < flags_.warmup; ++i) warm(i);
  return absl::OkStatus();
}

std::string Bench::Request(uint64_t key, uint32_t output_tokens) const {
  json::Object request;
  request["model"] = model_;
  if (token_ids_) {
    json::Array ids;
    ids.reserve(flags_.prompt_tokens);
    for (uint32_t i = 0; i < flags_.prompt_tokens; ++i) {
      ids.push_back(kFirstPromptToken + Mix(key + i) % (vocabulary_ - kFirstPromptToken));
    }
    request["prompt"] = std::move(ids);
  } else {
    // About a token each in common vocabularies; the server's count is what is reported.
    constexpr const char* kWords[] = {" the", " sea", " of",  " a",    " ship", " and",
                                      " in",  " to",  " by",  " wind", " at",   " night",
                                      " on",  " it",  " for", " was"};
    std::string text;
    for (uint32_t i = 0; i < flags_.prompt_tokens; ++i)
      text += kWords[Mix(key + i) % std::size(kWords)];
    request["prompt"] = std::move(text);
  }
  request["max_tokens"] = output_tokens;
  request["temperature"] = 0;
  request["ignore_eos"] = true;
  request["stream"] = true;
  request["stream_options"] = json::Object{{"include_usage", true}};
  return boost::json::serialize(request);
}

RequestResult Bench::Measure(HttpClient& client, uint64_t key, uint32_t output_tokens) const {
  return MeasureStream(client, Request(key, output_tokens), output_tokens);
}

absl::StatusOr<RunResult> Bench::RunLevel(uint32_t concurrency) {
  RunResult run;
  run.concurrency = concurrency;
  const uint32_t total = flags_.requests > 0 ? flags_.requests : std::max(8u, 4 * concurrency);
  run.requests.resize(total);
  std::atomic<uint32_t> next = 0, finished = 0, failed = 0;
  std::atomic<bool> cancelled = false;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> clients;
  for (uint32_t i = 0; i < std::min(concurrency, total); ++i) {
    clients.emplace_back([&] {
      HttpClient client(url_, flags_.server.api_key, cancel_fd_);
      for (uint32_t index = next++; index < total && !cancelled; index = next++) {
        const uint64_t key = Mix(Mix(flags_.seed + concurrency) + index);
        run.requests[index] = Measure(client, key, flags_.output_tokens);
        if (!run.requests[index].error.empty()) ++failed;
        if (WaitReadable(cancel_fd_, 0)) cancelled = true;
        ++finished;
      }
    });
  }
  // The clients do the work; this thread only shows how far they are.
  while (finished < total && !cancelled) {
    terminal_->Progress(
        absl::StrCat("Concurrency ", concurrency, ": ", finished.load(), " of ", total, " requests",
                     failed > 0 ? absl::StrCat(", ", failed.load(), " FAILED") : ""),
        static_cast<double>(finished) / total);
    WaitReadable(cancel_fd_, kProgressMs);
  }
  for (std::thread& client : clients) client.join();
  run.duration_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  terminal_->EndProgress();
  if (cancelled) return absl::CancelledError("cancelled");
  return run;
}

json::Object Bench::Report() const {
  json::Object out;
  out["program"] = absl::StrCat("strait bench ", kVersion);
  out["url"] = url_.Text();
  out["model"] = model_;
  out["prompt"] = token_ids_ ? "token ids" : "text";
  out["prompt_tokens"] = flags_.prompt_tokens;
  out["output_tokens"] = flags_.output_tokens;
  out["seed"] = flags_.seed;
  out["client_cores"] = std::thread::hardware_concurrency();
  if (!flags_.cluster.model.empty()) {
    out["cluster"] = json::Object{{"model", flags_.cluster.model},
                                  {"workers", flags_.cluster.num_workers},
                                  {"pipelines", flags_.cluster.num_pipelines},
                                  {"threads", flags_.cluster.worker_threads},
                                  {"random_weights", flags_.cluster.random_weights}};
  }
  out["runs"] = json::Array(summaries_.begin(), summaries_.end());
  return out;
}

// ---------------------------------------------------------------- output

void PrintTable(const std::vector<json::Object>& summaries) {
  std::vector<std::vector<std::string>> rows = {{"concurrency", "requests", "failed",
                                                 "prompt tok/s", "output tok/s", "TTFT p50", "p90",
                                                 "p99 ms", "TPOT p50", "p90", "p99 ms"}};
  const auto number = [](const json::Value& value) {
    return FormatNumber(value.to_number<double>());
  };
  for (const json::Object& run : summaries) {
    std::vector<std::string> row = {
        boost::json::serialize(run.at("concurrency")), boost::json::serialize(run.at("requests")),
        boost::json::serialize(run.at("failed")), number(run.at("prompt_tokens_per_s")),
        number(run.at("output_tokens_per_s"))};
    for (const char* what : {"ttft_ms", "tpot_ms"}) {
      for (const char* q : {"p50", "p90", "p99"})
        row.push_back(number(run.at(what).get_object().at(q)));
    }
    rows.push_back(std::move(row));
  }
  std::fputs(FormatTable(rows).c_str(), stdout);
  for (const json::Object& run : summaries) {
    for (const auto& [text, count] : run.at("errors").get_object()) {
      const std::string what(text.data(), text.size());
      std::fprintf(stderr, "concurrency %s: %s × %s\n",
                   boost::json::serialize(run.at("concurrency")).c_str(),
                   boost::json::serialize(count).c_str(), what.c_str());
    }
    if (run.at("short_outputs").to_number<int64_t>() > 0) {
      std::fprintf(stderr, "concurrency %s: %s requests gave fewer tokens than asked for\n",
                   boost::json::serialize(run.at("concurrency")).c_str(),
                   boost::json::serialize(run.at("short_outputs")).c_str());
    }
  }
  std::fflush(stdout);
}

int RunBench(BenchFlags flags) {
  for (const uint32_t c : flags.concurrency) {
    if (c == 0 || c > kMaxConcurrency) {
      return Fail(absl::InvalidArgumentError(
          absl::StrCat("--concurrency ", c, ": must be 1 to ", kMaxConcurrency)));
    }
  }
  if (flags.vocabulary > 0 && flags.vocabulary <= kFirstPromptToken) {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("--vocabulary must be more than ", kFirstPromptToken)));
  }
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  Terminal terminal;
  std::unique_ptr<LocalCluster> cluster;
  if (std::error_code error; std::filesystem::is_directory(flags.model, error)) {
    flags.cluster.model = flags.model;
    if (!flags.server.api_key.empty()) flags.cluster.api_keys = {flags.server.api_key};
    auto started = LocalCluster::Start(flags.cluster, &terminal, &*signals);
    if (!started.ok()) return Fail(started.status());
    cluster = *std::move(started);
    if (const absl::Status status = cluster->WaitReady(); !status.ok()) return Fail(status);
    flags.server.url = cluster->http_url();
    flags.cluster.num_workers = cluster->num_workers();
  }
  const absl::StatusOr<Url> url = ParseUrl(flags.server.url);
  if (!url.ok()) return Fail(url.status());

  EventFd cancel;
  Bench bench(flags, *url, &terminal, cancel.fd());
  const auto [watched, driven] =
      DriveBeside(cluster.get(), *signals, cancel, [&] { return bench.Drive(); });
  terminal.EndProgress();
  if (cluster) cluster->Stop();

  int64_t num_failed = 0;
  for (const json::Object& run : bench.summaries())
    num_failed += run.at("failed").to_number<int64_t>();
  if (flags.json_path != "-" && !bench.summaries().empty()) PrintTable(bench.summaries());
  if (!flags.json_path.empty()) {
    if (const absl::Status status = WriteJson(flags.json_path, bench.Report()); !status.ok()) {
      return Fail(status);
    }
  }
  if (!watched.ok()) return Fail(watched);
  if (!driven.ok()) return Fail(driven, cluster ? "" : url->Text());
  if (num_failed > 0) {
    std::fprintf(stderr, "strait: %lld requests failed\n", static_cast<long long>(num_failed));
    return kExitFailed;
  }
  return 0;
}

}  // namespace

void AddBench(CLI::App& app, Run* run) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* verb = app.add_subcommand(
      "bench",
      "Measure throughput and latency of an OpenAI-compatible server, or of a cluster of its own");
  AddServerFlags(*verb, &flags->server);
  verb->add_option(
      "--model", flags->model,
      "A model's name at the server (default: its first), or a checkpoint folder: then a cluster "
      "is started for it, measured, and stopped");
  verb->add_option("--concurrency", flags->concurrency,
                   "Clients at once; a list such as 1,4,16 runs each")
      ->delimiter(',')
      ->capture_default_str();
  verb->add_option("--prompt-tokens", flags->prompt_tokens,
                   "Tokens of each prompt, random from the seed")
      ->check(CLI::Range(1u, 1u << 24))
      ->capture_default_str();
  verb->add_option("--output-tokens", flags->output_tokens,
                   "Tokens to generate; the model's end is ignored")
      ->check(CLI::Range(1u, 1u << 24))
      ->capture_default_str();
  verb->add_option("--requests", flags->requests,
                   "Per concurrency (default: 4 a client, at least 8)");
  verb->add_option("--warmup", flags->warmup, "Requests before the measurement, at least one")
      ->capture_default_str();
  verb->add_option("--seed", flags->seed, "Of the prompts")->capture_default_str();
  verb->add_option("--vocabulary", flags->vocabulary,
                   "Prompt token ids are below this (default: asked for, or 256)");
  verb->add_flag("--text", flags->text_prompts, "Prompts as text, not as token ids");
  verb->add_option("--json", flags->json_path,
                   "Write all figures to this file; - is standard output");
  AddClusterFlags(*verb, &flags->cluster);
  verb->callback([=] { *run = [flags] { return RunBench(*flags); }; });
}

}  // namespace strait::cli
