// SPDX-License-Identifier: Apache-2.0
//
// Where the stages of a scaled pipeline lie, what they take while the old ones are there and in the end, what
// is refused; and which rows a successor may have.
#include "coordinator/core/scale.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// A pipeline on hosts 1, 2, …: each has the slots that it says.
std::vector<StageSlot> Slots(std::vector<std::pair<LayerRange, uint64_t>> stages) {
  std::vector<StageSlot> slots;
  for (const auto& [layers, rows] : stages) {
    StageSlot slot;
    slot.layers = layers;
    slot.cache_bytes = rows / 64 * layers.size() * 128;
    slot.stage_id = slots.size() + 1;
    slots.push_back(slot);
  }
  return slots;
}

std::vector<LayerRange> Layers(const ScalePlan& plan) {
  std::vector<LayerRange> layers;
  for (const ScaledStage& stage : plan.stages) layers.push_back(stage.plan.layers);
  return layers;
}

std::vector<uint64_t> Workers(const ScalePlan& plan) {
  std::vector<uint64_t> workers;
  for (const ScaledStage& stage : plan.stages) workers.push_back(stage.worker.value);
  return workers;
}

// SmallModel: 5,000 of weights, 50 of workspace a stage, 512 a block of all four layers.
TEST(ScaleTest, OneWorkerMadeTwoStagesOfGetsThemFromOneMemory) {
  const uint64_t memory = 5000 + 50 + 512 * 10;
  const std::vector<StageSlot> old = Slots({{{0, 4}, 640}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, memory, {0}}};
  const auto plan = PlanScale({}, SmallModel(), old, hosts, 2, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(Layers(*plan), ElementsAre(LayerRange{0, 2}, LayerRange{2, 4}));
  EXPECT_THAT(Workers(*plan), ElementsAre(1, 1));
  EXPECT_EQ(plan->num_hosts, 1u);
  // In the end two workspaces: 50 more, and so a block less.
  EXPECT_EQ(plan->capacity_rows, 9 * 64u);
  EXPECT_EQ(plan->stages[0].plan.cache_bytes, 9 * 256u);
  // Meanwhile three: 100 more.
  EXPECT_THAT(plan->old_cache_bytes, ElementsAre(9 * 512));
  EXPECT_EQ(plan->stages[1].first_cache_bytes, 9 * 256u);
  EXPECT_THAT(plan->stages[0].successor_of, ElementsAre(1));
  EXPECT_THAT(plan->stages[1].successor_of, ElementsAre(1));
}

TEST(ScaleTest, WhoHasTheLeastMemoryIsLeftOutAndSparesAreTakenWhereThereAreTooFew) {
  const std::vector<StageSlot> old = Slots({{{0, 1}, 640}, {{1, 3}, 640}, {{3, 4}, 640}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, 20'000, {0}},
                                        {WorkerId{2}, 9'000, {1}},
                                        {WorkerId{3}, 20'000, {2}},
                                        {WorkerId{4}, 30'000, {}}};
  const auto two = PlanScale({}, SmallModel(), old, hosts, 2, {});
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_THAT(Workers(*two), ElementsAre(1, 3));
  const auto four = PlanScale({}, SmallModel(), old, hosts, 4, {});
  ASSERT_TRUE(four.ok()) << four.status();
  // The spare comes where the fewest layers change their worker: the second of two layers goes to it.
  EXPECT_THAT(Workers(*four), ElementsAre(1, 2, 4, 3));
  EXPECT_THAT(four->stages[2].successor_of, ElementsAre());
  EXPECT_TRUE(four->stages[2].lands);
  EXPECT_THAT(four->landings, ElementsAre());
  EXPECT_EQ(four->stages[2].first_cache_bytes, four->stages[2].plan.cache_bytes);
}

TEST(ScaleTest, ASpareThatIsTooSmallIsLeftOut) {
  const std::vector<StageSlot> old = Slots({{{0, 4}, 640}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, 20'000, {0}}, {WorkerId{2}, 1'000, {}}};
  const auto plan = PlanScale({}, SmallModel(), old, hosts, 2, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(Workers(*plan), ElementsAre(1, 1));
}

TEST(ScaleTest, StagesGoToHostsEvenlyByMemory) {
  EXPECT_THAT(StagesOfHosts({100}, 3), ElementsAre(3));
  EXPECT_THAT(StagesOfHosts({100, 100}, 3), ElementsAre(2, 1));
  EXPECT_THAT(StagesOfHosts({100, 300}, 4), ElementsAre(1, 3));
  EXPECT_THAT(StagesOfHosts({1, 1'000'000}, 2), ElementsAre(1, 1));
}

TEST(ScaleTest, TooLittleForWhatRunsOrWasAdmittedIsRefusedWithTheNumbers) {
  const uint64_t memory = 5000 + 50 + 512 * 10;
  const std::vector<StageSlot> old = Slots({{{0, 4}, 640}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, memory, {0}}};
  const auto promised = PlanScale({}, SmallModel(), old, hosts, 2, {.promised_rows = 577});
  EXPECT_EQ(promised.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(promised.status().message()), HasSubstr("576 cache rows"));
  EXPECT_TRUE(PlanScale({}, SmallModel(), old, hosts, 2, {576, 576}).ok());
  // Four workspaces together with the old one, so two blocks less meanwhile; in the end as many go.
  const std::vector<ScaleHost> tight = {{WorkerId{1}, 5000 + 50 + 512 * 10 - 400, {0}}};
  const auto meanwhile = PlanScale({}, SmallModel(), Slots({{{0, 4}, 576}}), tight, 3,
                                   {.resident_rows = 576, .promised_rows = 0});
  EXPECT_EQ(meanwhile.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(meanwhile.status().message()), HasSubstr("a sequence that runs"));
}

TEST(ScaleTest, MoreLayersOnAWorkerBeginWithTheCacheOfFewer) {
  // Two workers with two layers each; one takes all four. Rows of the two others come to a landing, for as many rows as
  // the old stages hold; the new stage has both caches until these are gone.
  const std::vector<StageSlot> old = Slots({{{0, 2}, 1280}, {{2, 4}, 1280}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, 20'000, {0}}, {WorkerId{2}, 15'000, {1}}};
  const auto plan = PlanScale({}, SmallModel(), old, hosts, 1, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(Workers(*plan), ElementsAre(1));
  EXPECT_THAT(plan->old_cache_bytes, ElementsAre(20 * 256, 20 * 256));
  ASSERT_EQ(plan->landings.size(), 1u);
  EXPECT_EQ(plan->landings[0].layers, (LayerRange{2, 4}));
  EXPECT_EQ(plan->landings[0].cache_bytes, 20 * 256u);
  EXPECT_EQ(plan->stages[0].first_cache_bytes, 20 * 512u);
  EXPECT_EQ(plan->stages[0].plan.cache_bytes, (20'000u - 5050) / 512 * 512);
}

TEST(ScaleTest, WithoutRoomForALandingRowsAreReplayed) {
  // 20 blocks of two layers beside 5,150 of weights and workspaces: no two layers more have room for what is held.
  const std::vector<StageSlot> old = Slots({{{0, 2}, 1280}, {{2, 4}, 1280}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, 5150 + 20 * 256, {0}},
                                        {WorkerId{2}, 9'000, {1}}};
  const auto some = PlanScale({}, SmallModel(), old, hosts, 1, {.reserved_rows = 9 * 64});
  ASSERT_TRUE(some.ok()) << some.status();
  ASSERT_EQ(some->landings.size(), 1u);
  EXPECT_THAT(some->old_cache_bytes, ElementsAre(10 * 256, 20 * 256));
  const auto none = PlanScale({}, SmallModel(), old, hosts, 1, {.reserved_rows = 11 * 64});
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_THAT(none->landings, ElementsAre());
  EXPECT_THAT(none->old_cache_bytes, ElementsAre(20 * 256, 20 * 256));
}

TEST(ScaleTest, OfGoodPlansTheOneThatMovesTheFewestBytes) {
  // Two stages of two layers become four of one: the first and the last layer, with embedding and head, stay.
  const std::vector<StageSlot> old = Slots({{{0, 2}, 640}, {{2, 4}, 640}});
  const std::vector<ScaleHost> hosts = {{WorkerId{1}, 20'000, {0}},
                                        {WorkerId{2}, 20'000, {1}},
                                        {WorkerId{3}, 20'000, {}},
                                        {WorkerId{4}, 20'000, {}}};
  const auto plan = PlanScale({}, SmallModel(), old, hosts, 4, {.reserved_rows = 64});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(Workers(*plan), ElementsAre(1, 3, 4, 2));
  EXPECT_EQ(plan->moved_bytes, 2 * 1000u + 2 * 128) << "two layers, a block of each";
}

TEST(ScaleTest, ASuccessorMayHaveWhatAllOfItsLayersHave) {
  std::vector<StageSlot> old = Slots({{{0, 2}, 640}, {{2, 4}, 640}});
  old[0].may_hold = {{SequenceId{1}, {100, 90}}, {SequenceId{2}, {50, 50}}};
  old[1].may_hold = {{SequenceId{1}, {80, 95}}, {SequenceId{3}, {7, 7}}};
  const auto rows = [](const Holdings& holdings) {
    std::vector<std::tuple<uint64_t, uint32_t, uint32_t>> all;
    for (const auto& [id, may] : holdings) all.emplace_back(id.value, may.planned, may.confirmed);
    return all;
  };
  using Row = std::tuple<uint64_t, uint32_t, uint32_t>;
  EXPECT_THAT(rows(HoldingsOfSuccessor({0, 4}, {&old[0], &old[1]})),
              ElementsAre(Row{1, 80, 90}, Row{2, 0, 0}, Row{3, 0, 0}));
  EXPECT_THAT(rows(HoldingsOfSuccessor({0, 1}, {&old[0], &old[1]})),
              ElementsAre(Row{1, 100, 90}, Row{2, 50, 50}, Row{3, 0, 0}));
  // Layer 2 was on another worker.
  EXPECT_THAT(rows(HoldingsOfSuccessor({1, 3}, {&old[0]})),
              ElementsAre(Row{1, 0, 0}, Row{2, 0, 0}));
  EXPECT_THAT(rows(HoldingsOfSuccessor({0, 4}, {})), ElementsAre());
}

}  // namespace
}  // namespace strait
