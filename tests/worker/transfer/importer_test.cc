// SPDX-License-Identifier: Apache-2.0
//
// Defends: an importer asks for every row once, in pieces within its bounds, and again for what did not come; it
// writes nothing that it did not ask for, and tells what it has and why it ends.
#include "worker/transfer/importer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "proto/wire/epoch_wire.h"
#include "tests/worker/number_cache.h"
#include "tests/worker/polled_copies.h"
#include "tests/worker/transfer/scripted_transfer.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr LayerRange kLayers = {4, 9};
constexpr PlacementEpoch kPlacement = {1, 3};
constexpr SequenceId kId{7};
constexpr uint32_t kVocab = 1000;
constexpr BlockOrigin kOrigin = {.model = 5, .numerics = 6};

uint64_t Value(LayerIndex layer, uint32_t position) { return layer * 1'000'000 + position; }

class ImporterTest : public testing::Test {
 protected:
  ImporterTest() {
    EXPECT_TRUE(memory_.Resize(500, {}).ok());
    pool_.Grow(500);
    share_.transfer = &transfer_;
    share_.frame_bytes = 100 * kHashRowBytes;
  }
  ~ImporterTest() override {
    importer_.Clear();
    Drain();
    EXPECT_EQ(share_.asked_bytes, 0u);
    EXPECT_TRUE(share_.asks.empty());
    EXPECT_FALSE(cache_.in_copies());
  }

