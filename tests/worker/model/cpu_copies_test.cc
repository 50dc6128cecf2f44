// SPDX-License-Identifier: Apache-2.0
//
// Defends: what BlockCopies promises (moved_rows.h), of the CPU backend: a sequence whose rows were
// moved says bit for bit what it would have said, in both row formats; rows are what the layout says.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/worker/model/moved_rows.h"
#include "tests/worker/model/tiny_models.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cpu_backend.h"

namespace strait {
namespace {

using namespace moved_rows;  // NOLINT: the test's words

std::unique_ptr<CpuBackend> MakeBackend(RowFormat rows, uint32_t threads = 2) {
  CpuBackendOptions options;
  options.num_threads = threads;
  options.row_format = rows;
  options.memory_bytes = uint64_t{1} << 30;
  auto backend = CpuBackend::Create(options, MakeRandomWeights(TinyV3(), 1, 1));
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

class CpuCopiesTest : public testing::TestWithParam<RowFormat> {
 protected:
  const std::unique_ptr<CpuBackend> backend_ = MakeBackend(GetParam());
};

TEST_P(CpuCopiesTest, MovedRowsGoOn) { ExpectMovedRowsGoOn(backend_.get(), NanTrash); }
TEST_P(CpuCopiesTest, ReadsAreBehindSteps) { ExpectReadsBehindSteps(backend_.get(), NanTrash); }
TEST_P(CpuCopiesTest, WritesAreBehindSteps) { ExpectWritesBehindSteps(backend_.get(), NanTrash); }
TEST_P(CpuCopiesTest, Refusals) { ExpectRefusals(backend_.get()); }
TEST_P(CpuCopiesTest, ALimit) { ExpectALimit(backend_.get()); }
TEST_P(CpuCopiesTest, TheEndWaits) { ExpectTheEndWaits(backend_.get()); }

// Chunks, threads and places change no byte of a row.
TEST_P(CpuCopiesTest, RowsAreAFunctionOfTheTokens) {
  const auto one = LoadWhole(backend_.get());
  const auto other_backend = MakeBackend(GetParam(), 1);
  const auto other = LoadWhole(other_backend.get());
  FillWithTrash(other.get(), NanTrash);
  LoneSequence whole(backend_.get(), one.get(), Scattered(*one, 0));
  whole.Run(130);
  LoneSequence parts(other_backend.get(), other.get(), Scattered(*other, 2));
  for (const uint32_t count : {1, 62, 3, 64}) parts.Run(count);
  EXPECT_EQ(ReadRows(one.get(), ListOf(whole.tables(), 0, 130)),
            ReadRows(other.get(), ListOf(parts.tables(), 0, 130)));
}

TEST_P(CpuCopiesTest, RowsLieAsTheHeaderSays) {
  const ModelConfig config = TinyV3();
  const auto model = LoadWhole(backend_.get());
  FillWithTrash(model.get(), NanTrash);
  LoneSequence sequence(backend_.get(), model.get(), Scattered(*model, 1));
  sequence.Run(3);
  const uint32_t row_bytes = model->copies().row_bytes();
  EXPECT_EQ(row_bytes, RowBytes(GetParam(), config.kv_lora_rank, config.qk_rope_head_dim));
  const Bytes rows = ReadRows(model.get(), ListOf(sequence.tables(), 0, 3));
  const uint32_t end = RowEnd(GetParam(), config.kv_lora_rank, config.qk_rope_head_dim);
  const uint32_t element = GetParam() == RowFormat::kFp32 ? 4 : 2;
  for (size_t at = 0; at < rows.size(); at += row_bytes) {
    double squares = 0;  // the latent is normed
    for (uint32_t i = 0; i < end; i += element) {
      uint32_t bits = 0;
      std::memcpy(reinterpret_cast<std::byte*>(&bits) + 4 - element, rows.data() + at + i, element);
      const double value = std::bit_cast<float>(bits);
      ASSERT_TRUE(std::isfinite(value)) << "byte " << i;
      if (i < RopeKeyOffset(GetParam(), config.kv_lora_rank)) squares += value * value;
    }
    EXPECT_NEAR(squares / config.kv_lora_rank, 1, 0.01);  // bf16: 2^-8 each, mostly cancelling
    for (uint32_t i = end; i < row_bytes; ++i) EXPECT_EQ(rows[at + i], std::byte{0});
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, CpuCopiesTest, testing::Values(RowFormat::kFp32, RowFormat::kBf16),
                         [](const auto& info) { return RowFormatName(info.param); });

TEST(CpuCopiesMemoryTest, ADevicesBufferIsRefused) {
  const auto backend = MakeBackend(RowFormat::kFp32);
  const auto model = LoadWhole(backend.get());
  const auto memory = model->copies().Take(model->copies().row_bytes());
  ASSERT_TRUE(memory.ok());
  const std::vector<BlockRows> list = {{0, 0, 0, 1}};
  const absl::Span<std::byte> bytes(memory->data.get(), memory->bytes);
  EXPECT_EQ(model->copies().Read(list, {bytes, true}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(model->copies().Write(list, {bytes, true}).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto id = model->copies().Read(list, {bytes, false});
  ASSERT_TRUE(id.ok());
  WaitFor(&model->copies(), *id);
}

// For ThreadSanitizer: rows that are read and written while steps use others of the same blocks.
TEST(CpuCopiesMemoryTest, CopiesRunBesideSteps) {
  const auto backend = MakeBackend(RowFormat::kFp32);
  const auto model = LoadWhole(backend.get());
  LoneSequence sequence(backend.get(), model.get(), Scattered(*model, 0));
  sequence.Run(100);
  const std::vector<BlockRows> list = ListOf(sequence.tables(), 0, 100);
  const Bytes expected = ReadRows(model.get(), list);
  for (int i = 0; i < 20; ++i) {
    Bytes rows(expected.size());
    const auto read = model->copies().Read(list, {absl::MakeSpan(rows), false});
    // Rows that the step does not reach, in the block that it appends to, too.
    const std::vector<BlockRows> beyond =
        ListOf(sequence.tables(), sequence.length() + 1, kLongest);
    const Bytes trash(BytesOf(model->copies(), beyond), std::byte{0xff});
    const auto written = model->copies().Write(beyond, {absl::MakeConstSpan(trash), false});
    ASSERT_TRUE(read.ok() && written.ok());
    sequence.Run(1);
    WaitFor(&model->copies(), *written);
    EXPECT_EQ(rows, expected);
  }
}

}  // namespace
}  // namespace strait
