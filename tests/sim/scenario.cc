// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/scenario.h"

#include <algorithm>

#include "proto/base/limits.h"

namespace strait::sim {

namespace {

// Long sequences, all at once, in a cache of a few of them.
void Press(World* world, Scenario* s) {
  CoreOptions& o = s->options;
  const uint64_t num_layers = s->model.layer_weight_bytes.size();
  s->model.max_positions = 700;
  s->model.vocab_size = 300;  // else sequences soon end
  o.max_step_tokens = std::max(o.max_step_tokens, 16u);
  o.prefill_chunk = std::max(o.prefill_chunk, 16u);
  o.max_running = 16;
  o.max_waiting = 200;
  const uint64_t column_bytes = num_layers * s->model.block_bytes;
  const auto columns = static_cast<uint32_t>(world->Random(8, 13));
  for (uint64_t& bytes : s->worker_memory) {
    bytes = bytes - s->columns_least * column_bytes + columns * column_bytes;
  }
  s->columns_least = columns;
  s->host_cache_bytes = world->Pick({10, 40, 40, 200}) * num_layers * s->model.block_bytes;
  s->num_requests = 12;
  s->arrival_us = world->Pick({1'000, 50'000});
  s->tokens_each = static_cast<uint32_t>(world->Random(240, 400));
  s->cancel_chance = world->Pick({0.0, 0.1});
  s->deadline_chance = 0;
  // Of so many rows a pipeline must live for a while.
  if (o.heartbeat_timeout_us < 500'000) s->slow_message_chance = 0;
}

// How rows travel from worker to worker, and how long a move may take.
void SetRows(World* world, Scenario* s) {
  World& w = *world;
  CoreOptions& o = s->options;
  s->rows.delay_us_max = w.Pick({100, 1'000, 20'000});
  s->rows.bytes_per_s = w.Pick({200'000, 2'000'000, 100'000'000});
  s->rows.corrupt_chance = w.Pick({0.0, 0.0, 0.01, 0.1});
  s->rows.duplicate_chance = w.Pick({0.0, 0.01, 0.3});
  s->rows.break_chance = w.Pick({0.0, 0.0, 0.01, 0.1});
  s->transfer_frame_bytes =
      w.Pick({uint64_t{1'024}, uint64_t{4'096}, uint64_t{limits::kTransferFrameBytes}});
  o.migrate_stall_us = w.Pick({500'000, 10'000'000});
  o.migrate_pause_us = w.Pick({50'000, 2'000'000, 2'000'000});
  o.migrate_timeout_us = w.Pick({1'000'000, 300'000'000});
  o.migrate_bytes_per_s = w.Pick({0, 0, 100'000, 1'000'000});
}

}  // namespace

Scenario MakeScenario(Shape shape, World* world) {
  switch (shape) {
    case Shape::kAny:
      return MakeAnyScenario(world);
    case Shape::kGround:
      return MakeGroundScenario(world);
    case Shape::kSharing:
      return MakeSharingScenario(world);
    case Shape::kMoves:
      return MakeMovesScenario(world);
    case Shape::kReplicas:
      return MakeReplicasScenario(world);
    case Shape::kDrains:
      return MakeDrainsScenario(world);
    case Shape::kScales:
      return MakeScalesScenario(world);
    case Shape::kReplacements:
      return MakeReplacementsScenario(world);
  }
  return {};
}

Scenario MakeAnyScenario(World* world) {
  World& w = *world;
  Scenario s;
  CoreOptions& o = s.options;
  ModelShape& m = s.model;

  const auto num_layers = static_cast<uint32_t>(w.Random(1, 6));
  m.vocab_size = static_cast<uint32_t>(w.Pick({8, 40, 300}));
  m.max_positions = static_cast<uint32_t>(w.Pick({96, 256, 700}));
  m.eos_token_ids = {3};
  if (w.Chance(0.3)) m.eos_token_ids.push_back(5);
  for (uint32_t l = 0; l < num_layers; ++l) m.layer_weight_bytes.push_back(w.Random(1000, 6000));
  m.embedding_bytes = w.Random(0, 4000);
  m.head_bytes = w.Random(0, 4000);
  m.block_bytes = 1024;
  m.workspace_bytes = {w.Random(0, 200)};
  for (int i = 0; i < 3; ++i) m.workspace_bytes.push_back(m.workspace_bytes.back() + 150);
  m.fingerprint = 42;

  o.num_stages = static_cast<uint32_t>(w.Random(1, std::min(4u, num_layers)));
  o.num_pipelines = static_cast<uint32_t>(w.Pick({1, 1, 1, 2, 3}));
  o.max_step_tokens = static_cast<uint32_t>(w.Pick({1, 7, 16, 64, 64, 300}));
  o.prefill_chunk = static_cast<uint32_t>(w.Pick({1, 5, 16, 16, 64, 300}));
  o.max_running = static_cast<uint32_t>(w.Pick({1, 4, 16, 16, 64}));
  o.max_waiting = static_cast<uint32_t>(w.Pick({4, 20, 200}));
  o.steps_in_flight = static_cast<uint32_t>(w.Pick({0, 0, 1, 2, 5}));
  o.grant_depth = static_cast<uint32_t>(w.Pick({1, 2, 2, 2, 3, 5}));
  o.heartbeat_timeout_us = w.Pick({100'000, 500'000, 2'000'000});
  // Requests that nobody cancels end on their own, or the run finds them stuck.
  o.request_timeout_us = 3'600'000'000;
  o.no_pipeline_grace_us = w.Pick({200'000, 2'000'000, 30'000'000});
  o.step_timeout_us = 20'000'000;
  o.activation_timeout_us = 5'000'000;
  if (w.Chance(0.2)) o.max_cache_bytes_per_stage = w.Random(4, 20) * num_layers * m.block_bytes;

  // A pool of few columns makes residents fight for them.
  s.columns_least = static_cast<uint32_t>(w.Pick({2, 3, 4, 6, 6, 12, 50}));
  uint64_t weights = m.embedding_bytes + m.head_bytes;
  for (const uint64_t bytes : m.layer_weight_bytes) weights += bytes;
  const uint64_t enough =
      weights + m.workspace_bytes.back() + uint64_t{s.columns_least} * num_layers * m.block_bytes;
  s.equal_memory = w.Chance(0.7);
  const uint64_t num_workers = uint64_t{o.num_stages} * o.num_pipelines + w.Pick({0, 0, 1, 2});
  for (uint64_t i = 0; i < num_workers; ++i) {
    s.worker_memory.push_back(s.equal_memory ? enough : enough * w.Random(10, 20) / 10);
  }
  if (o.max_cache_bytes_per_stage > 0) {
    s.columns_least = std::min<uint32_t>(s.columns_least,
                                         o.max_cache_bytes_per_stage / m.block_bytes / num_layers);
  }

  s.num_requests = static_cast<uint32_t>(w.Pick({1, 6, 15, 25, 25}));
  s.arrival_us = w.Pick({1'000, 50'000, 1'000'000});
  s.cancel_chance = w.Pick({0.0, 0.1, 0.5});
  s.deadline_chance = w.Pick({0.0, 0.0, 0.2});
  s.bad_request_chance = w.Pick({0.0, 0.1});
  s.nan_chance = w.Pick({0.0, 0.0, 0.2});
  s.prompt_tokens_max = static_cast<uint32_t>(w.Pick({4, 30, 100, 200}));
  s.max_tokens_max = static_cast<uint32_t>(w.Pick({3, 20, 80, 200, 200}));
  o.prefix_cache = w.Chance(0.7);
  s.stem_chance = w.Pick({0.0, 0.5, 0.5, 1.0});

  s.control_delay_us_max = w.Pick({100, 1'000, 5'000});
  s.data_delay_us_max = w.Pick({100, 1'000, 5'000});
  s.compute_us_max = w.Pick({100, 1'000, 3'000});
  s.rows_ahead = static_cast<uint32_t>(w.Pick({0, 4, 40, 1'000, 1'000}));
  s.load_us_max = w.Pick({1'000, 100'000, 400'000});
  s.orphan_timeout_us = w.Pick({1'000'000, 60'000'000});
  s.slow_message_chance = w.Pick({0.0, 0.0, 0.002, 0.02});

  if (w.Chance(0.75)) {
    s.num_faults = static_cast<uint32_t>(w.Pick({1, 2, 4, 10}));
    s.faults_us = w.Pick({100'000, 500'000, 2'000'000});
    s.replacement_chance = w.Pick({1.0, 1.0, 0.5, 0.0});
    s.heals = w.Chance(0.9);
  }
  if (w.Chance(0.2)) s.num_lies = static_cast<uint32_t>(w.Random(1, 2));
  if (w.Chance(0.4)) {
    s.num_scales = static_cast<uint32_t>(w.Pick({1, 2, 2, 5}));
    s.scales_us = w.Pick({1'000, 100'000, 500'000});
    // Several stages on a worker have a workspace each, which takes of its cache.
    for (uint64_t& bytes : s.worker_memory) bytes += 2 * num_layers * m.block_bytes;
  }

  if (w.Chance(0.5)) {
    s.host_cache_bytes = w.Pick({1, 3, 10, 100}) * num_layers * m.block_bytes;
    o.preempt = w.Chance(0.7)   ? PreemptMode::kPark
                : w.Chance(0.8) ? PreemptMode::kAuto
                                : PreemptMode::kReplay;
  }
  if (s.host_cache_bytes > 0 && o.max_cache_bytes_per_stage == 0 && w.Chance(0.5)) Press(&w, &s);
  s.copy_us_max = w.Pick({20, 1'000, 20'000});
  s.copy_polls = static_cast<uint32_t>(w.Pick({0, 1, 5}));
  if (w.Chance(0.3)) s.num_corruptions = static_cast<uint32_t>(w.Pick({1, 5}));
  if (w.Chance(0.2)) s.num_flushes = static_cast<uint32_t>(w.Pick({1, 3}));
  SetRows(&w, &s);
  if (o.num_pipelines > 1 && w.Chance(0.7)) {
    s.num_moves = static_cast<uint32_t>(w.Pick({1, 2, 5, 20}));
    s.moves_us = w.Pick({1'000, 100'000, 500'000});
  }
  o.warm_spares = static_cast<uint32_t>(w.Pick({0, 1, 2}));
  return s;
}

Scenario MakeGroundScenario(World* world) {
  World& w = *world;
  Scenario s = MakeAnyScenario(world);
  CoreOptions& o = s.options;
  ModelShape& m = s.model;
  m.max_positions = 700;
  m.layer_weight_bytes.assign(w.Random(2, 3), 3000);
  const size_t num_layers = m.layer_weight_bytes.size();
  o.num_pipelines = 2;
  o.num_stages = 2;
  o.max_step_tokens = static_cast<uint32_t>(w.Pick({64, 300}));
  o.prefill_chunk = static_cast<uint32_t>(w.Pick({16, 64, 300}));
  o.max_running = 16;
  o.max_waiting = 200;
  o.max_cache_bytes_per_stage = 0;
  s.columns_least = static_cast<uint32_t>(w.Pick({12, 50}));
  s.equal_memory = true;
  const uint64_t enough = m.embedding_bytes + m.head_bytes + num_layers * 3000 +
                          m.workspace_bytes.back() +
                          uint64_t{s.columns_least} * num_layers * m.block_bytes;
  s.worker_memory.assign(5, enough + 2 * num_layers * m.block_bytes);
  s.num_requests = 8;
  s.tokens_each = 300;
  s.cancel_chance = s.deadline_chance = s.bad_request_chance = s.nan_chance = 0;
  s.num_faults = 3;
  s.faults_us = w.Pick({500'000, 2'000'000});
  s.replacement_chance = 1;
  s.heals = true;
  s.num_lies = 0;
  s.num_moves = 2;
  s.moves_us = 1'000'000;
  return s;
}

Scenario MakeSharingScenario(World* world) {
  World& w = *world;
  Scenario s = MakeAnyScenario(world);
  CoreOptions& o = s.options;
  ModelShape& m = s.model;
  m.max_positions = 700;
  o.prefix_cache = true;
  o.max_step_tokens = static_cast<uint32_t>(w.Pick({64, 64, 300}));
  o.prefill_chunk = static_cast<uint32_t>(w.Pick({16, 64, 300}));
  o.max_running = static_cast<uint32_t>(w.Pick({4, 16, 64}));
  o.max_waiting = 200;
  o.max_cache_bytes_per_stage = 0;
  // From hardly more than one sequence needs to all that there are.
  s.columns_least = static_cast<uint32_t>(w.Pick({8, 11, 11, 16, 50}));
  const size_t num_layers = m.layer_weight_bytes.size();
  uint64_t enough = m.embedding_bytes + m.head_bytes + m.workspace_bytes.back() +
                    uint64_t{s.columns_least + 2} * num_layers * m.block_bytes;
  for (const uint64_t bytes : m.layer_weight_bytes) enough += bytes;
  for (uint64_t& bytes : s.worker_memory) {
    bytes = s.equal_memory ? enough : enough * w.Random(10, 15) / 10;
  }
  s.num_requests = 25;
  s.tokens_each = 0;
  s.arrival_us = w.Pick({1'000, 50'000});
  s.bad_request_chance = 0;
  s.prompt_tokens_max = static_cast<uint32_t>(w.Pick({200, 400}));
  s.max_tokens_max = static_cast<uint32_t>(w.Pick({20, 80, 200}));
  s.stem_chance = w.Pick({0.8, 1.0});
  return s;
}

Scenario MakeMovesScenario(World* world) {
  World& w = *world;
  Scenario s = MakeGroundScenario(world);
  CoreOptions& o = s.options;
  ModelShape& m = s.model;
  m.layer_weight_bytes.assign(w.Random(2, 6), 3000);
  const size_t num_layers = m.layer_weight_bytes.size();
  o.num_stages = static_cast<uint32_t>(w.Random(1, 2));
  // Workers of other sizes make other splits.
  s.equal_memory = w.Chance(0.2);
  s.columns_least = static_cast<uint32_t>(w.Pick({9, 10, 12, 16, 50}));
  o.heartbeat_timeout_us = w.Pick({500'000, 2'000'000});
  const uint64_t enough = m.embedding_bytes + m.head_bytes + num_layers * 3000 +
                          m.workspace_bytes.back() +
                          uint64_t{s.columns_least + 2} * num_layers * m.block_bytes;
  for (uint64_t& bytes : s.worker_memory) {
    bytes = s.equal_memory ? enough : enough * w.Random(10, 20) / 10;
  }
  s.arrival_us = w.Pick({1'000, 50'000, 300'000});
  s.stem_chance = w.Pick({0.0, 0.5});
  s.prompt_tokens_max = static_cast<uint32_t>(w.Pick({30, 200}));
  s.load_us_max = w.Pick({1'000, 100'000});
  s.num_moves = static_cast<uint32_t>(w.Pick({2, 2, 4, 8}));
  s.moves_us = w.Pick({200'000, 600'000});
  s.num_faults = static_cast<uint32_t>(w.Random(0, 1));
  s.num_aimed = 3 - s.num_faults;
  s.faults_us = 2'000'000;
  // One that fails half way leaves pipelines of other numbers of stages.
  s.num_scales = w.Chance(0.4) ? 1 : 0;
  s.breaks_scale = w.Chance(0.7);
  s.scales_us = w.Pick({1'000, 500'000});
  return s;
}

}  // namespace strait::sim
