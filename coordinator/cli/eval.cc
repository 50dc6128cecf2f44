// SPDX-License-Identifier: Apache-2.0
//
// `strait eval`: flags, and one target after the other. A folder's cluster runs only while it is
// measured, so that two models neither share memory nor slow each other down.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/eval_report.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr size_t kMaxTargets = 2;
constexpr uint32_t kMaxAnswers = 10'000'000;
constexpr size_t kMaxConfigBytes = 16 << 20;

struct EvalFlags {
  std::vector<std::string> urls;
  std::vector<std::string> models;  // folders
  std::string api_key;
  LocalClusterOptions cluster;
  std::string text;
  EvalOptions options;
  std::string json_path;
};

struct Target {
  std::string name;
  std::optional<Url> url;  // none: `name` is a folder
};

absl::Status CheckOptions(const EvalOptions& options) {
  const auto bound = [](const char* flag, uint64_t value, uint64_t low, uint64_t high,
                        const char* fix) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", value, ": must be ", low, " to ", high, fix));
  };
  STRAIT_RETURN_IF_ERROR(bound("--answers", options.answers, 1, kMaxAnswers,
                               "; without --recall no answers are asked for"));
  STRAIT_RETURN_IF_ERROR(bound("--concurrency", options.concurrency, 1, kMaxEvalConcurrency, ""));
  if (options.window > 0) {
    STRAIT_RETURN_IF_ERROR(bound("--window", options.window, 4, INT32_MAX, ""));
  }
  // What is wrong with edges by themselves, before any server is asked.
  return MakeBuckets(options.edges, options.default_edges,
                     options.window > 0 ? options.window : INT32_MAX)
      .status();
}

absl::StatusOr<std::vector<Target>> FindTargets(const EvalFlags& flags) {
  std::vector<Target> targets;
  for (const std::string& text : flags.urls) {
    STRAIT_ASSIGN_OR_RETURN(Url url, ParseUrl(text));
    targets.push_back({url.Text(), url});
  }
  for (const std::string& folder : flags.models) {
    std::error_code error;
    if (!std::filesystem::is_directory(folder, error)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--model ", folder, " is no folder. Give a checkpoint's folder, or --url ",
                       "for a cluster that runs"));
    }
    targets.push_back({folder, std::nullopt});
  }
  if (targets.size() > kMaxTargets) {
    return absl::InvalidArgumentError(absl::StrCat(
        targets.size(), " targets: at most ", kMaxTargets, " can be compared (--url, --model)"));
  }
  if (targets.empty()) {
    STRAIT_ASSIGN_OR_RETURN(Url url, ParseUrl(kDefaultUrl));
    targets.push_back({url.Text(), url});
  }
  return targets;
}

// A context that both targets have, so that both get the same windows. A folder's is read from its
// config.json; its server may serve less, which EvaluateTarget then tells.
absl::StatusOr<uint32_t> CommonContext(const std::vector<Target>& targets,
                                       const std::string& api_key, int cancel_fd) {
  int64_t common = INT32_MAX;
  for (const Target& target : targets) {
    int64_t context = 0;
    if (target.url) {
      HttpClient client(*target.url, api_key, cancel_fd);
      STRAIT_ASSIGN_OR_RETURN(context, ContextOf(client));
    } else {
      const std::string path = target.name + "/config.json";
      STRAIT_ASSIGN_OR_RETURN(const json::Value config, json::ParseFile(path, kMaxConfigBytes));
      STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(config, path));
      STRAIT_ASSIGN_OR_RETURN(
          context, json::GetIntIn(*object, "max_position_embeddings", 4, INT32_MAX, path));
    }
    common = std::min(common, context);
  }
  return static_cast<uint32_t>(common);
}

absl::StatusOr<TargetResult> RunTarget(const EvalFlags& flags, const Target& target,
                                       const TextFile& text, Terminal* terminal, Signals* signals) {
  std::unique_ptr<LocalCluster> cluster;
  Url url;
  if (target.url) {
    url = *target.url;
  } else {
    LocalClusterOptions options = flags.cluster;
    options.model = target.name;
    if (!flags.api_key.empty()) options.api_keys = {flags.api_key};
    STRAIT_ASSIGN_OR_RETURN(cluster, LocalCluster::Start(options, terminal, signals));
    STRAIT_RETURN_IF_ERROR(cluster->WaitReady());
    STRAIT_ASSIGN_OR_RETURN(url, ParseUrl(cluster->http_url()));
  }
  EventFd cancel;
  absl::StatusOr<TargetResult> result = absl::CancelledError("cancelled");
  const Driven driven = DriveBeside(cluster.get(), *signals, cancel, [&] {
    result = EvaluateTarget(flags.options, text, url, terminal, &cancel);
    return result.status();
  });
  if (cluster) cluster->Stop();
  STRAIT_RETURN_IF_ERROR(driven.watched);
  STRAIT_RETURN_IF_ERROR(driven.worked);
  result->name = target.name;
  return result;
}

