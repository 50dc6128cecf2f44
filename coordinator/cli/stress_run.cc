// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_run.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/api_calls.h"
#include "coordinator/cli/mix.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/status_macros.h"
#include "proto/wire/version.h"

namespace strait::cli {
namespace {

constexpr int kLookMs = 100;
constexpr uint32_t kDefaultMaxRows = 2048;
constexpr uint32_t kSmallestVocabulary = 16;

// Keys of draws that have nothing to do with each other.
enum Stream : uint64_t { kOfClients = 1'000, kOfDisturbances = 2'000, kOfTimes = 3'000 };

Draws DrawsOf(uint64_t seed, uint64_t stream) { return Draws{Mix(Mix(seed) ^ Mix(stream))}; }

json::Object StatsOf(const json::Object& status) {
  const json::Value* stats = json::Find(status, "stats");
  return stats != nullptr && stats->is_object() ? stats->get_object() : json::Object();
}

// How many sequences ended by an error.
int64_t ErrorsOf(const json::Object& stats) {
  const json::Value* ended = json::Find(stats, "sequences_ended");
  if (ended == nullptr || !ended->is_object()) return 0;
  return static_cast<int64_t>(Number(ended->get_object(), "error"));
}

}  // namespace

Stress::Stress(StressOptions options, Url url, std::string api_key, std::string operator_key,
               LocalCluster* own, Terminal* terminal, int cancel_fd)
    : options_(std::move(options)),
      url_(std::move(url)),
      api_key_(std::move(api_key)),
      operator_key_(std::move(operator_key)),
      own_(own),
      terminal_(terminal),
      cancel_fd_(cancel_fd) {}

int64_t Stress::NowUs() const {
  return std::chrono::duration_cast<std::chrono::microseconds>(StressClock::now() - start_).count();
}

absl::StatusOr<json::Object> Stress::FetchStatus() {
  HttpClient client(url_, api_key_, cancel_fd_);
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client.Get("/strait/status", kConnectTimeoutMs));
  if (reply.status != 200) {
    return absl::FailedPreconditionError(absl::StrCat(
        url_.Text(), ": GET /strait/status: ", reply.ErrorText(), ". Is it a Strait coordinator?"));
  }
  STRAIT_ASSIGN_OR_RETURN(json::Value status, json::Parse(reply.body, "/strait/status"));
  STRAIT_RETURN_IF_ERROR(json::AsObject(status, "/strait/status").status());
  return std::move(status.get_object());
}

// Asks for nothing, in a way that tells whether the key is the right one.
absl::Status Stress::CheckKey() {
  if (options_.movers == 0 && options_.reshape_every_s <= 0) return absl::OkStatus();
  HttpClient client(url_, operator_key_, cancel_fd_);
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply,
                          client.Post("/strait/migrate", "{}", kConnectTimeoutMs));
  if (reply.status == 401 || reply.status == 403) {
    return absl::FailedPreconditionError(reply.ErrorText());
  }
  return absl::OkStatus();
}

absl::Status Stress::Prepare() {
  STRAIT_ASSIGN_OR_RETURN(const json::Object status, FetchStatus());
  STRAIT_RETURN_IF_ERROR(CheckKey());
  LoadOptions& load = options_.load;
  const auto context = static_cast<uint32_t>(Number(status, "max_positions"));
  if (load.max_rows == 0) {
    load.max_rows = std::max(load.min_rows, std::min(kDefaultMaxRows, context));
  }
  if (load.min_rows < 2 || load.min_rows > load.max_rows || load.max_rows > context) {
    return absl::InvalidArgumentError(
        absl::StrCat("--min-rows ", load.min_rows, " and --max-rows ", load.max_rows,
                     " must be from 2 to the model's context, ", context, ", and in this order"));
  }
  load.vocabulary =
      std::max(kSmallestVocabulary, static_cast<uint32_t>(Number(status, "vocab_size")));
  if (load.num_requests == 0) load.num_requests = std::max(8u, 2 * options_.clients);
  requests_ = MakeRequests(load);

  uint32_t active = 0;
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    active += Text(*pipeline, "state") == "active" ? 1 : 0;
    max_stages_ = std::max(max_stages_, static_cast<uint32_t>(Number(*pipeline, "num_stages")) + 1);
  }
  if (options_.movers > 0 && active < 2) {
    terminal_->Say(absl::StrCat("Only ", active,
                                " pipeline serves: nothing can move. Start it with "
                                "--pipelines 2."));
  }
  return absl::OkStatus();
}

