// SPDX-License-Identifier: Apache-2.0
//
// Defends: stages of a worker take the place of others while those serve: nothing stops before the new epoch,
// rows stay, and whatever the coordinator asks too early or wrongly is refused by name.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "tests/worker/core/many_stages.h"

namespace strait {
namespace {

using Held = std::map<uint64_t, uint32_t>;
constexpr LayerRange kAll{0, 6};

// A stage with all layers and 100 blocks, in epoch 1.1, that has 65 rows of sequence 7.
struct OneStage : ManyStages {
  explicit OneStage(int64_t memory_blocks = 1000) : ManyStages(memory_blocks) {
    Load(1, kAll, 100);
    FinishLoads();
    ActivateAll({1}, 1);
    Send(WithRows(Plan(1, 1), 7, 0, 65));
    RunAll();
    EXPECT_EQ(Told(), "LOADED, ACTIVE, report 0");
  }
};

TEST(SuccessionTest, OneStageBecomesTwoWhileItSteps) {
  OneStage w;
  w.Load(2, {0, 2}, 30, {1});
  w.Send(WithRows(w.Plan(1, 2), 7, 65, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.FinishLoads();
  w.Load(3, {2, 6}, 70, {1});
  w.FinishLoads();
  EXPECT_EQ(w.Told(), "LOADED, LOADED");
  EXPECT_EQ(w.taken, 100);
  w.Send(WithRows(w.Plan(1, 3), 8, 0, 10));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  // One step is begun, one waits: they are dropped.
  w.Send(WithRows(w.Plan(1, 4), 7, 66, 100));
  w.Send(WithRows(w.Plan(1, 5), 9, 0, 10));
  ASSERT_TRUE(w.Begin());
  w.Activate({2, 3}, 0, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 66}, {8, 10}}));
  w.ExpectSound();
  w.Activate({2, 3}, 1, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 66}, {8, 10}}));
  EXPECT_EQ(w.Told(), "ACTIVE, ACTIVE");
  w.ExpectSound();
  EXPECT_EQ(w.core.FindStage(1)->blocks_used(), 0u);
  EXPECT_FALSE(w.core.NextReady().has_value());

  // Too early.
  w.Send(w.Plan(3, 1));
  w.ExpectError("report 9", {"stage 3", "stage 1"});
  w.Unload(1);
  EXPECT_EQ(w.Told(), "UNLOADED");
  w.ActivateAll({2, 3}, 3);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 66}, {8, 10}}));
  EXPECT_EQ(w.Told(), "ACTIVE, ACTIVE");
  w.SendAll({2, 3}, WithClose(WithKept(w.Plan(2, 1), 7, 66, 2), 8));
  w.SendAll({2, 3}, WithRows(w.Plan(2, 2), 7, 66, 100));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0, report 0, report 0");
  EXPECT_EQ(w.core.BlocksHeld(), BlocksOfSequence(166, 6));
  EXPECT_EQ(w.taken, 100);
  w.ExpectSound();
}

TEST(SuccessionTest, TwoStagesBecomeOneAndAreCutAnew) {
  ManyStages w;
  w.Load(1, {0, 2}, 40);
  w.Load(2, {2, 6}, 60);
  w.FinishLoads();
  w.ActivateAll({1, 2}, 1);
  w.SendAll({1, 2}, WithRows(w.Plan(1, 1), 7, 0, 130));
  w.RunAll();
  w.Load(3, {0, 4}, 70, {1, 2});
  w.Load(4, {4, 6}, 30, {2});
  w.FinishLoads();
  w.Told();
  // The other way round is as good.
  w.Activate({3, 4}, 1, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 130}}));
  w.Activate({3, 4}, 0, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 130}}));
  w.ExpectSound();
  w.Told();
  // Stage 4 follows stage 2 alone; but stage 3 holds what stage 1 may.
  w.Unload(2);
  EXPECT_EQ(w.Told(), "UNLOADED");
  w.Send(w.Plan(4, 1));
  w.ExpectError("report 9", {"stage 4", "stage 1"});
  w.Unload(1);
  w.ActivateAll({3, 4}, 3);
  EXPECT_EQ(w.Told(), "UNLOADED, ACTIVE, ACTIVE");
  w.SendAll({3, 4}, WithKept(w.Plan(3, 1), 7, 130, 2));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0");
  w.Load(5, kAll, 100, {4, 3});
  w.FinishLoads();
  w.ActivateAll({5}, 4);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 130}}));
  w.Unload(4);
  w.Unload(3);
  EXPECT_EQ(w.Told(), "LOADED, ACTIVE, UNLOADED, UNLOADED");
  w.Send(WithKept(w.Plan(5, 1), 7, 130, 1));
  w.Send(WithRows(w.Plan(5, 2), 7, 130, 5));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0");
  EXPECT_EQ(w.taken, 100);
  w.ExpectSound();
}

