// SPDX-License-Identifier: Apache-2.0
//
// Harness drives a Core by hand: workers that load and activate at once, steps that wait until the
// test lets a stage report them. Its workers keep rows over epochs, hand them to successors, count their
// memory, and note in `problems` what an honest worker would refuse.
//
// Thread:  the test's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "proto/wire/tables_digest.h"
#include "proto/wire/version.h"
#include "tests/coordinator/core/fake_worker.h"

namespace strait {

inline RequestSpec OneSequence(uint32_t prompt_tokens, uint32_t max_tokens) {
  RequestSpec request;
  SequenceSpec& spec = request.sequences.emplace_back();
  for (uint32_t i = 0; i < prompt_tokens; ++i) spec.prompt.push_back(10 + i % 80);
  spec.max_tokens = max_tokens;
  spec.ignore_eos = true;
  return request;
}

class Harness {
 public:
  using FakeStage = strait::FakeStage;
  using FakeWorker = strait::FakeWorker;

  Harness(CoreOptions options, const ModelShape& shape)
      : block_bytes(shape.block_bytes), model(shape), core(std::move(options), shape) {}

  // The Hello of the next worker.
  v1::Hello MakeHello(uint64_t memory_bytes) const {
    const uint64_t id = last_worker + 1;
    v1::Hello hello;
    hello.set_wire_version(kWireVersion);
    hello.set_name("w" + std::to_string(id));
    hello.set_data_address("host:" + std::to_string(id));
    hello.set_memory_bytes(memory_bytes);
    hello.set_replica_bytes(replica_bytes);
    hello.set_model_fingerprint(7);
    hello.set_weights_fingerprint(0xABC);
    hello.set_cache_row_bytes(2);
    hello.set_instance(id);
    return hello;
  }
  WorkerId Attach(uint64_t memory_bytes) { return Attach(MakeHello(memory_bytes)); }
  WorkerId Attach(const v1::Hello& hello) {
    const WorkerId id{++last_worker};
    workers[id].hello = hello;
    core.OnWorkerAttached(id, hello, now_us);
    Pump();
    return id;
  }
  void Lose(WorkerId id) {
    lost[id] = std::move(workers.at(id));
    std::erase_if(lost[id].stages, [](const auto& entry) { return !entry.second.loaded; });
    workers.erase(id);
    core.OnWorkerLost(id, absl::UnavailableError("gone"), now_us);
    Pump();
  }
  // What a worker that was lost says when it comes back with its stages.
  v1::Hello HelloAgain(WorkerId old) const {
    const FakeWorker& worker = lost.at(old);
    v1::Hello hello = worker.hello;
    hello.set_term(1);
    hello.clear_held_stages();
    for (const auto& [id, stage] : worker.stages) {
      v1::HeldStage* held = hello.add_held_stages();
      held->set_stage_id(id);
      held->set_layer_begin(stage.load.layer_begin());
      held->set_layer_end(stage.load.layer_end());
      held->set_cache_bytes(stage.cache_bytes);
      held->set_weight_bytes(7);
    }
    return hello;
  }
  WorkerId ComeBack(WorkerId old) { return ComeBack(old, HelloAgain(old)); }
  WorkerId ComeBack(WorkerId old, const v1::Hello& hello) {
    const WorkerId id{++last_worker};
    workers[id] = std::move(lost.at(old));
    workers[id].hello = hello;
    // As a worker that forgets what the coordinator has forgotten.
    FakeReplicas& replicas = workers[id].replicas;
    replicas.blocks.clear();
    replicas.asked.clear();
    replicas.secret = 0;
    for (auto& [stage_id, stage] : workers[id].stages) {
      stage.plans.clear();
      stage.resize_due.reset();
      stage.memory_bytes = stage.cache_bytes;
    }
    core.OnWorkerAttached(id, hello, now_us);
    Pump();
    return id;
  }
  RequestId Submit(RequestSpec spec) {
    const RequestId id{++last_request};
    core.OnSubmit(id, std::move(spec), now_us);
    Pump();
    return id;
  }
  // Time passes, in which the coordinator is awake and all workers beat.
  void Tick(uint64_t after_us) { Pass(after_us, true); }
  void TickInSilence(uint64_t after_us) { Pass(after_us, false); }
  // Time passes in which the coordinator is stopped.
  void Pause(uint64_t us) {
    now_us += us;
    core.OnTick(now_us);
    Pump();
  }
  void Beat(WorkerId id) {
    v1::FromWorker message;
    message.mutable_heartbeat();
    core.OnWorkerMessage(id, message, now_us);
  }

