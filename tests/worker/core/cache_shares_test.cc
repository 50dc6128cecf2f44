// SPDX-License-Identifier: Apache-2.0
//
// Defends: the pool always has as many blocks as its stages may hold, whatever is refused changes nothing,
// and memory that no stage may hold any more goes back.
#include "worker/core/cache_shares.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/worker/number_cache.h"

namespace strait {
namespace {

using Code = absl::StatusCode;

// Shares of a worker with memory for so many blocks.
struct Worker {
  explicit Worker(int64_t memory = 1000) : left(memory) {}

  void Shrink() {
    ASSERT_TRUE(shares.ShrinkIsDue());
    shares.Shrink([](BlockId, std::vector<BlockMove>*) {});
    EXPECT_FALSE(shares.ShrinkIsDue());
  }
  // Blocks of the pool; those that are needed, if they are others.
  void Expect(uint32_t size, uint64_t needed) {
    EXPECT_EQ(shares.pool()->size(), size);
    EXPECT_EQ(shares.needed(), needed);
    EXPECT_EQ(shares.ShrinkIsDue(), needed < size);
    EXPECT_TRUE(shares.CheckIntegrity().ok()) << shares.CheckIntegrity();
  }
  void Refuses(Code code, const absl::Status& status, const std::vector<std::string>& names) {
    EXPECT_EQ(status.code(), code) << status;
    for (const std::string& name : names) {
      EXPECT_NE(status.message().find(name), std::string::npos) << status << " names no " << name;
    }
  }

  int64_t left;
  NumberCache cache{[this](int64_t blocks) {
    if (blocks > left) return absl::ResourceExhaustedError("no memory");
    left -= blocks;
    return absl::OkStatus();
  }};
  CacheShares shares{&cache};
};

TEST(CacheSharesTest, ThePoolIsTheSumOfShares) {
  Worker w;
  w.Expect(0, 0);
  ASSERT_TRUE(w.shares.Add(1, 30).ok());
  ASSERT_TRUE(w.shares.Add(2, 50).ok());
  w.Expect(80, 80);
  EXPECT_EQ(w.left, 920);
  EXPECT_EQ(w.shares.BlocksOf(1), 30u);
  w.shares.Remove(1);
  w.Expect(80, 50);
  // Room that has not gone yet serves who comes next.
  ASSERT_TRUE(w.shares.Add(3, 20).ok());
  w.Expect(80, 70);
  ASSERT_TRUE(w.shares.Add(4, 20).ok());
  w.Expect(90, 90);
  w.shares.Remove(2);
  w.Expect(90, 40);
  w.Shrink();
  w.Expect(40, 40);
  EXPECT_EQ(w.left, 960);
  w.shares.Clear();
  w.Shrink();
  w.Expect(0, 0);
  EXPECT_EQ(w.left, 1000);
}

TEST(CacheSharesTest, WhatMemoryRefusesChangesNothing) {
  Worker w(100);
  ASSERT_TRUE(w.shares.Add(1, 60).ok());
  w.Refuses(Code::kResourceExhausted, w.shares.Add(2, 50), {"no memory"});
  w.Refuses(Code::kResourceExhausted, w.shares.Change(1, 101), {"no memory"});
  w.Refuses(Code::kResourceExhausted, w.shares.Add(2, ~uint32_t{0}), {"4294967355"});
  w.Refuses(Code::kResourceExhausted, w.shares.Change(1, ~uint32_t{0}), {"no memory"});
  w.Expect(60, 60);
  EXPECT_EQ(w.left, 40);
  EXPECT_EQ(w.shares.BlocksOf(1), 60u);
  EXPECT_TRUE(w.shares.IsSettled(1));
  ASSERT_TRUE(w.shares.Add(2, 40).ok());
  w.Expect(100, 100);
}

// A share became smaller, and its room was lent to another stage at once, while plans from before still
// needed it.
TEST(CacheSharesTest, ASmallerShareCountsWhenItIsSettled) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(1, 60).ok());
  ASSERT_TRUE(w.shares.Change(1, 20).ok());
  EXPECT_EQ(w.shares.BlocksOf(1), 20u);
  EXPECT_EQ(w.shares.MostOf(1), 60u);
  EXPECT_FALSE(w.shares.IsSettled(1));
  w.Expect(60, 60);
  ASSERT_TRUE(w.shares.Add(2, 40).ok());
  w.Expect(100, 100);
  // It may have as much again, and that costs nothing.
  ASSERT_TRUE(w.shares.Change(1, 55).ok());
  w.Expect(100, 100);
  ASSERT_TRUE(w.shares.Change(1, 70).ok());
  w.Expect(110, 110);
  EXPECT_TRUE(w.shares.IsSettled(1));
  ASSERT_TRUE(w.shares.Change(1, 20).ok());
  w.shares.Settle(1);
  w.Expect(110, 60);
  EXPECT_TRUE(w.shares.IsSettled(1));
  w.Shrink();
  w.Expect(60, 60);
}

