// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/seeds.h"

#include "absl/strings/str_cat.h"

namespace strait::sim {
namespace {

volatile uint64_t running_seed = 0;

}  // namespace

uint64_t RunningSeed() { return running_seed; }

std::string Replay(Shape shape, uint64_t seed, const SimulationOptions& options) {
  return absl::StrCat("strait_sim", shape == Shape::kAny ? "" : " --",
                      shape == Shape::kAny ? "" : Name(shape), " --seed ", seed, " --trace",
                      options.check_always ? "" : " --rarely",
                      options.aim ? absl::StrCat(" --aim \"", Name(options.aim->first), "/",
                                                 Name(options.aim->second), "\"")
                                  : "");
}

std::optional<Shape> ShapeOfOption(const std::string& option) {
  for (int s = 1; s < kNumShapes; ++s) {
    if (option == absl::StrCat("--", Name(static_cast<Shape>(s)))) return static_cast<Shape>(s);
  }
  return std::nullopt;
}

void RunSeeds(const Seeds& seeds, const SimulationOptions& options, const OnRun& on_run) {
  SimulationOptions of_seed = options;
  of_seed.shape = seeds.shape;
  for (uint64_t seed = seeds.first; seed < seeds.first + seeds.count; ++seed) {
    running_seed = seed;
    of_seed.check_always = seeds.check_every > 0 && seed % seeds.check_every == 0;
    on_run(Replay(seeds.shape, seed, of_seed), RunSimulation(seed, of_seed));
  }
}

void AimAtMissing(Shape shape, ProcedureCounts* counts, const OnRun& on_run) {
  for (const auto& [phase, fault] : counts->MissingPairs(shape)) {
    SimulationOptions options{.shape = shape, .check_always = false};
    options.aim = {phase, fault};
    for (uint64_t seed = 1; seed <= kMostAimed && counts->count(fault, phase) == 0; ++seed) {
      running_seed = seed;
      const Outcome outcome = RunSimulation(seed, options);
      counts->Add(outcome.procedures);
      on_run(Replay(shape, seed, options), outcome);
    }
  }
}

}  // namespace strait::sim
