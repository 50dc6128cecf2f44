// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_stats.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "proto/base/check.h"

namespace strait::cli {
namespace {

constexpr double kNormalQuantile = 1.959963984540054;
constexpr size_t kExactDegrees = 400;  // beyond, an expansion is exact to nine digits

// P(|T| <= t), by the finite sums in the angle atan(t / sqrt(degrees)).
double StudentCoverage(double t, size_t degrees) {
  const double angle = std::atan(t / std::sqrt(static_cast<double>(degrees)));
  const double sine = std::sin(angle), cosine = std::cos(angle);
  const bool odd = degrees % 2 == 1;
  double term = odd ? cosine : 1, sum = 0;
  for (size_t k = odd ? 1 : 0; k + 2 <= degrees; k += 2) {
    sum += term;
    term *= cosine * cosine * static_cast<double>(k + 1) / static_cast<double>(k + 2);
  }
  return odd ? 2 / std::numbers::pi * (angle + sine * sum) : sine * sum;
}

Estimate Around(double value, double half_width, size_t count) {
  return {value, value - half_width, value + half_width, true, count};
}

}  // namespace

double StudentQuantile(size_t degrees) {
  STRAIT_CHECK(degrees > 0);
  if (degrees > kExactDegrees) {  // the expansion in powers of 1/degrees around the normal's
    const double z = kNormalQuantile, n = static_cast<double>(degrees), z3 = z * z * z;
    return z + (z3 + z) / (4 * n) + (5 * z3 * z * z + 16 * z3 + 3 * z) / (96 * n * n);
  }
  double low = 0, high = 16;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (StudentCoverage(middle, degrees) < 0.95 ? low : high) = middle;
  }
  return high;
}

Estimate MeanOf(std::span<const double> values) {
  const std::vector<double> ones(values.size(), 1.0);
  return values.empty() ? Estimate{} : RatioOf(values, ones);
}

Estimate PairedDifference(std::span<const double> a, std::span<const double> b) {
  STRAIT_CHECK(a.size() == b.size());
  std::vector<double> differences(a.size());
  for (size_t i = 0; i < a.size(); ++i) differences[i] = a[i] - b[i];
  return MeanOf(differences);
}

Estimate RatioOf(std::span<const double> part, std::span<const double> whole) {
  STRAIT_CHECK(part.size() == whole.size());
  const double n = static_cast<double>(part.size());
  double sum_part = 0, sum_whole = 0;
  for (size_t i = 0; i < part.size(); ++i) sum_part += part[i], sum_whole += whole[i];
  STRAIT_CHECK(sum_whole > 0);
  const double ratio = sum_part / sum_whole;
  if (part.size() < 2) return {ratio, ratio, ratio, false, part.size()};
  double squares = 0;
  for (size_t i = 0; i < part.size(); ++i) {
    const double residual = (part[i] - ratio * whole[i]) / (sum_whole / n);
    squares += residual * residual;
  }
  const double error = std::sqrt(squares / (n - 1) / n);
  return Around(ratio, StudentQuantile(part.size() - 1) * error, part.size());
}

Estimate IndependentDifference(const Estimate& a, const Estimate& b) {
  const double value = a.value - b.value;
  const size_t count = std::min(a.count, b.count);
  if (!a.has_interval || !b.has_interval) return {value, value, value, false, count};
  const auto error = [](const Estimate& e) {
    return (e.high - e.value) / StudentQuantile(e.count - 1);
  };
  return Around(value, StudentQuantile(count - 1) * std::hypot(error(a), error(b)), count);
}

Estimate Exponential(const Estimate& e) {
  return {std::exp(e.value), std::exp(e.low), std::exp(e.high), e.has_interval, e.count};
}

Estimate ShareOf(size_t right, size_t count) {
  STRAIT_CHECK(count > 0 && right <= count);
  const double n = static_cast<double>(count), share = static_cast<double>(right) / n;
  const double z2 = kNormalQuantile * kNormalQuantile;
  const double center = (share + z2 / (2 * n)) / (1 + z2 / n);
  const double half =
      kNormalQuantile / (1 + z2 / n) * std::sqrt(share * (1 - share) / n + z2 / (4 * n * n));
  return {share, std::max(0.0, center - half), std::min(1.0, center + half), true, count};
}

}  // namespace strait::cli
