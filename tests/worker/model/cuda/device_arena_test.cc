// SPDX-License-Identifier: Apache-2.0
//
// Defends: memory that one lease gives back serves another, wherever it lay; a lease keeps its contents
// and its address as it grows; what fails changes nothing; all slabs come back.
#include "worker/model/cuda/device_arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/kernels/cuda/gpu_test.h"

namespace strait {
namespace {

class DeviceArenaTest : public gpu_test::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    auto slab_bytes = DeviceArena::SlabBytesFor(0, 1);
    ASSERT_TRUE(slab_bytes.ok()) << slab_bytes.status();
    slab_bytes_ = *slab_bytes;
    budget_ = std::make_shared<MemoryBudget>(kSlabs * slab_bytes_);
    auto arena = DeviceArena::Create(0, budget_, slab_bytes_, budget_->total() / 2);
    ASSERT_TRUE(arena.ok()) << arena.status();
    arena_ = *std::move(arena);
  }
  static void Write(const DeviceArena::Lease& lease, uint64_t begin, uint64_t end, int value) {
    ASSERT_EQ(cudaMemset(lease.data() + begin, value, end - begin), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // a lease wants the device to be done
  }
  static bool IsAll(const DeviceArena::Lease& lease, uint64_t begin, uint64_t end, int value) {
    std::vector<uint8_t> bytes(end - begin);
    EXPECT_EQ(cudaMemcpy(bytes.data(), lease.data() + begin, bytes.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    for (const uint8_t byte : bytes) {
      if (byte != value) return false;
    }
    return true;
  }

  static constexpr uint64_t kSlabs = 24;
  uint64_t slab_bytes_ = 0;
  std::shared_ptr<MemoryBudget> budget_;
  std::shared_ptr<DeviceArena> arena_;
};

TEST_F(DeviceArenaTest, SlabsAreFewAndSmallBesideTheMemory) {
  const uint64_t memory = uint64_t{120} << 30;
  const auto bytes = DeviceArena::SlabBytesFor(0, memory);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes % slab_bytes_, 0u);
  EXPECT_LE(*bytes, memory / 2000);
  EXPECT_GE(*bytes, memory / 5000);
}

TEST_F(DeviceArenaTest, WhatIsGivenBackServesWhereverItLay) {
  // Every second slab's worth.
  std::vector<DeviceArena::Lease> leases;
  for (uint64_t i = 0; i < kSlabs; ++i) {
    auto lease = arena_->Take(slab_bytes_ - 5, "a slab");
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(lease->bytes(), slab_bytes_);
    Write(*lease, 0, lease->bytes(), static_cast<int>(i));
    leases.push_back(*std::move(lease));
  }
  const auto none = arena_->Take(1, "one too many");
  EXPECT_EQ(none.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(none.status().message().find("one too many"), std::string::npos) << none.status();
  for (uint64_t i = 0; i < kSlabs; i += 2) leases[i] = DeviceArena::Lease();
  EXPECT_EQ(budget_->used(), kSlabs / 2 * slab_bytes_);
  auto large = arena_->Take(kSlabs / 2 * slab_bytes_, "all that is left");
  ASSERT_TRUE(large.ok()) << large.status();
  Write(*large, 0, large->bytes(), 99);
  for (uint64_t i = 1; i < kSlabs; i += 2) {
    EXPECT_TRUE(IsAll(leases[i], 0, slab_bytes_, static_cast<int>(i))) << i;
  }
  EXPECT_TRUE(IsAll(*large, 0, large->bytes(), 99));
  leases.clear();
  *large = DeviceArena::Lease();
  EXPECT_EQ(budget_->used(), 0u);
}

TEST_F(DeviceArenaTest, ALeaseGrowsInPlaceAndFailsWhole) {
  auto lease = arena_->Take(1, kSlabs * slab_bytes_, "a cache");
  ASSERT_TRUE(lease.ok()) << lease.status();
  std::byte* const at = lease->data();
  Write(*lease, 0, slab_bytes_, 7);
  auto other = arena_->Take(4 * slab_bytes_, "another");
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(lease->Resize(21 * slab_bytes_, "a cache").code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(lease->bytes(), slab_bytes_);
  ASSERT_TRUE(lease->Resize(20 * slab_bytes_, "a cache").ok());
  EXPECT_EQ(lease->data(), at);
  Write(*lease, slab_bytes_, 20 * slab_bytes_, 8);
  ASSERT_TRUE(lease->Resize(3 * slab_bytes_, "a cache").ok());
  EXPECT_TRUE(IsAll(*lease, 0, slab_bytes_, 7));
  EXPECT_TRUE(IsAll(*lease, slab_bytes_, 3 * slab_bytes_, 8));
  // A lease outlives its arena's other owners.
  arena_.reset();
  ASSERT_TRUE(lease->Resize(10 * slab_bytes_, "a cache").ok());
  EXPECT_TRUE(IsAll(*lease, 0, slab_bytes_, 7));
}

TEST_F(DeviceArenaTest, RandomLivesOfLeases) {
  std::mt19937 rng(11);
  struct Held {
    DeviceArena::Lease lease;
    int value = 0;
  };
  std::vector<Held> held;
  uint64_t slabs = 0;
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE(i);
    const uint64_t count = rng() % 6;
    if (held.empty() || rng() % 3 == 0) {
      auto lease = arena_->Take(count * slab_bytes_, kSlabs * slab_bytes_, "a life");
      ASSERT_EQ(lease.ok(), slabs + count <= kSlabs) << lease.status();
      if (!lease.ok()) continue;
      slabs += count;
      held.push_back({*std::move(lease), i % 251});
      Write(held.back().lease, 0, count * slab_bytes_, held.back().value);
    } else {
      Held& one = held[rng() % held.size()];
      const uint64_t before = one.lease.bytes() / slab_bytes_;
      ASSERT_TRUE(IsAll(one.lease, 0, one.lease.bytes(), one.value));
      if (rng() % 2 == 0) {
        slabs -= before;
        std::swap(one, held.back());
        held.pop_back();
      } else {
        const bool fits = slabs - before + count <= kSlabs;
        ASSERT_EQ(one.lease.Resize(count * slab_bytes_, "a life").ok(), fits);
        if (!fits) continue;
        slabs += count - before;
        if (count > before) Write(one.lease, before * slab_bytes_, count * slab_bytes_, one.value);
      }
    }
    ASSERT_EQ(budget_->used(), slabs * slab_bytes_);
  }
}

}  // namespace
}  // namespace strait