TEST(CacheSharesTest, ASuccessorHasAPartOfItsPredecessor) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(9, 10).ok());
  ASSERT_TRUE(w.shares.Add(1, 100).ok());
  ASSERT_TRUE(w.shares.Add(2, 60, {1}).ok());
  w.Expect(110, 110);
  EXPECT_EQ(w.shares.WaitsFor(2), std::vector<uint64_t>{1});
  EXPECT_TRUE(w.shares.WaitsFor(1).empty());
  EXPECT_TRUE(w.shares.WaitsFor(9).empty());
  w.Refuses(Code::kInvalidArgument, w.shares.Add(3, 41, {1}), {"stage 3", "101", "100"});
  w.Refuses(Code::kInvalidArgument, w.shares.Add(3, 10, {8}), {"stage 3", "stage 8"});
  w.Refuses(Code::kInvalidArgument, w.shares.Add(3, 10, {2}), {"stage 3", "stage 2"});
  w.Refuses(Code::kFailedPrecondition, w.shares.Change(1, 100), {"stage 1"});
  w.Refuses(Code::kFailedPrecondition, w.shares.Change(2, 10), {"stage 2"});
  ASSERT_TRUE(w.shares.Add(3, 30, {1}).ok());
  w.Expect(110, 110);
  w.shares.Remove(1);
  EXPECT_TRUE(w.shares.WaitsFor(2).empty());
  w.Expect(110, 100);
  w.Shrink();
  // They are stages like others now.
  ASSERT_TRUE(w.shares.Change(2, 61).ok());
  ASSERT_TRUE(w.shares.Add(4, 61, {2}).ok());
  w.Expect(101, 101);
}

// One stage may only be followed when what it holds is what it may hold: or its successors would be given
// more than their shares.
TEST(CacheSharesTest, WhoIsNotSettledIsNotFollowed) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(1, 100).ok());
  ASSERT_TRUE(w.shares.Change(1, 50).ok());
  w.Refuses(Code::kInvalidArgument, w.shares.Add(2, 50, {1}), {"stage 2", "stage 1"});
  w.shares.Settle(1);
  EXPECT_TRUE(w.shares.Add(2, 50, {1}).ok());
}

TEST(CacheSharesTest, ASuccessorThatGoesLeavesItsPredecessorAsItWas) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(1, 100).ok());
  ASSERT_TRUE(w.shares.Add(2, 60, {1}).ok());
  w.shares.Remove(2);
  w.Expect(100, 100);
  ASSERT_TRUE(w.shares.Change(1, 50).ok());
  w.shares.Settle(1);
  w.Expect(100, 50);
}

// A share of another pipeline's stage becomes smaller while a handover lasts: its memory need not wait.
TEST(CacheSharesTest, OthersShrinkDuringAHandover) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(9, 70).ok());
  ASSERT_TRUE(w.shares.Add(1, 100).ok());
  ASSERT_TRUE(w.shares.Add(2, 60, {1}).ok());
  ASSERT_TRUE(w.shares.Change(9, 30).ok());
  w.shares.Settle(9);
  w.Expect(170, 130);
  w.Shrink();
  w.shares.Remove(9);
  w.Expect(130, 100);
  w.Shrink();
  // And others come.
  ASSERT_TRUE(w.shares.Add(8, 5).ok());
  w.Expect(105, 105);
}

