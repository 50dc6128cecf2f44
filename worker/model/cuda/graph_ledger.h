// SPDX-License-Identifier: Apache-2.0
//
// GraphLedger says which of a stage's decode graphs must go so that CUDA's memory for them stays
// within the stage's.
//
// Thread:  loop thread only.
// Limits:  kMaxGraphs; the bytes given, but for one graph that is always kept.
// Why:     what a graph takes is CUDA's own business and differs between versions: it is measured
//          when a graph is made. The one unused for longest goes; its size is captured again when
//          it comes again, which costs milliseconds and moves no token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace strait {

inline constexpr size_t kMaxGraphs = 64;

class GraphLedger {
 public:
  explicit GraphLedger(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  // A graph for `rows` rows took `bytes`. Those that must go, never this one.
  std::vector<int32_t> Add(int32_t rows, uint64_t bytes);
  // It is about to run. REQUIRES: it was added, and has not gone.
  void Used(int32_t rows);

  uint64_t bytes() const { return bytes_; }
  size_t size() const { return graphs_.size(); }

 private:
  struct Graph {
    uint64_t bytes = 0;
    uint64_t used = 0;  // when, in uses
  };
  const uint64_t max_bytes_;
  std::map<int32_t, Graph> graphs_;
  uint64_t bytes_ = 0;
  uint64_t uses_ = 0;
};

}  // namespace strait
