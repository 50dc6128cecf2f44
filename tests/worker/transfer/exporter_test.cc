// SPDX-License-Identifier: Apache-2.0
//
// Defends: only rows that are finished leave a stage, of sequences that the coordinator released and that are still
// here, to who shows the secret; what is read is confirmed once; nobody makes a worker hold more than its bounds.
#include "worker/transfer/exporter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "proto/wire/epoch_wire.h"
#include "tests/worker/number_cache.h"
#include "tests/worker/polled_copies.h"
#include "tests/worker/transfer/scripted_transfer.h"
#include "worker/transfer/rows_message.h"

namespace strait {
namespace {

constexpr LayerRange kLayers = {4, 7};
constexpr PlacementEpoch kPlacement = {1, 3};
constexpr SequenceId kId{7};
constexpr uint64_t kSecret = 1234;
constexpr BlockOrigin kOrigin = {.model = 5, .numerics = 6};

uint64_t Value(LayerIndex layer, uint32_t position) { return layer * 1'000'000 + position; }

class ExporterTest : public testing::Test {
 protected:
  ExporterTest() {
    EXPECT_TRUE(memory_.Resize(100, {}).ok());
    pool_.Grow(100);
    share_.transfer = &transfer_;
    Fill(kId, 200);
  }
  ~ExporterTest() override {
    exporter_.Clear();
    while (exporter_.num_copies() > 0) Turn();
    EXPECT_EQ(share_.made_bytes, 0u);
    EXPECT_EQ(share_.num_made, 0u);
    EXPECT_FALSE(cache_.in_copies());
  }

  void Fill(SequenceId id, uint32_t rows) {
    cache_.Open(id);
    cache_.Grow(id, rows);
    finished_[id] = rows;
    const auto tables = cache_.PageTables(id);
    for (LayerIndex layer = kLayers.begin; layer < kLayers.end; ++layer) {
      for (uint32_t p = 0; p < rows; ++p) {
        memory_.Row(tables[layer - kLayers.begin][p / limits::kBlockTokens],
                    p % limits::kBlockTokens) = Value(layer, p);
      }
    }
  }
  v1::ServeRows ServeOf(SequenceId id = kId, uint32_t served_rows = 0) const {
    v1::ServeRows serve;
    serve.set_sequence_id(id.value);
    ToWire(kPlacement, serve.mutable_placement());
    serve.set_secret(kSecret);
    serve.set_served_rows(served_rows);
    return serve;
  }
  static RowsAsk AskOf(uint32_t first, uint32_t count, SequenceId id = kId) {
    return {.sequence = id,
            .placement = kPlacement,
            .secret = kSecret,
            .layers = kLayers,
            .first_row = first,
            .num_rows = count};
  }
  // The code of the answer; kUnknown: there is none.
  absl::StatusCode CodeOf(uint64_t id) const {
    const auto it = transfer_.answers.find(id);
    return it == transfer_.answers.end() ? absl::StatusCode::kUnknown : it->second.status().code();
  }
  absl::StatusCode Asked(const RowsAsk& ask) {
    exporter_.OnAsk(PeerAskId{++last_ask_}, ask);
    return CodeOf(last_ask_);
  }
  void Turn() {
    exporter_.OnCopies(copies_.Poll());
    for (Exporter::Served& served : exporter_.Poll()) told_.push_back(served);
  }
  void Confirm(uint64_t id) {
    RowsFrame frame = *transfer_.answers.at(id);
    SealFrame(&frame);
    exporter_.OnServed(PeerAskId{id}, frame.pieces);
  }

