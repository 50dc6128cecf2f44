// SPDX-License-Identifier: Apache-2.0
//
// Defends: tables line up, and numbers and sizes read as people write them.
#include "coordinator/cli/terminal.h"

#include <gtest/gtest.h>

namespace strait::cli {
namespace {

TEST(FormatTest, NumbersAndBytes) {
  EXPECT_EQ(FormatNumber(0), "0");
  EXPECT_EQ(FormatNumber(1234.5), "1234");
  EXPECT_EQ(FormatNumber(12.34), "12.3");
  EXPECT_EQ(FormatNumber(1.234), "1.23");
  EXPECT_EQ(FormatNumber(0.0456), "0.046");
  EXPECT_EQ(Fixed(1.25, 3), "1.250");
  EXPECT_EQ(Fixed(-0.04, 1), "-0.0");
  EXPECT_EQ(Counted(1, "round"), "1 round");
  EXPECT_EQ(Counted(0, "round"), "0 rounds");
  EXPECT_EQ(FormatBytes(512), "512 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(3.0 * (1 << 30)), "3.00 GiB");
}

TEST(FormatTest, TableSetsTextLeftAndNumbersRight) {
  EXPECT_EQ(FormatTable({{"id", "name"}, {"1", "a"}, {"100", "worker"}}),
            " id  name\n"
            "  1  a\n"
            "100  worker\n");
}

TEST(FormatTest, NegativeNumbersAreNumbers) {
  EXPECT_EQ(FormatTable({{"difference"}, {"-0.5"}, {"-"}}), "difference\n      -0.5\n         -\n");
}

TEST(FormatTest, WidthCountsCharactersNotBytes) {
  EXPECT_EQ(FormatTable({{"a", "b"}, {"é", "x"}, {"ab", "y"}}), "a   b\né   x\nab  y\n");
}

}  // namespace
}  // namespace strait::cli
