// SPDX-License-Identifier: Apache-2.0
//
// `strait stress`: a load whose every token is known beforehand, while sequences move, workers die,
// stand still, come and go, links part, and pipelines change their shape.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/access/operator_key.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/operator_access.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/stress_goals.h"
#include "coordinator/cli/stress_run.h"

namespace strait::cli {
namespace {

constexpr double kDefaultSeconds = 60;

struct StressFlags {
  ServerFlags server;
  std::string operator_key_file;
  LocalClusterOptions cluster;
  uint32_t num_stages = 0;
  StressOptions stress;
  std::string model;  // a folder: then an own cluster
  std::string json_path;
  bool acceptance = false;
};

// Periods of the faults that only an own cluster can have, by flag.
std::vector<std::pair<const char*, double*>> OwnPeriods(StressOptions* stress) {
  return {{"--kill-every", &stress->kill_every_s},
          {"--stop-every", &stress->stop_every_s},
          {"--coordinator-stop-every", &stress->coordinator_stop_every_s},
          {"--partition-every", &stress->partition_every_s},
          {"--slow-every", &stress->slow_every_s},
          {"--join-every", &stress->join_every_s}};
}

bool Has(const std::vector<std::string>& args, std::string_view flag) {
  return std::find(args.begin(), args.end(), flag) != args.end();
}

// What an acceptance run does unless its flags say otherwise: every kind, often enough for its goals.
void CompleteAcceptance(StressFlags* flags) {
  StressOptions& stress = flags->stress;
  for (const auto& [period_s, usual] :
       {std::pair(&stress.seconds, StressGoals().seconds), std::pair(&stress.kill_every_s, 4.0),
        std::pair(&stress.stop_every_s, 15.0), std::pair(&stress.coordinator_stop_every_s, 150.0),
        std::pair(&stress.partition_every_s, 20.0), std::pair(&stress.slow_every_s, 20.0),
        std::pair(&stress.join_every_s, 45.0), std::pair(&stress.reshape_every_s, 10.0),
        std::pair(&stress.drain_every_s, 40.0)}) {
    if (*period_s == 0) *period_s = usual;
  }
  LocalClusterOptions& cluster = flags->cluster;
  if (cluster.num_spares == 0) cluster.num_spares = 2;
  if (!Has(cluster.worker_args, "--replica-memory")) {
    cluster.worker_args.insert(cluster.worker_args.end(), {"--replica-memory", "256MiB"});
  }
  if (!Has(cluster.coordinator_args, "--warm-spares")) {
    cluster.coordinator_args.insert(cluster.coordinator_args.end(), {"--warm-spares", "2"});
  }
}

void PrintTable(const json::Object& report) {
  const auto count_of = [&](const char* key) {
    return absl::StrCat(static_cast<int64_t>(Number(report, key)));
  };
  const auto spread = [&](const char* key, const char* value) {
    return FormatNumber(Number(report.at(key).get_object(), value));
  };
  uint64_t failed = 0;
  for (const auto& [reason, count] : report.at("failed_migrations").get_object()) {
    failed += count.to_number<uint64_t>();
  }
  std::fputs(
      FormatTable({{"seconds", "streams", "moves", "failed", "recovered", "recomputed tokens",
                    "violations"},
                   {FormatNumber(Number(report, "seconds")), count_of("streams"),
                    count_of("migrations"), absl::StrCat(failed), count_of("recovered_sequences"),
                    count_of("recomputed_tokens"), count_of("violations")}})
          .c_str(),
      stdout);
  std::vector<std::vector<std::string>> faults = {{"fault", "times"}};
  for (const FaultKind& kind : kFaultKinds) {
    faults.push_back({std::string(kind.name), count_of(std::string(kind.member).c_str())});
  }
  std::fputs(("\n" + FormatTable(faults)).c_str(), stdout);
  std::fputs("\n", stdout);
  std::vector<std::vector<std::string>> rows = {{"", "p50", "p99", "max", "of"}};
  for (const auto& [key, what] :
       {std::pair("pause_ms", "pause at the client, ms"),
        std::pair("pause_told_ms", "pause as told, ms"), std::pair("move_ms", "whole move, ms"),
        std::pair("move_rows", "rows moved")}) {
    const double count = Number(report.at(key).get_object(), "count");
    rows.push_back({what, spread(key, "p50"), spread(key, "p99"), spread(key, "max"),
                    absl::StrCat(static_cast<int64_t>(count))});
  }
  std::fputs(FormatTable(rows).c_str(), stdout);
  std::printf("\nmoved %s, at %s/s (median move)\n",
              FormatBytes(Number(report, "moved_bytes")).c_str(),
              FormatBytes(Number(report.at("move_bytes_per_s").get_object(), "p50")).c_str());
  if (json::Find(report, "protected_share") != nullptr) {
    std::printf("protected for %.2f %% of decode time\n", 100 * Number(report, "protected_share"));
  }
  for (const char* kind :
       {"failed_migrations", "failed_reshapes", "failed_drains", "failed_joins"}) {
    for (const auto& [reason, count] : report.at(kind).get_object()) {
      std::printf("%s: %s × %s\n", kind, boost::json::serialize(count).c_str(),
                  std::string(reason.data(), reason.size()).c_str());
    }
  }
  std::string skipped;
  for (const json::Value& kind : report.at("skipped_faults").get_array()) {
    absl::StrAppend(&skipped, skipped.empty() ? "" : ", ",
                    std::string(json::View(kind.get_string())));
  }
  if (!skipped.empty()) std::printf("not done: %s\n", skipped.c_str());
  std::fflush(stdout);
}

absl::Status Check(StressFlags flags, bool own) {
  if (!own && flags.acceptance) {
    return absl::InvalidArgumentError(
        "--acceptance needs a cluster of its own (--model DIR): it kills, stops and parts workers");
  }
  for (const auto& [flag, period_s] : OwnPeriods(&flags.stress)) {
    if (own || *period_s <= 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(flag,
                     " is for a cluster of its own (--model DIR): processes of others and "
                     "their links are left alone"));
  }
  if (own && flags.num_stages > 0 && flags.cluster.num_workers > 0 &&
      flags.cluster.num_workers != flags.num_stages * flags.cluster.num_pipelines) {
    return absl::InvalidArgumentError(absl::StrCat("--workers ", flags.cluster.num_workers,
                                                   " is not --pipelines ",
                                                   flags.cluster.num_pipelines, " times --stages ",
                                                   flags.num_stages, ": leave --workers out"));
  }
  return absl::OkStatus();
}

int RunStress(StressFlags flags) {
  std::error_code error;
  const bool own = !flags.model.empty() && std::filesystem::is_directory(flags.model, error);
  if (!flags.model.empty() && !own) {
    return Fail(absl::InvalidArgumentError(absl::StrCat(
        "--model ", flags.model, " is no folder; leave it out for a cluster that runs (--url)")));
  }
  if (const absl::Status checked = Check(flags, own); !checked.ok()) return Fail(checked);
  if (flags.acceptance) CompleteAcceptance(&flags);
  if (flags.stress.seconds == 0 && flags.stress.migrations == 0) {
    flags.stress.seconds = kDefaultSeconds;
  }
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  Terminal terminal;
  std::unique_ptr<LocalCluster> cluster;
  if (own) {
    LocalClusterOptions& options = flags.cluster;
    options.model = flags.model;
    options.operator_key_file = flags.operator_key_file;
    options.expects_deaths = true;
    options.relays_links = flags.stress.partition_every_s > 0 || flags.stress.slow_every_s > 0;
    if (flags.num_stages > 0) options.num_workers = flags.num_stages * options.num_pipelines;
    if (!flags.server.api_key.empty()) options.api_keys = {flags.server.api_key};
    auto started = LocalCluster::Start(options, &terminal, &*signals);
    if (!started.ok()) return Fail(started.status());
    cluster = *std::move(started);
    if (const absl::Status status = cluster->WaitReady(); !status.ok()) return Fail(status);
    flags.server.url = cluster->http_url();
    flags.operator_key_file = cluster->operator_key_file();
  }
  const absl::StatusOr<Url> url = ParseUrl(flags.server.url);
  if (!url.ok()) return Fail(url.status());
  const absl::StatusOr<std::string> key = FindOperatorKey(*url, flags.operator_key_file);
  if (!key.ok()) return Fail(key.status());

  EventFd cancel;
  Stress stress(flags.stress, *url, flags.server.api_key, *key, cluster.get(), &terminal,
                cancel.fd());
  const auto [watched, driven] =
      DriveBeside(cluster.get(), *signals, cancel, [&] { return stress.Drive(); });
  terminal.EndProgress();
  if (cluster) cluster->Stop();

  json::Object report = stress.Report();
  std::vector<std::string> missed;
  if (flags.acceptance) {
    missed = Missed(report, StressGoals());
    report["missed"] = json::Array(missed.begin(), missed.end());
  }
  if (stress.log().num_streams() > 0) {
    if (flags.json_path != "-") PrintTable(report);
    if (!flags.json_path.empty()) {
      if (const absl::Status status = WriteJson(flags.json_path, report); !status.ok()) {
        return Fail(status);
      }
    }
  }
  const uint64_t violations = stress.log().num_violations();
  for (const std::string& text : stress.log().violations()) {
    std::fprintf(stderr, "violation: %s\n", text.c_str());
  }
  for (const std::string& text : missed) {
    std::fprintf(stderr, "acceptance: %s\n", text.c_str());
  }
  if (!watched.ok()) return Fail(watched);
  if (!driven.ok()) return Fail(driven, cluster ? "" : url->Text());
  if (violations > 0) {
    std::fprintf(stderr, "strait: %llu of %llu streams are not what they were undisturbed\n",
                 static_cast<unsigned long long>(violations),
                 static_cast<unsigned long long>(stress.log().num_streams()));
    return kExitFailed;
  }
  return missed.empty() ? 0 : kExitFailed;
}

}  // namespace

void AddStress(CLI::App& app, Run* run) {
  auto flags = std::make_shared<StressFlags>();
  flags->cluster.num_pipelines = 2;
  StressOptions& stress = flags->stress;
  LoadOptions& load = stress.load;
  load.max_rows = 0;
  const CLI::Range often(0.0, 86'400.0);
  CLI::App* verb = app.add_subcommand(
      "stress",
      "Disturb a cluster that runs, or one of its own, and compare every token with an undisturbed "
      "run");
  AddServerFlags(*verb, &flags->server);
  AddOperatorKeyFlag(*verb, &flags->operator_key_file);
  verb->add_option("--model", flags->model,
                   "Checkpoint folder: then a cluster is started for it, and stopped");
  verb->add_option("--stages", flags->num_stages, "Stages of each pipeline of an own cluster")
      ->check(CLI::Range(1u, 256u));
  verb->add_option("--seconds", stress.seconds,
                   absl::StrCat("How long to disturb (default: ", kDefaultSeconds,
                                ", or what --migrations takes)"))
      ->check(often);
  verb->add_option("--migrations", stress.migrations, "End after so many moves");
  verb->add_option("--clients", stress.clients, "Streams at once")
      ->check(CLI::Range(1u, 4096u))
      ->capture_default_str();
  verb->add_option("--seed", load.seed, "Of all that is drawn")->capture_default_str();
  verb->add_option("--requests", load.num_requests,
                   "Unequal requests, each with its reference (default: 2 a client, at least 8)")
      ->check(CLI::Range(0u, 100'000u));
  verb->add_option("--min-rows", load.min_rows, "Prompt and answer of a sequence, at least")
      ->check(CLI::Range(2u, 1u << 24))
      ->capture_default_str();
  verb->add_option("--max-rows", load.max_rows,
                   "The same, at most (default: 2048, or the model's context)");
  verb->add_option("--output-tokens", load.output_tokens, "Answer of a sequence, at most")
      ->check(CLI::Range(1u, 1u << 24))
      ->capture_default_str();
  verb->add_option("--movers", stress.movers, "Moves at once; 0: none")
      ->check(CLI::Range(0u, 256u))
      ->capture_default_str();
  verb->add_option("--move-every", stress.move_every_s, "Seconds between two moves of a mover")
      ->check(often)
      ->capture_default_str();
  verb->add_option("--kill-every", stress.kill_every_s,
                   "Seconds between two SIGKILLs of workers; 0: none. Own cluster only")
      ->check(often);
  verb->add_option("--stop-every", stress.stop_every_s,
                   "Seconds between two SIGSTOPs of workers, which last up to 8 s; the same")
      ->check(often);
  verb->add_option("--reshape-every", stress.reshape_every_s,
                   "Seconds between two changes of the number of stages; 0: none")
      ->check(often);
  verb->add_option(
          "--drain-every", stress.drain_every_s,
          "Seconds between two drains of a worker, which gets stages again after up to 2 s; "
          "0: none")
      ->check(often);
  verb->add_option(
          "--partition-every", stress.partition_every_s,
          "Seconds between two partitions of a worker's links, silent or cut for up to 10 s; "
          "0: none. Own cluster only, as all that follow")
      ->check(often);
  verb->add_option("--slow-every", stress.slow_every_s,
                   "Seconds between two limits of a worker's links to --slow-rate, for up to 10 s")
      ->check(often);
  verb->add_option("--slow-rate", stress.slow_bytes_per_s,
                   "Bytes a second of a slow link, each direction")
      ->check(CLI::Range(1.0, 1e12))
      ->capture_default_str();
  verb->add_option(
          "--join-every", stress.join_every_s,
          "Seconds between two workers that join, after each of which another leaves for good")
      ->check(often);
  verb->add_option("--coordinator-stop-every", stress.coordinator_stop_every_s,
                   "Seconds between two SIGSTOPs of the coordinator, which last 20 s")
      ->check(often);
  verb->add_flag(
      "--acceptance", flags->acceptance,
      "Every kind of disturbance, for 10 minutes; fail if too few came about, and say which");
  verb->add_option("--json", flags->json_path,
                   "Write all figures to this file; - is standard output");
  AddClusterFlags(*verb, &flags->cluster);
  verb->callback([=] { *run = [flags] { return RunStress(*flags); }; });
}

}  // namespace strait::cli
