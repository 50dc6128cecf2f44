// SPDX-License-Identifier: Apache-2.0
//
// Defends: what the books say is on the device is there, whatever came and went; places of a batch lie
// apart; every batch within the pool gets places; what is known stays where it is as long as there is
// room.
#include "worker/model/cuda/table_places.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using Need = TablePlaces::Need;

// The memory that the books are about, and what a batch finds there.
class Columns {
 public:
  explicit Columns(uint64_t pool_columns)
      : columns_(TablePlaces::ColumnsFor(pool_columns)), places_(columns_.size()) {}

  // Places and brings; how many columns were brought. `versions` is what the columns of a tables_id
  // hold: other than what anything else ever held.
  uint64_t Step(const std::vector<Need>& needs) {
    ++step_;
    uint64_t brought = 0;
    const absl::Span<const TablePlace> places = places_.Place(needs);
    EXPECT_EQ(places.size(), needs.size());
    for (size_t i = 0; i < needs.size(); ++i) {
      const TablePlace& place = places[i];
      EXPECT_GE(place.num_columns, needs[i].num_columns);
      EXPECT_LE(place.first_column + place.num_columns, columns_.size());
      EXPECT_TRUE(needs[i].tables_id != 0 || place.num_known == 0);
      for (uint32_t c = place.num_known; c < needs[i].num_columns; ++c, ++brought) {
        columns_.at(place.first_column + c) = Tag(needs[i], i, c);
      }
    }
    for (size_t i = 0; i < needs.size(); ++i) {
      for (uint32_t c = 0; c < needs[i].num_columns; ++c) {
        EXPECT_EQ(columns_.at(places[i].first_column + c), Tag(needs[i], i, c))
            << "sequence " << i << " of the batch, column " << c;
      }
    }
    const absl::Status integrity = places_.CheckIntegrity();
    EXPECT_TRUE(integrity.ok()) << integrity;
    return brought;
  }
  // What a call that failed leaves: nobody knows.
  void Lose() {
    places_.Forget();
    std::fill(columns_.begin(), columns_.end(), std::nullopt);
  }

 private:
  struct Entry {
    uint64_t of = 0;  // tables_id, or the step where that is 0
    uint64_t index = 0;
    uint32_t column = 0;
    bool operator==(const Entry&) const = default;
  };
  std::optional<Entry> Tag(const Need& need, uint64_t index, uint32_t column) const {
    return need.tables_id != 0 ? Entry{need.tables_id, 0, column} : Entry{step_, index + 1, column};
  }

  std::vector<std::optional<Entry>> columns_;
  TablePlaces places_;
  uint64_t step_ = 0;
};

TEST(TablePlacesTest, WhatIsThereIsNotBroughtAgain) {
  Columns columns(100);
  EXPECT_EQ(columns.Step({{1, 5}, {2, 10}}), 15u);
  EXPECT_EQ(columns.Step({{1, 5}, {2, 10}}), 0u);
  EXPECT_EQ(columns.Step({{2, 11}, {1, 5}}), 1u) << "one was appended";
  EXPECT_EQ(columns.Step({{3, 1}}), 1u);
  EXPECT_EQ(columns.Step({{1, 4}}), 0u)
      << "rows that are in the cache already: fewer than are known";
  EXPECT_EQ(columns.Step({{1, 5}, {2, 11}, {3, 1}}), 0u);
  EXPECT_EQ(columns.Step({{1, 9}}), 9u) << "it had room for eight, and moves";
  EXPECT_EQ(columns.Step({{1, 15}, {2, 11}}), 6u);
}

TEST(TablePlacesTest, WithoutAPromiseAllIsBrought) {
  Columns columns(10);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(columns.Step({{0, 3}, {7, 2}, {0, 4}}), i == 0 ? 9u : 7u);
}