  // The worker's one stage.
  FakeStage& StageOf(WorkerId id) { return workers.at(id).stages.begin()->second; }
  // The honest report of the stage's oldest plan; sampled tokens come from `next_token`.
  v1::StageReport MakeReport(WorkerId id) { return MakeReport(StageOf(id)); }
  v1::StageReport MakeReport(FakeStage& stage) {
    const v1::StepPlan plan = stage.plans.front();
    stage.plans.pop_front();
    v1::StageReport report;
    report.set_stage_id(plan.stage_id());
    *report.mutable_epoch() = plan.epoch();
    report.set_step_id(plan.step_id());
    if (plan.step_id() == 1) stage.rows_kept = 0;
    for (const v1::CacheOp& op : plan.cache_ops()) {
      DoCacheOp(op, plan.step_id() == 1, &stage,
                [&](const std::string& what) { Problem(stage, what); });
    }
    if (plan.step_id() == 1) stage.prefixes.DropUnheld();
    if (!stage.told.empty()) Problem(stage, "the first plan does not name all that was told");
    uint32_t stages_before = stage.activate.num_stages();
    for (const v1::SequenceStep& step : plan.sequences()) {
      const uint32_t through =
          step.replay_stages() == 0 ? stage.activate.num_stages() : step.replay_stages();
      if (through > stages_before) Problem(stage, "sequences do not come by falling stages");
      stages_before = through;
      Do(step, through, &stage, &report);
      if (step.has_sampled() && (stage.first || stage.last)) {
        report.add_granted_ids(GrantedToken(step));
      }
      if (!stage.last || step.logits().empty()) continue;
      v1::SequenceResult* result = report.add_results();
      result->set_sequence_id(step.sequence_id());
      for (const v1::LogitsWanted& wanted : step.logits()) {
        v1::TokenLogprob* out =
            wanted.has_sample() ? result->mutable_sampled() : result->add_scored();
        const uint32_t sampled =
            token_at ? token_at(step.sequence_id(), step.first_position() + wanted.offset() + 1)
                     : next_token;
        out->set_token_id(wanted.has_sample() ? sampled : wanted.score_token());
        out->set_logprob(-1);
        if (wanted.has_sample()) last_sampled[step.sequence_id()] = sampled;
      }
    }
    TablesDigest digest;
    for (const auto& [sequence, length] : stage.lengths) digest.Add(sequence, length);
    const uint64_t bytes = HeldBytesOf(stage, block_bytes);
    if (bytes > stage.cache_of_step.at(plan.step_id())) {
      Problem(stage, "its cache is too small for the plan");
    }
    report.set_cache_bytes(bytes);
    report.set_tables_digest(digest.Value());
    return report;
  }
  // What a stage has of sequences when it enters an epoch, as ACTIVE tells it.
  static void AddHeld(const FakeStage& stage, v1::StageState* state) {
    for (const auto& [sequence, length] : stage.lengths) {
      if (stage.moves.imports.contains(sequence)) continue;
      v1::HeldSequence* held = state->add_held();
      held->set_sequence_id(sequence.value);
      held->set_rows(length);
      held->set_prefix_blocks(stage.prefixes.Of(sequence));
    }
  }
  // The last one, with what the stage has.
  void AnswerActivation(WorkerId id) { AnswerActivation(id, StageOf(id)); }
  void AnswerActivation(WorkerId id, FakeStage& stage) {
    stage.answered = stage.activate.epoch().counter();
    Restore(stage);
    v1::StageState state;
    state.set_stage_id(stage.activate.stage_id());
    state.set_state(v1::StageState::ACTIVE);
    *state.mutable_epoch() = stage.activate.epoch();
    AddHeld(stage, &state);
    if (before_active) before_active(id, &state);
    Answer(id, state);
  }
  void AnswerUnload(WorkerId id, uint64_t stage_id) {
    workers.at(id).stages.erase(stage_id);
    v1::StageState state;
    state.set_stage_id(stage_id);
    state.set_state(v1::StageState::UNLOADED);
    Answer(id, state);
  }
  void AnswerUnloads() {
    for (const auto& [id, stage_id] : std::exchange(unloads, {})) {
      if (workers.contains(id) && !workers.at(id).evicted) AnswerUnload(id, stage_id);
    }
    Pump();
  }
  // Of the edge that ends at this stage.
  static std::string NcclId(uint64_t stage_id) {
    return std::string(limits::kNcclIdBytes, static_cast<char>('a' + stage_id));
  }
  void Report(WorkerId id) { Report(id, StageOf(id)); }
  void Report(WorkerId id, FakeStage& stage) {
    const v1::StageReport report = MakeReport(stage);
    if (answer_resizes) AnswerResize(id, stage);
    Send(id, report);
    // It may have been unloaded for it.
    const auto worker = workers.find(id);
    if (!answer_fetches || worker == workers.end()) return;
    const auto still = worker->second.stages.find(report.stage_id());
    if (still != worker->second.stages.end()) AnswerFetches(id, still->second);
  }
  // Rows that it was told to fetch, and has blocks for, come.
  void AnswerFetches(WorkerId id, FakeStage& stage) {
    std::vector<v1::FromWorker> told;
    for (auto& fetches = stage.moves.fetches; !fetches.empty(); fetches.pop_front()) {
      const v1::FetchRows& fetch = fetches.front();
      const SequenceId sequence{fetch.sequence_id()};
      const PlacementEpoch placement{fetch.placement().term(), fetch.placement().counter()};
      if (stage.epoch.counter() == 0 && fetch.epoch().counter() == 0) {
        Land(fetch, &stage, &told);
        continue;
      }
      const auto it = stage.moves.imports.find(sequence);
      const bool is_due = fetch.epoch().counter() == stage.epoch.counter();
      if (is_due && (it == stage.moves.imports.end() || it->second.placement != placement ||
                     it->second.rows < fetch.end_row())) {
        if (!stage.plans.empty()) break;  // its plan has not run
        continue;                         // it was closed
      }
      if (!is_due) continue;
      std::vector<TokenId>& tokens = it->second.tokens;
      if (tokens.size() != fetch.begin_row()) Problem(stage, "rows are fetched out of order");
      CheckSources(stage, fetch);
      tokens.insert(tokens.end(), fetch.tokens().ids().begin(), fetch.tokens().ids().end());
      if (tokens.size() != fetch.end_row()) Problem(stage, "tokens and rows differ");
      v1::FromWorker& message = told.emplace_back();
      v1::RowsFetched* fetched = message.mutable_rows_fetched();
      fetched->set_stage_id(fetch.stage_id());
      *fetched->mutable_epoch() = fetch.epoch();
      fetched->set_sequence_id(fetch.sequence_id());
      *fetched->mutable_placement() = fetch.placement();
      fetched->set_rows(fetch.end_row());
      fetched->set_digest(FakeMoves::DigestOf(stage.layers(), fetch.end_row()) + spoil_digest);
      fetched->set_fetched_bytes(uint64_t{fetch.end_row()} * stage.layers().size());
    }
    for (const v1::FromWorker& message : told) core.OnWorkerMessage(id, message, now_us);
    if (!told.empty()) Pump();
  }
  void AnswerServe(WorkerId id, FakeStage& stage) {
    std::vector<v1::FromWorker> told;
    for (auto& [sequence, serve] : stage.moves.serves) {
      const auto length = stage.lengths.find(sequence);
      if (serve.served_rows == 0 || length == stage.lengths.end() ||
          length->second < serve.served_rows) {
        continue;
      }
      v1::FromWorker& message = told.emplace_back();
      v1::RowsServed* served = message.mutable_rows_served();
      served->set_stage_id(stage.load.stage_id());
      *served->mutable_epoch() = stage.epoch;
      served->set_sequence_id(sequence.value);
      served->mutable_placement()->set_term(serve.placement.term);
      served->mutable_placement()->set_counter(serve.placement.counter);
      served->set_rows(serve.served_rows);
      served->set_digest(FakeMoves::DigestOf(stage.layers(), std::exchange(serve.served_rows, 0)));
    }
    for (const v1::FromWorker& message : told) core.OnWorkerMessage(id, message, now_us);
    if (!told.empty()) Pump();
  }
  // Copies that it was told to make are there, or are not to be.
  void AnswerReplicas(WorkerId id) {
    FakeWorker& worker = workers.at(id);
    std::vector<v1::FromWorker> told;
    for (const v1::Replicate& replicate : std::exchange(worker.replicas.asked, {})) {
      v1::FromWorker& message = told.emplace_back();
      v1::Replicated* replicated = message.mutable_replicated();
      replicated->set_stage_id(replicate.source().stage_id());
      const absl::StatusOr<std::vector<ContentKey>> keys = ParseContentKeys(replicate.keys());
      for (const ContentKey& key : *keys) {
        const bool ok = !fail_copies && Copy(&worker, replicate.source(), key);
        AppendTo(key, ok ? replicated->mutable_keys() : replicated->mutable_failed());
        ++(ok ? copies_made : copies_failed);
      }
    }
    for (const v1::FromWorker& message : told) core.OnWorkerMessage(id, message, now_us);
    if (!told.empty()) Pump();
  }
  VerbId Migrate(MigrateSpec spec) {
    const VerbId id{++last_verb};
    core.OnMigrate(id, std::move(spec), now_us);
    Pump();
    return id;
  }
  VerbId Migrate(uint64_t sequence, PipelineId to) {
    MigrateSpec spec;
    spec.sequence = std::to_string(sequence);
    spec.to = to;
    return Migrate(std::move(spec));
  }
  VerbId Drain(DrainSpec spec) {
    const VerbId id{++last_verb};
    core.OnDrain(id, std::move(spec), now_us);
    Pump();
    return id;
  }
  VerbId Drain(WorkerId worker) {
    DrainSpec spec;
    spec.worker = std::to_string(worker.value);
    return Drain(std::move(spec));
  }
  void Leave(WorkerId worker) {
    v1::FromWorker message;
    message.mutable_leave()->set_reason("SIGTERM");
    core.OnWorkerMessage(worker, message, now_us);
    Pump();
  }
  // What was asked for last, once its rows allow it.
  void AnswerResize(WorkerId id, FakeStage& stage) {
    if (!stage.resize_due || HeldBytesOf(stage, block_bytes) > *stage.resize_due) return;
    v1::FromWorker message;
    message.mutable_cache_resized()->set_stage_id(stage.load.stage_id());
    message.mutable_cache_resized()->set_cache_bytes(*stage.resize_due);
    stage.memory_bytes = *stage.resize_due;
    stage.resize_due.reset();
    core.OnWorkerMessage(id, message, now_us);
  }
  void RefuseResize(WorkerId id, FakeStage& stage) {
    stage.cache_bytes = stage.memory_bytes = stage.cache_before;
    stage.resize_due.reset();
    v1::FromWorker message;
    message.mutable_cache_resized()->set_stage_id(stage.load.stage_id());
    message.mutable_cache_resized()->set_error_code(8);
    message.mutable_cache_resized()->set_error_message("no");
    core.OnWorkerMessage(id, message, now_us);
    Pump();
  }
  void Send(WorkerId id, const v1::StageReport& report) {
    v1::FromWorker message;
    *message.mutable_report() = report;
    core.OnWorkerMessage(id, message, now_us);
    Pump();
  }
  // Every stage reports what it has, so many times.
  void Rounds(int rounds) {
    for (int i = 0; i < rounds; ++i) {
      for (auto& [id, worker] : workers) {
        std::vector<uint64_t> ids;
        for (const auto& [stage_id, stage] : worker.stages) ids.push_back(stage_id);
        for (const uint64_t stage_id : ids) {
          const auto it = worker.stages.find(stage_id);
          if (it != worker.stages.end() && !it->second.plans.empty()) Report(id, it->second);
        }
      }
    }
  }
  // Every stage reports everything, until nothing more is planned.
  void Run() {
    for (bool any = true; any;) {
      any = false;
      for (auto& [id, worker] : workers) {
        std::vector<uint64_t> ids;
        for (const auto& [stage_id, stage] : worker.stages) ids.push_back(stage_id);
        for (const uint64_t stage_id : ids) {
          while (worker.stages.contains(stage_id) && !worker.stages.at(stage_id).plans.empty()) {
            Report(id, worker.stages.at(stage_id));
            any = true;
          }
        }
      }
    }
  }