StreamOutcome Stress::Run(const std::string& body, uint32_t choices) {
  std::list<Watched>::iterator watched;
  {
    std::lock_guard lock(mu_);
    watched = watched_.emplace(watched_.end());
    watched->last_sign_us = NowUs();
  }
  HttpClient client(url_, api_key_, watched->give_up.fd());
  StreamOutcome outcome = RunStream(client, body, choices, start_, &watched->last_sign_us);
  if (watched->silent) outcome.failure = absl::StrCat("silent for ", kSilenceS, " s");
  std::lock_guard lock(mu_);
  watched_.erase(watched);
  return outcome;
}

bool Stress::Watch() {
  const bool cancelled = Cancelled();
  const int64_t now_us = NowUs();
  std::lock_guard lock(mu_);
  for (Watched& stream : watched_) {
    const bool silent = now_us - stream.last_sign_us > static_cast<int64_t>(kSilenceS * 1e6);
    if (silent) stream.silent = true;
    if (silent || cancelled) stream.give_up.Set();
  }
  return !cancelled;
}

void Stress::WatchWhile(const std::atomic<uint32_t>& running, const std::function<void()>& show) {
  while (running > 0) {
    Watch();
    show();
    std::this_thread::sleep_for(std::chrono::milliseconds(kLookMs));
  }
  terminal_->EndProgress();
}

absl::Status Stress::MakeReferences() {
  const size_t count = requests_.size();
  references_.resize(count);
  std::atomic<size_t> next = 0, finished = 0;
  std::atomic<bool> failed = false;
  std::atomic<uint32_t> running =
      std::min<uint32_t>(options_.clients, static_cast<uint32_t>(count));
  std::vector<std::thread> clients;
  for (uint32_t i = running; i > 0; --i) {
    clients.emplace_back([&] {
      for (size_t r = next++; r < count && !failed; r = next++) {
        references_[r] = Run(BodyOf(requests_[r], ""), requests_[r].choices);
        if (!references_[r].failure.empty()) failed = true;
        ++finished;
      }
      --running;
    });
  }
  WatchWhile(running, [&] {
    terminal_->Progress("Undisturbed references",
                        static_cast<double>(finished) / static_cast<double>(count));
  });
  for (std::thread& client : clients) client.join();
  if (Cancelled()) return absl::CancelledError("cancelled");
  for (const StreamOutcome& reference : references_) {
    if (!reference.failure.empty()) {
      return absl::InternalError(absl::StrCat(
          "the cluster fails undisturbed, so nothing can be judged: ", reference.failure));
    }
  }
  return absl::OkStatus();
}

void Stress::RunClient(uint32_t client) {
  Draws draws = DrawsOf(options_.load.seed, kOfClients + client);
  for (uint64_t round = 0; !ending_; ++round) {
    const size_t index = draws.Below(requests_.size());
    const StressRequest& request = requests_[index];
    // A half finds its prompt's rows in a cache, as others have left them.
    const bool fresh = draws.Below(2) == 0;
    const std::string salt = fresh ? absl::StrCat("stress-", client, "-", round) : std::string();
    StreamOutcome outcome = Run(BodyOf(request, salt), request.choices);
    if (Cancelled()) return;  // it may have ended because of that
    std::string violation = Difference(outcome, references_[index]);
    const bool bad = !violation.empty();
    log_.AddStream(std::move(outcome), request.prompt_tokens, std::move(violation));
    // A server that refuses all is asked less often.
    if (bad) WaitReadable(cancel_fd_, kLookMs);
  }
}

void Stress::StartDisturbances(const DisturbContext& context) {
  uint64_t count = 0;
  const auto start = [&](double every_s, auto make) {
    const uint64_t key = count++;
    const uint64_t seed = options_.load.seed;
    disturbers_.emplace_back([=] {
      const std::unique_ptr<Disturbance> disturbance =
          make(context, DrawsOf(seed, kOfDisturbances + key));
      DisturbUntil(context, *disturbance, every_s, DrawsOf(seed, kOfTimes + key));
    });
  };
  for (uint32_t i = 0; i < options_.movers; ++i) start(options_.move_every_s, MakeMover);
  if (options_.drain_every_s > 0) start(options_.drain_every_s, MakeDrainer);
  if (options_.reshape_every_s > 0) {
    start(options_.reshape_every_s, [stages = max_stages_](const DisturbContext& c, Draws draws) {
      return MakeReshaper(c, draws, stages);
    });
  }
  if (own_ == nullptr) return;
  const auto start_own = [&](double every_s, auto make) {
    if (every_s > 0) start(every_s, make);
  };
  start_own(options_.kill_every_s, MakeKiller);
  start_own(options_.stop_every_s, MakeStopper);
  start_own(options_.coordinator_stop_every_s, MakeCoordinatorStopper);
  start_own(options_.join_every_s, MakeJoiner);
  if (own_->links() == nullptr) return;
  start_own(options_.partition_every_s, MakePartitioner);
  start_own(options_.slow_every_s,
            [rate = options_.slow_bytes_per_s](const DisturbContext& c, Draws draws) {
              return MakeSlower(c, draws, rate);
            });
}