  void Take(uint32_t rows, SequenceId id = kId) {
    if (!cache_.resident(id)) cache_.Open(id);
    cache_.Grow(id, rows);
    importer_.Take(id, kPlacement, rows);
  }
  v1::FetchRows Fetch(uint32_t begin, uint32_t end, SequenceId id = kId) const {
    v1::FetchRows fetch;
    fetch.set_sequence_id(id.value);
    ToWire(kPlacement, fetch.mutable_placement());
    fetch.set_begin_row(begin);
    fetch.set_end_row(end);
    for (uint32_t row = begin; row < end; ++row) fetch.mutable_tokens()->add_ids(row % kVocab);
    // Two stages have the layers.
    for (const LayerRange layers : {LayerRange{4, 6}, LayerRange{6, 9}}) {
      v1::RowsSource* source = fetch.add_sources();
      source->set_layer_begin(layers.begin);
      source->set_layer_end(layers.end);
      source->set_stage_id(layers.begin);
      source->mutable_epoch()->set_term(2);
      source->set_data_address(layers.begin == 4 ? "a:1" : "b:1");
      source->set_secret(90 + layers.begin);
    }
    return fetch;
  }
  void Say(const v1::FetchRows& fetch) { importer_.Fetch(fetch, 10'000, kVocab, now_us_); }
  void Ask() {
    importer_.Ask(true, now_us_);
    importer_.Ask(false, now_us_);
  }
  // Copies end, as far as they may; what was told is kept.
  void Turn(uint64_t us = 1'000) {
    now_us_ += us;
    const std::vector<CopyEnd> ends = copies_.Poll();
    importer_.OnCopies(ends, now_us_);
    for (Importer::Fetched& fetched : importer_.Poll(now_us_)) told_.push_back(std::move(fetched));
    Ask();
  }
  void Drain() {
    while (importer_.num_copies() > 0) Turn();
  }
  static RowsFrame Frame(const RowsAsk& ask, BlockOrigin origin = kOrigin) {
    return FrameOf(ask, Value, origin);
  }
  ScriptedTransfer::Asked Answer(absl::Status error = absl::OkStatus()) {
    ScriptedTransfer::Asked asked = transfer_.Take();
    Reply(asked, error.ok() ? absl::StatusOr<RowsFrame>(Frame(asked.ask)) : error);
    return asked;
  }
  void Reply(const ScriptedTransfer::Asked& asked, absl::StatusOr<RowsFrame> frame) {
    importer_.OnRows(asked.id, std::move(frame), now_us_);
  }
  // Until it asks for nothing more.
  void AnswerAll() {
    Ask();
    while (!transfer_.asks.empty() || importer_.num_copies() > 0) {
      if (!transfer_.asks.empty()) Answer();
      Turn();
    }
    Turn();
  }
  void ExpectRows(uint32_t rows, SequenceId id = kId) {
    const auto tables = cache_.PageTables(id);
    for (LayerIndex layer = kLayers.begin; layer < kLayers.end; ++layer) {
      for (uint32_t p = 0; p < rows; ++p) {
        const BlockId block = tables[layer - kLayers.begin][p / limits::kBlockTokens];
        ASSERT_EQ(memory_.Peek(block, p % limits::kBlockTokens), Value(layer, p))
            << "layer " << layer << ", row " << p;
      }
    }
  }
  absl::Status LastStatus() const {
    return told_.empty() ? absl::UnknownError("nothing was told") : told_.back().status;
  }

  NumberCache memory_;
  BlockPool pool_;
  CopyFaults faults_;
  PolledCopies copies_{kLayers.size(), &memory_, &faults_};
  LatentCache cache_{kLayers.size(), &pool_};
  ScriptedTransfer transfer_;
  TransferShare share_;
  Importer::Steps steps_;
  Importer importer_{HashRowTraits(kLayers, kOrigin), &copies_, &cache_, &share_,
                     [this] { return steps_; }};
  std::vector<Importer::Fetched> told_;
  uint64_t now_us_ = 1'000'000;
};

TEST_F(ImporterTest, RowsWaitForStepsThatMayUseTheirBlocksAndForNoOthers) {
  const auto begin_step = [&] {
    copies_.StepBegun({});
    ++steps_.begun;
  };
  const auto come = [&](uint32_t begin_row, uint32_t end_row) {
    Say(Fetch(begin_row, end_row));
    Ask();
    while (!transfer_.asks.empty()) Answer();
    Turn();
    return importer_.num_copies() == 0;
  };
  begin_step();
  Take(100);  // blocks that this step's sequences may have had
  EXPECT_FALSE(come(0, 64));
  copies_.StepFinished();
  ++steps_.finished;
  Turn();
  EXPECT_EQ(importer_.num_copies(), 0u);
  begin_step();
  EXPECT_TRUE(come(64, 90)) << "its block was there before the step began";
  Take(300);
  EXPECT_TRUE(come(90, 128)) << "in the block that it had";
  EXPECT_FALSE(come(128, 140));
  copies_.StepFinished();
  ++steps_.finished;
  Turn();
  EXPECT_EQ(importer_.num_copies(), 0u);
  ExpectRows(140);
}

TEST_F(ImporterTest, EveryRowIsAskedForOnceWithinItsBounds) {
  Take(400);
  Say(Fetch(0, 30));
  Say(Fetch(30, 331));
  std::map<std::pair<LayerIndex, uint32_t>, int> times;
  Ask();
  while (!transfer_.asks.empty()) {
    const ScriptedTransfer::Asked asked = Answer();
    const RowsAsk& ask = asked.ask;
    EXPECT_LE(ask.layers.size() * ask.num_rows * kHashRowBytes, share_.frame_bytes);
    EXPECT_EQ(asked.address, ask.layers.begin < 6 ? "a:1" : "b:1");
    EXPECT_EQ(ask.stage_id, ask.layers.begin < 6 ? 4u : 6u);
    EXPECT_EQ(ask.secret, ask.layers.begin < 6 ? 94u : 96u);
    EXPECT_EQ(ask.epoch, (PipelineEpoch{2, 0}));
    EXPECT_EQ(ask.placement, kPlacement);
    for (LayerIndex layer = ask.layers.begin; layer < ask.layers.end; ++layer) {
      for (uint32_t row = 0; row < ask.num_rows; ++row) ++times[{layer, ask.first_row + row}];
    }
    Turn();
  }
  Drain();
  Turn();
  EXPECT_EQ(times.size(), size_t{331} * kLayers.size());
  for (const auto& [row, count] : times) ASSERT_EQ(count, 1);
  ASSERT_FALSE(told_.empty());
  EXPECT_EQ(told_.back().rows, 331u);
  EXPECT_EQ(told_.back().bytes, 331 * kLayers.size() * kHashRowBytes);
  EXPECT_GT(told_.back().us, 0u);
  EXPECT_TRUE(importer_.IsFetched(kId, kPlacement, 331));
  ExpectRows(331);
  EXPECT_EQ(importer_.Open(kId).size(), 331u);
  EXPECT_FALSE(importer_.busy());
}

TEST_F(ImporterTest, FewRowsOfManyLayersAreOneAskASource) {
  Take(64);
  v1::FetchRows fetch = Fetch(0, 20);
  fetch.set_is_last(true);
  Say(fetch);
  Ask();
  ASSERT_EQ(transfer_.asks.size(), 2u);
  EXPECT_EQ(transfer_.asks[0].ask.layers, (LayerRange{4, 6}));
  EXPECT_EQ(transfer_.asks[1].ask.layers, (LayerRange{6, 9}));
}

TEST_F(ImporterTest, TheDigestIsThatOfThePiecesHoweverTheyCame) {
  RowsDigest expected;
  Take(200);
  Say(Fetch(0, 130));
  Say(Fetch(130, 200));
  Ask();
  std::vector<ScriptedTransfer::Asked> asks;
  while (!transfer_.asks.empty()) {
    asks.push_back(transfer_.Take());
    for (const BlockHeader& piece : Frame(asks.back().ask).pieces) expected.Add(piece);
  }
  std::reverse(asks.begin(), asks.end());
  for (const auto& asked : asks) {
    Reply(asked, Frame(asked.ask));
    Reply(asked, Frame(asked.ask));  // twice
    Turn();
  }
  Drain();
  Turn();
  EXPECT_EQ(told_.back().digest, expected.Value());
  EXPECT_EQ(told_.back().rows, 200u);
  EXPECT_EQ(expected.num_rows(), 200u * kLayers.size());
}

TEST_F(ImporterTest, AnUnreachablePeerIsAskedAgainWithAGrowingPause) {
  Take(64);
  Say(Fetch(0, 20));
  Ask();
  uint64_t pause = kFirstPauseUs;
  for (int i = 0; i < 8; ++i, pause = std::min(2 * pause, kMaxPauseUs)) {
    // The other one is asked on.
    while (transfer_.asks[0].address != "a:1") Answer();
    Answer(absl::UnavailableError("it is dead"));
    Turn(pause - 1'000);
    EXPECT_TRUE(transfer_.asks.empty() || transfer_.asks[0].address == "b:1");
    Turn(1'000);
    ASSERT_FALSE(transfer_.asks.empty()) << "after " << pause;
  }
  AnswerAll();
  EXPECT_EQ(told_.back().rows, 20u);
  EXPECT_TRUE(told_.back().status.ok());
  EXPECT_EQ(told_.back().refused_frames, 0u);
  ExpectRows(20);
}

TEST_F(ImporterTest, WhoHasTooMuchToDoIsAskedAgainSoon) {
  Take(64);
  Say(Fetch(0, 20));
  for (const absl::Status& why :
       {absl::ResourceExhaustedError("much"), absl::OutOfRangeError("not yet"),
        absl::NotFoundError("not told yet")}) {
    Ask();
    while (!transfer_.asks.empty()) Answer(why);
    Ask();
    EXPECT_TRUE(transfer_.asks.empty());
    Turn(kAskAgainUs);
    EXPECT_EQ(transfer_.asks.size(), 2u);
  }
  AnswerAll();
  EXPECT_EQ(told_.back().rows, 20u);
}

// A link that takes longer for a frame than the transfer waits for one never brought any: what was asked for again was as
// large.
TEST_F(ImporterTest, FramesShrinkWhileTheirSourceBringsNone) {
  share_.frame_bytes = limits::kTransferFrameBytes;
  constexpr uint32_t kRows = 156 * limits::kBlockTokens;
  static_assert(3 * kRows * kHashRowBytes > 4 * kLeastFrameBytes);
  ASSERT_TRUE(memory_.Resize(1'500, {}).ok());
  pool_.Grow(1'000);
  Take(kRows);
  Say(Fetch(0, kRows));
  Ask();
  uint64_t most = limits::kTransferFrameBytes;
  // The second source brings nothing before frames are as small as they become.
  while (most > kLeastFrameBytes) {
    while (!transfer_.asks.empty()) {
      const bool is_slow = transfer_.asks.front().address == "b:1";
      const ScriptedTransfer::Asked asked =
          Answer(is_slow ? absl::UnavailableError("no answer for 10 s") : absl::OkStatus());
      EXPECT_LE(asked.ask.bytes, is_slow ? most : limits::kTransferFrameBytes);
      EXPECT_EQ(asked.ask.bytes, BytesOf(HashRowTraits(kLayers), RangeOf(asked.ask)));
    }
    most /= 2;
    Turn(kMaxPauseUs);
  }
  EXPECT_GT(transfer_.asks.size(), 4u);
  // These come, and the sum is of the same pieces as with one frame.
  AnswerAll();
  ASSERT_EQ(told_.back().rows, kRows);
  RowsDigest digest;
  ForPieces({kLayers, 0, kRows}, [&](LayerIndex layer, uint32_t first, uint32_t count) {
    const RowsAsk ask = {.layers = {layer, layer + 1}, .first_row = first, .num_rows = count};
    for (const BlockHeader& piece : Frame(ask).pieces) digest.Add(piece);
  });
  EXPECT_EQ(told_.back().digest, digest.Value());
}

TEST_F(ImporterTest, DamageIsAskedForAgainAndInTheEndTold) {
  Take(64);
  Say(Fetch(0, 20));
  Ask();
  Answer();  // of the first source
  Answer(absl::DataLossError("damaged"));
  Ask();
  Answer(absl::DataLossError("damaged"));
  Ask();
  EXPECT_TRUE(told_.empty());
  Answer(absl::DataLossError("damaged again"));
  Turn();
  EXPECT_EQ(LastStatus(), absl::DataLossError("damaged again"));
  EXPECT_EQ(told_.back().refused_frames, 3u);
  EXPECT_EQ(told_.back().rows, 0u);
  EXPECT_TRUE(transfer_.asks.empty());
  EXPECT_FALSE(importer_.IsFetched(kId, kPlacement, 0));
  // It fetches nothing more, and says so again.
  told_.clear();
  Say(Fetch(20, 30));
  Turn();
  EXPECT_TRUE(absl::IsDataLoss(LastStatus()));
  EXPECT_TRUE(transfer_.asks.empty());
}

TEST_F(ImporterTest, WhatWasNotAskedForIsNotWritten) {
  Take(64);
  const std::vector<std::pair<std::function<void(RowsFrame*)>, absl::StatusCode>> wrongs = {
      {[](RowsFrame* f) { f->sequence.value = 8; }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->placement.counter = 4; }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->pieces.pop_back(); }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->rows.pop_back(); }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->pieces[0].layer = 5; }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->pieces[0].first_position = 1; }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->pieces[0].num_rows = 19; }, absl::StatusCode::kDataLoss},
      {[](RowsFrame* f) { f->pieces[0].origin.model = 1; }, absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].origin.basis = 1; }, absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].origin.policy = 1; }, absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].origin.numerics = 1; },
       absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].rank = 4; }, absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].rope = 4; }, absl::StatusCode::kFailedPrecondition},
      {[](RowsFrame* f) { f->pieces[0].row_format = RowFormat::kBf16; },
       absl::StatusCode::kFailedPrecondition},
  };
  for (const auto& [wrong, code] : wrongs) {
    importer_.Close(kId);
    Take(64);
    told_.clear();
    Say(Fetch(0, 20));
    for (uint32_t i = 0; i < kMaxRefusals; ++i) {
      Ask();
      auto asked = std::find_if(transfer_.asks.begin(), transfer_.asks.end(),
                                [](const auto& a) { return a.address == "a:1"; });
      ASSERT_NE(asked, transfer_.asks.end());
      RowsFrame frame = Frame(asked->ask);
      wrong(&frame);
      const ScriptedTransfer::Asked of = *asked;
      transfer_.asks.erase(asked);
      Reply(of, frame);
      EXPECT_EQ(importer_.num_copies(), 0u);
    }
    Turn();
    EXPECT_EQ(LastStatus().code(), code) << LastStatus();
    EXPECT_EQ(told_.back().refused_frames, kMaxRefusals);
  }
  // Where other numerics are taken, they are.
  importer_.Close(kId);
  Take(64);
  v1::FetchRows fetch = Fetch(0, 20);
  fetch.set_any_numerics(true);
  Say(fetch);
  Ask();
  while (!transfer_.asks.empty()) {
    const ScriptedTransfer::Asked asked = transfer_.Take();
    Reply(asked, Frame(asked.ask, {.model = 5, .numerics = 77}));
  }
  Drain();
  Turn();
  EXPECT_TRUE(importer_.IsFetched(kId, kPlacement, 20));
  ExpectRows(20);
}