TEST(SuccessionTest, WhatIsAskedWronglyIsRefusedByName) {
  OneStage w;
  w.Load(2, kAll, 10, {8});
  w.ExpectError("FAILED 3", {"stage 8", "stage 2"});
  w.Load(2, kAll, 10, {2});
  w.ExpectError("FAILED 3", {"stage 2"});
  w.Load(2, kAll, 10, {1, 1});
  w.ExpectError("FAILED 3", {"stage 1", "stage 2"});
  w.Load(2, kAll, 101, {1});
  w.ExpectError("FAILED 3", {"stage 2", "101", "100"});
  w.Load(3, {0, 3}, 60);
  w.Load(4, {3, 6}, 60, {3});
  w.ExpectError("FAILED 3", {"stage 3", "stage 4"});  // it still loads
  w.FinishLoads();
  w.Told();
  w.Load(4, kAll, 10, {1, 3});
  w.ExpectError("FAILED 3", {"stage 4", "stage 3", "layer"});
  w.Load(5, {0, 3}, 60, {1});
  w.ExpectError("", {});
  w.Load(6, {2, 6}, 40, {1});
  w.ExpectError("FAILED 3", {"stages 5 and 6", "stage 1"});
  w.Load(6, {3, 6}, 41, {1});
  w.ExpectError("FAILED 3", {"stage 6", "101", "100"});
  w.Load(6, {3, 6}, 40, {1});
  w.FinishLoads();
  EXPECT_EQ(w.Told(), "LOADED, LOADED");
  w.Load(7, {0, 3}, 10, {5});
  w.ExpectError("FAILED 3", {"stage 7", "stage 5"});
  w.ResizeBlocks(1, 50);
  w.ExpectError("resized 0 9", {"stage 1"});
  w.ResizeBlocks(5, 50);
  w.ExpectError("resized 0 9", {"stage 5"});
  // Of all this nothing came: the stage that is followed steps on.
  w.Send(WithRows(w.Plan(1, 2), 7, 65, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  EXPECT_EQ(w.taken, 160);
}

// An activation that is refused changed its stage all the same: the predecessor's steps ended, and its rows
// were in a stage of no epoch.
TEST(SuccessionTest, AnActivationThatIsRefusedTakesNothingOver) {
  OneStage w;
  w.Load(2, {0, 2}, 30, {1});
  w.FinishLoads();
  w.Told();
  w.Send(WithRows(w.Plan(1, 2), 7, 65, 1));
  ASSERT_TRUE(w.Begin());
  w.Activate({9, 2}, 1, 2);  // it has the first layers, so it is no last stage
  w.ExpectError("FAILED 3", {"stage 2"});
  EXPECT_EQ(w.core.FindStage(1)->num_begun(), 1u);
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.Activate({2, 9}, 0, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 66}}));
  w.ExpectSound();
}

// A second stage was to take layers that a first one had taken and gone with, and ended the worker.
TEST(SuccessionTest, LayersAreTakenOverOnce) {
  OneStage w;
  w.Load(2, {0, 2}, 30, {1});
  w.FinishLoads();
  w.Activate({2, 9}, 0, 2);
  w.Unload(2);
  EXPECT_EQ(w.Told(), "LOADED, ACTIVE, UNLOADED");
  w.Load(3, {1, 6}, 30, {1});
  w.ExpectError("FAILED 9", {"layer 1", "stage 1", "stage 3"});
  // What nobody took is there.
  w.Load(3, {2, 6}, 30, {1});
  w.FinishLoads();
  w.Activate({9, 3}, 1, 2);
  EXPECT_EQ(w.LastHeld(), (Held{{7, 65}}));
  w.ExpectSound();
  w.ActivateAll({1}, 3);
  w.Told();
  w.Unload(1);
  w.Unload(3);
  EXPECT_EQ(w.taken, 0);
}

// Two successors whose shares are no parts of the layers that they take: the one that has the more rows takes no
// more than it may hold, so the other one finds its blocks.
TEST(SuccessionTest, EverySuccessorFindsItsShare) {
  OneStage w;
  w.Send(WithRows(w.Plan(1, 2), 8, 0, 600));  // with the 12 of sequence 7: 72 blocks
  w.RunAll();
  w.Load(2, {0, 1}, 50, {1});
  w.Load(3, {1, 6}, 50, {1});
  w.FinishLoads();
  w.ActivateAll({2, 3}, 2);
  EXPECT_EQ(w.core.FindStage(2)->blocks_used(), 12u);
  EXPECT_EQ(w.core.FindStage(3)->blocks_used(), 10u);
  w.Unload(1);
  w.Told();
  const v1::StepPlan first = WithClose(WithKept(w.Plan(2, 1), 7, 65, 2), 8);
  w.SendAll({2, 3}, WithRows(first, 9, 0, 500));
  w.Send(WithRows(w.Plan(2, 2), 9, 500, 1500));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0, report 0");
  EXPECT_EQ(w.core.FindStage(2)->blocks_used(), 34u);
  EXPECT_EQ(w.core.FindStage(3)->blocks_used(), 50u);
  w.ExpectSound();
}

