// SPDX-License-Identifier: Apache-2.0
//
// Defends: what BlockCopies promises (moved_rows.h), of the CUDA backend, in both row formats; that
// runs long and short, many and few come byte by byte from where they are, to and from pinned, plain
// and device memory, and nothing else is touched; that a buffer that is not where it says is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/moved_rows.h"
#include "tests/worker/number_cache.h"
#include "worker/model/cuda/device_copies.h"

namespace strait {
namespace {

using namespace moved_rows;  // NOLINT: the test's words
using testing::HasSubstr;

class CudaCopiesTest : public CudaTestWithParam<RowFormat> {
 protected:
  void SetUp() override {
    CudaTestWithParam<RowFormat>::SetUp();
    if (IsSkipped()) return;
    backend_ = MakeCuda(
        OnCuda(TinyV3()),
        {.memory_bytes = uint64_t{1} << 30, .deterministic = true, .row_format = GetParam()});
  }

  std::unique_ptr<CudaBackend> backend_;
};

TEST_P(CudaCopiesTest, MovedRowsGoOn) { ExpectMovedRowsGoOn(backend_.get(), NanTrash); }
TEST_P(CudaCopiesTest, ReadsAreBehindSteps) { ExpectReadsBehindSteps(backend_.get(), NanTrash); }
TEST_P(CudaCopiesTest, WritesAreBehindSteps) { ExpectWritesBehindSteps(backend_.get(), NanTrash); }
TEST_P(CudaCopiesTest, Refusals) { ExpectRefusals(backend_.get()); }
TEST_P(CudaCopiesTest, ALimit) { ExpectALimit(backend_.get()); }
TEST_P(CudaCopiesTest, TheEndWaits) { ExpectTheEndWaits(backend_.get()); }

// Else copies to memory that workers share would go through staging.
TEST_P(CudaCopiesTest, LockedPagesAreSuchMemoryForAsLong) {
  constexpr size_t kBytes = 1 << 20;
  const std::unique_ptr<std::byte, void (*)(void*)> memory(
      static_cast<std::byte*>(std::aligned_alloc(4096, kBytes)), &std::free);
  const auto type = [&] {
    cudaPointerAttributes found = {};
    EXPECT_EQ(cudaPointerGetAttributes(&found, memory.get() + kBytes - 1), cudaSuccess);
    return found.type;
  };
  EXPECT_EQ(type(), cudaMemoryTypeUnregistered);
  auto locked = backend_->LockPages({memory.get(), kBytes});
  ASSERT_TRUE(locked.ok()) << locked.status();
  EXPECT_EQ(type(), cudaMemoryTypeHost);
  locked->reset();
  EXPECT_EQ(type(), cudaMemoryTypeUnregistered);
}

INSTANTIATE_TEST_SUITE_P(Rows, CudaCopiesTest, testing::Values(RowFormat::kBf16, RowFormat::kFp8),
                         [](const auto& info) { return RowFormatName(info.param); });

// A pool without a model: V3's fp8 blocks.
class DeviceCopiesTest : public CudaTest {
 protected:
  static constexpr uint32_t kBlocks = 300;  // 12.6 MB, three times the staging
  static constexpr uint32_t kRowBytes = 656;

  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_TRUE(cache_.Resize(kBlocks, {}).ok());  // for its size alone
    TakeOk(DeviceMemory::Create(uint64_t{kBlocks} * 64 * kRowBytes), &pool_);
    TakeOk(DeviceMemory::Create(kCudaCopyStagingBytes), &staging_);
    auto copies = DeviceCopies::Create(1, {.device = 0,
                                           .pool = pool_.data(),
                                           .cache = &cache_,
                                           .row_bytes = kRowBytes,
                                           .staging = staging_.data(),
                                           .pinned = pinned_.get(),
                                           .newest_step = [this] { return newest_step_; }});
    ASSERT_TRUE(copies.ok()) << copies.status();
    copies_ = *std::move(copies);
  }
  template <class T>
  static void TakeOk(absl::StatusOr<T> from, T* to) {
    ASSERT_TRUE(from.ok()) << from.status();
    *to = *std::move(from);
  }