TEST_F(ImporterTest, WhatTheSourceRefusesEndsTheImport) {
  for (const absl::Status& why : {absl::PermissionDeniedError("p"), absl::AbortedError("a"),
                                  absl::FailedPreconditionError("f"), absl::InternalError("i")}) {
    importer_.Close(kId);
    Take(64);
    Say(Fetch(0, 20));
    Ask();
    Answer(why);
    EXPECT_EQ(transfer_.asks.size(), 0u) << "the others are forgotten";
    EXPECT_EQ(share_.asked_bytes, 0u);
    Turn();
    EXPECT_EQ(LastStatus(), why);
  }
}

TEST_F(ImporterTest, BulkLeavesRoomForWhoStandsStill) {
  share_.frame_bytes = limits::kTransferFrameBytes;
  share_.asked_bytes = kBulkBytesUnderWay - 100 * kHashRowBytes;  // of other stages
  Take(640);
  Take(64, SequenceId{8});
  Say(Fetch(0, 640));
  v1::FetchRows fetch = Fetch(0, 64, SequenceId{8});
  fetch.set_is_last(true);
  Say(fetch);
  Ask();
  ASSERT_EQ(transfer_.asks.size(), 2u);
  for (const auto& asked : transfer_.asks) EXPECT_EQ(asked.ask.sequence, SequenceId{8});
  share_.asked_bytes = limits::kTransferBytesUnderWay;
  fetch = Fetch(64, 70, SequenceId{8});
  Take(128, SequenceId{8});
  Say(fetch);
  Ask();
  EXPECT_EQ(transfer_.asks.size(), 2u);
  share_.asked_bytes = importer_.asked_bytes();
  Ask();
  EXPECT_EQ(transfer_.asks.size(), 6u);
}