TEST(SuccessionTest, AChangeThatIsGivenUpLeavesAllAsItWas) {
  OneStage w;
  w.Load(2, {0, 2}, 30, {1});
  w.Load(3, {2, 6}, 70, {1});
  w.Unload(3);
  w.FinishLoads();
  EXPECT_EQ(w.Told(), "LOADED, UNLOADED");
  w.Unload(2);
  EXPECT_EQ(w.Told(), "UNLOADED");
  w.Send(WithRows(w.Plan(1, 2), 7, 65, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.ResizeBlocks(1, 50);
  EXPECT_EQ(w.Told(), "resized 50");
  EXPECT_EQ(w.taken, 50);
  w.ExpectSound();
}

// The predecessor went first: nothing is left to take over, and its memory is its successor's.
TEST(SuccessionTest, APredecessorThatGoesFirstLeavesNothing) {
  OneStage w;
  w.Load(2, kAll, 60, {1});
  w.FinishLoads();
  w.Unload(1);
  EXPECT_EQ(w.taken, 60);
  w.ActivateAll({2}, 2);
  EXPECT_TRUE(w.LastHeld().empty());
  w.Send(WithRows(w.Plan(2, 1), 8, 0, 640));
  w.RunAll();
  EXPECT_EQ(w.Told(), "LOADED, UNLOADED, ACTIVE, report 0");
  EXPECT_EQ(w.core.BlocksHeld(), 60u);
  w.ExpectSound();
}

// A coordinator gives a stage id once; one that does not must not end the worker.
TEST(SuccessionTest, AnIdThatComesAgainIsAnotherStage) {
  OneStage w;
  w.Load(2, {0, 3}, 30, {1});
  w.FinishLoads();
  w.Unload(1);
  w.Load(1, kAll, 20);
  w.Activate({2, 9}, 0, 2);
  EXPECT_TRUE(w.LastHeld().empty());
  w.FinishLoads();
  w.Send(w.Plan(2, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "LOADED, UNLOADED, ACTIVE, LOADED, report 0");
  w.ExpectSound();
}

// The coordinator is lost in every phase of a change: what was loading goes, the rest stays, and in the end
// all memory is back.
TEST(SuccessionTest, MemoryComesBackWheneverTheCoordinatorIsLost) {
  const std::vector<void (*)(ManyStages&)> phases = {
      [](ManyStages& w) {
        w.Load(2, {0, 2}, 30, {1});
      },
      [](ManyStages& w) {
        w.Load(3, {2, 6}, 70, {1});
      },
      [](ManyStages& w) { w.Load(9, kAll, 50); },
      [](ManyStages& w) { w.FinishLoads(); },
      [](ManyStages& w) { w.ResizeBlocks(9, 20); },
      [](ManyStages& w) {
        w.Send(WithRows(w.Plan(1, 2), 7, 65, 64));
        w.Begin();
      },
      [](ManyStages& w) { w.ResizeBlocks(9, 10); },  // waits for the step
      [](ManyStages& w) { w.Unload(9); },
      [](ManyStages& w) {
        w.Activate({2, 3}, 0, 2);
      },
      [](ManyStages& w) {
        w.Activate({2, 3}, 1, 2);
      },
      [](ManyStages& w) { w.Unload(1); },
      [](ManyStages& w) {
        w.SendAll({2, 3}, WithKept(w.Plan(2, 1), 7, 65, 2));
      },
      [](ManyStages& w) { w.ResizeBlocks(3, 30); },
      [](ManyStages& w) { w.Begin(); },
      [](ManyStages& w) { w.RunAll(); },
  };
  for (size_t num_phases = 0; num_phases <= phases.size(); ++num_phases) {
    for (const bool comes_back : {false, true}) {
      SCOPED_TRACE(testing::Message() << num_phases << " phases, comes back: " << comes_back);
      OneStage w;
      for (size_t i = 0; i < num_phases; ++i) {
        phases[i](w);
        w.ExpectSound();
      }
      w.core.OnDetached(0);
      w.ExpectSound();
      v1::Hello hello;
      w.core.FillHello(&hello);
      for (const uint64_t id : w.core.stage_ids()) {
        EXPECT_NE(w.core.StateOf(id), WorkerCore::HostedState::kLoading);
      }
      EXPECT_EQ(hello.held_stages_size(), static_cast<int>(w.core.num_stages()));
      w.RunAll();
      w.ExpectSound();
      EXPECT_EQ(w.taken, w.cache.num_blocks());
      if (comes_back) {
        w.Told();
        v1::Welcome welcome;
        welcome.set_term(1);
        w.core.OnWelcome(welcome);
        const std::vector<uint64_t> ids = w.core.stage_ids();
        for (const uint64_t id : ids) {
          w.Unload(id);
          w.ExpectSound();
        }
        std::string told;
        for (size_t i = 0; i < ids.size(); ++i) told += i == 0 ? "UNLOADED" : ", UNLOADED";
        EXPECT_EQ(w.Told(), told);
      } else {
        w.core.OnTick(2'000'000);
      }
      EXPECT_EQ(w.core.num_stages(), 0u);
      EXPECT_EQ(w.taken, 0);
      w.ExpectSound();
    }
  }
}

}  // namespace
}  // namespace strait
