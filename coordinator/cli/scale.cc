// SPDX-License-Identifier: Apache-2.0
//
// `strait scale`: every pipeline gets another number of stages while it serves.
#include <chrono>
#include <cstdio>
#include <future>
#include <memory>
#include <string>

#include <poll.h>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "proto/base/limits.h"
#include "proto/rpc/address.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/status.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait::cli {
namespace {

constexpr char kDefaultGrpc[] = "127.0.0.1:7000";
constexpr int kLookMs = 100;

struct ScaleFlags {
  std::string coordinator = kDefaultGrpc;
  uint32_t num_stages = 0;
  double timeout_s = 1800;
};

int Failed(const absl::Status& status, const std::string& address) {
  Fail(status);
  if (absl::IsUnavailable(status)) {
    std::fprintf(stderr,
                 "No coordinator at %s? This is its gRPC address, at which workers join; name "
                 "another with --coordinator HOST:PORT (or STRAIT_COORDINATOR).\n",
                 address.c_str());
  } else if (absl::IsUnimplemented(status)) {
    std::fprintf(stderr,
                 "%s is no coordinator that can scale: is it the HTTP port? --coordinator is the "
                 "gRPC address, at which workers join.\n",
                 address.c_str());
  } else if (absl::IsDeadlineExceeded(status)) {
    std::fprintf(stderr, "It may still come about: see strait status.\n");
  }
  return status.code() == absl::StatusCode::kCancelled ? kExitCancelled : kExitFailed;
}

// "1 pipeline", "2 pipelines"
std::string Counted(uint64_t count, const char* what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

int RunScale(const ScaleFlags& flags) {
  const absl::StatusOr<rpc::HostPort> address = rpc::ParseHostPort(flags.coordinator);
  if (!address.ok()) return Fail(address.status());
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  const auto stub =
      v1::Coordinator::NewStub(rpc::MakeChannel(address->ToString(), rpc::Traffic::kControl));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(static_cast<int64_t>(flags.timeout_s * 1000)));
  v1::ScaleRequest request;
  request.set_num_stages(flags.num_stages);
  v1::ScaleReply reply;
  auto promise = std::make_shared<std::promise<absl::Status>>();
  std::future<absl::Status> ended = promise->get_future();
  stub->async()->Scale(&context, &request, &reply, [promise](const grpc::Status& status) {
    promise->set_value(rpc::FromGrpc(status));
  });
  while (ended.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    pollfd fd = {signals->fd(), POLLIN, 0};
    poll(&fd, 1, kLookMs);
    if (signals->Take()) context.TryCancel();
  }
  const absl::Status status = ended.get();
  if (!status.ok()) return Failed(status, address->ToString());
  std::printf("%s with %s; longest pause %.1f ms; rows kept in caches %llu, computed again %llu\n",
              Counted(reply.pipelines(), "pipeline").c_str(),
              Counted(flags.num_stages, "stage").c_str(),
              static_cast<double>(reply.pause_us()) / 1000,
              static_cast<unsigned long long>(reply.rows_kept()),
              static_cast<unsigned long long>(reply.rows_lost()));
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
  verb->add_option("--coordinator", flags->coordinator,
                   "HOST:PORT of the coordinator's gRPC server, at which workers join")
      ->envname("STRAIT_COORDINATOR")
      ->capture_default_str();
  verb->add_option("--timeout", flags->timeout_s, "Seconds to wait for the end")
      ->check(CLI::Range(0.1, 86'400.0))
      ->capture_default_str();
  verb->callback([=] { *run = [flags] { return RunScale(*flags); }; });
}

}  // namespace strait::cli
