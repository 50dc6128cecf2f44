// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a pipeline does about links that fail: it goes on with other workers, or in another order, where that is
// possible, and with those that it has where it is not; nobody is evicted for it, and the status says who is at fault.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "coordinator/core/cluster.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

constexpr uint64_t kMemory = 20'000;

CoreOptions Options(uint32_t num_stages, uint32_t grant_depth = 2) {
  CoreOptions options;
  options.grant_depth = grant_depth;
  options.num_stages = num_stages;
  return options;
}

// A cluster some of whose links pass nothing. Who sends over one says so instead of ACTIVE.
class Links {
 public:
  Links(uint32_t num_stages, uint32_t num_workers, uint32_t grant_depth = 2)
      : h(Options(num_stages, grant_depth), SmallModel()) {
    h.answer_activations = false;
    for (uint32_t i = 0; i < num_workers; ++i) workers.push_back(h.Attach(kMemory));
  }
  // Until the pipeline serves, or the time is over: then false.
  bool Serves(uint64_t within_us) {
    for (const uint64_t end_us = h.now_us + within_us; h.now_us < end_us; h.Tick(20'000)) {
      AnswerAll();
      if (h.core.Ready()) return true;
    }
    return false;
  }
  WorkerId WorkerOf(uint64_t stage_id) {
    for (const auto& [id, worker] : h.workers) {
      if (worker.stages.contains(stage_id)) return id;
    }
    return {};
  }
  // By stage index.
  std::vector<WorkerId> Order() {
    std::map<uint32_t, WorkerId> order;
    for (const auto& [id, worker] : h.workers) {
      for (const auto& [stage_id, stage] : worker.stages) order[stage.activate.stage_index()] = id;
    }
    std::vector<WorkerId> ids;
    for (const auto& [index, id] : order) ids.push_back(id);
    return ids;
  }
  void CheckNobodyEvicted() {
    for (const auto& [id, worker] : h.workers) EXPECT_FALSE(worker.evicted) << worker.why;
    EXPECT_THAT(h.problems, IsEmpty());
  }

  std::set<std::pair<WorkerId, WorkerId>> dead;  // from, to
  std::set<WorkerId> unreachable;                // nothing reaches them
  Harness h;
  std::vector<WorkerId> workers;

 private:
  void AnswerAll() {
    for (const WorkerId id : workers) {
      std::vector<uint64_t> ids;
      for (const auto& [stage_id, stage] : h.workers.at(id).stages) ids.push_back(stage_id);
      for (const uint64_t stage_id : ids) {
        if (!h.workers.at(id).stages.contains(stage_id)) continue;
        FakeStage& stage = h.workers.at(id).stages.at(stage_id);
        if (stage.epoch.counter() == 0 || stage.answered == stage.epoch.counter()) continue;
        Answer(id, stage);
        h.Pump();
      }
    }
  }
  void Answer(WorkerId id, FakeStage& stage) {
    const v1::ActivateStage& activate = stage.activate;
    const uint64_t to =
        activate.next_stage_id() != 0 ? activate.next_stage_id() : activate.first_stage_id();
    const WorkerId receiver = WorkerOf(to);
    if (to == 0 || (!dead.contains({id, receiver}) && !unreachable.contains(receiver))) {
      return h.AnswerActivation(id, stage);
    }
    stage.answered = stage.epoch.counter();
    v1::StageState state;
    state.set_stage_id(stage.load.stage_id());
    state.set_state(v1::StageState::FAILED);
    *state.mutable_epoch() = stage.activate.epoch();
    state.set_error_code(static_cast<uint32_t>(absl::StatusCode::kUnavailable));
    state.set_error_message("connection refused");
    state.mutable_failed_link()->set_from_stage_id(stage.load.stage_id());
    state.mutable_failed_link()->set_to_stage_id(to);
    h.Answer(id, state);
  }
};

std::string StatusOf(Links& links, WorkerId id) {
  const std::string status = links.h.core.StatusJson(links.h.now_us);
  const size_t begin =
      status.find("\"name\":\"w" + std::to_string(id.value) + "\",\"data_address\"");
  return status.substr(begin, status.find("\"standing\"", begin) + 30 - begin);
}

// The bug: a worker whose data address nobody answers at had every healthy neighbour evicted, for minutes, while a spare
// stood by.
TEST(FaultsTest, AWorkerThatNothingReachesGivesItsPlaceToTheSpare) {
  for (const uint32_t bad : {0u, 1u, 2u}) {
    SCOPED_TRACE(bad);
    Links links(3, 0);
    for (uint32_t i = 0; i < 4; ++i) {
      links.workers.push_back(links.h.Attach(kMemory));
      if (i == bad) links.unreachable.insert(links.workers.back());
    }
    ASSERT_TRUE(links.Serves(15'000'000)) << links.h.core.StatusJson(links.h.now_us);
    EXPECT_THAT(links.Order(), Not(testing::Contains(links.workers[bad])));
    links.CheckNobodyEvicted();
    links.h.Submit(OneSequence(10, 5));
    links.h.Run();
    EXPECT_EQ(links.h.tokens.begin()->second.size(), 5u);
    EXPECT_THAT(StatusOf(links, links.workers[bad]), HasSubstr("\"suspect\""));
    for (const WorkerId id : links.workers) {
      if (id == links.workers[bad]) continue;
      EXPECT_THAT(StatusOf(links, id), HasSubstr("\"standing\":\"good\""));
    }
  }
}

TEST(FaultsTest, WithoutAnotherChoiceTheyAreTriedAgainAndNobodyIsEvicted) {
  Links links(2, 2);
  links.unreachable.insert(links.workers[1]);
  EXPECT_FALSE(links.Serves(200'000'000));
  links.CheckNobodyEvicted();
  // A spare comes.
  links.workers.push_back(links.h.Attach(kMemory));
  EXPECT_TRUE(links.Serves(15'000'000));
  EXPECT_THAT(links.Order(), testing::UnorderedElementsAre(links.workers[0], links.workers[2]));
  links.CheckNobodyEvicted();
}

TEST(FaultsTest, APathThatPassesNothingIsAvoidedByAnotherOrder) {
  Links links(4, 4);
  links.dead.insert({links.workers[1], links.workers[2]});
  ASSERT_TRUE(links.Serves(15'000'000));
  const std::vector<WorkerId> order = links.Order();
  ASSERT_EQ(order.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_FALSE(order[i] == links.workers[1] && order[(i + 1) % 4] == links.workers[2]);
  }
  links.CheckNobodyEvicted();
}

// Its links fail with every partner that it gets: after the second it is the one at fault.
TEST(FaultsTest, AWorkerThatReachesNobodyIsSetAside) {
  Links links(2, 0, 1);
  for (int i = 0; i < 4; ++i) links.workers.push_back(links.h.Attach(kMemory));
  const WorkerId bad = links.workers[0];
  for (int i = 1; i < 4; ++i) links.dead.insert({bad, links.workers[i]});
  ASSERT_TRUE(links.Serves(15'000'000));
  EXPECT_THAT(links.Order(), Not(testing::Contains(bad)));
  EXPECT_THAT(StatusOf(links, bad), HasSubstr("\"set_aside\""));
  links.CheckNobodyEvicted();
  // It is needed again: a place that nobody else can take is its.
  std::vector<WorkerId> others = links.Order();
  for (int i = 1; i < 4; ++i) {
    if (links.workers[i] != others[0]) links.h.Lose(links.workers[i]);
  }
  std::erase_if(links.workers, [&](WorkerId id) { return id != bad && id != others[0]; });
  links.dead.clear();
  EXPECT_TRUE(links.Serves(15'000'000));
  EXPECT_THAT(links.Order(), testing::Contains(bad));
}

TEST(FaultsTest, TheStatusNamesBothEndsOfAFailedLink) {
  Links links(2, 2);
  links.unreachable.insert(links.workers[1]);
  EXPECT_FALSE(links.Serves(1'000'000));
  const std::string status = links.h.core.StatusJson(links.h.now_us);
  EXPECT_THAT(status, HasSubstr("link from worker w1 to worker w2: connection refused"));
  EXPECT_THAT(status, HasSubstr("\"failed_links\":[{\"from\":\"w1\",\"to\":\"w2\""));
}

// A stage that fails by itself has no pair to blame.
TEST(FaultsTest, ALinkOfStagesThatAreNoNeighboursBlamesNobody) {
  Links links(2, 2);
  ASSERT_TRUE(links.Serves(1'000'000));
  v1::StageReport report;
  FakeStage& stage = links.h.StageOf(links.workers[0]);
  report.set_stage_id(stage.load.stage_id());
  *report.mutable_epoch() = stage.epoch;
  report.set_error_code(static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  report.mutable_failed_link()->set_from_stage_id(77);
  report.mutable_failed_link()->set_to_stage_id(stage.load.stage_id());
  links.h.Send(links.workers[0], report);
  EXPECT_THAT(links.h.core.StatusJson(links.h.now_us), Not(HasSubstr("failed_links")));
}

}  // namespace
}  // namespace strait
