// SPDX-License-Identifier: Apache-2.0
//
// What BlockCopies promises, for any backend: rows read from one place of a pool and written to
// another are the sequence; copies stand behind the steps begun before them; what is refused.
//
// Why:     pools are filled with trash first, through Write, so that a row that was not copied, or
//          copied from the wrong place, changes what comes out.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "tests/worker/model/load_with_cache.h"
#include "worker/backend.h"

namespace strait::moved_rows {

using Bytes = std::vector<std::byte>;
using Tables = std::vector<std::vector<BlockId>>;  // [layers][position / 64]

inline constexpr uint32_t kPoolBlocksEachLayer = 16;
inline constexpr uint32_t kLongest = 300;  // tokens of a sequence

// Fills rows with what no step wrote. Not a number on backends that compute with it.
using Trash = std::function<void(absl::Span<std::byte>)>;
inline void NanTrash(absl::Span<std::byte> rows) {
  std::fill(rows.begin(), rows.end(), std::byte{0xff});
}

inline std::unique_ptr<StageModel> LoadWhole(Backend* backend) {
  StageSpec spec;
  spec.layers = {0, backend->num_layers()};
  spec.pool_blocks = kPoolBlocksEachLayer * backend->num_layers();
  auto model = LoadWithCache(backend, spec);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

// Blocks for kLongest tokens in every layer, at random places; other salts, other blocks.
inline Tables Scattered(const StageModel& model, uint32_t salt) {
  std::vector<BlockId> ids(model.spec().pool_blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(7));  // one permutation: salts do not overlap
  const uint32_t each = BlocksPerLayer(kLongest);
  Tables tables(model.spec().layers.size());
  auto next = ids.begin() + salt * each * tables.size();
  for (auto& table : tables) {
    table.assign(next, next + each);
    next += each;
  }
  return tables;
}

// Rows of positions [begin, end), layer after layer.
inline std::vector<BlockRows> ListOf(const Tables& tables, uint32_t begin, uint32_t end) {
  std::vector<BlockRows> list;
  for (uint32_t layer = 0; layer < tables.size(); ++layer) {
    for (uint32_t at = begin; at < end;) {
      const uint32_t row = at % limits::kBlockTokens;
      const uint32_t count = std::min(limits::kBlockTokens - row, end - at);
      list.push_back({layer, tables[layer][at / limits::kBlockTokens], row, count});
      at += count;
    }
  }
  return list;
}
inline size_t BytesOf(const BlockCopies& copies, const std::vector<BlockRows>& list) {
  size_t rows = 0;
  for (const BlockRows& entry : list) rows += entry.num_rows;
  return rows * copies.row_bytes();
}

inline void WaitFor(BlockCopies* copies, CopyId id) {
  for (;;) {
    for (const CopyEnd& end : copies->Poll()) {
      EXPECT_TRUE(end.status.ok()) << end.status;
      if (end.id == id) return;
    }
  }
}
// Lets copies go as far as they may while a step is under way; how many have ended.
inline size_t PollEagerly(BlockCopies* copies) {
  size_t ended = 0;
  for (int i = 0; i < 50; ++i) {
    for (const CopyEnd& end : copies->Poll()) {
      EXPECT_TRUE(end.status.ok()) << end.status;
      ++ended;
    }
  }
  return ended;
}
inline Bytes ReadRows(StageModel* model, const std::vector<BlockRows>& list) {
  Bytes rows(BytesOf(model->copies(), list));
  const auto id = model->copies().Read(list, {absl::MakeSpan(rows), false});
  EXPECT_TRUE(id.ok()) << id.status();
  WaitFor(&model->copies(), *id);
  return rows;
}
inline void WriteRows(StageModel* model, const std::vector<BlockRows>& list, const Bytes& rows) {
  const auto id = model->copies().Write(list, {absl::MakeConstSpan(rows), false});
  EXPECT_TRUE(id.ok()) << id.status();
  WaitFor(&model->copies(), *id);
}
inline void FillWithTrash(StageModel* model, const Trash& trash) {
  std::vector<BlockRows> all;
  for (BlockId block = 0; block < model->spec().pool_blocks; ++block) {
    all.push_back({0, block, 0, limits::kBlockTokens});
  }
  Bytes rows(BytesOf(model->copies(), all));
  trash(absl::MakeSpan(rows));
  WriteRows(model, all, rows);
}

// One sequence on a stage that is a whole model.
class LoneSequence {
 public:
  LoneSequence(Backend* backend, StageModel* model, Tables tables, uint32_t length = 0)
      : vocab_(backend->vocab_size()), model_(model), tables_(std::move(tables)), length_(length) {
    for (uint32_t i = 0; i < kLongest; ++i) tokens_.push_back((i * 37 + 5) % vocab_);
  }

  // Begins a step of the next `count` tokens.
  void Begin(uint32_t count) {
    std::vector<absl::Span<const BlockId>> views;
    const uint32_t end = length_ + count;
    ASSERT_LE(end, kLongest);
    for (const auto& table : tables_) {
      views.push_back(absl::MakeSpan(table).subspan(0, BlocksPerLayer(end)));
    }
    BatchSequence sequence;
    sequence.id = SequenceId{1};
    sequence.first_position = length_;
    sequence.num_tokens = count;
    sequence.tokens = absl::MakeSpan(tokens_).subspan(0, end);
    sequence.page_tables = views;
    sequence.tables_id =
        tables_[0][0] + 1;  // blocks are in one of a model's tables, or in equal ones
    sequence.prompt_tokens = 1;
    sequence.sampling = &sampling_;
    LogitsRequest request;
    request.row = count - 1;
    request.token = 3;
    request.num_top = 5;
    StageBatch batch;
    batch.sequences = absl::MakeSpan(&sequence, 1);
    batch.num_tokens = count;
    batch.logits = absl::MakeSpan(&request, 1);
    const absl::Status begun = model_->Begin(batch, {}, {});
    ASSERT_TRUE(begun.ok()) << begun;
    length_ = end;
  }
  // The bits of what the oldest step answered.
  std::vector<uint32_t> Finish() {
    std::vector<LogitsResult> results;
    const absl::Status finished = model_->Finish(&results);
    EXPECT_TRUE(finished.ok()) << finished;
    std::vector<uint32_t> bits;
    for (const LogitsResult& result : results) {
      EXPECT_TRUE(result.status.ok()) << result.status;
      bits.push_back(std::bit_cast<uint32_t>(result.logprob));
      for (const auto& [id, logprob] : result.top) {
        bits.push_back(id);
        bits.push_back(std::bit_cast<uint32_t>(logprob));
      }
    }
    EXPECT_EQ(bits.size(), 11u);
    return bits;
  }
  std::vector<uint32_t> Run(uint32_t count) {
    Begin(count);
    return Finish();
  }

  uint32_t length() const { return length_; }
  const Tables& tables() const { return tables_; }

 private:
  const uint32_t vocab_;
  StageModel* const model_;
  const Tables tables_;
  uint32_t length_;
  std::vector<TokenId> tokens_;
  SamplingParams sampling_;
};

// A sequence that goes to another pool, and there to other blocks in two rounds, says what it would
// have said where it was.
inline void ExpectMovedRowsGoOn(Backend* backend, const Trash& trash) {
  const auto home = LoadWhole(backend);
  const auto away = LoadWhole(backend);
  FillWithTrash(home.get(), trash);
  FillWithTrash(away.get(), trash);
  LoneSequence stays(backend, home.get(), Scattered(*home, 0));
  stays.Run(150);
  for (int i = 0; i < 3; ++i) stays.Run(1);

  const Tables there = Scattered(*away, 1);
  WriteRows(away.get(), ListOf(there, 0, stays.length()),
            ReadRows(home.get(), ListOf(stays.tables(), 0, stays.length())));
  LoneSequence moves(backend, away.get(), there, stays.length());
  for (int i = 0; i < 4; ++i) EXPECT_EQ(moves.Run(1), stays.Run(1)) << "step " << i;
  EXPECT_EQ(moves.Run(50), stays.Run(50)) << "over a block's end";
  EXPECT_EQ(ReadRows(away.get(), ListOf(there, 0, stays.length())),
            ReadRows(home.get(), ListOf(stays.tables(), 0, stays.length())));

  // The first round's last block is cut where the second begins.
  const Tables elsewhere = Scattered(*away, 2);
  const uint32_t first_round = moves.length();
  WriteRows(away.get(), ListOf(elsewhere, 0, first_round),
            ReadRows(away.get(), ListOf(there, 0, first_round)));
  EXPECT_EQ(moves.Run(3), stays.Run(3));
  WriteRows(away.get(), ListOf(elsewhere, first_round, moves.length()),
            ReadRows(away.get(), ListOf(there, first_round, moves.length())));
  Bytes gone(BytesOf(away->copies(), ListOf(there, 0, kLongest)));
  trash(absl::MakeSpan(gone));
  WriteRows(away.get(), ListOf(there, 0, kLongest), gone);
  LoneSequence again(backend, away.get(), elsewhere, moves.length());
  for (int i = 0; i < 4; ++i) EXPECT_EQ(again.Run(1), stays.Run(1)) << "step " << i;
}

// Read has what the steps begun before it wrote, though these are finished later, and steps after it
// do not disturb it.
inline void ExpectReadsBehindSteps(Backend* backend, const Trash& trash) {
  const auto model = LoadWhole(backend);
  FillWithTrash(model.get(), trash);
  LoneSequence sequence(backend, model.get(), Scattered(*model, 0));
  sequence.Run(60);
  sequence.Begin(1);
  const std::vector<BlockRows> list = ListOf(sequence.tables(), 0, sequence.length());
  Bytes rows(BytesOf(model->copies(), list));
  const auto id = model->copies().Read(list, {absl::MakeSpan(rows), false});
  ASSERT_TRUE(id.ok()) << id.status();
  size_t ended = PollEagerly(&model->copies());
  const bool ahead = model->TakesAhead(1, 1);
  if (ahead) sequence.Begin(1);
  sequence.Finish();
  if (!ahead) sequence.Begin(1);
  sequence.Finish();
  sequence.Run(10);
  while (model->copies().num_under_way() > 0) ended += model->copies().Poll().size();
  EXPECT_EQ(ended, 1u);
  EXPECT_EQ(rows, ReadRows(model.get(), list));
  // A row of trash would be equal, too.
  Bytes unwritten(BytesOf(model->copies(), list));
  trash(absl::MakeSpan(unwritten));
  for (size_t at = 0; at < rows.size(); at += model->copies().row_bytes()) {
    ASSERT_NE(std::memcmp(rows.data() + at, unwritten.data() + at, model->copies().row_bytes()), 0)
        << "row " << at / model->copies().row_bytes() << " was read before it was written";
  }
}

// Write does not reach a step that was begun before it; copies are made in order.
inline void ExpectWritesBehindSteps(Backend* backend, const Trash& trash) {
  std::vector<uint32_t> said[2];
  for (const bool overwritten : {false, true}) {
    const auto model = LoadWhole(backend);
    LoneSequence sequence(backend, model.get(), Scattered(*model, 0));
    sequence.Run(140);
    const std::vector<BlockRows> list = ListOf(sequence.tables(), 0, sequence.length());
    Bytes before(BytesOf(model->copies(), list));
    Bytes trashed = before;
    trash(absl::MakeSpan(trashed));
    Bytes after = before;
    sequence.Begin(1);
    if (overwritten) {
      const auto first = model->copies().Read(list, {absl::MakeSpan(before), false});
      const auto second = model->copies().Write(list, {absl::MakeConstSpan(trashed), false});
      const auto third = model->copies().Read(list, {absl::MakeSpan(after), false});
      ASSERT_TRUE(first.ok() && second.ok() && third.ok());
      EXPECT_EQ(first->value + 1, second->value);
      EXPECT_EQ(second->value + 1, third->value);
    }
    PollEagerly(&model->copies());
    said[overwritten] = sequence.Finish();
    while (model->copies().num_under_way() > 0) model->copies().Poll();
    if (!overwritten) continue;
    EXPECT_EQ(after, trashed);
    EXPECT_NE(before, trashed);
  }
  EXPECT_EQ(said[true], said[false]);
}

// What is refused costs nothing: afterwards a copy is taken.
inline void ExpectRefusals(Backend* backend) {
  const auto model = LoadWhole(backend);
  BlockCopies& copies = model->copies();
  const uint32_t layers = model->spec().layers.size();
  const uint32_t blocks = model->spec().pool_blocks;
  const auto read = [&](const std::vector<BlockRows>& list, size_t rows) {
    Bytes to(rows * copies.row_bytes());
    const auto id = copies.Read(list, {absl::MakeSpan(to), false});
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument) << id.status();
    return std::string(id.status().message());
  };
  using testing::HasSubstr;
  EXPECT_THAT(read({}, 0), HasSubstr("0 entries"));
  EXPECT_THAT(read(std::vector<BlockRows>(kMaxCopyEntries + 1, {0, 0, 0, 1}), kMaxCopyEntries + 1),
              HasSubstr("4097 entries"));
  EXPECT_THAT(read({{layers, 0, 0, 1}}, 1), HasSubstr("layer"));
  EXPECT_THAT(read({{0, blocks, 0, 1}}, 1), HasSubstr("block"));
  EXPECT_THAT(read({{0, ~0u, 0, 1}}, 1), HasSubstr("block"));
  EXPECT_THAT(read({{0, 0, 0, 0}}, 0), HasSubstr("0 rows"));
  EXPECT_THAT(read({{0, 0, 64, 0}}, 0), HasSubstr("rows"));
  EXPECT_THAT(read({{0, 0, 1, 64}}, 64), HasSubstr("64 rows from row 1"));
  EXPECT_THAT(read({{0, 0, ~0u, 2}}, 2), HasSubstr("rows"));
  EXPECT_THAT(read({{0, 0, 2, ~0u}}, 2), HasSubstr("rows"));
  EXPECT_THAT(read({{0, 0, 0, 3}}, 2), HasSubstr("buffer"));
  EXPECT_THAT(read({{0, 0, 0, 3}}, 4), HasSubstr("buffer"));

  const std::vector<BlockRows> twice = {{0, 1, 0, 64}, {0, 2, 0, 1}, {0, 1, 63, 1}};
  Bytes rows(66 * copies.row_bytes());
  const auto written = copies.Write(twice, {absl::MakeConstSpan(rows), false});
  EXPECT_EQ(written.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(written.status().message(), HasSubstr("row of block 1 would be written twice"));
  EXPECT_EQ(copies.num_under_way(), 0u);
  EXPECT_TRUE(copies.Poll().empty());
  ReadRows(model.get(), twice);
}

// As many as may be are under way at once; they are told in order, each once.
inline void ExpectALimit(Backend* backend) {
  const auto model = LoadWhole(backend);
  BlockCopies& copies = model->copies();
  std::vector<Bytes> buffers(kMaxCopiesUnderWay + 1, Bytes(copies.row_bytes()));
  const std::vector<BlockRows> list = {{0, 3, 9, 1}};
  CopyId last;
  for (int round = 0; round < 2; ++round) {
    std::vector<CopyId> asked;
    for (size_t i = 0; i < kMaxCopiesUnderWay; ++i) {
      const auto id = copies.Read(list, {absl::MakeSpan(buffers[i]), false});
      ASSERT_TRUE(id.ok()) << id.status();
      EXPECT_EQ(id->value, ++last.value);
      asked.push_back(*id);
    }
    EXPECT_EQ(copies.num_under_way(), kMaxCopiesUnderWay);
    EXPECT_EQ(copies.Read(list, {absl::MakeSpan(buffers.back()), false}).status().code(),
              absl::StatusCode::kResourceExhausted);
    std::vector<CopyId> told;
    while (told.size() < asked.size()) {
      for (const CopyEnd& end : copies.Poll()) told.push_back(end.id);
    }
    EXPECT_EQ(told, asked);
    EXPECT_TRUE(copies.Poll().empty());
  }
}

// A model that goes while copies are under way has let go of their buffers.
inline void ExpectTheEndWaits(Backend* backend) {
  auto model = LoadWhole(backend);
  LoneSequence sequence(backend, model.get(), Scattered(*model, 0));
  sequence.Run(70);
  const std::vector<BlockRows> list = ListOf(sequence.tables(), 0, sequence.length());
  const Bytes expected = ReadRows(model.get(), list);
  Bytes rows(expected.size());
  ASSERT_TRUE(model->copies().Read(list, {absl::MakeSpan(rows), false}).ok());
  model.reset();
  EXPECT_EQ(rows, expected);
}

}  // namespace strait::moved_rows
