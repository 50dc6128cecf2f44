// SPDX-License-Identifier: Apache-2.0
//
// Defends: places of an arena never overlap, join again when they are free, and its memory serves
// the next edge.
#include "worker/transport/slot_arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "tests/worker/transport/fake_nccl.h"

namespace strait {
namespace {

TEST(SlotArena, PlacesNeverOverlapAndAllComeBack) {
  FakeFabric fabric;
  FakeFaults faults;
  const auto device = std::make_shared<FakeDevice>(&fabric, &faults);
  const auto pool = std::make_shared<ArenaPool>(device);
  {
    auto made = pool->Take(64 * kSlotAlign - 3);
    ASSERT_TRUE(made.ok());
    const std::shared_ptr<SlotArena> arena = *std::move(made);
    EXPECT_EQ(arena->bytes(), 64 * kSlotAlign);
    std::mt19937 random(11);
    std::vector<std::pair<HiddenBuffer, std::byte>> taken;
    int refused = 0;
    for (int round = 0; round < 4000; ++round) {
      if (random() % 2 == 0) {
        auto place = arena->Take(1 + random() % (10 * kSlotAlign));
        refused += !place;
        if (place) {
          const auto mark = static_cast<std::byte>(round);
          memset(place->data(), static_cast<int>(mark), place->size());
          taken.emplace_back(*std::move(place), mark);
        }
      } else if (!taken.empty()) {
        const size_t i = random() % taken.size();
        for (size_t j = 0; j < taken[i].first.size(); ++j) {
          ASSERT_EQ(taken[i].first.data()[j], taken[i].second) << "round " << round;
        }
        taken.erase(taken.begin() + static_cast<ptrdiff_t>(i));
      }
    }
    EXPECT_GT(refused, 0);
    taken.clear();
    EXPECT_TRUE(arena->Take(64 * kSlotAlign).has_value()) << "freed places did not join";
  }
  EXPECT_EQ(pool->bytes_idle(), 64 * kSlotAlign);
  {
    const auto again = pool->Take(5 * kSlotAlign);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(device->pieces, 1) << "idle memory was not used";
  }
}

}  // namespace
}  // namespace strait