  void Pump() {
    for (std::vector<CoreMessage> messages = core.Take(now_us); !messages.empty();
         messages = core.Take(now_us)) {
      for (const CoreMessage& message : messages)
        std::visit([this](const auto& m) { On(m); }, message);
    }
    const absl::Status sound = core.CheckIntegrity();
    if (!sound.ok()) problems.push_back(sound.ToString());
    // Only now that all messages are delivered: an answer brings new ones.
    for (const auto& [id, stage_id] : std::exchange(moves_told_, {})) {
      if (!answer_fetches) break;
      const auto find = [&, id = id, stage_id = stage_id]() -> FakeStage* {
        const auto worker = workers.find(id);
        if (worker == workers.end() || !worker->second.stages.contains(stage_id)) return nullptr;
        return &worker->second.stages.at(stage_id);
      };
      if (FakeStage* stage = find()) AnswerFetches(id, *stage);
      if (FakeStage* stage = find()) AnswerServe(id, *stage);
    }
    if (!answer_replicas) return;
    for (const WorkerId id : std::exchange(replicas_told_, {})) {
      if (workers.contains(id)) AnswerReplicas(id);
    }
  }

  // Every pipeline is to have so many stages.
  ScaleId Scale(ScaleSpec spec) {
    const ScaleId id{++last_scale};
    core.OnScale(id, spec, now_us);
    Pump();
    return id;
  }

