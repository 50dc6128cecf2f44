// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever fails, and whenever, with reports and activations that come late or never: the
// coordinator's idea of every stage is the stage's own, no row of another token is kept, nobody
// honest is evicted, and every client gets its tokens and scores once and in order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::IsEmpty;

class Fuzz {
 public:
  explicit Fuzz(uint32_t seed)
      : random_(seed), options_(MakeOptions()), h_(options_, SmallModel(4)) {
    h_.token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    // Some stages have little room, some a lot.
    const uint32_t n = options_.num_stages;
    memory_ = 5'100 / n + 1'000 + (4 + Pick(6)) * 512 / n + Pick(2) * 40'000;
    // Some have host memory for copies, of few blocks or of many.
    if (Pick(2) == 0) h_.replica_bytes = Pick(2) == 0 ? 5 * 512 : 1'000'000;
    const uint32_t workers = options_.num_stages * options_.num_pipelines + Pick(2);
    for (uint32_t i = 0; i < workers; ++i) h_.Attach(memory_);
  }

  void Run(int events) {
    for (int i = 0; i < events && !testing::Test::HasFailure(); ++i) {
      Event();
      ASSERT_THAT(h_.problems, IsEmpty()) << "event " << i;
    }
    Settle();
    Check();
  }

  CoreStats stats() const { return h_.core.Stats(); }
  uint64_t num_back() const { return num_back_; }
  uint64_t num_uneven() const { return num_uneven_; }
  uint64_t num_scales() const { return num_scales_; }
  uint64_t num_scaled() const { return num_scaled_; }
  uint64_t num_taken_back() const { return num_taken_back_; }
  uint64_t rows_restored() const { return h_.rows_restored; }

 private:
  uint32_t Pick(uint32_t below) { return random_() % below; }

  CoreOptions MakeOptions() {
    CoreOptions options;
    options.num_stages = 1 + Pick(4);
    options.num_pipelines = 1 + Pick(2);
    options.grant_depth = 1 + Pick(3);
    options.steps_in_flight = Pick(3) == 0 ? 1 + Pick(3) : 0;
    options.max_step_tokens = 8 + Pick(60);
    options.prefill_chunk = 4 + Pick(60);
    options.max_running = Pick(3) == 0 ? 2 : 16;
    options.prefix_cache = Pick(2) == 0;
    options.no_pipeline_grace_us = 3'600'000'000;
    options.request_timeout_us = 3'600'000'000;
    options.activation_timeout_us = 3'600'000'000;
    options.step_timeout_us = 3'600'000'000;
    return options;
  }

  struct Seat {
    WorkerId worker;
    uint64_t stage_id = 0;
  };
  std::vector<Seat> Seats() {
    std::vector<Seat> seats;
    for (auto& [id, worker] : h_.workers) {
      if (worker.evicted) continue;
      for (const auto& [stage_id, stage] : worker.stages) seats.push_back({id, stage_id});
    }
    return seats;
  }
  // Null: it went meanwhile.
  Harness::FakeStage* StageAt(const Seat& seat) {
    const auto worker = h_.workers.find(seat.worker);
    if (worker == h_.workers.end() || worker->second.evicted) return nullptr;
    const auto stage = worker->second.stages.find(seat.stage_id);
    return stage == worker->second.stages.end() ? nullptr : &stage->second;
  }

  // The stage at this place of the same pipeline and epoch; null: it does not take part now.
  Harness::FakeStage* Peer(const Harness::FakeStage& stage, uint32_t index) {
    for (const Seat& seat : Seats()) {
      Harness::FakeStage& other = *StageAt(seat);
      if (other.activate.epoch().counter() == stage.activate.epoch().counter() &&
          other.activate.stage_index() == index) {
        return &other;
      }
    }
    return nullptr;
  }
  bool Did(const Harness::FakeStage* stage, uint64_t step) {
    return stage != nullptr && (stage->plans.empty() || stage->plans.front().step_id() > step);
  }
  // Hidden states and ids that its next plan needs are there.
  bool MayRun(const Harness::FakeStage& stage) {
    const v1::StepPlan& plan = stage.plans.front();
    const uint32_t index = stage.activate.stage_index();
    bool needs_hidden = false;
    for (const v1::SequenceStep& step : plan.sequences()) {
      needs_hidden = needs_hidden || step.replay_stages() == 0 || step.replay_stages() > index;
      if (index > 0 || !step.has_sampled()) continue;
      if (!Did(Peer(stage, stage.activate.num_stages() - 1), step.sampled().step_id())) {
        return stage.activate.num_stages() == 1;
      }
    }
    return index == 0 || !needs_hidden || Did(Peer(stage, index - 1), plan.step_id());
  }

