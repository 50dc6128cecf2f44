// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage's cache is resized while it serves: plans from before find their blocks, plans from after
// are held to the new size, and a smaller cache is told when its memory is free, not before.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/worker/core/many_stages.h"

namespace strait {
namespace {

constexpr LayerRange kAll{0, 6};

// A stage with all layers and 100 blocks, in epoch 1.1.
struct OneStage : ManyStages {
  explicit OneStage(int64_t memory_blocks = 1000) : ManyStages(memory_blocks) {
    Load(1, kAll, 100);
    FinishLoads();
    ActivateAll({1}, 1);
    EXPECT_EQ(Told(), "LOADED, ACTIVE");
  }
  // Of sequence 7.
  void RunRows(uint64_t step, uint32_t first, uint32_t rows) {
    Send(WithRows(Plan(1, step), 7, first, rows));
    RunAll();
    EXPECT_EQ(Told(), "report 0");
  }
};

TEST(ResizeCacheTest, MoreIsThereAtOnce) {
  OneStage w;
  w.RunRows(1, 0, 640);  // 60 blocks
  w.Send(WithRows(w.Plan(1, 2), 7, 640, 1));
  ASSERT_TRUE(w.Begin());
  w.ResizeBlocks(1, 240);
  EXPECT_EQ(w.Told(), "resized 240");
  EXPECT_EQ(w.taken, 240);
  EXPECT_EQ(w.models.at(1)->spec().pool_blocks, 240u);
  EXPECT_EQ(w.core.FindStage(1)->capacity_blocks(), 240u);
  w.Send(WithRows(w.Plan(1, 3), 8, 0, 1920));  // 180 blocks and 66
  w.ExpectError("report 8", {"246", "240"});
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.ActivateAll({1}, 2);
  w.Send(WithKept(w.Plan(1, 1), 7, 641, 1));
  w.Send(WithRows(w.Plan(1, 2), 8, 0, 1856));  // 174
  w.RunAll();
  EXPECT_EQ(w.Told(), "ACTIVE, report 0, report 0");
  EXPECT_EQ(w.core.BlocksHeld(), 240u);
  w.ExpectSound();
}

TEST(ResizeCacheTest, LessIsToldAtOnceWhereNothingIsInTheWay) {
  OneStage w;
  w.RunRows(1, 0, 65);
  w.ResizeBlocks(1, 12);
  EXPECT_EQ(w.Told(), "resized 12");
  EXPECT_EQ(w.taken, 12);
  v1::Hello hello;
  w.core.FillHello(&hello);
  EXPECT_EQ(hello.held_stages(0).cache_bytes(), 12 * kFakeBlockBytes);
  w.Send(WithRows(w.Plan(1, 2), 7, 65, 64));
  w.ExpectError("report 8", {"18", "12"});
}

// Rows that lie behind the new end are found where they were moved to.
TEST(ResizeCacheTest, RowsMoveWithTheirBlocks) {
  OneStage w;
  w.Send(WithRows(w.Plan(1, 1), 5, 0, 500));
  w.Send(WithRows(w.Plan(1, 2), 7, 0, 130));
  w.Send(WithClose(w.Plan(1, 3), 5));
  w.RunAll();
  w.Told();
  w.ResizeBlocks(1, 20);
  EXPECT_EQ(w.Told(), "resized 20");
  v1::StepPlan plan = WithRows(w.Plan(1, 4), 7, 130, 10);
  WantScore(plan.mutable_sequences(0), 9, 5);
  w.Send(plan);
  w.RunAll();
  ASSERT_EQ(w.ports.messages.back().report().results_size(), 1);
  std::vector<TokenId> tokens;
  for (uint32_t p = 0; p < 140; ++p) tokens.push_back(p % 50);
  EXPECT_EQ(w.ports.messages.back().report().results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash(kAll, tokens) % 4096));
  w.ExpectSound();
}

TEST(ResizeCacheTest, LessIsToldWhenThePlansThatCloseHaveRun) {
  OneStage w;
  w.RunRows(1, 0, 640);  // 60 blocks
  w.Send(WithRows(w.Plan(1, 2), 8, 0, 64));
  w.Send(WithClose(w.Plan(1, 3), 7));
  // It holds 60 and will hold 6.
  w.ResizeBlocks(1, 5);
  w.ExpectError("resized 0 9", {"stage 1", "6", "5"});
  EXPECT_EQ(w.taken, 100);
  w.ResizeBlocks(1, 12);
  EXPECT_EQ(w.Told(), "");
  w.ExpectSound();
  // The new size holds for plans that come now.
  w.Send(WithRows(w.Plan(1, 4), 8, 64, 65));
  w.ExpectError("report 8", {"18", "12"});
  w.Send(WithRows(w.Plan(1, 4), 8, 64, 64));
  ASSERT_TRUE(w.Begin());
  ASSERT_TRUE(w.Finish());
  EXPECT_EQ(w.Told(), "report 0");
  ASSERT_TRUE(w.Begin());
  EXPECT_EQ(w.core.BlocksHeld(), 6u);
  EXPECT_FALSE(w.core.NextReady().has_value());  // it closed: now the cache can become smaller
  EXPECT_EQ(w.taken, 100);
  ASSERT_TRUE(w.Finish());
  EXPECT_EQ(w.Told(), "report 0, resized 12");
  EXPECT_EQ(w.taken, 12);
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.ExpectSound();
}

// What the stage held was little when it was resized, so the pool became small at once; then a plan from before
// took more, which the next one was to close, and the worker ended.
TEST(ResizeCacheTest, PlansFromBeforeMayHoldMoreInBetween) {
  OneStage w;
  w.RunRows(1, 0, 64);
  w.Send(WithRows(w.Plan(1, 2), 8, 0, 960));  // 90 blocks and 6
  w.Send(WithClose(w.Plan(1, 3), 8));
  w.ResizeBlocks(1, 10);
  EXPECT_EQ(w.Told(), "");
  EXPECT_EQ(w.taken, 100);
  // Nor is that room another stage's.
  w.Load(2, kAll, 50);
  w.FinishLoads();
  w.ActivateAll({2}, 1);
  EXPECT_EQ(w.Told(), "LOADED, ACTIVE");
  EXPECT_EQ(w.taken, 150);
  w.Send(WithRows(w.Plan(2, 1), 9, 0, 512));
  while (w.Begin()) {
  }
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0, report 0, resized 10");
  EXPECT_EQ(w.taken, 60);
  EXPECT_EQ(w.core.BlocksHeld(), 54u);
  w.ExpectSound();
}

TEST(ResizeCacheTest, NoStepBeginsWhileTheCacheWaitsToBecomeSmaller) {
  OneStage w;
  w.Load(2, kAll, 100);
  w.FinishLoads();
  w.ActivateAll({2}, 1);
  w.Told();
  w.Send(WithRows(w.Plan(2, 1), 8, 0, 640));
  w.Send(WithRows(w.Plan(1, 1), 7, 0, 64));
  w.Send(WithRows(w.Plan(1, 2), 7, 64, 64));
  ASSERT_TRUE(w.Begin());
  w.ResizeBlocks(1, 20);
  EXPECT_EQ(w.Told(), "");
  EXPECT_FALSE(w.core.NextReady().has_value());
  EXPECT_EQ(w.taken, 200);
  EXPECT_EQ(w.models.at(1)->spec().pool_blocks, 100u);  // its tables may be in use
  ASSERT_TRUE(w.Finish());
  EXPECT_EQ(w.Told(), "report 0, resized 20");
  EXPECT_EQ(w.models.at(1)->spec().pool_blocks, 20u);
  EXPECT_EQ(w.taken, 120);
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, report 0");
  w.ExpectSound();
}

// An activation dropped the step that was waited for, and no step began ever after.
TEST(ResizeCacheTest, AStepThatIsDroppedIsWaitedForNoMore) {
  OneStage w;
  w.RunRows(1, 0, 64);
  w.Send(WithRows(w.Plan(1, 2), 7, 64, 1));
  ASSERT_TRUE(w.Begin());
  w.ResizeBlocks(1, 20);
  EXPECT_EQ(w.Told(), "");
  w.ActivateAll({1}, 2);
  EXPECT_EQ(w.Told(), "ACTIVE, resized 20");
  EXPECT_EQ(w.taken, 20);
  w.Send(WithKept(w.Plan(1, 1), 7, 64, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0");
  w.ExpectSound();
}

TEST(ResizeCacheTest, ASuccessorDropsStepsThatAreWaitedFor) {
  OneStage w;
  w.RunRows(1, 0, 64);
  w.Load(2, kAll, 100, {1});
  w.Load(9, kAll, 50);
  w.FinishLoads();
  w.Send(WithRows(w.Plan(1, 2), 7, 64, 1));
  ASSERT_TRUE(w.Begin());
  w.Told();
  w.ResizeBlocks(9, 20);
  w.Unload(9);
  EXPECT_EQ(w.Told(), "");
  w.ActivateAll({2}, 2);
  EXPECT_EQ(w.Told(), "ACTIVE, UNLOADED");
  EXPECT_EQ(w.taken, 100);
  w.ExpectSound();
}

// The plans that were to close never ran: the epoch's first plan must.
TEST(ResizeCacheTest, AnEpochThatEndsLeavesItToTheNextOne) {
  OneStage w;
  w.RunRows(1, 0, 640);
  w.RunAll();
  w.Send(WithClose(w.Plan(1, 2), 7));
  w.ResizeBlocks(1, 30);
  w.ActivateAll({1}, 2);
  EXPECT_EQ(w.Told(), "ACTIVE");
  w.Send(WithKept(w.Plan(1, 1), 7, 640, 1));
  w.ExpectError("report 8", {"60", "30"});
  w.ActivateAll({1}, 3);
  EXPECT_EQ(w.Told(), "ACTIVE");
  w.Send(WithKept(w.Plan(1, 1), 7, 320, 1));
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, resized 30");
  EXPECT_EQ(w.taken, 30);
  w.ExpectSound();
}

TEST(ResizeCacheTest, WhatIsAskedWronglyIsRefused) {
  OneStage w(150);
  w.ResizeBlocks(2, 10);
  w.ExpectError("resized 0 5", {"stage 2"});
  w.Load(2, kAll, 10);
  w.ResizeBlocks(2, 20);
  w.ExpectError("resized 0 5", {"stage 2"});  // it loads
  w.FinishLoads();
  w.Told();
  w.Resize(1, 0);
  w.ExpectError("resized 0 3", {"0 bytes"});
  w.Resize(1, 10 * kFakeBlockBytes + 1);
  w.ExpectError("resized 0 3", {"10001 bytes"});
  w.Resize(1, ~uint64_t{0} / kFakeBlockBytes * kFakeBlockBytes);
  w.ExpectError("resized 0 3", {"bytes"});
  w.ResizeBlocks(1, 141);
  w.ExpectError("resized 0 8", {"no memory"});
  EXPECT_EQ(w.core.FindStage(1)->capacity_blocks(), 100u);
  EXPECT_EQ(w.taken, 110);
  w.RunRows(1, 0, 1024);  // 96 blocks
  w.ResizeBlocks(1, 95);
  w.ExpectError("resized 0 9", {"stage 1", "96", "95"});
  EXPECT_EQ(w.taken, 110);
  w.ResizeBlocks(1, 140);
  EXPECT_EQ(w.Told(), "resized 140");
}

TEST(ResizeCacheTest, OneAtATime) {
  OneStage w;
  w.RunRows(1, 0, 640);
  w.Send(WithClose(w.Plan(1, 2), 7));
  w.ResizeBlocks(1, 30);
  EXPECT_EQ(w.Told(), "");
  w.ResizeBlocks(1, 200);
  w.ExpectError("resized 0 9", {"stage 1"});
  // Another stage's need not wait for it.
  w.Load(2, kAll, 20);
  w.FinishLoads();
  w.ResizeBlocks(2, 50);
  w.ResizeBlocks(2, 10);
  EXPECT_EQ(w.Told(), "LOADED, resized 50, resized 10");
  EXPECT_EQ(w.taken, 110);
  w.Unload(2);
  EXPECT_EQ(w.Told(), "UNLOADED");
  EXPECT_EQ(w.taken, 100);
  // Nobody follows it meanwhile.
  w.Load(3, kAll, 30, {1});
  w.ExpectError("FAILED 3", {"stage 1", "stage 3"});
  w.RunAll();
  EXPECT_EQ(w.Told(), "report 0, resized 30");
  w.Load(3, kAll, 30, {1});
  w.FinishLoads();
  w.ResizeBlocks(1, 40);
  EXPECT_EQ(w.Told(), "LOADED, resized 0 9");
  EXPECT_EQ(w.taken, 30);
  w.ExpectSound();
}

// The model had no memory for larger tables, and the cache stayed as large as it was to be.
TEST(ResizeCacheTest, WhatTheModelRefusesTakesNoMemory) {
  OneStage w;
  w.models.at(1)->capacity_status = absl::ResourceExhaustedError("no room for tables");
  w.ResizeBlocks(1, 200);
  w.ExpectError("resized 0 8", {"no room for tables"});
  EXPECT_EQ(w.taken, 100);
  EXPECT_EQ(w.core.FindStage(1)->capacity_blocks(), 100u);
  w.models.at(1)->capacity_status = absl::OkStatus();
  w.RunRows(1, 0, 1024);
  w.ExpectSound();
}

// UNLOADED means that the memory is there for others.
TEST(ResizeCacheTest, AnUnloadedStageIsToldWhenItsMemoryIsFree) {
  OneStage w;
  w.Load(2, kAll, 50);
  w.FinishLoads();
  w.Told();
  w.Send(WithRows(w.Plan(1, 1), 7, 0, 64));
  ASSERT_TRUE(w.Begin());
  w.Unload(2);
  EXPECT_EQ(w.Told(), "");
  w.Load(2, kAll, 50);  // in its place, of the room that it left
  EXPECT_EQ(w.taken, 150);
  w.FinishLoads();
  w.Unload(2);
  w.RunAll();
  EXPECT_EQ(w.Told(), "LOADED, report 0, UNLOADED, UNLOADED");
  EXPECT_EQ(w.taken, 100);
  w.ExpectSound();
}

}  // namespace
}  // namespace strait