  const uint64_t block_bytes;
  const ModelShape model;
  Core core;
  uint64_t now_us = 1'000'000;
  uint64_t last_request = 0;
  uint64_t last_worker = 0;
  uint64_t last_scale = 0;
  uint64_t last_verb = 0;
  uint32_t next_token = 50;
  // Of a sequence at a position, if samples are to be the same whenever they are taken.
  std::function<uint32_t(uint64_t, uint32_t)> token_at;
  std::map<uint64_t, uint32_t> last_sampled;  // by sequence
  bool answer_loads = true;
  bool answer_activations = true;
  bool answer_links = true;
  bool answer_nccl_ids = true;
  bool answer_resizes = true;
  bool answer_unloads = true;
  bool answer_fetches = true;
  uint64_t replica_bytes = 0;  // that workers offer which attach from now on
  bool answer_replicas = true;
  bool fail_copies = false;
  uint64_t copies_made = 0;  // of one block of one stage
  uint64_t copies_failed = 0;
  uint32_t most_restored = ~0u;  // blocks of each sequence that come in time
  uint64_t rows_restored = 0;    // each stage counts its own
  uint64_t rows_landed = 0;      // of each layer
  uint64_t spoil_digest = 0;
  bool tell_rows = true;  // else as workers that drop everything with an epoch
  std::function<void(WorkerId, v1::StageState*)> before_active;  // may change what is told
  std::map<WorkerId, FakeWorker> workers;
  std::map<WorkerId, FakeWorker> lost;
  std::map<RequestId, std::vector<TokenInfo>> tokens;
  std::map<RequestId, std::vector<TokenInfo>> scores;
  std::map<RequestId, SequenceEnded> ended;
  std::map<RequestId, std::vector<uint32_t>> cached;
  std::map<RequestId, absl::Status> refused;
  std::map<ScaleId, ScaleAnswered> scaled;
  std::map<ScaleId, std::vector<ScaleReport>> scale_told;
  std::map<VerbId, std::vector<MoveReport>> moves;
  std::map<VerbId, std::vector<DrainReport>> drains;
  std::set<WorkerId> shut_down;
  std::map<VerbId, absl::Status> verbs;  // that ended
  std::vector<std::string> problems;
  std::vector<std::pair<WorkerId, uint64_t>> unloads;  // not answered

