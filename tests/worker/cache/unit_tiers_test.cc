// SPDX-License-Identifier: Apache-2.0
//
// Defends: the pool's use is the sum of HeldBytes over sequences whose blocks become old as their tiers say,
// after every step; and a pool of their ReservedBytes and one block has room for it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "proto/model/cache_tiers.h"
#include "proto/model/reservation.h"
#include "worker/cache/unit_pool.h"

namespace strait {
namespace {

CacheTiers Tiers() {
  CacheTiers::Spec spec;
  spec.rope = 64;
  spec.young = {RowFormat::kFp8, 512};
  // Copied, cut where it lies, dropped.
  spec.old = {{RowFormat::kInt4, 240}, {RowFormat::kFp8, 240}, {RowFormat::kFp8, 0}};
  spec.sink_rows = 64;
  spec.young_rows = 128;
  spec.interval_rows = 512;
  return CacheTiers::Create(spec).value();
}

// Sequences of all layers in one pool.
class Worker {
 public:
  Worker(const CacheTiers& tiers, uint32_t num_units, size_t num_sequences)
      : tiers_(tiers), pool_(64, num_units), sequences_(num_sequences) {
    for (Sequence& sequence : sequences_) sequence.tables.resize(tiers.spec().old.size());
  }

  // As a plan's step does it: what is old by now, block by block, then the new rows' blocks.
  void Grow(size_t index, uint32_t end) {
    Sequence& sequence = sequences_[index];
    for (size_t layer = 0; layer < sequence.tables.size(); ++layer) {
      std::vector<UnitBlock>& table = sequence.tables[layer];
      const uint32_t sinks = tiers_.spec().sink_rows / limits::kBlockTokens;
      for (uint32_t b = sinks; b < sinks + tiers_.NumOldBlocks(end); ++b) {
        MakeOld(&table[b], tiers_.spec().old[layer]);
      }
      while (table.size() < BlocksPerLayer(end)) table.push_back(Take(tiers_.spec().young));
    }
    sequence.length = end;
  }

  uint32_t length(size_t index) const { return sequences_[index].length; }
  UnitPool& pool() { return pool_; }
  uint64_t HeldByRows() const {
    uint64_t bytes = 0;
    for (const Sequence& one : sequences_) {
      bytes +=
          HeldBytes({.tiers = &tiers_}, one.length, {0, static_cast<uint32_t>(one.tables.size())});
    }
    return bytes;
  }

 private:
  struct Sequence {
    uint32_t length = 0;
    std::vector<std::vector<UnitBlock>> tables;
  };

  void MakeOld(UnitBlock* block, BlockShape old) {
    if (block->pieces.empty() || block->shape == old) return;
    if (old.rank == 0) {
      pool_.Give(std::exchange(*block, UnitBlock()));
    } else if (old.format == block->shape.format) {
      pool_.Cut(block, old.rank);
    } else {
      UnitBlock copy = Take(old);
      pool_.Give(std::exchange(*block, std::move(copy)));
    }
  }

  UnitBlock Take(BlockShape shape) {
    if (std::optional<UnitBlock> block = pool_.Take(shape)) return std::move(*block);
    std::vector<RunMove> moves;
    pool_.Compact(&moves);
    for (Sequence& sequence : sequences_) {
      for (std::vector<UnitBlock>& table : sequence.tables) {
        for (UnitBlock& block : table) {
          if (!block.pieces.empty()) pool_.Follow(&block);
        }
      }
    }
    return pool_.Take(shape).value();
  }

  const CacheTiers& tiers_;
  UnitPool pool_;
  std::vector<Sequence> sequences_;
};

TEST(UnitTiersTest, UseIsTheSumOfHeldBytes) {
  constexpr uint32_t kSeed = 1;
  const CacheTiers tiers = Tiers();
  Worker worker(tiers, 5000, 3);
  std::mt19937 rng(kSeed);
  for (int step = 0; step < 400; ++step) {
    const size_t index = rng() % 3;
    const uint32_t length = worker.length(index);
    // No chunk crosses a point.
    const uint32_t room = tiers.spec().interval_rows - length % tiers.spec().interval_rows;
    worker.Grow(index, length + std::min<uint32_t>(1 + rng() % 100, room));
    ASSERT_EQ(worker.pool().used_bytes(), worker.HeldByRows())
        << "seed " << kSeed << " step " << step;
  }
  EXPECT_TRUE(worker.pool().CheckIntegrity().ok()) << worker.pool().CheckIntegrity();
}

TEST(UnitTiersTest, WhatIsReservedIsEnough) {
  constexpr uint32_t kLength = 6000;
  const CacheTiers tiers = Tiers();
  uint64_t bytes = 2 * ReservedBytes({.tiers = &tiers}, kLength, {0, 3});
  // A block that is copied is there twice, and less than a unit may be stranded, before it and in its runs.
  bytes += UnitBlockBytes(tiers.spec().old[0], 64) + 2 * UnitBytes(64);
  Worker worker(tiers, static_cast<uint32_t>(bytes / UnitBytes(64)), 2);
  for (uint32_t end = 64; end <= kLength; end += 64) {
    for (const size_t index : {0, 1}) worker.Grow(index, end);
    ASSERT_EQ(worker.pool().used_bytes(), worker.HeldByRows()) << end;
  }
  EXPECT_TRUE(worker.pool().CheckIntegrity().ok()) << worker.pool().CheckIntegrity();
}

}  // namespace
}  // namespace strait