int RunEval(EvalFlags flags) {
  if (const absl::Status status = CheckOptions(flags.options); !status.ok()) return Fail(status);
  const absl::StatusOr<std::vector<Target>> targets = FindTargets(flags);
  if (!targets.ok()) return Fail(targets.status());
  // Before signals are blocked, so that they end the reading of a large file.
  const absl::StatusOr<TextFile> text = ReadText(flags.text);
  if (!text.ok()) return Fail(text.status());

  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  Terminal terminal;
  if (targets->size() > 1) {
    const absl::StatusOr<uint32_t> context = CommonContext(*targets, flags.api_key, signals->fd());
    if (!context.ok()) return Fail(context.status());
    flags.options.context_tokens = *context;
  }
  std::vector<TargetResult> results;
  for (const Target& target : *targets) {
    absl::StatusOr<TargetResult> result = RunTarget(flags, target, *text, &terminal, &*signals);
    terminal.EndProgress();
    if (!result.ok()) return Fail(result.status(), target.url ? target.name : "");
    results.push_back(*std::move(result));
  }

  const json::Object report = ReportJson(flags.options, *text, results);
  if (flags.json_path != "-") std::fputs(ReportTables(report).c_str(), stdout);
  if (!flags.json_path.empty()) {
    const absl::Status status = WriteJson(flags.json_path, report);
    if (!status.ok()) return Fail(status);
  }
  return 0;
}

}  // namespace

void AddEval(CLI::App& app, Run* run) {
  auto flags = std::make_shared<EvalFlags>();
  EvalOptions& options = flags->options;
  CLI::App* verb = app.add_subcommand(
      "eval", "Measure a model's quality: perplexity by position, recall by distance; compare two");
  verb->add_option("--text", flags->text,
                   "What is scored, and fills recall's contexts: plain UTF-8 text, or .jsonl with "
                   "{\"text\": …} a line; .xz is decompressed")
      ->required();
  verb->add_option("--url,--coordinator", flags->urls,
                   "HTTP address of a running cluster; twice: the two are compared (default: "
                   "STRAIT_URL, http://127.0.0.1:8000)")
      ->allow_extra_args(false);
  verb->add_option(
          "--model", flags->models,
          "A checkpoint folder: a cluster is started for it, measured, and stopped; twice, "
          "or beside --url: the two are compared")
      ->allow_extra_args(false);
  verb->add_option("--api-key", flags->api_key, "Sent as a bearer token")
      ->envname("STRAIT_API_KEY");
  verb->add_option("--window", options.window,
                   "Tokens scored together; only documents as long count (default: 8192, or the "
                   "model's context when that is less)");
  verb->add_option("--max-windows", options.max_windows, "At most so many windows; 0: all")
      ->capture_default_str();
  CLI::Option* edges = verb->add_option("--edges", options.edges,
                                        "Positions at which buckets of perplexity begin and end")
                           ->delimiter(',')
                           ->capture_default_str();
  verb->add_option("--recall", options.distances,
                   "Tokens back at which recall is asked for, as in 512,2048,8000")
      ->delimiter(',');
  verb->add_option("--answers", options.answers, "At least so many answers for each distance")
      ->capture_default_str();
  verb->add_option("--seed", options.seed, "Of recall's contexts")->capture_default_str();
  verb->add_option("--concurrency", options.concurrency, "Requests in flight")
      ->capture_default_str();
  verb->add_option("--json", flags->json_path,
                   "Write all figures to this file; - is standard output");
  AddClusterFlags(*verb, &flags->cluster);
  verb->callback([=] {
    flags->options.default_edges = edges->count() == 0;
    const char* const url = std::getenv("STRAIT_URL");
    if (flags->urls.empty() && flags->models.empty() && url && *url) flags->urls = {url};
    *run = [flags] { return RunEval(*flags); };
  });
}

}  // namespace strait::cli