TEST(TablePlacesTest, TheOneUnusedForLongestGoesFirst) {
  Columns columns(8);                             // 16 of them
  EXPECT_EQ(columns.Step({{1, 2}, {2, 2}}), 4u);  // room for four each
  EXPECT_EQ(columns.Step({{3, 4}}), 4u);          // for eight: all are taken
  EXPECT_EQ(columns.Step({{1, 2}}), 0u);
  EXPECT_EQ(columns.Step({{4, 2}}), 2u) << "instead of the second";
  EXPECT_EQ(columns.Step({{1, 2}, {3, 4}, {4, 2}}), 0u);
  EXPECT_EQ(columns.Step({{2, 2}}), 2u) << "instead of the first";
  EXPECT_EQ(columns.Step({{3, 4}, {4, 2}}), 0u);
  EXPECT_EQ(columns.Step({{1, 2}}), 2u);
}

// The bug that would be: tables of this batch go for other ones of it.
TEST(TablePlacesTest, ABatchDoesNotDisplaceItself) {
  Columns columns(8);
  columns.Step({{1, 4}});
  columns.Step({{2, 2}});
  columns.Step({{3, 2}});
  EXPECT_EQ(columns.Step({{4, 2}, {1, 4}}), 2u) << "the second one goes, though the first is older";
}

// Free columns, enough and in pieces: all is laid out anew.
TEST(TablePlacesTest, RoomInPiecesIsRoom) {
  Columns columns(8);  // 16: eight places of two
  std::vector<Need> ones;
  for (uint64_t id = 1; id <= 8; ++id) ones.push_back({id, 1});
  EXPECT_EQ(columns.Step(ones), 8u);
  const std::vector<Need> odd = {{1, 1}, {3, 1}, {5, 1}, {7, 1}, {9, 4}};
  EXPECT_EQ(columns.Step(odd), 8u);
  EXPECT_EQ(columns.Step(odd), 0u);
}

TEST(TablePlacesDeathTest, ChecksItsCaller) {
  TablePlaces places(TablePlaces::ColumnsFor(4));
  EXPECT_DEATH(places.Place({{{1, 1}, {1, 2}}}), "the same tables_id");
  EXPECT_DEATH(places.Place({{{1, 4}, {2, 2}}}), "more blocks than the pool");
  EXPECT_DEATH(places.Place({{{0, 9}}}), "more blocks than the pool");
  TablePlaces none(0);
  EXPECT_TRUE(none.Place({}).empty());
  EXPECT_TRUE(none.CheckIntegrity().ok());
}

// Sequences of a pool that is mostly full come, grow, are cut and go; steps have some of them.
TEST(TablePlacesTest, RandomLives) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (const uint32_t pool : {1u, 2u, 7u, 64u, 300u}) {
    Columns columns(pool);
    std::vector<Need> live;
    uint64_t next_id = 1;
    uint32_t used = 0;
    uint64_t had = 0;
    uint64_t brought = 0;
    for (int i = 0; i < 3000; ++i) {
      const auto choice = rng() % 16;
      const uint32_t free = pool - used;
      const size_t at = live.empty() ? 0 : rng() % live.size();
      if (free > 0 && (choice < 3 || live.empty())) {
        const auto columns_more = static_cast<uint32_t>(1 + rng() % std::min(free, 1 + pool / 4));
        live.push_back({rng() % 8 == 0 ? 0 : next_id++, columns_more});
      } else if (choice < 5) {
        live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
      } else if (choice < 6 && live[at].num_columns > 1) {  // cut: under another number
        live[at] = {next_id++, static_cast<uint32_t>(1 + rng() % (live[at].num_columns - 1))};
      } else if (free > 0 && choice < 12) {
        live[at].num_columns += 1;
      } else if (choice == 12 && rng() % 20 == 0) {
        columns.Lose();
      }
      used = 0;
      for (const Need& need : live) used += need.num_columns;
      std::vector<Need> batch;
      for (const Need& need : live) {
        if (rng() % 3 != 0) batch.push_back(need);
      }
      std::shuffle(batch.begin(), batch.end(), rng);
      for (const Need& need : batch) had += need.num_columns;
      brought += columns.Step(batch);
      ASSERT_FALSE(HasFailure()) << "step " << i << " of a pool of " << pool;
    }
    EXPECT_TRUE(pool < 64 || brought < had / 2) << "brought " << brought << " of " << had;
  }
}

}  // namespace
}  // namespace strait
