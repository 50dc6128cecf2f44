// SPDX-License-Identifier: Apache-2.0
//
// Defends: what comes back from host memory is what went there, byte for byte, or is told as lost; no block and
// no slot is used again before the last copy that uses it has ended.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/worker/number_cache.h"
#include "tests/worker/polled_copies.h"
#include "worker/cache/host_tier.h"

namespace strait {
namespace {

constexpr uint32_t kLayers = 2;
constexpr uint64_t kSlotBytes = kLayers * 64 * kHashRowBytes;

class HostTierTest : public testing::Test {
 protected:
  HostTierTest() {
    EXPECT_TRUE(cache_.Resize(40, {}).ok());
    budget_.limit_bytes = 3 * kSlotBytes;
    tier_ = std::make_unique<HostTier>(kLayers, &copies_, &budget_);
    tier_->SetBlocks(3);
  }
  ~HostTierTest() override {
    Clear();
    tier_.reset();
    EXPECT_EQ(budget_.used_bytes, 0u);
    EXPECT_TRUE(faults_.taken.empty());
  }

  static ContentKey Key(uint64_t n) { return {n, 1}; }
  static std::vector<BlockId> Blocks(BlockId first) { return {first, first + 1}; }
  void Fill(BlockId first, uint64_t seed) {
    for (BlockId block = first; block < first + kLayers; ++block) {
      for (uint32_t r = 0; r < 64; ++r)
        cache_.Row(block, r) = seed * 1'000'000 + block % 2 * 1'000 + r;
    }
  }
  bool Has(BlockId first, uint64_t seed) {
    for (BlockId block = first; block < first + kLayers; ++block) {
      for (uint32_t r = 0; r < 64; ++r) {
        if (cache_.Row(block, r) != seed * 1'000'000 + block % 2 * 1'000 + r) return false;
      }
    }
    return true;
  }
  std::vector<HostTier::End> Poll() { return tier_->Poll(++now_us_, copies_.Poll()); }
  std::vector<HostTier::End> Clear() {
    return tier_->Clear([this] { return copies_.Poll(); });
  }
  std::vector<HostTier::End> Drain() {
    std::vector<HostTier::End> all;
    for (int i = 0; tier_->busy(); ++i) {
      for (HostTier::End& end : Poll()) all.push_back(std::move(end));
      if (i >= 1'000) {
        ADD_FAILURE() << "copies do not end";
        break;
      }
    }
    return all;
  }

  NumberCache cache_;
  CopyFaults faults_;
  PolledCopies copies_{kLayers, &cache_, &faults_};
  HostBudget budget_;
  std::unique_ptr<HostTier> tier_;
  uint64_t now_us_ = 0;
};

TEST_F(HostTierTest, OutAndBack) {
  for (uint64_t n = 1; n <= 3; ++n) {
    Fill(static_cast<BlockId>(2 * n), n);
    tier_->Offload(Key(n), Blocks(static_cast<BlockId>(2 * n)));
  }
  EXPECT_TRUE(tier_->Uses(Key(2)));
  const auto out = Drain();
  ASSERT_EQ(out.size(), 3u);
  for (const auto& end : out) EXPECT_TRUE(end.ok && !end.is_return && end.abandoned.empty());
  EXPECT_FALSE(tier_->Uses(Key(2)));
  EXPECT_EQ(budget_.used_bytes, budget_.limit_bytes);
  EXPECT_EQ(tier_->TakeCopied().bytes, 3 * kSlotBytes);
  for (BlockId block = 2; block < 8; block += 2) Fill(block, 99);
  tier_->Return(Key(2), Blocks(20));
  const auto back = Drain();
  ASSERT_EQ(back.size(), 1u);
  EXPECT_TRUE(back[0].ok && back[0].is_return);
  EXPECT_EQ(back[0].key, Key(2));
  EXPECT_TRUE(Has(20, 2));
  // It is still there, and may come back again.
  tier_->Return(Key(2), Blocks(30));
  Drain();
  EXPECT_TRUE(Has(30, 2));
}

TEST_F(HostTierTest, ABitThatChangedIsFound) {
  Fill(2, 7);
  tier_->Offload(Key(1), Blocks(2));
  Drain();
  // Every bit counts, in the last byte as well.
  for (const uint64_t at : {uint64_t{0}, kSlotBytes / 2, kSlotBytes - 1}) {
    faults_.taken.begin()->first[at] ^= std::byte{1};
    Fill(20, 55);
    tier_->Return(Key(1), Blocks(20));
    const auto ends = Drain();
    ASSERT_EQ(ends.size(), 1u);
    EXPECT_FALSE(ends[0].ok) << at;
    EXPECT_TRUE(Has(20, 55)) << "nothing was written";
    faults_.taken.begin()->first[at] ^= std::byte{1};
  }
  tier_->Return(Key(1), Blocks(20));
  EXPECT_TRUE(Drain()[0].ok);
}

TEST_F(HostTierTest, ACopyThatFailsLosesTheBlock) {
  Fill(2, 7);
  faults_.fail_next = true;
  tier_->Offload(Key(1), Blocks(2));
  EXPECT_FALSE(Drain()[0].ok);
  tier_->Return(Key(1), Blocks(20));
  const auto ends = Drain();
  EXPECT_TRUE(ends.size() == 1 && ends[0].is_return && !ends[0].ok);
  // Of one that is well a failed way back loses nothing but that way.
  tier_->Offload(Key(2), Blocks(2));
  Drain();
  faults_.fail_next = true;
  tier_->Return(Key(2), Blocks(20));
  EXPECT_FALSE(Drain()[0].ok);
  tier_->Return(Key(2), Blocks(20));
  EXPECT_TRUE(Drain()[0].ok);
  EXPECT_TRUE(Has(20, 7));
}

TEST_F(HostTierTest, AReturnWaitsForItsOwnWayOut) {
  faults_.delay_polls = 3;
  Fill(2, 7);
  tier_->Offload(Key(1), Blocks(2));
  tier_->Return(Key(1), Blocks(20));
  const auto ends = Drain();
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_TRUE(ends[1].ok && ends[1].is_return);
  EXPECT_TRUE(Has(20, 7));
}

TEST_F(HostTierTest, AbandonedBlocksAreToldWithTheLastCopy) {
  faults_.delay_polls = 2;
  Fill(2, 7);
  tier_->Offload(Key(1), Blocks(2));
  tier_->Abandon(Key(1), Blocks(2));
  EXPECT_FALSE(tier_->Uses(Key(1)));
  tier_->Return(Key(1), Blocks(20));
  EXPECT_TRUE(tier_->Uses(Key(1)));
  tier_->Abandon(Key(1), Blocks(20));
  tier_->Forget(Key(1));
  EXPECT_FALSE(tier_->has(Key(1)));
  const auto ends = Drain();
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_EQ(ends[0].abandoned, Blocks(2));
  EXPECT_EQ(ends[1].abandoned, Blocks(20));
}

TEST_F(HostTierTest, ASlotIsUsedAgainWhenItsLastCopyHasEnded) {
  for (uint64_t n = 1; n <= 3; ++n) {
    Fill(static_cast<BlockId>(2 * n), n);
    tier_->Offload(Key(n), Blocks(static_cast<BlockId>(2 * n)));
  }
  Drain();
  faults_.delay_polls = 4;
  tier_->Return(Key(1), Blocks(20));
  (void)Poll();
  tier_->Forget(Key(1));
  Fill(30, 4);
  tier_->Offload(Key(4), Blocks(30));  // all memory is taken: it waits for that slot
  const auto ends = Drain();
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_TRUE(ends[0].ok && ends[1].ok);
  EXPECT_TRUE(Has(20, 1));
  tier_->Return(Key(4), Blocks(10));
  Drain();
  EXPECT_TRUE(Has(10, 4));
}

TEST_F(HostTierTest, WithoutMemoryABlockIsLost) {
  for (uint64_t n = 1; n <= 4; ++n) tier_->Offload(Key(n), Blocks(static_cast<BlockId>(2 * n)));
  const auto ends = Drain();
  ASSERT_EQ(ends.size(), 4u);
  EXPECT_FALSE(ends[3].ok);
  tier_->Return(Key(4), Blocks(20));
  EXPECT_FALSE(Drain()[0].ok);
}

TEST_F(HostTierTest, ManyAtOnceAndClear) {
  budget_.limit_bytes = 100 * kSlotBytes;
  tier_->SetBlocks(100);
  faults_.delay_polls = 5;
  for (uint64_t n = 1; n <= 100; ++n)
    tier_->Offload(Key(n), Blocks(static_cast<BlockId>(n % 19 * 2)));
  (void)Poll();
  EXPECT_LE(copies_.num_under_way(), kMaxTierCopies);
  tier_->Abandon(Key(100), Blocks(100 % 19 * 2));
  const auto ends = Clear();
  EXPECT_EQ(
      std::count_if(ends.begin(), ends.end(), [](const auto& e) { return !e.abandoned.empty(); }),
      1);
  EXPECT_EQ(tier_->num_blocks(), 0u);
  EXPECT_EQ(copies_.num_under_way(), 0u);
  EXPECT_EQ(budget_.used_bytes, 0u);
}

}  // namespace
}  // namespace strait