  NumberCache memory_;
  BlockPool pool_;
  CopyFaults faults_;
  PolledCopies copies_{kLayers.size(), &memory_, &faults_};
  LatentCache cache_{kLayers.size(), &pool_};
  std::map<SequenceId, uint32_t> finished_;
  ScriptedTransfer transfer_;
  TransferShare share_;
  Exporter exporter_{HashRowTraits(kLayers, kOrigin),
                     &copies_,
                     &cache_,
                     &share_,
                     [this](SequenceId id) -> std::optional<uint32_t> {
                       const auto it = finished_.find(id);
                       if (it == finished_.end()) return std::nullopt;
                       return it->second;
                     },
                     [this](const ContentKey& key) { return cache_.has_prefix(key); }};
  std::vector<Exporter::Served> told_;
  uint64_t last_ask_ = 0;
};

TEST_F(ExporterTest, RowsAreThoseOfTheCache) {
  exporter_.Serve(ServeOf());
  RowsAsk ask = AskOf(50, 100);
  ask.layers = {5, 7};
  EXPECT_EQ(Asked(ask), absl::StatusCode::kUnknown);  // it is read beside steps
  EXPECT_TRUE(exporter_.busy());
  Turn();
  ASSERT_EQ(CodeOf(1), absl::StatusCode::kOk);
  RowsFrame frame = *transfer_.answers.at(1);
  SealFrame(&frame);
  const RowsFrame expected = FrameOf(ask, Value, kOrigin);
  EXPECT_EQ(frame.pieces, expected.pieces);
  EXPECT_TRUE(frame.rows == expected.rows);
  EXPECT_EQ(frame.sequence, kId);
  EXPECT_EQ(frame.placement, kPlacement);
}

TEST_F(ExporterTest, WhatMayNotBeReadIsRefused) {
  using absl::StatusCode;
  EXPECT_EQ(Asked(AskOf(0, 10)), StatusCode::kNotFound);  // nobody said that it may
  exporter_.Serve(ServeOf());
  exporter_.Serve(ServeOf(SequenceId{99}));  // not here
  EXPECT_EQ(Asked(AskOf(0, 10, SequenceId{99})), StatusCode::kNotFound);
  RowsAsk ask = AskOf(0, 10);
  ask.secret ^= 1;
  EXPECT_EQ(Asked(ask), StatusCode::kPermissionDenied);
  ask = AskOf(0, 10);
  ask.placement.counter = 4;
  EXPECT_EQ(Asked(ask), StatusCode::kNotFound);
  for (const LayerRange layers : {LayerRange{3, 5}, LayerRange{6, 8}, LayerRange{5, 5},
                                  LayerRange{6, 5}, LayerRange{0, ~0u}}) {
    ask = AskOf(0, 10);
    ask.layers = layers;
    EXPECT_EQ(Asked(ask), StatusCode::kInvalidArgument) << layers.begin << " " << layers.end;
  }
  EXPECT_EQ(Asked(AskOf(0, 0)), StatusCode::kInvalidArgument);
  EXPECT_EQ(Asked(AskOf(0, 201)), StatusCode::kOutOfRange);
  EXPECT_EQ(Asked(AskOf(~0u, 201)), StatusCode::kOutOfRange);
  finished_[kId] = 1'000'000;
  EXPECT_EQ(Asked(AskOf(0, 300'000)), StatusCode::kInvalidArgument);  // more than a frame
  finished_[kId] = 200;
  EXPECT_EQ(Asked(AskOf(0, 200)), StatusCode::kUnknown);
  v1::ServeRows end = ServeOf();
  end.set_end(true);
  exporter_.Serve(end);
  Turn();
  EXPECT_EQ(CodeOf(last_ask_), StatusCode::kAborted);
  EXPECT_EQ(Asked(AskOf(0, 10)), StatusCode::kNotFound);
}

TEST_F(ExporterTest, ASequenceThatLeavesWhileItIsReadIsNotSent) {
  exporter_.Serve(ServeOf());
  faults_.delay_polls = 2;
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kUnknown);
  const uint32_t used = cache_.blocks_used();
  exporter_.Close(kId);
  cache_.Close(kId);
  finished_.erase(kId);
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kAborted);
  EXPECT_EQ(share_.made_bytes, 0u);
  // No step may write what a copy reads: these blocks are nobody's meanwhile.
  EXPECT_EQ(cache_.num_pinned(), 2 * kLayers.size());
  EXPECT_LT(cache_.num_pinned(), used);
  while (exporter_.num_copies() > 0) Turn();
  EXPECT_EQ(cache_.num_pinned(), 0u);
  EXPECT_EQ(transfer_.answers.size(), 1u);
  EXPECT_TRUE(cache_.CheckIntegrity().ok());
}

TEST_F(ExporterTest, WhatWaitsIsLookedAtAgain) {
  exporter_.Serve(ServeOf());
  share_.holds_copies = true;
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kUnknown);
  EXPECT_EQ(Asked(AskOf(100, 100)), absl::StatusCode::kUnknown);
  Turn();
  EXPECT_EQ(exporter_.num_copies(), 0u);
  finished_[kId] = 150;  // it was cut
  share_.holds_copies = false;
  Turn();
  Turn();
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(2), absl::StatusCode::kOutOfRange);
}

// A sequence that stands still waited for the steps of all others, twice at either end.
TEST_F(ExporterTest, FinishedRowsAreReadWithoutWaitingForSteps) {
  exporter_.Serve(ServeOf());
  copies_.StepBegun({});
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kUnknown);
  Turn();
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kOk);
  copies_.StepFinished();
}