  void Compute(const Seat& seat, bool told) {
    Harness::FakeStage* stage = StageAt(seat);
    if (stage == nullptr || stage->plans.empty() || !MayRun(*stage)) return;
    for (const v1::SequenceStep& step : stage->plans.front().sequences()) {
      num_uneven_ += step.replay_stages() != 0;
    }
    late_[seat.worker].push_back(h_.MakeReport(*stage));
    if (told) Tell(seat.worker);
  }
  void Tell(WorkerId id) {
    for (; !late_[id].empty(); late_[id].erase(late_[id].begin())) {
      const v1::StageReport report = late_[id].front();
      if (h_.workers.at(id).evicted) return;
      h_.Send(id, report);
    }
    TellResizes(id);
  }
  // Of stages whose rows allow it.
  void TellResizes(WorkerId id) {
    for (const Seat& seat : Seats()) {
      if (seat.worker != id) continue;
      if (Harness::FakeStage* stage = StageAt(seat)) h_.AnswerResize(id, *stage);
    }
    h_.Pump();
  }
  void TellLoads(WorkerId id) {
    for (const Seat& seat : Seats()) {
      Harness::FakeStage* stage = StageAt(seat);
      if (seat.worker != id || stage == nullptr || stage->loaded) continue;
      stage->loaded = true;
      v1::StageState state;
      state.set_stage_id(seat.stage_id);
      state.set_state(v1::StageState::LOADED);
      state.set_cache_bytes(stage->load.cache_bytes());
      h_.Answer(id, state);
    }
    h_.Pump();
  }
  void Error(const Seat& seat) {
    const Harness::FakeStage& stage = *StageAt(seat);
    if (stage.answered == 0 || stage.answered != stage.epoch.counter() || stage.followed) return;
    Tell(seat.worker);
    Harness::FakeStage* still = StageAt(seat);
    if (still == nullptr || still->answered != still->epoch.counter()) return;
    v1::StageReport report;
    report.set_stage_id(still->load.stage_id());
    *report.mutable_epoch() = still->epoch;
    report.set_step_id(Pick(2));
    report.set_error_code(14);
    still->plans.clear();
    h_.Send(seat.worker, report);
  }
  void Activate(const Seat& seat) {
    Harness::FakeStage& stage = *StageAt(seat);
    if (stage.answered == stage.epoch.counter() || stage.epoch.counter() == 0) return;
    h_.AnswerActivation(seat.worker, stage);
    h_.Pump();
  }
  void Submit() {
    if (submitted_ == 24) return;
    RequestSpec spec = OneSequence(1 + Pick(150), Pick(6) == 0 ? 0 : 1 + Pick(60));
    spec.sequences[0].score_prompt = spec.sequences[0].max_tokens == 0 || Pick(4) == 0;
    const RequestId id = h_.Submit(spec);
    ++submitted_;
    if (!h_.refused.contains(id)) specs_[id] = spec.sequences[0];
  }
  void Lose(WorkerId id) {
    late_.erase(id);
    h_.Lose(id);
    gone_.push_back(id);
  }
  void Return() {
    if (gone_.empty()) return;
    const WorkerId id = gone_.back();
    gone_.pop_back();
    if (Pick(3) == 0) {
      h_.Attach(memory_);
      return;
    }
    // What it had begun to unload, or not begun to load, is not told.
    const WorkerId back = h_.ComeBack(id);
    num_back_ += !h_.workers.at(back).stages.empty();
  }

