// SPDX-License-Identifier: Apache-2.0
//
// The verbs of the `strait` program: each adds its flags to the command line and runs.
//
// Thread:  main. Each Run… returns the process's exit code: 0 done, 1 failed (told on stderr), 130
//          cancelled.
// Why:     results go to stdout, everything else to stderr, so that output can be piped.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/local_cluster.h"

namespace strait::cli {

inline constexpr int kExitFailed = 1;
inline constexpr int kExitCancelled = 130;
inline constexpr char kDefaultUrl[] = "http://127.0.0.1:8000";

// Each adds one subcommand whose callback stores how to run it in `*run`.
using Run = std::function<int()>;
void AddUp(CLI::App& app, Run* run);
void AddGenerate(CLI::App& app, Run* run);
void AddStatus(CLI::App& app, Run* run);
void AddMigrate(CLI::App& app, Run* run);
void AddDrain(CLI::App& app, Run* run);
void AddScale(CLI::App& app, Run* run);
void AddBench(CLI::App& app, Run* run);
void AddEval(CLI::App& app, Run* run);
void AddStress(CLI::App& app, Run* run);

// ---- What several verbs share ----

// --coordinator, --url, --api-key.
struct ServerFlags {
  std::string url = kDefaultUrl;
  std::string api_key;
};
void AddServerFlags(CLI::App& verb, ServerFlags* flags);

// The same and --operator-key-file, of a verb that changes the cluster.
struct OperatorFlags {
  ServerFlags server;
  std::string key_file;  // empty: that of `strait up`
};
void AddOperatorKeyFlag(CLI::App& verb, std::string* key_file);
void AddOperatorFlags(CLI::App& verb, OperatorFlags* flags);
// A client with the operator key, or where none is found with the API key: the coordinator says what it needs.
absl::StatusOr<std::unique_ptr<HttpClient>> OperatorClient(const OperatorFlags& flags,
                                                           int cancel_fd);

// The flags of a cluster that this program starts; without --model, whose meaning differs.
void AddClusterFlags(CLI::App& verb, LocalClusterOptions* options);

// Prints an error, with the next thing to do when no server answers.
int Fail(const absl::Status& status, const std::string& url = "");

}  // namespace strait::cli