  void Answer(WorkerId id, const v1::StageState& state) {
    v1::FromWorker message;
    *message.mutable_stage_state() = state;
    core.OnWorkerMessage(id, message, now_us);
  }

 private:
  static constexpr TokenId kUnknown = ~TokenId{0};

  std::set<std::pair<WorkerId, uint64_t>> moves_told_;  // stages with something to answer
  std::set<WorkerId> replicas_told_;                    // likewise

  FakeWorker* WorkerAt(const std::string& data_address) {
    for (auto& [id, worker] : workers) {
      if (!worker.evicted && worker.hello.data_address() == data_address) return &worker;
    }
    return nullptr;
  }
  // False: its source has it no more.
  bool Copy(FakeWorker* worker, const v1::RowsSource& source, const ContentKey& key) {
    FakeWorker* from = WorkerAt(source.data_address());
    if (from == nullptr || !from->stages.contains(source.stage_id())) return false;
    FakeStage& stage = from->stages.at(source.stage_id());
    if (from == worker) Problem(stage, "has its copies on its own worker");
    if (stage.epoch.counter() != source.epoch().counter()) return false;
    if (stage.prefix_secret != source.secret() || source.secret() == 0) {
      Problem(stage, "does not know the secret that its buddy shows");
    }
    if (!stage.prefixes.Has(key)) return false;
    for (LayerIndex layer = source.layer_begin(); layer < source.layer_end(); ++layer) {
      worker->replicas.blocks.insert({key, layer});
    }
    if (worker->replicas.blocks.size() * block_bytes > worker->hello.replica_bytes()) {
      Problem(stage, "gets more copies than its buddy has memory for");
    }
    return true;
  }
  // As many whole blocks as there are copies of.
  void Restore(FakeStage& stage) {
    if (std::exchange(stage.restored_counter, stage.epoch.counter()) == stage.epoch.counter()) {
      return;
    }
    uint64_t last = 0;
    // Its blocks are still those of the stages before it.
    if (!stage.load.successor_of().empty()) return;
    for (const v1::FetchRows& restore : stage.activate.restores()) {
      const SequenceId id{restore.sequence_id()};
      if (id.value <= last) Problem(stage, "restores do not come by rising ids");
      last = id.value;
      if (stage.lengths.contains(id)) continue;
      std::vector<ContentKey> keys = *ParseContentKeys(restore.keys());
      if (restore.end_row() != keys.size() * limits::kBlockTokens) Problem(stage, "keys lack");
      size_t here = 0;
      while (here < std::min<size_t>(keys.size(), most_restored) &&
             IsCopied(stage, restore, keys[here])) {
        ++here;
      }
      keys.resize(here);
      if (keys.empty()) continue;
      const auto& ids = restore.tokens().ids();
      stage.fed[id].assign(ids.begin(), ids.begin() + long(here) * limits::kBlockTokens);
      stage.lengths[id] = static_cast<uint32_t>(here) * limits::kBlockTokens;
      rows_restored += stage.lengths[id];
      stage.prefixes.Adopt(id, std::move(keys));
      stage.told.insert(id);
    }
    if (last != 0 && HeldBytesOf(stage, block_bytes) > stage.cache_bytes) {
      Problem(stage, "is to restore more than its cache holds");
    }
  }
  bool IsCopied(FakeStage& stage, const v1::FetchRows& restore, const ContentKey& key) {
    LayerIndex next = stage.layers().begin;
    for (const v1::RowsSource& source : restore.sources()) {
      if (source.layer_begin() != next) Problem(stage, "restores leave layers out");
      next = source.layer_end();
      const FakeWorker* from = WorkerAt(source.data_address());
      if (from == nullptr) return false;
      if (!from->replicas.secrets.contains(source.secret()) || source.secret() == 0) {
        Problem(stage, "shows a secret that the keeper of its copies does not know");
      }
      if (from->replicas.secret != source.secret()) return false;  // it came back meanwhile
      if (!from->replicas.Has(key, {source.layer_begin(), source.layer_end()})) return false;
    }
    if (next != stage.layers().end) Problem(stage, "restores leave layers out");
    return true;
  }

