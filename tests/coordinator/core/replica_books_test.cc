// SPDX-License-Identifier: Apache-2.0
//
// What gives way in a buddy's memory: ends before what leads to them, what nobody has before what somebody has, and of
// that only what is cheaper to compute again than what comes. A random run compares with a search through everything.
#include <map>
#include <random>
#include <set>

#include "coordinator/core/recompute_cost.h"
#include "coordinator/core/replicas.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr WorkerId kBuddy{7};
constexpr LayerRange kLayers{0, 4};
constexpr uint64_t kBytes = 100;

static_assert(RecomputeCost(0) < RecomputeCost(1));
// 64 blocks deep a row attends to as many rows as its products cost.
static_assert(RecomputeCost(64) - RecomputeCost(0) == uint64_t{64} * kRowCost);

class ReplicaBooksTest : public testing::Test {
 protected:
  void Offer(uint64_t blocks) { books_.Offer(kBuddy, blocks * kBytes); }
  static ContentKey Key(uint32_t sequence, uint32_t block) { return {sequence, block}; }
  static Replicas::Place PlaceOf(uint32_t sequence, uint32_t block) {
    if (block == 0) return {0, std::nullopt};
    return {block, Key(sequence, block - 1)};
  }
  // What gave way; absent: it found no room.
  std::optional<std::vector<ContentKey>> Add(uint32_t sequence, uint32_t block) {
    const Replicas::Place place = PlaceOf(sequence, block);
    const auto gone = books_.MakeRoom(kBuddy, kBytes, place, [this](const ContentKey& key) {
      return held_.contains({key.low, key.high});
    });
    if (!gone) return std::nullopt;
    std::vector<ContentKey> keys;
    for (const Replicas::Gone& each : *gone) keys.push_back(each.key);
    books_.Begin(Key(sequence, block), place, kLayers, 1, kBuddy, kBytes);
    EXPECT_TRUE(books_.End(Key(sequence, block), 1, kBuddy, true));
    const absl::Status sound = books_.CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound;
    return keys;
  }
  void AddAll(uint32_t sequence, uint32_t blocks) {
    for (uint32_t b = 0; b < blocks; ++b) ASSERT_THAT(*Add(sequence, b), IsEmpty());
  }
  void Hold(uint32_t sequence, uint32_t blocks) {
    for (uint32_t b = 0; b < blocks; ++b) held_.insert({sequence, b});
  }
  bool Has(uint32_t sequence, uint32_t block) const {
    return books_.IsThere(Key(sequence, block), kLayers, kBuddy);
  }

  Replicas books_;
  std::set<std::pair<uint64_t, uint64_t>> held_;
};

TEST_F(ReplicaBooksTest, AnEndGoesBeforeWhatLeadsToItAndTheShortOneFirst) {
  Offer(9);
  AddAll(1, 5);
  AddAll(2, 3);
  Hold(3, 5);
  AddAll(3, 1);
  EXPECT_THAT(*Add(3, 1), ElementsAre(Key(2, 2)));
  EXPECT_THAT(*Add(3, 2), ElementsAre(Key(2, 1)));
  EXPECT_THAT(*Add(3, 3), ElementsAre(Key(2, 0)));
  EXPECT_THAT(*Add(3, 4), ElementsAre(Key(1, 4)));
}

TEST_F(ReplicaBooksTest, WhatNobodyHasGoesBeforeWhatIsCheaper) {
  Offer(9);
  AddAll(1, 8);
  Hold(2, 1);
  AddAll(2, 1);
  EXPECT_THAT(*Add(3, 0), ElementsAre(Key(1, 7)));
}

TEST_F(ReplicaBooksTest, OfWhatIsHeldOnlyTheCheaperGivesWay) {
  Offer(8);
  Hold(1, 5);
  Hold(2, 10);
  AddAll(1, 3);
  AddAll(2, 5);
  const uint64_t losses = books_.losses();
  EXPECT_THAT(*Add(2, 5), ElementsAre(Key(1, 2)));
  EXPECT_GT(books_.losses(), losses);
  EXPECT_FALSE(books_.HasBefore(PlaceOf(1, 3), kBuddy)) << "a copy of it were of no use";
  EXPECT_EQ(Add(1, 2), std::nullopt) << "they do not drive each other out in turn";
  EXPECT_THAT(*Add(2, 6), ElementsAre(Key(1, 1)));
  EXPECT_THAT(*Add(2, 7), ElementsAre(Key(1, 0)));
  EXPECT_EQ(Add(2, 8), std::nullopt) << "its own beginning stays";
  for (uint32_t b = 0; b < 8; ++b) EXPECT_TRUE(Has(2, b));
}