  void Event() {
    const std::vector<Seat> seats = Seats();
    const uint32_t kind = Pick(100);
    h_.answer_activations = Pick(4) > 0;
    h_.answer_resizes = Pick(2) > 0;
    h_.answer_loads = Pick(2) > 0;
    h_.answer_fetches = Pick(2) > 0;
    h_.spoil_digest = Pick(50) == 0;
    h_.answer_replicas = Pick(3) > 0;
    h_.fail_copies = Pick(10) == 0;
    h_.most_restored = Pick(4) == 0 ? Pick(2) : ~0u;
    if (kind < 8 || seats.empty()) Submit();
    if (seats.empty()) return Return();
    const Seat seat = seats[Pick(static_cast<uint32_t>(seats.size()))];
    if (StageAt(seat) == nullptr) return;
    // A moved sequence's new home may fail before its first step there: chance alone brings that once in hundreds of seeds.
    if (kind < 3) {
      if (const std::optional<WorkerId> adopting = Adopting()) return Lose(*adopting);
    }
    if (kind < 60) return Compute(seat, true);
    if (kind < 69) return Compute(seat, false);
    if (kind < 71) return TellMoves(seat);
    if (kind < 72) return Migrate();
    if (kind < 78) return Tell(seat.worker);
    if (kind < 80) return TellLoads(seat.worker);
    if (kind < 88) return Activate(seat);
    // In calm runs what takes several steps has a chance.
    if (kind < 96 && is_calm_ && Pick(10) > 0) {
      return Pick(2) == 0 ? Migrate() : Compute(seat, true);
    }
    if (kind < 90) return Lose(seat.worker);
    if (kind < 94) return Return();
    if (kind < 95) return Error(seat);
    if (kind < 96) {
      const RequestId request{1 + Pick(24)};
      if (!specs_.contains(request) || h_.ended.contains(request)) return;
      cancelled_.insert(request);
      h_.core.OnCancel(request, std::nullopt, h_.now_us);
      return h_.Pump();
    }
    if (kind < 97) return Scale();
    h_.Tick(100'000);
  }
  // A worker that was told to open a sequence with rows of another pipeline, and has not begun to.
  std::optional<WorkerId> Adopting() {
    for (const Seat& seat : Seats()) {
      for (const v1::StepPlan& plan : StageAt(seat)->plans) {
        for (const v1::CacheOp& op : plan.cache_ops()) {
          if (op.open().imported_rows() > 0) return seat.worker;
        }
      }
    }
    return std::nullopt;
  }
  void Scale() {
    const ScaleId id = h_.Scale(1 + Pick(4));
    if (!h_.scaled.contains(id)) ++num_scales_;
  }

  void Migrate() {
    const std::vector<Seat> seats = Seats();
    const Harness::FakeStage& from = *StageAt(seats[Pick(static_cast<uint32_t>(seats.size()))]);
    const Harness::FakeStage& to = *StageAt(seats[Pick(static_cast<uint32_t>(seats.size()))]);
    if (from.lengths.empty()) return;
    auto it = from.lengths.begin();
    std::advance(it, Pick(static_cast<uint32_t>(from.lengths.size())));
    h_.Migrate(it->first.value, PipelineId{to.activate.pipeline_id()});
  }
  void TellMoves(const Seat& seat) {
    if (Harness::FakeStage* stage = StageAt(seat)) h_.AnswerFetches(seat.worker, *stage);
    if (Harness::FakeStage* stage = StageAt(seat)) h_.AnswerServe(seat.worker, *stage);
    if (StageAt(seat) != nullptr) h_.AnswerReplicas(seat.worker);
  }

  void Settle() {
    h_.answer_activations = h_.answer_resizes = h_.answer_loads = h_.answer_fetches = true;
    h_.spoil_digest = 0;
    h_.answer_replicas = true;
    h_.fail_copies = false;
    for (int round = 0; round < 400; ++round) {
      while (!gone_.empty()) Return();
      // Scaled pipelines may have taken what others lost.
      if (round == 100) {
        for (uint32_t i = 0; i < 4 * options_.num_pipelines; ++i) h_.Attach(memory_);
      }
      for (const Seat& seat : Seats()) {
        if (StageAt(seat) == nullptr) continue;
        Tell(seat.worker);
        TellLoads(seat.worker);
        if (StageAt(seat) != nullptr) Activate(seat);
        TellMoves(seat);
      }
      for (const Seat& seat : Seats()) Compute(seat, true);
      if (round % 20 == 0) h_.Tick(500'000);
      if (round % 20 == 0) h_.Run();
    }
  }

  void Check() {
    EXPECT_THAT(h_.problems, IsEmpty());
    for (const auto& [id, worker] : h_.workers) {
      const std::string why = worker.why.ToString();
      EXPECT_TRUE(!worker.evicted || why.find("its stage failed") != std::string::npos) << why;
    }
    for (const auto& [id, spec] : specs_) {
      SCOPED_TRACE(testing::Message() << "request " << id.value);
      ASSERT_TRUE(h_.ended.contains(id)) << h_.core.StatusJson(h_.now_us);
      const std::vector<TokenInfo>& tokens = h_.tokens[id];
      const std::vector<TokenInfo>& scores = h_.scores[id];
      for (size_t i = 0; i < tokens.size(); ++i) {
        EXPECT_EQ(tokens[i].position, spec.prompt.size() + i);
      }
      for (size_t i = 0; i < scores.size(); ++i) EXPECT_EQ(scores[i].position, i + 1);
      const std::string why = h_.ended.at(id).status.ToString();
      // Faults may come faster than tokens.
      const bool fruitless = why.find("without a token of this sequence") != std::string::npos ||
                             why.find("workers that died") != std::string::npos;
      if (cancelled_.contains(id) || fruitless) continue;
      ASSERT_EQ(h_.ended.at(id).reason, FinishReason::kLength) << h_.ended.at(id).status;
      EXPECT_EQ(tokens.size(), spec.max_tokens);
      EXPECT_EQ(scores.size(), spec.score_prompt ? spec.prompt.size() - 1 : 0);
    }
    h_.core.OnFlush(h_.now_us);
    h_.Pump();
    h_.Run();
    EXPECT_EQ(h_.core.Stats().cache_bytes_used, 0u);
    for (const Seat& seat : Seats()) {
      if (StageAt(seat)->answered == 0) continue;
      EXPECT_THAT(StageAt(seat)->lengths, IsEmpty());
    }
    for (const auto& [id, answer] : h_.scaled) num_scaled_ += answer.status.ok();
    EXPECT_EQ(h_.scaled.size(), h_.last_scale) << "each is answered";
    EXPECT_EQ(h_.verbs.size(), h_.last_verb) << "each is answered";
    for (const auto& [id, status] : h_.verbs) {
      num_taken_back_ +=
          std::string(status.message()).find("the source goes on") != std::string::npos;
    }
  }

  std::mt19937 random_;
  const CoreOptions options_;
  Harness h_;
  uint64_t memory_ = 0;
  const bool is_calm_ = Pick(2) == 0;
  uint32_t submitted_ = 0;
  uint64_t num_back_ = 0;        // places taken back
  uint64_t num_scales_ = 0;      // begun
  uint64_t num_scaled_ = 0;      // done
  uint64_t num_taken_back_ = 0;  // moves of which the destination failed after the commit
  uint64_t num_uneven_ = 0;      // chunks that stages had in part
  std::map<WorkerId, std::vector<v1::StageReport>> late_;
  std::vector<WorkerId> gone_;
  std::map<RequestId, SequenceSpec> specs_;
  std::set<RequestId> cancelled_;
};

TEST(ReplayFuzzTest, WhateverFailsWheneverItFails) {
  const char* first = std::getenv("STRAIT_FUZZ_SEED");
  const char* count = std::getenv("STRAIT_FUZZ_COUNT");
  const auto begin = static_cast<uint32_t>(first != nullptr ? std::atoi(first) : 1);
  const auto seeds = static_cast<uint32_t>(count != nullptr ? std::atoi(count) : 200);
  CoreStats all;
  uint64_t restored = 0;
  uint64_t back = 0, uneven = 0, scales = 0, scaled = 0, taken_back = 0;
  for (uint32_t seed = begin; seed < begin + seeds && !HasFailure(); ++seed) {
    SCOPED_TRACE(testing::Message() << "STRAIT_FUZZ_SEED=" << seed);
    Fuzz fuzz(seed);
    fuzz.Run(1500);
    const CoreStats stats = fuzz.stats();
    all.recoveries += stats.recoveries;
    all.kept_rows += stats.kept_rows;
    all.recomputed_rows += stats.recomputed_rows;
    all.preemptions += stats.preemptions;
    back += fuzz.num_back();
    uneven += fuzz.num_uneven();
    scales += fuzz.num_scales();
    scaled += fuzz.num_scaled();
    taken_back += fuzz.num_taken_back();
    restored += fuzz.rows_restored();
    all.replicas_made += stats.replicas_made;
    all.replicas_failed += stats.replicas_failed;
    all.replicas_refused += stats.replicas_refused;
    all.migrations += stats.migrations;
    all.migrations_failed += stats.migrations_failed;
  }
  std::printf(
      "seeds %u to %u: %lu recoveries, %lu places taken back, %lu rows kept, %lu recomputed, %lu "
      "chunks that some stage had, %lu preemptions, %lu of %lu scales done, %lu moves, %lu given "
      "up, %lu "
      "of them taken back, %lu copies made, %lu failed, %lu without room, %lu rows restored\n",
      begin, begin + seeds - 1, all.recoveries, back, all.kept_rows, all.recomputed_rows, uneven,
      all.preemptions, scaled, scales, all.migrations, all.migrations_failed, taken_back,
      all.replicas_made, all.replicas_failed, all.replicas_refused, restored);
  if (seeds < 100) return;
  for (const uint64_t seen :
       {all.recoveries, back, all.kept_rows, all.recomputed_rows, uneven, all.preemptions, scales,
        scaled, all.migrations, all.migrations_failed, taken_back, all.replicas_made,
        all.replicas_failed, all.replicas_refused, restored}) {
    EXPECT_GT(seen, 0u);
  }
}

}  // namespace
}  // namespace strait
