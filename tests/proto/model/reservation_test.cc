// SPDX-License-Identifier: Apache-2.0
//
// Defends: the names of the row formats, which both sides' --cache-format takes.
#include "proto/model/reservation.h"

#include <gtest/gtest.h>

namespace strait {
namespace {

TEST(ReservationTest, NamesGoBothWays) {
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kFp8}) {
    EXPECT_EQ(RowFormatOf(RowFormatName(format)), format);
  }
  EXPECT_EQ(RowFormatOf("fp8"), RowFormat::kFp8);
  for (const char* name : {"", "fp", "FP8", "fp16"}) EXPECT_EQ(RowFormatOf(name), std::nullopt);
}

}  // namespace
}  // namespace strait
