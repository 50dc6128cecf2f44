// SPDX-License-Identifier: Apache-2.0
//
// FakeMoves is what a test's stage knows of sequences that come to it, or may be read here by others.
//
// Thread:  the test's.
// Why:     it checks what an honest worker would refuse, and that rows are asked for only where they are.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

struct FakeImport {
  PlacementEpoch placement;
  uint32_t rows = 0;            // that it has blocks for
  std::vector<TokenId> tokens;  // of rows that are here
};

struct FakeServe {
  PlacementEpoch placement;
  uint64_t secret = 0;
  uint32_t served_rows = 0;  // not 0: to be told
};

struct FakeMoves {
  std::map<SequenceId, FakeImport> imports;
  std::map<SequenceId, FakeServe> serves;
  std::deque<v1::FetchRows> fetches;  // not done

  // Both sides count so, each from what it has.
  static uint64_t DigestOf(LayerRange layers, uint32_t rows) {
    uint64_t sum = 0;
    for (LayerIndex l = layers.begin; l < layers.end; ++l) {
      for (uint64_t row = 0; row < rows; ++row)
        sum += (l + 1) * 0x9E3779B97F4A7C15u ^ (row * row + 7);
    }
    return sum;
  }
};

}  // namespace strait