  static Bytes Noise(size_t count, uint32_t seed) {
    std::mt19937 rng(seed);
    Bytes bytes(count);
    for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
    return bytes;
  }
  void SetPool(const Bytes& bytes) {
    ASSERT_EQ(cudaMemcpy(pool_.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
              cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  Bytes Pool() const { return FromDevice(pool_); }
  static Bytes FromDevice(const DeviceMemory& memory) {
    Bytes bytes(memory.bytes());
    EXPECT_EQ(cudaMemcpy(bytes.data(), memory.data(), bytes.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return bytes;
  }
  // What a copy of the list is to do, the simple way.
  static void Each(const std::vector<BlockRows>& list,
                   const std::function<void(size_t pool, size_t buffer, size_t bytes)>& visit) {
    size_t at = 0;
    for (const BlockRows& entry : list) {
      const size_t bytes = size_t{entry.num_rows} * kRowBytes;
      visit((size_t{entry.block} * 64 + entry.first_row) * kRowBytes, at, bytes);
      at += bytes;
    }
  }

  struct Case {
    const char* name;
    std::vector<BlockRows> list;
  };
  static std::vector<Case> Cases() {
    std::vector<BlockId> ids(kBlocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(3));
    Case scattered{"more pieces than a launch takes, more bytes than staging", {}};
    for (int i = 0; i < 200; ++i) scattered.list.push_back({0, ids[i], 0, 64});
    Case run{"one run longer than staging", {}};
    for (BlockId block = 17; block < 160; ++block) run.list.push_back({0, block, 0, 64});
    Case rows{"single rows", {}};
    for (int i = 0; i < 150; ++i) rows.list.push_back({0, ids[i], ids[i] % 64, 1});
    Case mixed{"runs, parts of blocks and rows in turn", {}};
    for (BlockId block = 10; block < 250; ++block) {
      // Every 30th block ends a run: parts of one, out of order.
      if (block % 30 != 0) {
        mixed.list.push_back({0, block, 0, 64});
      } else {
        mixed.list.push_back({0, block, 60, 4});
        mixed.list.push_back({0, block, 3, 2});
      }
    }
    return {scattered, run, rows, mixed, {"one row", {{0, 299, 63, 1}}}};
  }

  const std::shared_ptr<PinnedPool> pinned_ = std::make_shared<PinnedPool>();
  NumberCache cache_;
  DeviceMemory pool_;
  DeviceMemory staging_;
  cudaEvent_t newest_step_ = nullptr;
  std::unique_ptr<DeviceCopies> copies_;
};

TEST_F(DeviceCopiesTest, EveryByteFromWhereItIs) {
  const Bytes pool = Noise(pool_.bytes(), 1);
  SetPool(pool);
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.name);
    Bytes expected(BytesOf(*copies_, c.list));
    Each(c.list, [&](size_t in_pool, size_t in_buffer, size_t bytes) {
      std::memcpy(expected.data() + in_buffer, pool.data() + in_pool, bytes);
    });
    Bytes plain(expected.size());
    const auto pinned = copies_->Take(expected.size());
    const auto device = DeviceMemory::Create(expected.size());
    ASSERT_TRUE(pinned.ok() && device.ok());
    const auto a = copies_->Read(c.list, {absl::MakeSpan(plain), false});
    const auto b = copies_->Read(c.list, {{pinned->data.get(), expected.size()}, false});
    const auto d = copies_->Read(c.list, {{device->data(), expected.size()}, true});
    ASSERT_TRUE(a.ok() && b.ok() && d.ok()) << a.status() << b.status() << d.status();
    WaitFor(copies_.get(), *d);
    EXPECT_TRUE(plain == expected);
    EXPECT_EQ(std::memcmp(pinned->data.get(), expected.data(), expected.size()), 0);
    EXPECT_TRUE(FromDevice(*device) == expected);
  }
  EXPECT_TRUE(Pool() == pool);
}

TEST_F(DeviceCopiesTest, EveryByteToWhereItBelongsAndNoOther) {
  for (const Case& c : Cases()) {
    for (const char* memory : {"plain", "pinned", "device"}) {
      SCOPED_TRACE(std::string(c.name) + ", " + memory);
      Bytes pool = Noise(pool_.bytes(), 2);
      SetPool(pool);
      const Bytes rows = Noise(BytesOf(*copies_, c.list), 3);
      Each(c.list, [&](size_t in_pool, size_t in_buffer, size_t bytes) {
        std::memcpy(pool.data() + in_pool, rows.data() + in_buffer, bytes);
      });
      const auto pinned = copies_->Take(rows.size());
      const auto device = DeviceMemory::Create(rows.size());
      ASSERT_TRUE(pinned.ok() && device.ok());
      RowsIn from = {absl::MakeConstSpan(rows), false};
      if (memory[1] == 'i') {
        std::memcpy(pinned->data.get(), rows.data(), rows.size());
        from.bytes = {pinned->data.get(), rows.size()};
      } else if (memory[0] == 'd') {
        ASSERT_EQ(cudaMemcpy(device->data(), rows.data(), rows.size(), cudaMemcpyHostToDevice),
                  cudaSuccess);
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        from = {{device->data(), rows.size()}, true};
      }
      const auto id = copies_->Write(c.list, from);
      ASSERT_TRUE(id.ok()) << id.status();
      WaitFor(copies_.get(), *id);
      EXPECT_TRUE(Pool() == pool);
    }
  }
}

TEST_F(DeviceCopiesTest, ABufferIsWhereItSays) {
  const std::vector<BlockRows> list = {{0, 0, 0, 1}};
  const auto device = DeviceMemory::Create(2 * kRowBytes);
  ASSERT_TRUE(device.ok());
  Bytes host(kRowBytes);
  const auto refused = [&](RowsOut to) {
    const auto id = copies_->Read(list, to);
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(id.status().message());
  };
  EXPECT_THAT(refused({absl::MakeSpan(host), true}), HasSubstr("not on the device"));
  EXPECT_THAT(refused({{device->data(), kRowBytes}, false}), HasSubstr("on a device"));
  EXPECT_THAT(refused({{device->data() + 8, kRowBytes}, true}), HasSubstr("multiple of 16"));
  EXPECT_EQ(copies_->num_under_way(), 0u);
  const auto id = copies_->Read(list, {{device->data() + 16, kRowBytes}, true});
  ASSERT_TRUE(id.ok()) << id.status();
  WaitFor(copies_.get(), *id);
}

// A step that is begun writes; the copy has what it wrote, also if the event is recorded again for a
// later step before the copy is made.
TEST_F(DeviceCopiesTest, BehindTheNewestStep) {
  cudaStream_t steps = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&steps, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventCreateWithFlags(&newest_step_, cudaEventDisableTiming), cudaSuccess);
  SetPool(Bytes(pool_.bytes()));
  const std::vector<BlockRows> list = {{0, 5, 0, 64}, {0, 7, 0, 64}};
  Bytes rows(BytesOf(*copies_, list));
  ASSERT_EQ(cudaMemsetAsync(pool_.data(), 1, pool_.bytes(), steps), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(newest_step_, steps), cudaSuccess);
  const auto id = copies_->Read(list, {absl::MakeSpan(rows), false});
  ASSERT_TRUE(id.ok());
  // Rows of others.
  ASSERT_EQ(cudaMemsetAsync(pool_.data(), 2, 64 * kRowBytes, steps), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(newest_step_, steps), cudaSuccess);
  WaitFor(copies_.get(), *id);
  EXPECT_TRUE(std::all_of(rows.begin(), rows.end(), [](std::byte b) { return b == std::byte{1}; }));
  copies_.reset();
  ASSERT_EQ(cudaStreamSynchronize(steps), cudaSuccess);
  ASSERT_EQ(cudaEventDestroy(newest_step_), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(steps), cudaSuccess);
}

}  // namespace
}  // namespace strait