  // Rows come to a stage that was never active.
  void Land(const v1::FetchRows& fetch, FakeStage* stage, std::vector<v1::FromWorker>* told) {
    const SequenceId id{fetch.sequence_id()};
    const PlacementEpoch placement{fetch.placement().term(), fetch.placement().counter()};
    if (!stage->load.successor_of().empty()) Problem(*stage, "rows land where others' blocks are");
    const auto [it, is_new] = stage->landed.emplace(id, placement);
    if (it->second != placement) Problem(*stage, "rows of two placements land");
    std::vector<TokenId>& fed = stage->fed[id];
    if (fed.size() != fetch.begin_row()) Problem(*stage, "rows are fetched out of order");
    CheckSources(*stage, fetch);
    fed.insert(fed.end(), fetch.tokens().ids().begin(), fetch.tokens().ids().end());
    if (fed.size() != fetch.end_row()) Problem(*stage, "tokens and rows differ");
    stage->lengths[id] = fetch.end_row();
    std::vector<ContentKey> keys = *ParseContentKeys(fetch.prefix_keys());
    if (keys.size() * limits::kBlockTokens > fetch.end_row()) Problem(*stage, "keys without rows");
    stage->prefixes.Leave(id, 0);
    stage->prefixes.Adopt(id, std::move(keys));
    if (fetch.begin_row() == fetch.end_row()) return;
    rows_landed += uint64_t{fetch.end_row() - fetch.begin_row()} * stage->layers().size();
    v1::RowsFetched* fetched = told->emplace_back().mutable_rows_fetched();
    fetched->set_stage_id(fetch.stage_id());
    fetched->set_sequence_id(fetch.sequence_id());
    *fetched->mutable_placement() = fetch.placement();
    fetched->set_rows(fetch.end_row());
    fetched->set_fetched_bytes(uint64_t{fetch.end_row()} * stage->layers().size());
    if (HeldBytesOf(*stage, block_bytes) <= stage->cache_bytes) return;
    fetched->set_error_code(8);
    fetched->set_error_message("no room");
    DropLanded(id, stage);
  }
  static void DropLanded(SequenceId id, FakeStage* stage) {
    // What was asked for before is not answered.
    auto& fetches = stage->moves.fetches;
    fetches.erase(std::remove_if(fetches.begin(), fetches.end(),
                                 [&](const auto& f) { return f.sequence_id() == id.value; }),
                  fetches.end());
    if (stage->landed.erase(id) == 0) return;
    stage->lengths.erase(id);
    stage->fed.erase(id);
    stage->prefixes.Leave(id, 0);
    stage->prefixes.DropUnheld();
  }

