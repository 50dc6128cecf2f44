// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_timeline.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "proto/base/check.h"

namespace strait::cli {

double BinSeconds(double seconds) {
  return std::max(1.0, std::ceil(seconds / static_cast<double>(kMaxBins)));
}

json::Array CountByTime(const std::vector<double>& at_s, double seconds) {
  const double bin_s = BinSeconds(seconds);
  std::vector<uint64_t> counts(static_cast<size_t>(std::max(1.0, std::ceil(seconds / bin_s))));
  const auto last = static_cast<double>(counts.size() - 1);
  for (const double at : at_s) {
    ++counts[static_cast<size_t>(std::clamp(std::floor(at / bin_s), 0.0, last))];
  }
  return json::Array(counts.begin(), counts.end());
}

json::Array CountBySize(const std::vector<double>& values, const std::vector<double>& edges) {
  std::vector<uint64_t> counts(edges.size() - 1);
  for (const double value : values) {
    STRAIT_CHECK(value >= edges.front() && value < edges.back());
    ++counts[static_cast<size_t>(std::upper_bound(edges.begin(), edges.end(), value) -
                                 edges.begin() - 1)];
  }
  const auto any = [](uint64_t count) { return count > 0; };
  const auto first = std::find_if(counts.begin(), counts.end(), any) - counts.begin();
  const auto end = counts.rend() - std::find_if(counts.rbegin(), counts.rend(), any);
  json::Array out;
  for (auto i = first; i < end; ++i) {
    const auto at = static_cast<size_t>(i);
    out.push_back(json::Object{{"from", edges[at]}, {"to", edges[at + 1]}, {"count", counts[at]}});
  }
  return out;
}

json::Array Some(json::Array points) {
  if (points.size() <= kMaxPoints) return points;
  const size_t step = (points.size() + kMaxPoints - 1) / kMaxPoints;
  json::Array some;
  for (size_t i = 0; i < points.size(); i += step) some.push_back(std::move(points[i]));
  return some;
}

}  // namespace strait::cli
