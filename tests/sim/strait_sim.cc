// SPDX-License-Identifier: Apache-2.0
//
// strait_sim runs simulations by their seeds: one with --trace to look into a failure, or many.
#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/sim/seeds.h"
#include "tests/sim/simulation.h"

namespace {

// What the clusters did beside steps and moves.
struct ProcedureSums {
  strait::sim::ProcedureCounts counts;
  uint64_t replicas_made = 0, replicas_failed = 0, rows_restored = 0;
  uint64_t drains_asked = 0, drains_done = 0, drains_undone = 0;
  uint64_t leaves = 0, left = 0, left_with_stages = 0, joins = 0;

  void Add(const strait::sim::Outcome& outcome) {
    counts.Add(outcome.procedures);
    replicas_made += outcome.stats.replicas_made;
    replicas_failed += outcome.stats.replicas_failed;
    rows_restored += outcome.rows_restored;
    drains_asked += outcome.drains_asked;
    drains_done += outcome.drains_done;
    drains_undone += outcome.drains_undone;
    leaves += outcome.leaves;
    left += outcome.left;
    left_with_stages += outcome.left_with_stages;
    joins += outcome.joins;
  }
  void Print() const {
    std::printf(
        "Faults by the phase that they met, and how drains ended:\n%s\n"
        "copies made %" PRIu64 ", failed %" PRIu64 "; rows of layers restored %" PRIu64
        "\ndrains asked for %" PRIu64 ", done %" PRIu64 ", taken back %" PRIu64
        "; workers told to stop %" PRIu64 ", stopped of themselves %" PRIu64
        " (with stages yet %" PRIu64 "); joins %" PRIu64 "\n",
        counts.Table().c_str(), replicas_made, replicas_failed, rows_restored, drains_asked,
        drains_done, drains_undone, leaves, left, left_with_stages, joins);
  }
};

extern "C" void OnCrash(int signal) {
  const auto seed = static_cast<unsigned long long>(strait::sim::RunningSeed());
  std::fprintf(stderr, "crashed in seed %llu; replay: strait_sim --seed %llu --trace\n", seed,
               seed);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

int CountPairs(uint64_t first, uint64_t count, const strait::sim::SimulationOptions& options) {
  ProcedureSums sums;
  uint64_t seeds = 0, failures = 0;
  const strait::sim::OnRun on_run = [&](const std::string& replay,
                                        const strait::sim::Outcome& outcome) {
    ++seeds;
    if (outcome.violation.empty()) return;
    ++failures;
    std::printf("%s\n  replay: %s\n", outcome.violation.c_str(), replay.c_str());
  };
  for (const strait::sim::Shape shape : strait::sim::kProcedureShapes) {
    if (options.shape != strait::sim::Shape::kAny && shape != options.shape) continue;
    strait::sim::RunSeeds({.shape = shape,
                           .first = first,
                           .count = count,
                           .check_every = options.check_always ? 1u : 0u},
                          options,
                          [&](const std::string& replay, const strait::sim::Outcome& outcome) {
                            sums.Add(outcome);
                            on_run(replay, outcome);
                          });
    strait::sim::AimAtMissing(shape, &sums.counts, on_run);
  }
  sums.Print();
  const std::string missing = sums.counts.Missing();
  std::printf("Pairs that never came: %s\n%" PRIu64 " of %" PRIu64 " seeds failed\n",
              missing.empty() ? "none" : missing.c_str(), failures, seeds);
  return failures == 0 && missing.empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1;
  uint64_t count = 1;
  bool pairs = false;
  strait::sim::SimulationOptions options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--trace") == 0) {
      options.trace = true;
    } else if (const auto shape = strait::sim::ShapeOfOption(argv[i])) {
      options.shape = *shape;
    } else if (std::strcmp(argv[i], "--pairs") == 0) {
      pairs = true;
    } else if (std::strcmp(argv[i], "--aim") == 0 && i + 1 < argc) {
      options.aim = strait::sim::PairOf(argv[++i]);
      if (!options.aim) {
        std::fprintf(stderr, "no pair is called %s: a phase and a fault as --pairs shows them\n",
                     argv[i]);
        return 2;
      }
    } else if (std::strcmp(argv[i], "--rarely") == 0) {
      options.check_always = false;
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--count") == 0 && i + 1 < argc) {
      count = std::strtoull(argv[++i], nullptr, 10);
    } else {
      std::fprintf(
          stderr,
          "usage: strait_sim [--seed N] [--count N] [--trace]"
          " [--ground | --sharing | --moves | --replicas | --drains | --scales | --replacements]"
          " [--rarely] [--pairs] [--aim PHASE/FAULT]\n"
          "  --ground  two pipelines, five workers, eight sequences of 300 tokens, three faults\n"
          "  --sharing prompts that begin alike, caches of few blocks\n"
          "  --moves   as --ground, sequences move between the pipelines, faults strike meanwhile\n"
          "  --replicas as --moves, blocks have copies, stages begin with them\n"
          "  --drains  as --moves, workers are drained, leave and come\n"
          "  --scales  as --moves, pipelines get other numbers of stages\n"
          "  --replacements  the only pipeline gets other stages, since a worker of it is drained\n"
          "  --pairs   each pair of a fault and a phase of copies, replacements, drains, joins, "
          "scales:"
          " how often it came in --count seeds of each of these shapes; then seeds aim at what is "
          "missing\n"
          "  --rarely  integrity is checked after faults and in idle moments only\n");
      return 2;
    }
  }
  for (const int signal : {SIGABRT, SIGFPE, SIGSEGV}) std::signal(signal, OnCrash);
  if (pairs) return CountPairs(seed, count, options);
  uint64_t failures = 0;
  strait::sim::EventCounts events;
  uint64_t cached_rows = 0, blocks_made = 0, blocks_dropped = 0, blocks_survived = 0,
           blocks_mended = 0;
  uint64_t offloaded = 0, returned = 0, lost = 0, forgotten = 0, corruptions = 0, preemptions = 0;
  ProcedureSums procedures;
  strait::sim::MoveCounts moves;
  uint64_t moves_asked = 0, moves_done = 0, moves_other_layers = 0, moves_other_stages = 0;
  uint64_t late_frames = 0;
  uint64_t pause_us = 0, pause_us_max = 0, moved_bytes = 0;
  const auto begin = std::chrono::steady_clock::now();
  const auto on_run = [&](const std::string& replay, const strait::sim::Outcome& outcome) {
    events.Add(outcome.events);
    cached_rows += outcome.stats.cached_rows;
    blocks_made += outcome.stats.prefix_blocks_made;
    blocks_dropped += outcome.stats.prefix_blocks_dropped;
    blocks_survived += outcome.stats.prefix_blocks_survived;
    blocks_mended += outcome.stats.prefix_blocks_mended;
    offloaded += outcome.stats.prefix_blocks_offloaded;
    returned += outcome.stats.prefix_blocks_returned;
    lost += outcome.stats.prefix_blocks_lost;
    forgotten += outcome.stats.prefix_blocks_forgotten;
    corruptions += outcome.corruptions;
    preemptions += outcome.stats.preemptions;
    procedures.Add(outcome);
    moves.Add(outcome.moves);
    moves_asked += outcome.moves_asked;
    moves_done += outcome.moves_done;
    moves_other_layers += outcome.moves_other_layers;
    moves_other_stages += outcome.moves_other_stages;
    late_frames += outcome.late_frames;
    moved_bytes += outcome.stats.migrated_bytes;
    pause_us += outcome.stats.migration_pause_us;
    pause_us_max = std::max(pause_us_max, outcome.stats.migration_pause_us_max);
    if (outcome.violation.empty()) return;
    ++failures;
    std::printf("%s\n  replay: %s\n", outcome.violation.c_str(), replay.c_str());
  };
  strait::sim::RunSeeds({.shape = options.shape,
                         .first = seed,
                         .count = count,
                         .check_every = options.check_always ? 1u : 0u},
                        options, on_run);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  if (count > 1 && options.shape >= strait::sim::Shape::kReplicas) procedures.Print();
  if (count > 1 && moves_asked > 0) {
    std::printf(
        "Faults of moves by the phase that they met, and how moves ended:\n%s\n"
        "moves asked for %" PRIu64 ", done %" PRIu64 " (%" PRIu64 " between other splits, %" PRIu64
        " between other numbers of stages), %" PRIu64
        " bytes, pause %.1f ms on average, at most %.1f; "
        "frames too late %" PRIu64 "\n",
        moves.Table().c_str(), moves_asked, moves_done, moves_other_layers, moves_other_stages,
        moved_bytes,
        moves_done == 0 ? 0.0
                        : static_cast<double>(pause_us) / 1e3 / static_cast<double>(moves_done),
        static_cast<double>(pause_us_max) / 1e3, late_frames);
  }
  if (count > 1) {
    std::printf("%s\nrows found in prefix blocks %" PRIu64 "; prefix blocks made %" PRIu64
                ", dropped for room %" PRIu64 ", over epochs %" PRIu64 ", mended %" PRIu64
                "\npreemptions %" PRIu64 "; to host memory %" PRIu64 ", back %" PRIu64
                ", given up there %" PRIu64 ", lost %" PRIu64 " in %" PRIu64
                " corruptions\n%.0f seeds a minute on one core\n",
                events.Table().c_str(), cached_rows, blocks_made, blocks_dropped, blocks_survived,
                blocks_mended, preemptions, offloaded, returned, forgotten, lost, corruptions,
                static_cast<double>(count) * 60 / took.count());
  }
  std::printf("%llu of %llu seeds failed\n", static_cast<unsigned long long>(failures),
              static_cast<unsigned long long>(count));
  return failures == 0 ? 0 : 1;
}