// Two stages cut anew: the first follows one of them, the second both. Until both are gone the first
// must not grow: the second holds what it took over, and their other predecessor still has its blocks.
TEST(CacheSharesTest, StagesThatAreLinkedBySuccessorsAreOneHandover) {
  for (const bool second_first : {false, true}) {
    Worker w;
    ASSERT_TRUE(w.shares.Add(1, 50).ok());
    ASSERT_TRUE(w.shares.Add(2, 50).ok());
    // In whichever order they come.
    if (!second_first) {
      ASSERT_TRUE(w.shares.Add(3, 25, {1}).ok());
    }
    ASSERT_TRUE(w.shares.Add(4, 75, {1, 2}).ok());
    if (second_first) {
      ASSERT_TRUE(w.shares.Add(3, 25, {1}).ok());
    }
    w.Refuses(Code::kInvalidArgument, w.shares.Add(5, 1, {2}), {"stage 5", "101", "100"});
    w.Expect(100, 100);
    EXPECT_EQ(w.shares.WaitsFor(3), (std::vector<uint64_t>{1, 2}));
    w.shares.Remove(1);
    w.Expect(100, 100);
    EXPECT_EQ(w.shares.WaitsFor(3), std::vector<uint64_t>{2});
    EXPECT_EQ(w.shares.WaitsFor(4), std::vector<uint64_t>{2});
    w.Refuses(Code::kFailedPrecondition, w.shares.Change(3, 1), {"stage 3"});
    EXPECT_EQ(w.shares.PredecessorsOf(4), std::vector<uint64_t>{2});
    w.Refuses(Code::kInvalidArgument, w.shares.Add(5, 1, {1}), {"stage 5", "stage 1"});
    w.shares.Remove(2);
    w.Expect(100, 100);
    EXPECT_TRUE(w.shares.WaitsFor(3).empty());
    EXPECT_TRUE(w.shares.WaitsFor(4).empty());
    ASSERT_TRUE(w.shares.Change(3, 1).ok());
  }
}

// Each successor had fewer blocks than its own predecessors, and still was refused: shares of neighbours
// were counted, their predecessors were not.
TEST(CacheSharesTest, ThreeStagesBecomeTwo) {
  Worker w;
  for (const uint64_t id : {1, 2, 3}) ASSERT_TRUE(w.shares.Add(id, 40).ok());
  ASSERT_TRUE(w.shares.Add(4, 60, {1, 2}).ok());
  ASSERT_TRUE(w.shares.Add(5, 60, {2, 3}).ok());
  EXPECT_EQ(w.shares.WaitsFor(4), (std::vector<uint64_t>{1, 2, 3}));
  w.Expect(120, 120);
  // The change is given up.
  w.shares.Remove(5);
  w.Expect(120, 120);
  w.Refuses(Code::kFailedPrecondition, w.shares.Change(3, 39), {"stage 3"});
  w.shares.Remove(4);
  ASSERT_TRUE(w.shares.Change(3, 39).ok());
  w.shares.Settle(3);
  w.Expect(120, 119);
  w.Shrink();
}

// What two successors have together is held against what their stages have together. When one of them goes,
// what is left must still be counted so: the other alone may have more than the stages it follows.
TEST(CacheSharesTest, AHandoverIsNotTakenApart) {
  Worker w;
  for (const uint64_t id : {1, 2, 3}) ASSERT_TRUE(w.shares.Add(id, 40).ok());
  ASSERT_TRUE(w.shares.Add(4, 10, {1, 2}).ok());
  ASSERT_TRUE(w.shares.Add(5, 110, {2, 3}).ok());
  w.shares.Remove(4);
  w.shares.Remove(2);
  w.shares.Remove(3);
  w.Expect(120, 120);
  EXPECT_EQ(w.shares.WaitsFor(5), std::vector<uint64_t>{1});
  w.shares.Remove(1);
  w.Expect(120, 110);
}

TEST(CacheSharesDeathTest, ChecksItsCaller) {
  Worker w;
  ASSERT_TRUE(w.shares.Add(1, 10).ok());
  EXPECT_DEATH((void)w.shares.Add(1, 10), "has a share already");
}

