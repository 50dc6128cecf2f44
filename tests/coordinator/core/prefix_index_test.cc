// SPDX-License-Identifier: Apache-2.0
//
// Defends: the index of prefix blocks and the sums in bytes that go with it, each by itself.
#include "coordinator/core/prefix_index.h"

#include <gtest/gtest.h>

#include "coordinator/core/cache_books.h"

namespace strait {
namespace {

constexpr ContentKey Key(uint64_t number) { return {.low = number, .high = 7}; }

TEST(StageBlocksTest, RaisesTheLeastUntilTheyAreEven) {
  StageBlocks blocks({2, 0, 1});
  EXPECT_FALSE(blocks.even());
  EXPECT_EQ(blocks.least(), 0u);
  EXPECT_EQ(blocks.most(), 2u);
  blocks.RaiseLeast();
  EXPECT_EQ(blocks.at(1), 1u);
  EXPECT_EQ(blocks.at(2), 1u);
  blocks.RaiseLeast();
  EXPECT_TRUE(blocks.even());
  blocks.RaiseLeast();
  EXPECT_EQ(blocks.at(1), 3u);
  EXPECT_TRUE(StageBlocks({4, 4}).even());
  EXPECT_EQ(StageBlocks().most(), 0u);
}

class PrefixIndexTest : public testing::Test {
 protected:
  PrefixIndexTest() { index_.Start(2); }
  // Of so many blocks, on all stages, held once.
  std::vector<PrefixIndex::Node*> Path(uint64_t first, uint32_t blocks) {
    std::vector<PrefixIndex::Node*> path;
    for (uint32_t b = 0; b < blocks; ++b) {
      path.push_back(index_.Add(Key(first + b), b == 0 ? nullptr : path.back(), b));
      index_.SetWhole(path.back());
      index_.Hold(path.back());
    }
    return path;
  }
  void Leave(const std::vector<PrefixIndex::Node*>& path) {
    for (auto it = path.rbegin(); it != path.rend(); ++it) index_.Leave(*it);
  }
  PrefixIndex index_;
};

TEST_F(PrefixIndexTest, TheOldestAreLeavesFirst) {
  const auto a = Path(10, 2);
  const auto b = Path(20, 3);
  EXPECT_EQ(index_.Oldest(), nullptr);
  Leave(a);
  Leave(b);
  EXPECT_EQ(index_.num_unheld(), 5u);
  for (PrefixIndex::Node* node : a) index_.Hold(node);
  Leave(a);
  std::vector<uint64_t> order;
  while (PrefixIndex::Node* node = index_.Oldest()) {
    order.push_back(node->key.low);
    index_.Remove(node);
    EXPECT_TRUE(index_.CheckIntegrity({}).ok()) << index_.CheckIntegrity({});
  }
  EXPECT_EQ(order, (std::vector<uint64_t>{22, 21, 20, 11, 10}));
  EXPECT_EQ(index_.num_on(0), 0u);
}

TEST_F(PrefixIndexTest, OneThatIsNotOnAllStagesIsNoRoom) {
  PrefixIndex::Node* node = index_.Add(Key(1), nullptr, 0);
  index_.SetOn(node, 1);
  index_.Hold(node);
  EXPECT_FALSE(node->whole());
  EXPECT_FALSE(node->on(0));
  EXPECT_TRUE(index_.Leave(node));
  EXPECT_EQ(index_.num_unheld(), 0u);
  EXPECT_FALSE(index_.CheckIntegrity({}).ok()) << "it is to be removed";
  index_.Remove(node);
  EXPECT_TRUE(index_.CheckIntegrity({}).ok());
}

TEST_F(PrefixIndexTest, OneMayGoFromAStage) {
  const auto path = Path(1, 1);
  index_.SetOff(path[0], 0);
  EXPECT_FALSE(path[0]->whole());
  EXPECT_EQ(index_.num_on(0), 0u);
  EXPECT_EQ(index_.num_on(1), 1u);
  EXPECT_TRUE(index_.CheckIntegrity({{path[0], 1}}).ok());
  index_.SetWhole(path[0]);
  EXPECT_EQ(index_.num_on(0), 1u);
  EXPECT_FALSE(index_.CheckIntegrity({}).ok()) << "a sequence has it";
}

TEST_F(PrefixIndexTest, PromisesAreTheFirstOnes) {
  index_.Promise(Key(1), SequenceId{5});
  index_.Promise(Key(1), SequenceId{6});
  EXPECT_EQ(index_.Promised(Key(1)), SequenceId{5});
  index_.Unpromise(Key(1), SequenceId{6});
  EXPECT_EQ(index_.Promised(Key(1)), SequenceId{5});
  index_.Unpromise(Key(1), SequenceId{5});
  EXPECT_FALSE(index_.Promised(Key(1)).has_value());
}

// Five blocks a layer, and six.
class PrefixBooksTest : public testing::Test {
 protected:
  PrefixBooksTest() { books_.Start({100}, {{{0, 2}, 1000}, {{2, 3}, 600}}); }
  void AddPrefixes(uint32_t blocks) {
    for (uint32_t i = 0; i < blocks; ++i) {
      books_.AddPrefix(0);
      books_.AddPrefix(1);
    }
  }
  CacheBooks books_;
};

TEST_F(PrefixBooksTest, APrefixBlockCountsOnce) {
  AddPrefixes(2);
  EXPECT_EQ(books_.stages()[0].held_bytes, 400u);
  const StageRows rows({130, 130});
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(books_.CanEnter(130, StageBlocks(2)));
    books_.Enter(130, StageBlocks(2));
    books_.Hold(rows, StageBlocks(2));
  }
  EXPECT_EQ(books_.stages()[0].reserved_bytes, 400u + 2 * 200);
  EXPECT_EQ(books_.stages()[1].held_bytes, 200u + 2 * 100);
  EXPECT_TRUE(books_.CanEnter(129, StageBlocks(2)));
  EXPECT_FALSE(books_.CanEnter(129, StageBlocks(1))) << "its second block would be its own";
  EXPECT_EQ(books_.HeldInLayer(rows, StageBlocks(2), 0, 1), 100u);
  books_.Free(rows, StageBlocks(2));
  books_.Leave(130, StageBlocks(2));
  EXPECT_EQ(books_.stages()[0].held_bytes, 400u + 200);
}

TEST_F(PrefixBooksTest, WhatNobodyHasIsRoom) {
  AddPrefixes(4);
  EXPECT_FALSE(books_.HasRoom(128, {}, 0, 0));
  EXPECT_TRUE(books_.HasRoom(128, {}, 1, 0));
  EXPECT_FALSE(books_.HasRoom(128, {}, 1, 1));
  EXPECT_EQ(books_.free_rows(0), 64u);
  EXPECT_EQ(books_.free_rows(4), 320u);
}

// A sequence that brings prefix blocks along enters when others have left.
TEST_F(PrefixBooksTest, MoreThanThereIsForAWhileIsNoRoom) {
  AddPrefixes(3);
  AddPrefixes(3);
  ASSERT_GT(books_.stages()[0].reserved_bytes, books_.stages()[0].capacity_bytes);
  EXPECT_FALSE(books_.CanEnter(192, StageBlocks(3)));
  books_.RemovePrefix(0);
  books_.RemovePrefix(1);
  EXPECT_TRUE(books_.CanEnter(192, StageBlocks(3)));
}

}  // namespace
}  // namespace strait
