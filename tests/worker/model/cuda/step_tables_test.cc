// SPDX-License-Identifier: Apache-2.0
//
// Defends: what the segments of every step point to on the device are the page tables of its batch,
// while sequences come, grow, are cut and go, with two steps begun; a step without new blocks brings
// no entry.
//
// Why:     where no sequence of the last step lies the device is filled with ids that no pool has, so
//          that tables taken for known that are not show every time. Batches are the LatentCache's: so
//          its numbers are under test, too.
#include "worker/model/cuda/step_tables.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "proto/model/reservation.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "worker/cache/latent_cache.h"
#include "worker/model/cuda/device_tables.h"

namespace strait {
namespace {

using gpu_test::Buffer;

constexpr uint32_t kLayers = 3;
constexpr uint32_t kPoolBlocks = 200;
constexpr uint32_t kMaxPositions = 4096;
constexpr BlockId kWild = 0xdead0000;

StageSpec Spec() {
  StageSpec spec;
  spec.layers = {1, 1 + kLayers};
  spec.pool_blocks = kPoolBlocks;
  return spec;
}

StepLimits Limits() {
  StepLimits limits;
  limits.table_bytes = 64 << 10;
  return limits;
}

// Of all the memory of the page tables, that of new entries at its end.
int64_t NumEntries() {
  return static_cast<int64_t>(DeviceTables::DeviceBytes(kLayers, kPoolBlocks) / sizeof(BlockId));
}

class StepTablesTest : public gpu_test::GpuTest {
 protected:
  // A step: what its batch has, what the device has when the stream comes to it.
  struct Step {
    std::optional<StepTables> tables;
    PinnedMemory arrivals;
    std::vector<std::vector<std::vector<BlockId>>> expected;  // [sequences][layers][blocks]
    std::vector<cuda::MlaSegment> segments;                   // [layers, sequences]
    std::vector<BlockId> entries;                             // [NumEntries()]
    cudaEvent_t done = nullptr;
  };

  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    entries_.emplace(NumEntries());
    rows_.emplace(static_cast<int64_t>(limits_.table_bytes));
    device_.emplace(Spec(), reinterpret_cast<std::byte*>(entries_->data()));
    FillWild({});
    for (Step& step : steps_) {
      auto tables = StepTables::Create(*pinned_, limits_, rows_->data());
      ASSERT_TRUE(tables.ok()) << tables.status();
      step.tables.emplace(*std::move(tables));
      step.entries.resize(static_cast<size_t>(NumEntries()));
      auto arrivals = pinned_->Take(DeviceTables::ArrivalBytes(kPoolBlocks));
      ASSERT_TRUE(arrivals.ok()) << arrivals.status();
      step.arrivals = *std::move(arrivals);
      ASSERT_EQ(cudaEventCreateWithFlags(&step.done, cudaEventDisableTiming), cudaSuccess);
    }
  }
  void TearDown() override {
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    }
    for (const Step& step : steps_) {
      if (step.done != nullptr) {
        EXPECT_EQ(cudaEventDestroy(step.done), cudaSuccess);
      }
    }
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    }
    GpuTest::TearDown();
  }

  // Begins a step of the last row of each, and looks at what the one before the last had; how many
  // entries it brought. `promised`: their numbers are given.
  uint64_t Begin(const std::vector<SequenceId>& ids, bool promised = true) {
    Step& step = steps_[next_];
    next_ = (next_ + 1) % steps_.size();
    Check(&step);
    StageBatch batch;
    std::vector<BatchSequence> sequences;
    const std::vector<TokenId> tokens(kMaxPositions, 3);
    step.expected.clear();
    for (const SequenceId id : ids) {
      BatchSequence& sequence = sequences.emplace_back();
      const uint32_t length = cache_.length(id);
      sequence.id = id;
      sequence.first_position = length - 1;
      sequence.num_tokens = 1;
      sequence.tokens = absl::MakeConstSpan(tokens).subspan(0, length);
      sequence.page_tables = cache_.PageTables(id);
      sequence.tables_id = promised ? cache_.tables_id(id) : 0;
      auto& expected = step.expected.emplace_back();
      for (const auto table : sequence.page_tables)
        expected.emplace_back(table.begin(), table.end());
    }
    batch.sequences = sequences;
    batch.num_tokens = static_cast<uint32_t>(ids.size());
    const uint64_t before = device_->entries_brought();
    const absl::Status status =
        step.tables->Fill(batch, kMaxPositions, kPoolBlocks, &*device_,
                          absl::MakeSpan(step.arrivals.data(), step.arrivals.bytes()), stream_);
    EXPECT_TRUE(status.ok()) << status;
    // What kernels would read, in the stream's order.
    step.segments.resize(ids.size() * kLayers);
    EXPECT_EQ(cudaMemcpyAsync(step.segments.data(), step.tables->segments(0),
                              step.segments.size() * sizeof(cuda::MlaSegment),
                              cudaMemcpyDeviceToHost, stream_),
              cudaSuccess);
    EXPECT_EQ(
        cudaMemcpyAsync(step.entries.data(), entries_->data(),
                        step.entries.size() * sizeof(BlockId), cudaMemcpyDeviceToHost, stream_),
        cudaSuccess);
    EXPECT_EQ(cudaEventRecord(step.done, stream_), cudaSuccess);
    const absl::Status integrity = device_->CheckIntegrity();
    EXPECT_TRUE(integrity.ok()) << integrity;
    return device_->entries_brought() - before;
  }
  // Waits for a step, if it is begun, and looks at what it had.
  void Check(Step* step) {
    if (step->expected.empty()) return;
    EXPECT_EQ(cudaEventSynchronize(step->done), cudaSuccess);
    for (size_t s = 0; s < step->expected.size(); ++s) {
      for (size_t layer = 0; layer < kLayers; ++layer) {
        const std::vector<BlockId>& expected = step->expected[s][layer];
        const int64_t first = First(*step, s, layer);
        ASSERT_LE(first + static_cast<int64_t>(expected.size()), entries_->count());
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), step->entries.begin() + first))
            << "sequence " << s << " of the batch, layer " << layer;
      }
    }
  }
  void CheckAll() {
    for (Step& step : steps_) Check(&step);
  }
  const Step& newest() const { return steps_[(next_ + steps_.size() - 1) % steps_.size()]; }
  int64_t First(const Step& step, size_t s, size_t layer) const {
    return step.segments[layer * step.expected.size() + s].page_table - entries_->data();
  }
  // All entries but those at true of `kept`. Waits for the stream.
  void FillWild(const std::vector<bool>& kept) {
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    std::vector<BlockId> entries = entries_->Get();
    for (size_t i = 0; i < entries.size(); ++i) {
      if (kept.empty() || !kept[i]) entries[i] = kWild + static_cast<BlockId>(i);
    }
    entries_->Put(entries);
  }

  const StepLimits limits_ = Limits();
  const std::shared_ptr<PinnedPool> pinned_ = std::make_shared<PinnedPool>();
  BlockPool pool_{kPoolBlocks};
  LatentCache cache_{kLayers, &pool_};
  cudaStream_t stream_ = nullptr;
  std::optional<Buffer<BlockId>> entries_;
  std::optional<Buffer<std::byte>> rows_;
  std::optional<DeviceTables> device_;
  std::array<Step, kMaxStepsBegun> steps_;
  size_t next_ = 0;
};