// Stages that take all they may: whatever comes, none finds the pool empty.
class CacheSharesFuzzTest : public testing::TestWithParam<uint32_t> {};

TEST_P(CacheSharesFuzzTest, EveryStageFindsItsBlocks) {
  std::mt19937 rng(GetParam());
  Worker w(600);
  struct Stage {
    std::vector<BlockId> blocks;
    bool was_followed = false;  // by one that is here or was: it takes no more
    std::set<uint64_t> took;    // predecessors whose blocks it has
  };
  std::map<uint64_t, Stage> stages;
  uint64_t next_id = 1;
  int num_handovers = 0;
  const auto any = [&]() { return std::next(stages.begin(), rng() % stages.size())->first; };
  const auto give = [&](Stage* stage, uint32_t keep) {
    for (; stage->blocks.size() > keep; stage->blocks.pop_back()) {
      w.shares.pool()->Give(stage->blocks.back());
    }
  };
  for (int i = 0; i < 4000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    const uint32_t what = stages.empty() ? 0 : rng() % 10;
    if (what == 0) {
      if (w.shares.Add(next_id, 1 + rng() % 60).ok()) stages[next_id++];
    } else if (what == 1) {
      std::set<uint64_t> before{any(), any()};
      if (w.shares.Add(next_id, 1 + rng() % 60, {before.begin(), before.end()}).ok()) {
        stages[next_id++];
        ++num_handovers;
      }
    } else if (what == 2) {
      const uint64_t id = any();
      give(&stages.at(id), 0);
      stages.erase(id);
      w.shares.Remove(id);
    } else if (what == 3) {
      (void)w.shares.Change(any(), 1 + rng() % 90);
    } else if (what == 4) {
      // As a successor does with its first activation.
      const uint64_t id = any();
      Stage& mine = stages.at(id);
      for (const uint64_t before : w.shares.PredecessorsOf(id)) {
        if (stages.count(before) == 0 || !mine.took.insert(before).second) continue;
        Stage& theirs = stages.at(before);
        theirs.was_followed = true;
        for (size_t n = rng() % (theirs.blocks.size() + 1); n > 0; --n) {
          if (mine.blocks.size() == w.shares.BlocksOf(id)) break;
          mine.blocks.push_back(theirs.blocks.back());
          theirs.blocks.pop_back();
        }
      }
    } else if (what == 5) {
      give(&stages.at(any()), rng() % 30);
    } else if (what == 6) {
      const uint64_t id = any();
      give(&stages.at(id), w.shares.BlocksOf(id));
      w.shares.Settle(id);
    } else if (what == 7 && w.shares.ShrinkIsDue()) {
      w.shares.Shrink([&](BlockId end, std::vector<BlockMove>* moves) {
        for (auto& [id, stage] : stages) {
          for (BlockId& block : stage.blocks) {
            if (block < end) continue;
            moves->push_back({block, w.shares.pool()->Take()});
            w.shares.pool()->Give(block);
            block = moves->back().to;
          }
        }
      });
    } else {
      const uint64_t id = any();
      Stage& stage = stages.at(id);
      if (stage.was_followed || !w.shares.WaitsFor(id).empty()) continue;
      // Plans from before a share became smaller grow it up to what it was.
      while (stage.blocks.size() < w.shares.MostOf(id)) {
        ASSERT_LT(w.shares.pool()->used(), w.shares.pool()->size());
        stage.blocks.push_back(w.shares.pool()->Take());
      }
    }
    ASSERT_TRUE(w.shares.CheckIntegrity().ok()) << w.shares.CheckIntegrity();
    ASSERT_EQ(w.left, 600 - int64_t{w.shares.pool()->size()});
  }
  EXPECT_GT(num_handovers, 50);
  for (auto& [id, stage] : stages) {
    give(&stage, 0);
    w.shares.Remove(id);
  }
  EXPECT_EQ(w.shares.needed(), 0u);
  EXPECT_EQ(w.shares.pool()->used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, CacheSharesFuzzTest, testing::Range(1u, 9u));

}  // namespace
}  // namespace strait
