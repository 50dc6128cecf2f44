// SPDX-License-Identifier: Apache-2.0
//
// What a stress report says of when and how much, in few numbers: counts by time, counts by size, a
// share of many points.
//
// Thread:  pure functions.
// Limits:  kMaxBins of time; kMaxPoints.
#pragma once

#include <cstddef>
#include <vector>

#include "proto/base/json.h"

namespace strait::cli {

inline constexpr size_t kMaxBins = 120;
inline constexpr size_t kMaxPoints = 1000;

// Whole seconds, so that `seconds` have at most kMaxBins.
double BinSeconds(double seconds);

// How many of the times lie in each bin from 0 to `seconds`; what is outside counts for the bin at that
// end.
json::Array CountByTime(const std::vector<double>& at_s, double seconds);

// `{"from", "to", "count"}` of each range between two edges, from the first with any to the last.
// REQUIRES: edges ascend, values are at least the first and below the last.
json::Array CountBySize(const std::vector<double>& values, const std::vector<double>& edges);

// All, or every n-th where they are more than kMaxPoints.
json::Array Some(json::Array points);

}  // namespace strait::cli
