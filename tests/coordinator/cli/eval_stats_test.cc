// SPDX-License-Identifier: Apache-2.0
//
// Defends: estimates and their intervals are those of the textbook, at one document, at few and at
// many.
#include "coordinator/cli/eval_stats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace strait::cli {
namespace {

TEST(StudentQuantileTest, IsTheTablesToSixDigits) {
  EXPECT_NEAR(StudentQuantile(1), 12.706204736, 1e-6);
  EXPECT_NEAR(StudentQuantile(2), 4.302652730, 1e-6);
  EXPECT_NEAR(StudentQuantile(9), 2.262157163, 1e-6);
  EXPECT_NEAR(StudentQuantile(30), 2.042272456, 1e-6);
  EXPECT_NEAR(StudentQuantile(120), 1.979930405, 1e-6);
}

TEST(StudentQuantileTest, FallsTowardsTheNormalsAcrossTheChangeOfMethod) {
  EXPECT_GT(StudentQuantile(400), StudentQuantile(401));
  EXPECT_NEAR(StudentQuantile(400), StudentQuantile(401), 2e-5);
  EXPECT_NEAR(StudentQuantile(1'000'000'000), 1.959963985, 1e-6);
}

TEST(MeanTest, IntervalOfTwoIsStudentsWithOneDegree) {
  const Estimate mean = MeanOf(std::vector<double>{1, 3});
  EXPECT_DOUBLE_EQ(mean.value, 2);
  ASSERT_TRUE(mean.has_interval);
  EXPECT_NEAR(mean.high - mean.value, 12.706204736, 1e-6);  // standard error 1
  EXPECT_NEAR(mean.value - mean.low, 12.706204736, 1e-6);
  EXPECT_EQ(mean.count, 2u);
}

TEST(MeanTest, OneDocumentHasNoInterval) {
  const Estimate mean = MeanOf(std::vector<double>{5});
  EXPECT_DOUBLE_EQ(mean.value, 5);
  EXPECT_FALSE(mean.has_interval);
  EXPECT_FALSE(MeanOf({}).has_interval);
}

TEST(PairedDifferenceTest, WhatDocumentsShareCancels) {
  // Documents differ by hundreds, the two sides by 1 or 2.
  const std::vector<double> a = {101, 502, 901, 302}, b = {100, 500, 900, 300};
  const Estimate difference = PairedDifference(a, b);
  EXPECT_DOUBLE_EQ(difference.value, 1.5);
  EXPECT_NEAR(difference.high - difference.value, 3.182446305 * std::sqrt(1.0 / 3 / 4), 1e-6);
  const Estimate apart = IndependentDifference(MeanOf(a), MeanOf(b));
  EXPECT_DOUBLE_EQ(apart.value, 1.5);
  EXPECT_GT(apart.high, 100);
}

TEST(RatioTest, IsOfTheSumsAndExactWhenProportional) {
  const std::vector<double> part = {2, 4, 8}, whole = {1, 2, 4};
  const Estimate ratio = RatioOf(part, whole);
  EXPECT_DOUBLE_EQ(ratio.value, 2);
  EXPECT_DOUBLE_EQ(ratio.low, 2);
  EXPECT_DOUBLE_EQ(RatioOf(std::vector<double>{1, 5}, std::vector<double>{1, 1}).value, 3);
}

TEST(ExponentialTest, MapsTheInterval) {
  const Estimate e = Exponential({1, 0, 2, true, 7});
  EXPECT_DOUBLE_EQ(e.value, std::exp(1.0));
  EXPECT_DOUBLE_EQ(e.low, 1);
  EXPECT_DOUBLE_EQ(e.high, std::exp(2.0));
  EXPECT_EQ(e.count, 7u);
}

TEST(ShareTest, WilsonsIntervalStaysWithinZeroAndOne) {
  const Estimate half = ShareOf(5, 10);
  EXPECT_DOUBLE_EQ(half.value, 0.5);
  EXPECT_NEAR(half.low, 0.236593, 1e-6);
  EXPECT_NEAR(half.high, 0.763407, 1e-6);
  const Estimate all = ShareOf(10, 10);
  EXPECT_NEAR(all.low, 0.722467, 1e-6);
  EXPECT_NEAR(all.high, 1, 1e-12);
  EXPECT_LE(all.high, 1);
  const Estimate none = ShareOf(0, 10);
  EXPECT_NEAR(none.low, 0, 1e-12);
  EXPECT_GE(none.low, 0);
  EXPECT_NEAR(none.high, 0.277533, 1e-6);
}

}  // namespace
}  // namespace strait::cli