TEST_F(ExporterTest, WhoWaitsForMemoryHoldsUpNobody) {
  exporter_.Serve(ServeOf());
  transfer_.without_memory = {1};
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kUnknown);
  EXPECT_EQ(Asked(AskOf(100, 100)), absl::StatusCode::kUnknown);
  Turn();
  Turn();
  EXPECT_EQ(CodeOf(2), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kUnknown);
  EXPECT_TRUE(exporter_.busy());
  transfer_.without_memory.clear();
  Turn();
  Turn();
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kOk);
  EXPECT_EQ(share_.made_bytes, 0u);
}

TEST_F(ExporterTest, ServedIsToldOnceWhenAllWasRead) {
  exporter_.Serve(ServeOf());
  Asked(AskOf(0, 100));
  Asked(AskOf(100, 99));
  Turn();
  Confirm(1);
  Confirm(1);  // twice is nothing
  exporter_.Serve(ServeOf(kId, 200));
  Turn();
  EXPECT_TRUE(told_.empty());
  Confirm(2);
  // The same rows once more, since a stream broke: they count once.
  Asked(AskOf(0, 100));
  Turn();
  Confirm(3);
  Turn();
  EXPECT_TRUE(told_.empty());
  Asked(AskOf(199, 1));
  Turn();
  Confirm(4);
  EXPECT_TRUE(exporter_.busy());
  Turn();
  ASSERT_EQ(told_.size(), 1u);
  EXPECT_EQ(told_[0].rows, 200u);
  RowsDigest expected;
  for (const RowsAsk& ask : {AskOf(0, 100), AskOf(100, 99), AskOf(199, 1)}) {
    for (const BlockHeader& piece : FrameOf(ask, Value, kOrigin).pieces) expected.Add(piece);
  }
  EXPECT_EQ(told_[0].digest, expected.Value());
  Turn();
  exporter_.Serve(ServeOf(kId, 200));
  Turn();
  EXPECT_EQ(told_.size(), 1u);
  // It thawed, and stands still anew.
  exporter_.Serve(ServeOf());
  exporter_.Serve(ServeOf(kId, 200));
  Turn();
  EXPECT_EQ(told_.size(), 2u);
}

TEST_F(ExporterTest, AFrameThatIsNeverConfirmedIsNoHarm) {
  exporter_.Serve(ServeOf());
  Asked(AskOf(0, 100));
  Turn();
  EXPECT_EQ(share_.unconfirmed.size(), 1u);
  v1::ServeRows end = ServeOf();
  end.set_end(true);
  exporter_.Serve(end);
  EXPECT_TRUE(share_.unconfirmed.empty());
  Confirm(1);
  exporter_.Serve(ServeOf());
  Asked(AskOf(0, 100));
  Turn();
  exporter_.Close(kId);
  EXPECT_TRUE(share_.unconfirmed.empty());
  exporter_.Serve(ServeOf());
  Asked(AskOf(0, 100));
  Turn();
  exporter_.Clear();
  EXPECT_TRUE(share_.unconfirmed.empty());
}

TEST_F(ExporterTest, WhoStandsStillIsReadFirst) {
  Fill(SequenceId{8}, 100);
  exporter_.Serve(ServeOf());
  exporter_.Serve(ServeOf(SequenceId{8}, 100));
  share_.holds_copies = true;
  Asked(AskOf(0, 10));
  Asked(AskOf(10, 10));
  Asked(AskOf(0, 50, SequenceId{8}));
  Asked(AskOf(50, 50, SequenceId{8}));
  faults_.delay_polls = 0;
  share_.holds_copies = false;
  Turn();  // begins
  exporter_.OnCopies(std::vector<CopyEnd>{{CopyId{1}, absl::OkStatus()}});
  EXPECT_EQ(CodeOf(3), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kUnknown);
  copies_.Poll();
  exporter_.OnCopies(std::vector<CopyEnd>{
      {CopyId{2}, absl::OkStatus()}, {CopyId{3}, absl::OkStatus()}, {CopyId{4}, absl::OkStatus()}});
  EXPECT_EQ(transfer_.answers.size(), 4u);
}

