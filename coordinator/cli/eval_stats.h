// SPDX-License-Identifier: Apache-2.0
//
// Estimates with 95 % confidence intervals: means and ratios over documents, differences, shares.
//
// Thread:  pure functions.
// Why:     a document is the unit of all intervals of log-loss, because tokens of one document are
//          not independent; documents of one window's length weigh the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace strait::cli {

struct Estimate {
  double value = 0;
  double low = 0, high = 0;   // equal to value when there is no interval
  bool has_interval = false;  // at least two documents
  size_t count = 0;           // documents, or answers
};

// The 97.5 % quantile of Student's t. REQUIRES: degrees > 0.
double StudentQuantile(size_t degrees);

// Mean, with Student's interval. Of no values: 0, without an interval.
Estimate MeanOf(std::span<const double> values);

// MeanOf a[i] - b[i]. REQUIRES: equal sizes.
Estimate PairedDifference(std::span<const double> a, std::span<const double> b);

// Σ part / Σ whole, its interval by the linearized ratio. REQUIRES: equal sizes, Σ whole > 0.
Estimate RatioOf(std::span<const double> part, std::span<const double> whole);

// a - b of two estimates of different samples (Welch's interval, with the fewer degrees).
Estimate IndependentDifference(const Estimate& a, const Estimate& b);

// e to the power of it: log-loss to perplexity.
Estimate Exponential(const Estimate& estimate);

// A share with Wilson's interval. REQUIRES: 0 < count, right <= count.
Estimate ShareOf(size_t right, size_t count);

}  // namespace strait::cli
