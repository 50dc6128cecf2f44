// SPDX-License-Identifier: Apache-2.0
//
// Defends: items of one producer stay in order, none is lost or doubled, and "full" is told.
#include "proto/rpc/queue.h"

#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace strait {
namespace {

using std::chrono_literals::operator""us;
using std::chrono_literals::operator""s;

TEST(Queue, TellsWhenItIsFull) {
  BoundedQueue<std::unique_ptr<int>> queue(2);
  EXPECT_TRUE(queue.Push(std::make_unique<int>(1)));
  EXPECT_FALSE(queue.Push(std::make_unique<int>(2)));
  EXPECT_FALSE(queue.Push(std::make_unique<int>(3)));  // taken, all the same
  auto refused = std::make_unique<int>(4);
  EXPECT_FALSE(queue.TryPush(refused));
  EXPECT_NE(refused, nullptr);
  EXPECT_EQ(queue.PopAll(0us).size(), 3u);
  EXPECT_TRUE(queue.TryPush(refused));
  EXPECT_EQ(queue.PopAll(0us).size(), 1u);
  EXPECT_TRUE(queue.PopAll(1us).empty());
}

// That it looks instead of sleeping is a matter of time, and a benchmark's.
TEST(Queue, AnEagerWaitLosesNothingAndEnds) {
  BoundedQueue<int> queue(16);
  EXPECT_TRUE(queue.PopAll(0us, 1s).empty());
  EXPECT_TRUE(queue.PopAll(10us, 5us).empty());
  std::jthread producer([&queue] { queue.Push(7); });
  EXPECT_EQ(queue.PopAll(600s, 300s).front(), 7);
  std::jthread late([&queue] { queue.Push(8); });
  EXPECT_EQ(queue.PopAll(600s, 1us).front(), 8);  // asleep or not
}

TEST(Queue, KeepsEveryProducersOrder) {
  constexpr int kProducers = 4;
  constexpr int kItems = 5000;
  BoundedQueue<std::pair<int, int>> queue(16);
  std::vector<std::jthread> producers;
  for (int p = 0; p < kProducers; ++p) {
    producers.emplace_back([&queue, p] {
      for (int i = 0; i < kItems; ++i) queue.Push({p, i});
    });
  }
  std::vector<int> next(kProducers, 0);
  int seen = 0;
  while (seen < kProducers * kItems) {
    for (auto [p, i] : queue.PopAll(10s)) {
      ASSERT_EQ(i, next[p]++);
      ++seen;
    }
  }
  EXPECT_TRUE(queue.PopAll(0us).empty());
}

}  // namespace
}  // namespace strait
