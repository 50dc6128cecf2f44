// SPDX-License-Identifier: Apache-2.0
//
// Defends: the loop's queue is full by number or by bytes, and has room again when its items are
// handled.
//
// The bug: only the number of events was bounded, and 65,536 messages of 16 MiB are a terabyte.
#include "coordinator/service/loop_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace strait {
namespace {

using testing::ElementsAre;

std::vector<int> All(LoopQueue<int>* queue) {
  std::vector<int> all;
  queue->HandleAll(std::chrono::microseconds(0), [&all](int& item) { all.push_back(item); });
  return all;
}

TEST(LoopQueueTest, IsFullByBytes) {
  LoopQueue<int> queue(100, 1000);
  EXPECT_TRUE(queue.Push(1, 999));
  EXPECT_TRUE(queue.Push(2)) << "weighs nothing";
  EXPECT_FALSE(queue.Push(3, 1)) << "taken, and its producer pauses";
  EXPECT_THAT(All(&queue), ElementsAre(1, 2, 3));
  EXPECT_TRUE(queue.Push(4, 999));
}

TEST(LoopQueueTest, WhatIsBeingHandledStillCounts) {
  LoopQueue<int> queue(100, 1000);
  queue.Push(1, 600);
  queue.HandleAll(std::chrono::microseconds(0),
                  [&queue](int&) { EXPECT_FALSE(queue.Push(2, 600)); });
  EXPECT_TRUE(queue.Push(3, 300));
}

TEST(LoopQueueTest, IsFullByNumber) {
  LoopQueue<int> queue(2, 1000);
  EXPECT_TRUE(queue.Push(1, 1));
  EXPECT_FALSE(queue.Push(2, 1));
  EXPECT_THAT(All(&queue), ElementsAre(1, 2));
}

}  // namespace
}  // namespace strait