TEST_F(ExporterTest, NoMoreIsMadeThanTheWorkerMayHold) {
  exporter_.Serve(ServeOf());
  Fill(SequenceId{8}, 100);
  exporter_.Serve(ServeOf(SequenceId{8}, 100));  // it stands still
  const uint64_t each = uint64_t{kLayers.size()} * 100 * kHashRowBytes;
  share_.made_bytes = kBulkBytesMade - each;  // of other stages
  share_.holds_copies = true;
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kUnknown);
  EXPECT_EQ(Asked(AskOf(0, 100)), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Asked(AskOf(0, 100, SequenceId{8})), absl::StatusCode::kUnknown);
  share_.made_bytes = limits::kTransferBytesUnderWay;
  EXPECT_EQ(Asked(AskOf(0, 1, SequenceId{8})), absl::StatusCode::kResourceExhausted);
  share_.made_bytes = 2 * each;
  share_.num_made = kMaxFramesMade / 2;
  EXPECT_EQ(Asked(AskOf(0, 1)), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Asked(AskOf(0, 1, SequenceId{8})), absl::StatusCode::kUnknown);
  share_.num_made = kMaxFramesMade;
  EXPECT_EQ(Asked(AskOf(0, 1, SequenceId{8})), absl::StatusCode::kResourceExhausted);
  share_.num_made = 3;
  share_.holds_copies = false;
  Turn();
  Turn();
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kOk);
  EXPECT_EQ(share_.made_bytes, 0u);
}

TEST_F(ExporterTest, ACopyThatFailsIsTold) {
  exporter_.Serve(ServeOf());
  faults_.fail_next = true;
  Asked(AskOf(0, 100));
  Turn();
  EXPECT_EQ(CodeOf(1), absl::StatusCode::kInternal);
}

TEST_F(ExporterTest, PrefixBlocksAreServedByTheirKeys) {
  const ContentKey first{1, 1}, second{2, 2};
  cache_.KeepPrefix(kId, first);
  cache_.KeepPrefix(kId, second);
  RowsAsk ask{.secret = kSecret, .layers = {4, 6}, .first_row = 640, .num_rows = 128};
  ask.keys = {second, first};                          // whatever their order
  EXPECT_EQ(Asked(ask), absl::StatusCode::kNotFound);  // nothing is served
  v1::ServeRows serve = ServeOf(SequenceId{0}, 64);
  serve.clear_placement();
  exporter_.Serve(serve);
  EXPECT_EQ(Asked(ask), absl::StatusCode::kUnknown);
  Turn();
  const auto& answer = transfer_.answers.at(last_ask_);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->pieces.size(), 4u);
  EXPECT_TRUE(CheckFrame(HashRowTraits(kLayers, kOrigin), ask, false, *answer).ok());
  for (size_t i = 0; i < 4; ++i) {
    const LayerIndex layer = 4 + static_cast<LayerIndex>(i / 2);
    EXPECT_EQ(answer->pieces[i].content_key, i % 2 == 0 ? second : first);
    const auto* rows = reinterpret_cast<const std::byte*>(answer->rows.data());
    EXPECT_EQ(GetHashRow(rows + (i * 64 + 5) * kHashRowBytes),
              Value(layer, (i % 2 == 0 ? 64 : 0) + 5));
  }
  Confirm(last_ask_);
  Turn();
  EXPECT_TRUE(told_.empty());  // of these nobody is told

  RowsAsk wrong = ask;
  wrong.keys[1] = {3, 3};
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kNotFound);
  wrong = ask;
  wrong.secret = 1;
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kPermissionDenied);
  wrong = ask;
  wrong.keys.pop_back();
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kInvalidArgument);
  wrong = ask;
  wrong.keys.clear();
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kInvalidArgument);
  wrong = ask;
  wrong.first_row = 1;
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kInvalidArgument);
  // Keys of a sequence: it is asked for by positions.
  exporter_.Serve(ServeOf());
  wrong = AskOf(0, 64);
  wrong.keys = {first};
  EXPECT_EQ(Asked(wrong), absl::StatusCode::kInvalidArgument);

  // They stay when their sequence goes; a copy of one that is dropped ends well.
  finished_.erase(kId);
  exporter_.Close(kId);
  cache_.Close(kId);
  faults_.delay_polls = 2;
  EXPECT_EQ(Asked(ask), absl::StatusCode::kUnknown);
  cache_.DropPrefix(first);
  EXPECT_EQ(cache_.num_pinned(), 2u);
  while (exporter_.num_copies() > 0) Turn();
  EXPECT_EQ(CodeOf(last_ask_), absl::StatusCode::kOk);
  EXPECT_EQ(Asked(ask), absl::StatusCode::kNotFound);
  EXPECT_EQ(cache_.num_pinned(), 0u);

  // Until it is ended.
  ask.keys = {second};
  ask.num_rows = 64;
  EXPECT_EQ(Asked(ask), absl::StatusCode::kUnknown);
  serve.set_end(true);
  exporter_.Serve(serve);
  while (exporter_.num_copies() > 0) Turn();
  EXPECT_EQ(CodeOf(last_ask_), absl::StatusCode::kAborted);
  EXPECT_EQ(Asked(ask), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace strait