  uint32_t GrantedToken(const v1::SequenceStep& step) const {
    if (token_at) return token_at(step.sequence_id(), step.first_position());
    const auto sampled = last_sampled.find(step.sequence_id());
    return sampled == last_sampled.end() ? next_token : sampled->second;
  }
  void Problem(const FakeStage& stage, const std::string& what) {
    problems.push_back("stage " + std::to_string(stage.load.stage_id()) + ": " + what);
  }
  void Do(const v1::SequenceStep& step, uint32_t through, FakeStage* stage,
          v1::StageReport* report) {
    const SequenceId id{step.sequence_id()};
    const uint32_t begin = step.first_position();
    std::vector<TokenId> ids(step.literals().ids().begin(), step.literals().ids().end());
    if (step.has_sampled()) ids = {token_at ? token_at(id.value, begin) : kUnknown};
    const auto rows = static_cast<uint32_t>(ids.size());
    uint32_t& length = stage->lengths.at(id);
    std::vector<TokenId>& fed = stage->fed[id];
    const bool replays = step.replay_stages() != 0;
    const uint32_t index = stage->activate.stage_index();
    const bool has_all = length >= begin + rows;
    if (rows == 0 || (!has_all && length != begin)) Problem(*stage, "rows do not follow");
    if (replays && through < stage->activate.num_stages() && step.logits_size() > 0) {
      Problem(*stage, "wants logits of rows that do not reach the last stage");
    }
    if (replays && step.has_sampled()) Problem(*stage, "replays a granted row");
    if (replays && index + 1 == through && has_all) Problem(*stage, "the last one lacks nothing");
    if (!replays && has_all) Problem(*stage, "has rows already, and it is no replay");
    for (uint32_t i = 0; has_all && i < rows; ++i) {
      if (fed[begin + i] != kUnknown && fed[begin + i] != ids[i]) {
        Problem(*stage, "kept a row of another token");
      }
    }
    if (index >= through) {
      if (!has_all) Problem(*stage, "is left out, and lacks rows");
      return;
    }
    stage->rows_computed += rows;
    report->set_rows_computed(report->rows_computed() + rows);
    if (has_all) return;
    fed.insert(fed.end(), ids.begin(), ids.end());
    length += rows;
    stage->rows_stored += rows;
    report->set_rows_stored(report->rows_stored() + rows);
  }
  static void OnServe(const v1::ServeRows& told, FakeStage* stage) {
    const SequenceId sequence{told.sequence_id()};
    if (told.end()) {
      stage->moves.serves.erase(sequence);
      return;
    }
    // As worker/transfer does it: what is not here, it cannot serve.
    if (!stage->lengths.contains(sequence)) return;
    stage->moves.serves[sequence] = {
        {told.placement().term(), told.placement().counter()}, told.secret(), told.served_rows()};
  }
  // Every layer of the rows is where they are to be fetched from, and may be read there.
  void CheckSources(const FakeStage& stage, const v1::FetchRows& fetch) {
    LayerIndex next = stage.layers().begin;
    for (const v1::RowsSource& source : fetch.sources()) {
      if (source.layer_begin() != next) Problem(stage, "sources leave layers out");
      next = source.layer_end();
      for (auto& [id, worker] : workers) {
        const auto it = worker.stages.find(source.stage_id());
        if (it == worker.stages.end()) continue;
        const FakeStage& from = it->second;
        const SequenceId sequence{fetch.sequence_id()};
        const auto serve = from.moves.serves.find(sequence);
        if (from.epoch.counter() != source.epoch().counter()) continue;  // it failed meanwhile
        const PlacementEpoch placement{fetch.placement().term(), fetch.placement().counter()};
        // Or it ended, and there may be another one.
        if (serve == from.moves.serves.end() || serve->second.placement != placement) continue;
        if (serve->second.secret != source.secret() || source.secret() == 0) {
          Problem(stage, "shows a secret that its source does not know");
        }
        if (worker.hello.data_address() != source.data_address()) {
          Problem(stage, "looks for its source elsewhere");
        }
        const auto fed = from.fed.find(sequence);
        if (fed == from.fed.end() || fed->second.size() < fetch.end_row()) {
          Problem(stage, "fetches rows that are not there");
          continue;
        }
        for (uint32_t row = fetch.begin_row(); row < fetch.end_row(); ++row) {
          const TokenId token = fetch.tokens().ids(static_cast<int>(row - fetch.begin_row()));
          if (fed->second[row] != kUnknown && fed->second[row] != token) {
            Problem(stage, "fetches rows of other tokens");
          }
        }
      }
    }
    if (next != stage.layers().end) Problem(stage, "sources leave layers out");
  }
  void Pass(uint64_t us, bool beats) {
    for (const uint64_t end_us = now_us + us; now_us < end_us;) {
      now_us = std::min(end_us, now_us + kCallGapUs);
      for (auto& [id, worker] : workers) {
        if (beats && !worker.evicted) Beat(id);
      }
      core.OnTick(now_us);
      Pump();
    }
  }
  // Its edges are up at once.
  void OnLink(WorkerId id, const v1::ActivateStage& future, FakeWorker* worker) {
    FakeStage& stage = worker->stages.at(future.stage_id());
    if (stage.link || stage.epoch.counter() != 0) Problem(stage, "is to open edges too late");
    stage.link = future;
    if (!answer_links) return;
    v1::FromWorker message;
    if (future.edge_over_nccl()) {
      message.mutable_edge_id()->set_stage_id(future.stage_id());
      message.mutable_edge_id()->set_nccl_id(NcclId(future.stage_id()));
      core.OnWorkerMessage(id, message, now_us);
    }
    message.mutable_stage_linked()->set_stage_id(future.stage_id());
    core.OnWorkerMessage(id, message, now_us);
  }
  // What was made ahead is what the first epoch has.
  void CheckMade(const FakeStage& stage, const v1::ActivateStage& activate) {
    const bool is_first = stage.epoch.counter() == 0;
    const bool linked = is_first && stage.link.has_value();
    if ((activate.edge_made() &&
         (!linked || stage.link->edge_id() != activate.edge_id() || !activate.edge_over_nccl())) ||
        (activate.next_edge_made() &&
         (!linked || stage.link->next_edge_id() != activate.next_edge_id() ||
          stage.link->next_nccl_id() != activate.next_nccl_id()))) {
      Problem(stage, "is to go on with an edge that was not made");
    }
  }
  void On(const SendToWorker& m) {
    const auto it = workers.find(m.worker);
    if (it == workers.end() || it->second.evicted) return;  // its stream is gone
    FakeWorker& worker = it->second;
    v1::StageState state;
    if (m.message.has_load_stage()) {
      const v1::LoadStage& load = m.message.load_stage();
      FakeStage& stage = worker.stages[load.stage_id()];
      stage.load = load;
      stage.cache_bytes = stage.memory_bytes = load.cache_bytes();
      for (const uint64_t before : load.successor_of()) {
        if (!worker.stages.contains(before)) Problem(stage, "follows a stage that is not here");
      }
      CheckMemory(worker, model, &problems);
      if (!answer_loads) return;
      stage.loaded = true;
      state.set_stage_id(load.stage_id());
      state.set_state(v1::StageState::LOADED);
      state.set_cache_bytes(load.cache_bytes());
      Answer(m.worker, state);
    } else if (m.message.has_link_stage()) {
      OnLink(m.worker, m.message.link_stage().future(), &worker);
    } else if (m.message.has_activate_stage()) {
      const v1::ActivateStage& activate = m.message.activate_stage();
      FakeStage& stage = worker.stages.at(activate.stage_id());
      if (stage.followed) Problem(stage, "is followed, and enters an epoch");
      CheckMade(stage, activate);
      TakeOver(worker, stage);
      stage.epoch = activate.epoch();
      stage.activate = activate;
      stage.first = activate.previous_stage_id() == 0;
      stage.last = activate.next_stage_id() == 0;
      stage.plans.clear();
      stage.told.clear();
      for (const auto& [sequence, import] : stage.moves.imports) stage.lengths.erase(sequence);
      stage.moves = {};
      stage.prefix_secret = 0;
      if (!tell_rows) {
        stage.lengths.clear();
        stage.prefixes.Clear();
      }
      stage.prefixes.DropUnheld();
      for (const auto& [sequence, length] : stage.lengths) stage.told.insert(sequence);
      if (activate.edge_over_nccl() && !activate.edge_made() && answer_nccl_ids) {
        v1::FromWorker id;
        id.mutable_edge_id()->set_stage_id(activate.stage_id());
        *id.mutable_edge_id()->mutable_epoch() = activate.epoch();
        id.mutable_edge_id()->set_nccl_id(NcclId(activate.stage_id()));
        core.OnWorkerMessage(m.worker, id, now_us);
      }
      if (!answer_activations) return;
      AnswerActivation(m.worker, stage);
    } else if (m.message.has_unload_stage()) {
      if (!answer_unloads) {
        unloads.emplace_back(m.worker, m.message.unload_stage().stage_id());
        worker.stages.at(m.message.unload_stage().stage_id()).plans.clear();
        return;
      }
      AnswerUnload(m.worker, m.message.unload_stage().stage_id());
    } else if (m.message.has_resize_cache()) {
      const v1::ResizeCache& resize = m.message.resize_cache();
      FakeStage& stage = worker.stages.at(resize.stage_id());
      if (stage.resize_due) Problem(stage, "is resized twice at once");
      stage.cache_before = stage.cache_bytes;
      stage.cache_bytes = resize.cache_bytes();
      stage.resize_due = resize.cache_bytes();
      CheckMemory(worker, model, &problems);
      if (answer_resizes) AnswerResize(m.worker, stage);
    } else if (m.message.has_fetch_rows()) {
      FakeStage& stage = worker.stages.at(m.message.fetch_rows().stage_id());
      stage.moves.fetches.push_back(m.message.fetch_rows());
      moves_told_.insert({m.worker, m.message.fetch_rows().stage_id()});
    } else if (m.message.has_drop_landed()) {
      FakeStage& stage = worker.stages.at(m.message.drop_landed().stage_id());
      DropLanded(SequenceId{m.message.drop_landed().sequence_id()}, &stage);
    } else if (m.message.has_replicate()) {
      worker.replicas.Forget(m.message.replicate());
      if (!m.message.replicate().has_source()) return;
      worker.replicas.asked.push_back(m.message.replicate());
      replicas_told_.insert(m.worker);
    } else if (m.message.has_serve_rows() && m.message.serve_rows().stage_id() == 0) {
      worker.replicas.secret = m.message.serve_rows().secret();
      worker.replicas.secrets.insert(worker.replicas.secret);
    } else if (m.message.has_serve_rows() && m.message.serve_rows().sequence_id() == 0) {
      worker.stages.at(m.message.serve_rows().stage_id()).prefix_secret =
          m.message.serve_rows().secret();
    } else if (m.message.has_serve_rows()) {
      FakeStage& stage = worker.stages.at(m.message.serve_rows().stage_id());
      OnServe(m.message.serve_rows(), &stage);
      moves_told_.insert({m.worker, m.message.serve_rows().stage_id()});
    } else if (m.message.has_shutdown()) {
      shut_down.insert(m.worker);
    } else if (m.message.has_step()) {
      FakeStage& stage = worker.stages.at(m.message.step().stage_id());
      for (const uint64_t before : stage.load.successor_of()) {
        if (worker.stages.contains(before) && answer_unloads) {
          Problem(stage, "gets a plan before those that it follows went");
        }
      }
      stage.cache_of_step[m.message.step().step_id()] = stage.cache_bytes;
      stage.plans.push_back(m.message.step());
    }
  }
  void On(const EvictWorker& m) {
    workers[m.worker].evicted = true;
    workers[m.worker].why = m.why;
    workers[m.worker].stages.clear();
  }
  void On(const ScaleAnswered& m) { scaled[m.scale] = m; }
  void On(const ScaleTold& m) { scale_told[m.scale].push_back(m.report); }
  void On(const MoveTold& m) { moves[m.verb].push_back(m.report); }
  void On(const DrainTold& m) { drains[m.verb].push_back(m.report); }
  void On(const VerbEnded& m) { verbs[m.verb] = m.status; }
  void On(const RequestRefused& m) { refused[m.request] = m.why; }
  void On(const RequestAdmitted&) {}
  void On(const PromptCached& m) { cached[m.request].push_back(m.cached_tokens); }
  void On(const PromptScored& m) {
    auto& all = scores[m.request];
    all.insert(all.end(), m.scores.begin(), m.scores.end());
  }
  void On(const TokenEmitted& m) { tokens[m.request].push_back(m.token); }
  void On(const SequenceEnded& m) { ended[m.request] = m; }
};

inline std::vector<WorkerId> AttachAll(Harness& h, uint32_t count, uint64_t memory = 100'000) {
  std::vector<WorkerId> workers;
  for (uint32_t i = 0; i < count; ++i) workers.push_back(h.Attach(memory));
  return workers;
}

// Every stage reports what it has, until `rounds` are over.
inline void Rounds(Harness& h, const std::vector<WorkerId>& workers, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    for (const WorkerId id : workers) {
      if (!h.StageOf(id).plans.empty()) h.Report(id);
    }
  }
}

}  // namespace strait
