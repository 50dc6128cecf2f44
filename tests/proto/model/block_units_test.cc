// SPDX-License-Identifier: Apache-2.0
//
// Defends: the pieces of a block are its rows' bytes and little padding; a lower rank's pieces are the
// first ones of a higher rank's, so that a cut can leave them where they are.
#include "proto/model/block_units.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "proto/model/reservation.h"

namespace strait {
namespace {

TEST(BlockUnitsTest, PiecesAreTheRows) {
  for (const uint32_t rope : {16u, 48u, 64u}) {
    for (uint32_t f = 0; f < kNumRowFormats; ++f) {
      const auto format = static_cast<RowFormat>(f);
      uint64_t before = 0;
      for (uint32_t rank = 1; rank <= 8 * rope + 16; ++rank) {
        SCOPED_TRACE(testing::Message() << RowFormatName(format) << " " << rank << "+" << rope);
        const BlockUnits layout({format, rank}, rope);
        uint64_t grains = 0;
        uint64_t used = 0;
        for (uint32_t i = 0; i < layout.size(); ++i) {
          const BlockPiece piece = layout[i];
          ASSERT_TRUE(piece.grains == 1 || piece.grains == 2 || piece.grains == 4 ||
                      piece.grains == 8);
          ASSERT_GT(piece.used_bytes, (piece.grains - 1) * GrainBytes(rope));
          ASSERT_LE(piece.used_bytes, piece.grains * GrainBytes(rope));
          grains += piece.grains;
          used += piece.used_bytes;
        }
        ASSERT_EQ(layout.grains(), grains);
        ASSERT_EQ(layout.bytes(), grains * GrainBytes(rope));
        ASSERT_EQ(layout.used_bytes(), used);
        // All numbers of its rows, and nothing else.
        ASSERT_EQ(used, 64u * (LatentBytes(format, rank) + ScaleBytes(format, rank) +
                               rope * (format == RowFormat::kFp32 ? 4 : 2)));
        ASSERT_GE(grains, before) << "a lower rank takes no more";
        before = grains;
      }
    }
  }
}

TEST(BlockUnitsTest, PaddingOverRanksInStepsOf16) {
  for (const auto& [rope, max_rank] : {std::pair(64u, 512u), {16u, 128u}}) {
    for (const RowFormat format :
         {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kFp8, RowFormat::kInt4}) {
      double sum = 0;
      double worst = 0;
      for (uint32_t rank = 16; rank <= max_rank; rank += 16) {
        const BlockUnits layout({format, rank}, rope);
        const double share = double(layout.padded_bytes()) / double(layout.bytes());
        sum += share;
        worst = std::max(worst, share);
      }
      const double mean = sum / (max_rank / 16);
      EXPECT_LE(mean, 0.05) << RowFormatName(format) << ", rope " << rope;
      std::printf("padding of %s, rope %u, ranks 16 to %u: mean %.2f %%, most %.2f %%\n",
                  RowFormatName(format), rope, max_rank, 100 * mean, 100 * worst);
      testing::Test::RecordProperty(
          std::string("padding_") + RowFormatName(format) + "_" + std::to_string(rope),
          std::to_string(mean));
    }
  }
}

TEST(BlockUnitsTest, ALowerRankHasTheFirstPieces) {
  for (const uint32_t rope : {16u, 64u}) {
    for (uint32_t f = 0; f < kNumRowFormats; ++f) {
      const auto format = static_cast<RowFormat>(f);
      for (uint32_t rank = 16; rank <= 9 * rope; rank += 16) {
        const BlockUnits from({format, rank}, rope);
        for (uint32_t lower = 8; lower < rank; lower += 8) {
          SCOPED_TRACE(testing::Message()
                       << RowFormatName(format) << " " << rank << " to " << lower);
          const BlockUnits to({format, lower}, rope);
          uint32_t same = 0;
          while (same < to.size() && to[same].grains == from[same].grains) ++same;
          // What is left lies in the one piece that the cut goes through.
          uint32_t rest = 0;
          for (uint32_t i = same; i < to.size(); ++i) rest += to[i].grains;
          if (rest > 0) {
            ASSERT_LT(same, from.size());
            ASSERT_LT(rest, from[same].grains);
          }
        }
      }
    }
  }
}

TEST(BlockUnitsTest, KeysThatHaveUnits) {
  for (const uint32_t rope : {16u, 64u, 1024u}) EXPECT_TRUE(HasUnits(rope));
  for (const uint32_t rope : {0u, 8u, 24u, 1040u}) EXPECT_FALSE(HasUnits(rope));
}

}  // namespace
}  // namespace strait
