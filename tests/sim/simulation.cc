// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/simulation.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "tests/sim/sim_cluster.h"

namespace strait::sim {
namespace {

// After the last fault, everything that lives must have settled within this.
constexpr uint64_t kSettleUs = 240'000'000;
// So often it is tried to move something, where nothing can.
constexpr uint32_t kMoveAttempts = 50;
constexpr uint32_t kScaleAttempts = 50;

}  // namespace

bool SimCluster::Settled() const {
  // Who is to learn of it comes back when the way is open, and the coordinator there.
  if (gate_.is_shut() || procedures_.AwaitsCopies() || partition_.any()) return false;
  if (std::any_of(workers_.begin(), workers_.end(),
                  [](const auto& worker) { return worker->alive() && worker->hangs(); })) {
    return false;
  }
  if (drains_left_ > 0 || leaves_left_ > 0 || joins_left_ > 0 || drains_.pending() || AnyLeaves())
    return false;
  if (scales_left_ > 0 || !scales_.empty() || moves_left_ > 0 || moves_.pending() ||
      requests_left_ > 0 || !faults_over_ || clients_.num_live() > 0)
    return false;
  const CoreStats stats = core_.Stats();
  if (stats.cache_bytes_used > stats.cache_bytes_free_prefixes) return false;
  return !scenario_.heals || stats.pipelines_active == scenario_.options.num_pipelines;
}

void SimCluster::CheckIdle() {
  CheckSound();
  const CoreStats stats = core_.Stats();
  if (!scenario_.options.prefix_cache && stats.host_bytes_used > 0) {
    world_.Violation(absl::StrCat("at idle ", stats.host_bytes_used,
                                  " bytes are parked of sequences that ended"));
  }
  if (stats.running + stats.waiting != 0 ||
      stats.cache_bytes_used != stats.cache_bytes_free_prefixes) {
    return world_.Violation(absl::StrCat("at idle ", stats.running, " run, ", stats.waiting,
                                         " wait, ", stats.cache_bytes_used,
                                         " bytes of cache are used"));
  }
  if (stats.pipelines_active < scenario_.options.num_pipelines) return;
  uint64_t held_bytes = 0;
  bool any_dead = false;  // whose end a coordinator that stood still may not know yet
  for (const auto& worker : workers_) {
    any_dead = any_dead || !worker->alive();
    if (worker->alive()) held_bytes += worker->BlocksHeld() * scenario_.model.block_bytes;
  }
  if (held_bytes == stats.cache_bytes_free_prefixes) return;
  if (held_bytes < stats.cache_bytes_free_prefixes && any_dead) return;
  world_.Violation(absl::StrCat("at idle workers hold ", held_bytes, " bytes, ",
                                stats.cache_bytes_free_prefixes, " are of prefix blocks"));
}

// After a flush: nothing is left of anything.
void SimCluster::CheckEnd() {
  if (!moves_.Live().empty() || !Status().at("migrations").as_array().empty()) {
    return world_.Violation("at the end sequences move");
  }
  const CoreStats stats = core_.Stats();
  const uint64_t failures = stats.workers_lost + stats.recoveries + stats.preemptions +
                            outcome_.scales + drains_.num_asked() + outcome_.leaves;
  if (failures == 0 && stats.replayed_tokens > 0) {
    world_.Violation(
        absl::StrCat("nothing failed, and ", stats.replayed_tokens, " tokens were computed again"));
  }
  for (const auto& worker : workers_) {
    if (!worker->alive()) continue;
    const std::string left = worker->TransfersLeft();
    if (left.empty()) continue;
    world_.Violation(absl::StrCat("at the end w", worker->instance(), " has ", left));
  }
}

Outcome SimCluster::Run() {
  last_ready_us_ = world_.now_us();
  const uint64_t begin_us = world_.now_us();
  for (const uint64_t memory : scenario_.worker_memory) {
    const uint64_t delay_us = world_.Random(0, 20'000);
    world_.After(delay_us, [this, memory] { StartWorker(memory); });
  }
  requests_left_ = scenario_.num_requests;
  for (uint32_t i = 0; i < scenario_.num_requests; ++i) {
    // Some come before anybody can serve them.
    world_.After(world_.Chance(0.1)
                     ? 0
                     : scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { gate_.Pass([this] { SubmitOne(); }); });
  }
  const uint64_t faults_from_us = world_.Chance(0.5) ? 0 : scenario_.load_us_max;
  for (uint32_t i = 0; i < scenario_.num_faults; ++i) {
    world_.After(faults_from_us + world_.Random(0, scenario_.faults_us), [this] { FaultOnce(); });
  }
  for (uint32_t i = 0; i < scenario_.num_lies; ++i) {
    // Later than the last worker's start.
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 200'000),
                 [this] { workers_[world_.Random(0, workers_.size() - 1)]->LieOnce(); });
  }
  for (uint32_t i = 0; i < scenario_.num_corruptions; ++i) {
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { Corrupt(); });
  }
  for (uint32_t i = 0; i < scenario_.num_flushes; ++i) {
    world_.After(20'001 + scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.arrival_us),
                 [this] { gate_.Pass([this] { Flush(); }); });
  }
  scales_left_ = scenario_.num_scales;
  for (uint32_t i = 0; i < scenario_.num_scales; ++i) {
    world_.After(scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.scales_us),
                 [this] { gate_.Pass([this] { ScaleOnce(kScaleAttempts); }); });
  }
  moves_left_ = scenario_.num_moves;
  for (uint32_t i = 0; i < scenario_.num_moves; ++i) {
    world_.After(scenario_.load_us_max + world_.Random(0, 50'000 + scenario_.moves_us),
                 [this] { gate_.Pass([this] { MoveOnce(kMoveAttempts); }); });
  }
  MakeAims();
  ScheduleProcedures();
  if (options_.forge_rows) rows_.ForgeNext();
  // Replacements of killed workers come up to a second later.
  world_.After(faults_from_us + scenario_.faults_us + 1'100'000, [this] { Heal(); });
  Tick();

  const uint64_t limit_us = begin_us + scenario_.load_us_max + scenario_.faults_us +
                            scenario_.arrival_us + scenario_.scales_us + scenario_.moves_us +
                            (scenario_.num_drains > 0 ? scenario_.options.migrate_timeout_us : 0) +
                            (scenario_.num_leaves > 0 ? scenario_.leave_timeout_us : 0) +
                            scenario_.options.no_pipeline_grace_us + kSettleUs;
  while (world_.RunOne()) {
    if (world_.now_us() > limit_us + gate_.shut_us()) {
      world_.Violation(absl::StrCat("not settled: ", clients_.num_live(), " requests live:",
                                    clients_.Stuck(), "; ", core_.StatusJson(world_.now_us())));
    }
    if (Settled()) break;
  }
  // What is under way arrives, stalled workers wake up, nothing more happens.
  const uint64_t end_us = world_.now_us() + 3'000'000 +
                          (scenario_.all_faults() + 1) * 3 * scenario_.options.heartbeat_timeout_us;
  while (world_.violation().empty() && world_.now_us() < end_us) world_.RunOne();
  if (world_.violation().empty()) CheckIdle();
  if (world_.violation().empty()) CheckCopies(/*flushed=*/false);
  if (world_.violation().empty()) {
    std::optional<uint64_t> until_us;
    gate_.Pass([&] {
      Flush();
      until_us = world_.now_us() + 3'000'000;
    });
    while (world_.violation().empty() && (!until_us || world_.now_us() < *until_us)) {
      world_.RunOne();
    }
    const CoreStats stats = core_.Stats();
    if (stats.cache_bytes_used + stats.host_bytes_used > 0) {
      world_.Violation(absl::StrCat("after a flush ", stats.cache_bytes_used, " and ",
                                    stats.host_bytes_used, " bytes are used"));
    }
    if (world_.violation().empty()) CheckIdle();
    if (world_.violation().empty()) CheckCopies(/*flushed=*/true);
    if (world_.violation().empty()) CheckEnd();
  }
  outcome_.violation = world_.violation();
  outcome_.stats = core_.Stats();
  outcome_.sequences_finished = clients_.num_finished();
  outcome_.sequences_nan = clients_.num_nan();
  outcome_.cached_tokens = clients_.num_cached();
  for (const auto& worker : workers_) {
    outcome_.steps_ahead += worker->steps_ahead();
    outcome_.late_ids += worker->late_ids();
    outcome_.events.Add(worker->event_counts());
  }
  outcome_.moves.Add(moves_.counts());
  outcome_.moves_asked = moves_.num_asked();
  outcome_.moves_done = moves_.num_done();
  outcome_.moves_other_layers = moves_.num_other_layers();
  outcome_.moves_other_stages = moves_.num_other_stages();
  outcome_.late_frames = moves_.num_late();
  CollectProcedures();
  outcome_.virtual_us = world_.now_us() - begin_us;
  return outcome_;
}

Outcome RunSimulation(uint64_t seed, const SimulationOptions& options) {
  return SimCluster(seed, options).Run();
}

}  // namespace strait::sim
