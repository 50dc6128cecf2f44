// SPDX-License-Identifier: Apache-2.0
//
// Scenarios of clusters that have more than steps and moves: copies of blocks on other workers, workers that go and come.
#include "tests/sim/scenario.h"

namespace strait::sim {
namespace {

void SetReplicas(World* world, Scenario* s) {
  World& w = *world;
  CoreOptions& o = s->options;
  const uint64_t column_bytes = s->model.layer_weight_bytes.size() * s->model.block_bytes;
  // From hardly any to more than all sequences fill.
  s->replica_bytes = w.Pick({3, 12, 40, 200}) * column_bytes;
  o.replicate_bytes_per_s = w.Pick({0, 0, 100'000, 1'000'000});
  o.restore_timeout_us = w.Pick({100'000, 1'000'000, 10'000'000});
}

}  // namespace

Scenario MakeReplicasScenario(World* world) {
  World& w = *world;
  Scenario s = MakeMovesScenario(world);
  s.num_scales = 0;
  s.num_moves = static_cast<uint32_t>(w.Pick({0, 2, 2, 4}));
  s.num_faults = w.Chance(0.3) ? 1 : 0;
  s.num_aimed = s.num_moves > 0 && w.Chance(0.3) ? 1 : 0;
  s.num_procedure_aims = 6;
  s.num_joins = w.Chance(0.7) ? 1 : 0;
  s.drains_us = 600'000;
  // Prompts that fill blocks at once have copies early.
  s.prompt_tokens_max = static_cast<uint32_t>(w.Pick({30, 200, 280}));
  SetReplicas(&w, &s);
  return s;
}

Scenario MakeDrainsScenario(World* world) {
  World& w = *world;
  Scenario s = MakeMovesScenario(world);
  // From workers that are all needed to several spares.
  const size_t num_workers = s.options.num_pipelines * s.options.num_stages + w.Random(0, 2);
  s.worker_memory.resize(num_workers, s.worker_memory.front());
  s.num_scales = w.Chance(0.15) ? 1 : 0;
  s.num_moves = static_cast<uint32_t>(w.Pick({0, 0, 2}));
  s.num_faults = w.Chance(0.3) ? 1 : 0;
  s.num_aimed = 0;
  s.num_procedure_aims = 3;
  s.num_drains = static_cast<uint32_t>(w.Pick({1, 2, 2, 4}));
  s.num_leaves = static_cast<uint32_t>(w.Pick({0, 0, 1, 2}));
  s.num_joins = static_cast<uint32_t>(w.Pick({0, 1, 2}));
  s.drains_us = w.Pick({200'000, 600'000});
  s.leave_timeout_us = w.Pick({500'000, 30'000'000});
  if (w.Chance(0.5)) SetReplicas(&w, &s);
  return s;
}

namespace {

Scenario MakeChangesScenario(World* world) {
  World& w = *world;
  Scenario s = MakeMovesScenario(world);
  s.num_scales = 0;
  s.breaks_scale = false;
  s.num_moves = static_cast<uint32_t>(w.Pick({0, 0, 0, 2}));
  s.num_faults = w.Chance(0.2) ? 1 : 0;
  s.num_aimed = 0;
  s.num_procedure_aims = 3;
  s.num_joins = 0;
  s.options.load_timeout_us = 10'000'000;
  if (w.Chance(0.3)) SetReplicas(&w, &s);
  return s;
}

}  // namespace

Scenario MakeScalesScenario(World* world) {
  Scenario s = MakeChangesScenario(world);
  s.num_scales = 4;
  s.scales_us = 1'000'000;
  return s;
}

Scenario MakeReplacementsScenario(World* world) {
  World& w = *world;
  Scenario s = MakeChangesScenario(world);
  s.options.num_pipelines = 1;
  s.options.num_stages = static_cast<uint32_t>(w.Pick({1, 2, 2}));
  s.worker_memory.resize(s.options.num_stages + w.Random(0, 2), s.worker_memory.front());
  s.num_moves = 0;
  s.num_drains = 3;
  s.drains_us = 1'000'000;
  s.drains_serving = true;
  return s;
}

}  // namespace strait::sim