TEST_F(ImporterTest, NoMoreAsksThanTheWorkerMayHave) {
  Take(6'000);
  Say(Fetch(0, 6'000));
  Ask();
  EXPECT_EQ(transfer_.asks.size(), kBulkAsksUnderWay);
  AnswerAll();
  EXPECT_EQ(told_.back().rows, 6'000u);
  ExpectRows(6'000);
}

TEST_F(ImporterTest, SmallAsksOfBulkLeaveRoomForWhoStandsStill) {
  // Of many asks that nobody answers none is large.
  Take(6'000);
  Say(Fetch(0, 6'000));
  Ask();
  transfer_.asks.clear();
  const SequenceId other{8};
  Take(64, other);
  v1::FetchRows fetch = Fetch(0, 10, other);
  fetch.set_is_last(true);
  Say(fetch);
  Ask();
  ASSERT_EQ(transfer_.asks.size(), 2u);  // of two stages
  EXPECT_EQ(transfer_.asks[0].ask.sequence, other);
}

TEST_F(ImporterTest, ARateIsKept) {
  Take(1'000);
  v1::FetchRows fetch = Fetch(0, 1'000);
  fetch.set_bytes_per_s(160'000);  // 10,000 rows of a layer a second
  Say(fetch);
  const uint64_t began_us = now_us_;
  Ask();
  while (importer_.busy()) {
    while (!transfer_.asks.empty()) Answer();
    Turn(1'000);
  }
  const double seconds = static_cast<double>(now_us_ - began_us) / 1e6;
  EXPECT_GT(seconds, 0.35);  // 5,000 rows, of which a tenth of a second's are saved up
  EXPECT_LT(seconds, 0.6);
  EXPECT_GE(told_.size(), 3u);  // at most every 100 ms
  EXPECT_LE(told_.size(), 7u);
}

TEST_F(ImporterTest, TheLastRowsDoNotWaitForWhatIsOwedOfARate) {
  share_.frame_bytes = 1'000 * kHashRowBytes;
  Take(300);
  const auto say = [&](uint32_t begin, uint32_t end, bool is_last) {
    v1::FetchRows fetch = Fetch(begin, end);
    fetch.set_bytes_per_s(160);
    fetch.set_is_last(is_last);
    Say(fetch);
    Ask();
  };
  say(0, 200, false);
  while (importer_.busy()) {
    if (!transfer_.asks.empty()) Answer();
    Turn(100'000);
  }
  ASSERT_EQ(told_.back().rows, 200u);
  say(200, 210, true);
  EXPECT_EQ(transfer_.asks.size(), 2u);
  AnswerAll();
  say(210, 300, true);  // of a prompt, whose client waits anyway
  EXPECT_TRUE(transfer_.asks.empty());
}

TEST_F(ImporterTest, ACopyThatFailsEndsTheImport) {
  Take(64);
  Say(Fetch(0, 20));
  Ask();
  faults_.fail_next = true;
  Answer();
  Turn();
  Turn();
  EXPECT_TRUE(absl::IsInternal(LastStatus())) << LastStatus();
}

TEST_F(ImporterTest, WhileCopiesAreHeldFramesWait) {
  Take(64);
  Say(Fetch(0, 20));
  Ask();
  share_.holds_copies = true;
  Answer();
  Answer();
  Turn();
  EXPECT_EQ(importer_.num_copies(), 0u);
  EXPECT_TRUE(importer_.busy());
  share_.holds_copies = false;
  Turn();
  EXPECT_EQ(importer_.num_copies(), 2u);
  Drain();
  Turn();
  EXPECT_EQ(told_.back().rows, 20u);
}

TEST_F(ImporterTest, WithoutACoordinatorNothingIsAskedAndWhatIsThereStays) {
  Take(200);
  Say(Fetch(0, 20));
  AnswerAll();
  Say(Fetch(20, 130));
  Ask();
  EXPECT_FALSE(transfer_.asks.empty());
  importer_.EndFetches();
  EXPECT_TRUE(transfer_.asks.empty());
  EXPECT_EQ(share_.asked_bytes, 0u);
  EXPECT_FALSE(importer_.busy());
  told_.clear();
  Turn();
  EXPECT_TRUE(told_.empty());
  ExpectRows(20);
}

TEST_F(ImporterTest, ClosedWhileRowsComeItLeavesNothingBehind) {
  Take(400);
  Say(Fetch(0, 400));
  Ask();
  faults_.delay_polls = 3;
  Answer();
  Answer();
  EXPECT_EQ(importer_.num_copies(), 2u);
  importer_.Close(kId);
  cache_.Close(kId);
  EXPECT_GT(cache_.num_pinned(), 0u);
  EXPECT_TRUE(transfer_.asks.empty());
  EXPECT_TRUE(cache_.CheckIntegrity().ok());
  // The same sequence comes again, for another placement.
  cache_.Open(kId);
  cache_.Grow(kId, 64);
  importer_.Take(kId, {1, 4}, 64);
  Drain();
  EXPECT_EQ(cache_.num_pinned(), 0u);
  EXPECT_TRUE(cache_.CheckIntegrity().ok());
  Turn();
  EXPECT_TRUE(told_.empty());
}

}  // namespace
}  // namespace strait