TEST_F(ReplicaBooksTest, WhatIsHeldNoMoreIsFoundAgain) {
  Offer(3);
  Hold(1, 3);
  AddAll(1, 3);
  EXPECT_EQ(Add(2, 0), std::nullopt);
  held_.clear();
  EXPECT_THAT(*Add(2, 0), ElementsAre(Key(1, 2)));
}

TEST_F(ReplicaBooksTest, WhatIsOnItsWayStaysWithWhatLeadsToIt) {
  Offer(3);
  AddAll(1, 2);
  books_.Begin(Key(1, 2), PlaceOf(1, 2), kLayers, 1, kBuddy, kBytes);
  EXPECT_EQ(books_.MakeRoom(kBuddy, kBytes, PlaceOf(2, 0), [](const auto&) { return false; }),
            std::nullopt);
  EXPECT_TRUE(books_.End(Key(1, 2), 1, kBuddy, false));
  EXPECT_THAT(*Add(2, 0), IsEmpty());
  EXPECT_TRUE(books_.CheckIntegrity().ok());
}

TEST_F(ReplicaBooksTest, WhatMakesWayInTheMiddleLeavesTheRestInOrder) {
  Offer(4);
  AddAll(1, 3);
  const auto parts = books_.MakeWay(Key(1, 1), {0, 2}, kBuddy);
  ASSERT_TRUE(parts);
  ASSERT_EQ(parts->size(), 1u);
  EXPECT_TRUE(books_.CheckIntegrity().ok()) << books_.CheckIntegrity();
  EXPECT_THAT(*Add(1, 1), IsEmpty());
  Hold(2, 2);
  AddAll(2, 1);
  EXPECT_THAT(*Add(2, 1), ElementsAre(Key(1, 2)));
}

// Against a search through all of it.
TEST_F(ReplicaBooksTest, RandomRunsGiveWayAsASearchWould) {
  std::mt19937 random(20261130);
  for (int run = 0; run < 200; ++run) {
    books_ = Replicas();
    held_.clear();
    const uint32_t room = 3 + random() % 20;
    Offer(room);
    std::map<uint32_t, uint32_t> lengths;  // blocks there
    for (int step = 0; step < 60; ++step) {
      const uint32_t sequence = 1 + random() % 5;
      if (random() % 6 == 0) {
        for (uint32_t b = 0; b < 40; ++b) held_.erase({sequence, b});
        continue;
      }
      if (random() % 3 == 0) Hold(sequence, 40);
      const uint32_t block = lengths[sequence];
      uint64_t used = 0;
      for (const auto& [id, length] : lengths) used += length;
      // Ends of others, and its own only where it has no beginning there.
      std::optional<std::pair<bool, uint32_t>> due;  // held, block
      if (used == room) {
        for (const auto& [id, length] : lengths) {
          if (length == 0 || id == sequence) continue;
          const bool is_held = held_.contains({id, length - 1});
          if (is_held && length - 1 >= block) continue;
          if (!due || std::pair(is_held, length - 1) < *due) due = {is_held, length - 1};
        }
      }
      const auto gone = Add(sequence, block);
      ASSERT_EQ(gone.has_value(), used < room || due.has_value()) << "run " << run;
      if (!gone) continue;
      ++lengths[sequence];
      ASSERT_EQ(gone->size(), due ? 1u : 0u);
      if (!due) continue;
      const ContentKey key = gone->front();
      EXPECT_EQ(key.high, due->second) << "run " << run;
      EXPECT_EQ(held_.contains({key.low, key.high}), due->first);
      --lengths[static_cast<uint32_t>(key.low)];
    }
  }
}

}  // namespace
}  // namespace strait
