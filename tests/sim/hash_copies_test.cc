// SPDX-License-Identifier: Apache-2.0
//
// Defends: what BlockCopies promises (moved_rows.h), of the simulator's backend: its rows can be
// checked by value, and it ends the process on what BlockCopies and tables_id forbid.
#include <gtest/gtest.h>

#include "tests/sim/hash_backend.h"
#include "tests/worker/model/moved_rows.h"

namespace strait::sim {
namespace {

using namespace moved_rows;  // NOLINT: the test's words

ModelShape Shape() {
  ModelShape shape;
  shape.vocab_size = 1000;
  shape.max_positions = 2000;
  shape.layer_weight_bytes = {10, 10, 10};
  shape.block_bytes = 64 * kHashRowBytes;
  return shape;
}

void HashTrash(absl::Span<std::byte> rows) {
  for (size_t at = 0; at < rows.size(); at += kHashRowBytes) {
    PutHashRow(Mix(at, 0xDEAD), rows.data() + at);
  }
}

class HashCopiesTest : public testing::Test {
 protected:
  HashCopiesTest() { backend_.rows_ahead = 1; }

  const ModelShape shape_ = Shape();
  HashBackend backend_{&shape_, uint64_t{1} << 30};
};
using HashCopiesDeathTest = HashCopiesTest;

TEST_F(HashCopiesTest, MovedRowsGoOn) {
  backend_.copy_faults.delay_polls = 3;
  ExpectMovedRowsGoOn(&backend_, HashTrash);
}
TEST_F(HashCopiesTest, ReadsAreBehindSteps) { ExpectReadsBehindSteps(&backend_, HashTrash); }
TEST_F(HashCopiesTest, WritesAreBehindSteps) { ExpectWritesBehindSteps(&backend_, HashTrash); }
TEST_F(HashCopiesTest, Refusals) { ExpectRefusals(&backend_); }
TEST_F(HashCopiesTest, ALimit) { ExpectALimit(&backend_); }
TEST_F(HashCopiesTest, TheEndWaits) { ExpectTheEndWaits(&backend_); }

TEST_F(HashCopiesTest, RowsCanBeCheckedByValue) {
  const auto model = LoadWhole(&backend_);
  LoneSequence sequence(&backend_, model.get(), Scattered(*model, 0));
  sequence.Run(66);
  Bytes rows = ReadRows(model.get(), ListOf(sequence.tables(), 0, 66));
  for (uint32_t position = 0; position < 66; ++position) {
    const TokenId token = (position * 37 + 5) % Shape().vocab_size;  // LoneSequence's
    EXPECT_EQ(GetHashRow(rows.data() + position * kHashRowBytes),
              CacheRow(Embed(token, position), 0, position));
  }
  rows[5] ^= std::byte{1};
  EXPECT_EQ(GetHashRow(rows.data()), std::nullopt);
}

TEST_F(HashCopiesTest, ACopyLastsAsLongAsItIsTold) {
  const auto model = LoadWhole(&backend_);
  backend_.copy_faults.delay_polls = 2;
  Bytes rows(kHashRowBytes);
  const std::vector<BlockRows> list = {{0, 0, 0, 1}};
  ASSERT_TRUE(model->copies().Read(list, {absl::MakeSpan(rows), false}).ok());
  EXPECT_TRUE(model->copies().Poll().empty());
  EXPECT_EQ(model->copies().Poll().size(), 1u);
}

TEST_F(HashCopiesTest, ACopyFailsIfItIsTold) {
  const auto model = LoadWhole(&backend_);
  backend_.copy_faults.fail_next = true;
  Bytes rows(kHashRowBytes);
  const std::vector<BlockRows> list = {{0, 0, 0, 1}};
  for (const absl::StatusCode expected : {absl::StatusCode::kInternal, absl::StatusCode::kOk}) {
    ASSERT_TRUE(model->copies().Read(list, {absl::MakeSpan(rows), false}).ok());
    const std::vector<CopyEnd> ends = model->copies().Poll();
    ASSERT_EQ(ends.size(), 1u);
    EXPECT_EQ(ends[0].status.code(), expected);
    EXPECT_EQ(GetHashRow(rows.data()).has_value(), ends[0].status.ok());
  }
}

TEST_F(HashCopiesDeathTest, WhatIsForbiddenEndsTheProcess) {
  const auto model = LoadWhole(&backend_);
  LoneSequence sequence(&backend_, model.get(), Scattered(*model, 0));
  sequence.Run(66);
  Bytes row(kHashRowBytes);
  PutHashRow(1, row.data());
  const auto copy = [&](uint32_t position, bool write) {
    const std::vector<BlockRows> list = ListOf({sequence.tables()[0]}, position, position + 1);
    return write ? model->copies().Write(list, {absl::MakeConstSpan(row), false})
                 : model->copies().Read(list, {absl::MakeSpan(row), false});
  };
  // Allowed: a step reads what is read, and leaves alone what is written.
  ASSERT_TRUE(copy(10, false).ok());
  ASSERT_TRUE(copy(67, true).ok());
  sequence.Run(1);
  while (model->copies().num_under_way() > 0) model->copies().Poll();

  EXPECT_DEATH(
      {
        (void)copy(10, true);
        sequence.Begin(1);
      },
      "uses rows that a copy is to write");
  EXPECT_DEATH(
      {
        (void)copy(67, true);
        sequence.Begin(1);
      },
      "uses rows that a copy is to write");
  EXPECT_DEATH(
      {
        (void)copy(67, false);
        sequence.Begin(1);
      },
      "writes rows that a copy is to read");
  row[0] ^= std::byte{1};
  EXPECT_DEATH(
      {
        (void)copy(68, true);
        model->copies().Poll();
      },
      "no row");
}

// What BatchSequence::tables_id promises.
TEST_F(HashCopiesDeathTest, TablesThatChangeUnderTheirNumberEndTheProcess) {
  const auto model = LoadWhole(&backend_);
  const Tables tables = Scattered(*model, 0);
  LoneSequence sequence(&backend_, model.get(), tables);
  sequence.Run(66);
  sequence.Run(100);
  Tables others = tables;
  std::swap(others[1][1], others[1][2]);  // LoneSequence takes the number from the first block
  LoneSequence changed(&backend_, model.get(), others, sequence.length());
  EXPECT_DEATH(changed.Begin(1), "changed under its tables_id");
  LoneSequence shorter(&backend_, model.get(), tables);
  EXPECT_DEATH(shorter.Begin(1), "changed under its tables_id");
}

}  // namespace
}  // namespace strait::sim