TEST_F(StepTablesTest, AStepWithoutNewBlocksBringsNothing) {
  for (const uint64_t id : {1, 2, 3}) cache_.Open({id});
  cache_.Grow({1}, 300);
  cache_.Grow({2}, 64);
  cache_.Grow({3}, 1);
  EXPECT_EQ(Begin({{1}, {2}, {3}}), (5u + 1 + 1) * kLayers);
  for (uint32_t length = 301; length <= 320; ++length) {
    cache_.Grow({1}, length);
    EXPECT_EQ(Begin({{1}, {3}}), 0u) << "length " << length;
  }
  cache_.Grow({1}, 321);
  EXPECT_EQ(Begin({{3}, {1}}), kLayers) << "one block in each layer";
  EXPECT_EQ(Begin({{1}}, false), 6u * kLayers) << "nothing was promised";
  EXPECT_EQ(Begin({{1}, {2}}), 0u);
  CheckAll();
}

// The bug that would be: rows come back after a cut in other blocks, and the device has the old ones.
TEST_F(StepTablesTest, TablesThatWereCutAreBroughtAnew) {
  cache_.Open({1});
  cache_.Grow({1}, 200);
  EXPECT_EQ(Begin({{1}}), 4u * kLayers);
  cache_.Cut({1}, 193);
  EXPECT_EQ(Begin({{1}}), 0u) << "it has the same blocks";
  cache_.Cut({1}, 100);
  cache_.Open({2});
  cache_.Grow({2}, 60);
  cache_.Grow({1}, 200);
  EXPECT_EQ(Begin({{1}, {2}}), (4u + 1) * kLayers);
  CheckAll();
}

