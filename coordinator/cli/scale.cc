// SPDX-License-Identifier: Apache-2.0
//
// `strait scale`: every pipeline gets another number of stages while it serves.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"
#include "proto/base/json.h"
#include "proto/base/limits.h"

namespace strait::cli {
namespace {

struct ScaleFlags {
  OperatorFlags operator_flags;
  uint32_t num_stages = 0;
  double timeout_s = 1800;
};

int RunScale(const ScaleFlags& flags) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  absl::StatusOr<std::unique_ptr<HttpClient>> client =
      OperatorClient(flags.operator_flags, signals->fd());
  if (!client.ok()) return Fail(client.status());
  const absl::StatusOr<HttpReply> reply =
      (*client)->Post("/strait/scale", absl::StrCat("{\"stages\":", flags.num_stages, "}"),
                      static_cast<int>(flags.timeout_s * 1000));
  if (absl::IsCancelled(reply.status()) || absl::IsDeadlineExceeded(reply.status())) {
    const int code = Fail(reply.status());
    std::fprintf(stderr, "It may still come about: see strait status.\n");
    return code;
  }
  if (!reply.ok()) return Fail(reply.status(), (*client)->url().Text());
  if (reply->status != 200) return Fail(absl::InternalError(reply->ErrorText()));
  const absl::StatusOr<json::Value> parsed = json::Parse(reply->body, "/strait/scale");
  if (!parsed.ok() || !parsed->is_object()) {
    return Fail(absl::InternalError("/strait/scale: the answer is no JSON object"));
  }
  const json::Object& done = parsed->get_object();
  std::printf(
      "%s with %s; longest pause %.1f ms; rows kept in caches %.0f, computed again %.0f, moved "
      "%s\n",
      Counted(Count(done, "pipelines"), "pipeline").c_str(),
      Counted(flags.num_stages, "stage").c_str(), Number(done, "pause_ms"),
      Number(done, "rows_kept"), Number(done, "rows_lost"),
      FormatBytes(Number(done, "moved_bytes")).c_str());
  return 0;
}

}  // namespace

void AddScale(CLI::App& app, Run* run) {
  auto flags = std::make_shared<ScaleFlags>();
  CLI::App* verb =
      app.add_subcommand("scale", "Give every pipeline another number of stages while it serves");
  verb->add_option("--stages", flags->num_stages,
                   "Stages of each pipeline; a worker may have several")
      ->required()
      ->check(CLI::Range(1u, limits::kMaxStagesPerPipeline));
  verb->add_option("--timeout", flags->timeout_s, "Seconds to wait for the end")
      ->check(CLI::Range(0.1, 86'400.0))
      ->capture_default_str();
  AddOperatorFlags(*verb, &flags->operator_flags);
  verb->callback([=] { *run = [flags] { return RunScale(*flags); }; });
}

}  // namespace strait::cli