absl::Status Stress::Disturb() {
  EventFd end;
  const DisturbContext context{url_, api_key_, operator_key_, cancel_fd_, end.fd(), &log_, own_};
  const StressClock::time_point begin = StressClock::now();
  log_.Begin();
  const auto elapsed_s = [&] {
    return std::chrono::duration<double>(StressClock::now() - begin).count();
  };
  std::atomic<uint32_t> running = options_.clients + 1;  // and the disturbances together
  std::vector<std::thread> clients;
  for (uint32_t i = 0; i < options_.clients; ++i) {
    clients.emplace_back([this, i, &running] {
      RunClient(i);
      --running;
    });
  }
  StartDisturbances(context);
  const auto over = [&] {
    return (options_.seconds > 0 && elapsed_s() >= options_.seconds) ||
           (options_.migrations > 0 && log_.num_migrations() >= options_.migrations);
  };
  while (Watch() && !over()) {
    terminal_->Progress(log_.Progress(),
                        options_.seconds > 0 ? elapsed_s() / options_.seconds : -1);
    WaitReadable(cancel_fd_, kLookMs);
  }
  // What runs ends undisturbed, and watched.
  end.Set();
  ending_ = true;
  std::thread waiting([&] {
    for (std::thread& disturber : disturbers_) disturber.join();
    --running;
  });
  WatchWhile(running, [&] { terminal_->Progress("The last streams end", -1); });
  waiting.join();
  for (std::thread& client : clients) client.join();
  disturbed_s_ = elapsed_s();
  return Cancelled() ? absl::CancelledError("cancelled") : absl::OkStatus();
}

absl::Status Stress::Drive() {
  STRAIT_RETURN_IF_ERROR(Prepare());
  STRAIT_RETURN_IF_ERROR(MakeReferences());
  STRAIT_ASSIGN_OR_RETURN(const json::Object before, FetchStatus());
  stats_before_ = StatsOf(before);
  STRAIT_RETURN_IF_ERROR(Disturb());
  STRAIT_ASSIGN_OR_RETURN(const json::Object after, FetchStatus());
  stats_after_ = StatsOf(after);
  return absl::OkStatus();
}

json::Object Stress::Report() const {
  json::Object out;
  out["program"] = absl::StrCat("strait stress ", kVersion);
  out["url"] = url_.Text();
  out["seed"] = options_.load.seed;
  out["clients"] = options_.clients;
  out["requests"] = requests_.size();
  out["min_rows"] = options_.load.min_rows;
  out["max_rows"] = options_.load.max_rows;
  out["output_tokens"] = options_.load.output_tokens;
  out["seconds"] = disturbed_s_;
  for (auto& [key, value] : log_.Report(disturbed_s_)) out[key] = std::move(value);
  const auto counted = [this](const char* key) {
    return static_cast<int64_t>(Number(stats_after_, key) - Number(stats_before_, key));
  };
  out["recomputed_tokens"] = counted("replayed_tokens");
  out["recomputed_rows"] = counted("recomputed_rows");
  out["workers_lost"] = counted("workers_lost");
  out["recoveries"] = counted("recoveries");
  out["preemptions"] = counted("preemptions");
  out["interrupted_sequences"] = counted("sequences_interrupted");
  out["recovered_sequences"] = std::max<int64_t>(
      0, counted("sequences_interrupted") - (ErrorsOf(stats_after_) - ErrorsOf(stats_before_)));
  out["restored_rows"] = counted("restored_rows");
  out["migrated_shared_bytes"] = counted("migrated_shared_bytes");
  out["replicated_bytes"] = counted("replicated_bytes");
  if (const auto decoding_us = counted("decoding_us"); decoding_us > 0) {
    out["protected_share"] =
        static_cast<double>(counted("protected_us")) / static_cast<double>(decoding_us);
  }
  return out;
}

}  // namespace strait::cli