class StepTablesLivesTest : public StepTablesTest, public testing::WithParamInterface<bool> {};

TEST_P(StepTablesLivesTest, TheDeviceHasTheTablesOfEveryStep) {
  STRAIT_TRACE_SEED();
  const bool fills_wild = GetParam();  // else two steps are begun at a time
  kernel_test::Rng rng(kernel_test::Seed());
  std::vector<SequenceId> live;
  uint64_t next_id = 1;
  uint64_t brought = 0;
  uint64_t had = 0;
  // Where the tables lie that the books may take for known: the last to have been there.
  std::vector<uint64_t> owners(static_cast<size_t>(NumEntries()), 0);
  for (int i = 0; i < 400; ++i) {
    const size_t at = live.empty() ? 0 : rng() % live.size();
    const auto choice = rng() % 16;
    const auto grow = [&](SequenceId id, uint32_t more) {
      const uint32_t length = std::min(cache_.length(id) + more, kMaxPositions);
      const uint64_t blocks =
          BlocksOfSequence(length, kLayers) - BlocksOfSequence(cache_.length(id), kLayers);
      if (cache_.blocks_used() + blocks <= kPoolBlocks) cache_.Grow(id, length);
    };
    if (choice < 3 || live.empty()) {
      live.push_back({next_id++});
      cache_.Open(live.back());
      grow(live.back(), static_cast<uint32_t>(1 + rng() % 1000));
    } else if (choice < 5) {
      cache_.Close(live[at]);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
    } else if (choice < 7) {
      cache_.Cut(live[at], static_cast<uint32_t>(rng() % (cache_.length(live[at]) + 1)));
    }
    std::vector<SequenceId> batch;
    for (const SequenceId id : live) {
      if (rng() % 3 == 0) continue;
      grow(id, rng() % 8 == 0 ? 130 : 20);
      if (cache_.length(id) > 0) batch.push_back(id);
    }
    if (batch.empty()) continue;
    std::shuffle(batch.begin(), batch.end(), rng);
    for (const SequenceId id : batch) had += BlocksOfSequence(cache_.length(id), kLayers);
    const bool promised = rng() % 16 != 0;
    brought += Begin(batch, promised);
    ASSERT_FALSE(HasFailure()) << "step " << i;
    if (!fills_wild) continue;
    CheckAll();
    std::map<uint64_t, int> known;
    for (const SequenceId id : live) known[cache_.tables_id(id)] = 1;
    std::vector<bool> here(owners.size());
    for (size_t s = 0; s < batch.size(); ++s) {
      const uint64_t tables_id = promised ? cache_.tables_id(batch[s]) : 0;
      std::replace(owners.begin(), owners.end(), tables_id, uint64_t{0});  // it may have moved
      for (size_t layer = 0; layer < kLayers; ++layer) {
        const auto first = static_cast<size_t>(First(newest(), s, layer));
        const size_t count = newest().expected[s][layer].size();
        for (size_t entry = first; entry < first + count; ++entry) {
          ASSERT_FALSE(here[entry]) << "two tables of a step lie over each other";
          here[entry] = true;
          owners[entry] = tables_id;
        }
      }
    }
    std::vector<bool> kept(owners.size());
    for (size_t entry = 0; entry < owners.size(); ++entry)
      kept[entry] = known.contains(owners[entry]);
    FillWild(kept);
  }
  CheckAll();
  EXPECT_LT(brought, had / 2) << "it was meant to be less than all";
}

INSTANTIATE_TEST_SUITE_P(Both, StepTablesLivesTest, testing::Bool());

}  // namespace
}  // namespace strait
