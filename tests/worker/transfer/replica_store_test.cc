// SPDX-License-Identifier: Apache-2.0
//
// Defends: a replica is what its source had, or is not there; memory is never above the budget; each key that the coordinator
// names is told once, whatever becomes of its source; copies are given only to who shows a secret, and outlive
// the coordinator that had them made.
#include "worker/transfer/replica_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "tests/worker/transfer/scripted_transfer.h"
#include "worker/transfer/importer.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

constexpr LayerRange kModel = {0, 8};
constexpr uint64_t kBlockBytes = limits::kBlockTokens * kHashRowBytes;
constexpr uint64_t kSecret = 77;
constexpr BlockOrigin kOrigin = {.model = 5, .numerics = 6};

ContentKey KeyNo(uint64_t number) { return {number, 1}; }
uint64_t Value(const ContentKey& key, LayerIndex layer, uint32_t row) {
  return key.low * 1'000'000 + layer * 1'000 + row;
}

class ReplicaStoreTest : public testing::Test {
 protected:
  explicit ReplicaStoreTest(uint64_t blocks = 20) : blocks_(blocks) {
    share_.transfer = &transfer_;
    share_.frame_bytes = 8 * kBlockBytes;
  }
  ~ReplicaStoreTest() override {
    store_.Clear();
    EXPECT_EQ(share_.asked_bytes, 0u);
    EXPECT_TRUE(share_.asks.empty());
  }

  static v1::Replicate Of(const std::vector<ContentKey>& keys, LayerRange layers = {2, 4}) {
    v1::Replicate replicate;
    v1::RowsSource& source = *replicate.mutable_source();
    source.set_layer_begin(layers.begin);
    source.set_layer_end(layers.end);
    source.set_stage_id(3);
    source.set_data_address("a:1");
    source.set_secret(9);
    replicate.set_keys(Pack(keys));
    return replicate;
  }
  static v1::Replicate Forgetting(const std::vector<ContentKey>& keys, LayerRange layers) {
    v1::Replicate replicate;
    replicate.set_forget(Pack(keys));
    replicate.set_layer_begin(layers.begin);
    replicate.set_layer_end(layers.end);
    return replicate;
  }
  void Replicate(const v1::Replicate& replicate) { store_.Replicate(replicate, now_us_); }
  static RowsFrame FrameFor(const RowsAsk& ask) {
    RowsFrame frame = FrameOf(
        ask,
        [&](LayerIndex layer, uint32_t position) {
          const ContentKey& key = ask.keys[(position - ask.first_row) / limits::kBlockTokens];
          return Value(key, layer, position % limits::kBlockTokens);
        },
        kOrigin);
    for (BlockHeader& piece : frame.pieces) {
      piece.content_key = ask.keys[(piece.first_position - ask.first_row) / limits::kBlockTokens];
    }
    return frame;
  }
  void Answer(absl::StatusOr<RowsFrame> frame) { AnswerTo(transfer_.Take(), std::move(frame)); }
  void AnswerTo(const ScriptedTransfer::Asked& asked, absl::StatusOr<RowsFrame> frame) {
    const auto it = share_.asks.find(asked.id);
    if (it != share_.asks.end()) it->second->OnRows(asked.id, std::move(frame), now_us_);
    Turn(0);
  }
  void AnswerAll() {
    while (!transfer_.asks.empty()) {
      const ScriptedTransfer::Asked asked = transfer_.Take();
      AnswerTo(asked, FrameFor(asked.ask));
    }
  }
  void Turn(uint64_t us = 1'000) {
    now_us_ += us;
    store_.Ask(now_us_);
    for (const ReplicaStore::Told& told : store_.Poll()) {
      EXPECT_EQ(told.stage_id, 3u);
      for (const ContentKey& key : told.keys) there_.push_back(key.low);
      for (const ContentKey& key : told.failed) failed_.push_back(key.low);
      bytes_ += told.fetched_bytes;
    }
    const absl::Status sound = store_.CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound;
    EXPECT_LE(store_.taken_bytes(), blocks_ * kBlockBytes);
    EXPECT_EQ(share_.asked_bytes, store_.asked_bytes());
    EXPECT_LE(share_.asked_bytes, kReplicaBytesUnderWay);
  }
  void Serve(uint64_t secret, bool end = false) {
    v1::ServeRows serve;
    serve.set_secret(secret);
    serve.set_end(end);
    store_.Serve(serve);
  }
  absl::StatusOr<RowsFrame> Asked(const RowsAsk& ask) {
    transfer_.answers.clear();
    store_.OnAsk(PeerAskId{1}, ask);
    return transfer_.answers.at(1);
  }
  static RowsAsk AskOf(const std::vector<ContentKey>& keys, LayerRange layers = {2, 4}) {
    RowsAsk ask{.sequence = SequenceId{12},
                .placement = {1, 4},
                .secret = kSecret,
                .layers = layers,
                .first_row = 128};
    ask.keys = keys;
    ask.num_rows = static_cast<uint32_t>(keys.size()) * limits::kBlockTokens;
    return ask;
  }

  const uint64_t blocks_;
  ScriptedTransfer transfer_;
  TransferShare share_;
  ReplicaStore store_{HashRowTraits(kModel, {.model = 5}), blocks_* kBlockBytes, &share_};
  uint64_t now_us_ = 1'000'000;
  std::vector<uint64_t> there_;
  std::vector<uint64_t> failed_;
  uint64_t bytes_ = 0;
};

TEST_F(ReplicaStoreTest, WhatWasFetchedIsGivenToWhoShowsTheSecret) {
  Replicate(Of({KeyNo(1), KeyNo(2), KeyNo(3), KeyNo(4), KeyNo(5)}));
  ASSERT_EQ(transfer_.asks.size(), 2u);  // four keys of two layers are a frame
  EXPECT_EQ(transfer_.asks[0].address, "a:1");
  EXPECT_EQ(transfer_.asks[0].ask.stage_id, 3u);
  EXPECT_EQ(transfer_.asks[0].ask.sequence, SequenceId{0});
  EXPECT_EQ(transfer_.asks[0].ask.secret, 9u);
  EXPECT_EQ(transfer_.asks[0].ask.keys.size(), 4u);
  EXPECT_EQ(transfer_.asks[0].ask.num_rows, 256u);
  EXPECT_TRUE(store_.busy());
  AnswerAll();
  EXPECT_THAT(there_, UnorderedElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(failed_, IsEmpty());
  EXPECT_EQ(bytes_, 10 * kBlockBytes);
  EXPECT_FALSE(store_.busy());

  const RowsAsk ask = AskOf({KeyNo(2), KeyNo(5)});
  EXPECT_TRUE(absl::IsNotFound(Asked(ask).status()));  // nothing is served yet
  Serve(1);
  EXPECT_TRUE(absl::IsPermissionDenied(Asked(ask).status()));
  Serve(kSecret);
  const absl::StatusOr<RowsFrame> frame = Asked(ask);
  ASSERT_TRUE(frame.ok()) << frame.status();
  // As its source made it, but for where it stands in the ask.
  EXPECT_TRUE(CheckFrame(HashRowTraits(kModel, kOrigin), ask, false, *frame).ok());
  EXPECT_EQ(frame->rows, FrameFor(ask).rows);
  EXPECT_EQ(frame->pieces[1].first_position, 192u);

  EXPECT_TRUE(absl::IsNotFound(Asked(AskOf({KeyNo(6)})).status()));
  EXPECT_TRUE(absl::IsNotFound(Asked(AskOf({KeyNo(2)}, {2, 5})).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Asked(AskOf({KeyNo(2)}, {2, 9})).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Asked(AskOf({})).status()));
  Serve(kSecret, true);
  EXPECT_TRUE(absl::IsPermissionDenied(Asked(ask).status()));
}

TEST_F(ReplicaStoreTest, WhatIsHereIsNotFetchedAgain) {
  Replicate(Of({KeyNo(1)}));
  AnswerAll();
  Replicate(Of({KeyNo(1)}));
  EXPECT_THAT(transfer_.asks, IsEmpty());
  Turn();
  EXPECT_THAT(there_, ElementsAre(1, 1));
  EXPECT_EQ(store_.num_blocks(), 2u);
  // Of more layers it is another matter.
  Replicate(Of({KeyNo(1)}, {0, 4}));
  AnswerAll();
  EXPECT_THAT(there_, ElementsAre(1, 1, 1));
  EXPECT_EQ(store_.num_blocks(), 4u);
}

TEST_F(ReplicaStoreTest, MemoryIsNeverAboveItsBudget) {
  std::vector<ContentKey> keys;
  for (uint64_t i = 1; i <= 12; ++i) keys.push_back(KeyNo(i));
  Replicate(Of(keys));
  Turn();
  EXPECT_THAT(failed_, ElementsAre(11, 12));  // told at once
  AnswerAll();
  EXPECT_EQ(there_.size(), 10u);
  EXPECT_EQ(store_.num_blocks(), 20u);
  // What is forgotten makes room, for keys of the same message, too.
  v1::Replicate next = Of({KeyNo(11)});
  next.set_forget(Pack({KeyNo(3)}));
  next.set_layer_begin(2);
  next.set_layer_end(4);
  Replicate(next);
  AnswerAll();
  EXPECT_EQ(there_.back(), 11u);
  EXPECT_FALSE(store_.has(KeyNo(3), 2));
  EXPECT_EQ(store_.taken_bytes(), 20 * kBlockBytes);
}

TEST_F(ReplicaStoreTest, AKeyThatIsForgottenWhileItComesDoesNotStay) {
  Replicate(Of({KeyNo(1), KeyNo(2)}));
  Replicate(Forgetting({KeyNo(2), KeyNo(9)}, {0, 8}));
  Turn();
  EXPECT_THAT(failed_, ElementsAre(2));
  AnswerAll();
  EXPECT_THAT(there_, ElementsAre(1));
  EXPECT_FALSE(store_.has(KeyNo(2), 2));
  // Of other layers nothing happens.
  Replicate(Forgetting({KeyNo(1)}, {4, 8}));
  EXPECT_EQ(store_.num_blocks(), 2u);
  Replicate(Forgetting({KeyNo(1)}, {3, 4}));
  EXPECT_EQ(store_.num_blocks(), 1u);
  Turn();
}

TEST_F(ReplicaStoreTest, OneThatItsSourceHasNotFailsAlone) {
  share_.frame_bytes = 4 * kBlockBytes;
  Replicate(Of({KeyNo(1), KeyNo(2)}, {0, 2}));
  ASSERT_EQ(transfer_.asks.size(), 1u);
  // It may be that the source hears later that it is to serve.
  for (uint32_t i = 0; i < kMaxMisses; ++i) {
    EXPECT_THAT(failed_, IsEmpty());
    Answer(absl::PermissionDeniedError("not yet"));
    EXPECT_THAT(transfer_.asks, IsEmpty());
    Turn(kFirstMissUs << i);
    ASSERT_EQ(transfer_.asks.size(), 1u);
  }
  Answer(absl::NotFoundError("one of them"));
  ASSERT_EQ(transfer_.asks.size(), 2u);
  const ScriptedTransfer::Asked first = transfer_.Take();
  EXPECT_THAT(first.ask.keys, ElementsAre(KeyNo(1)));
  AnswerTo(first, FrameFor(first.ask));
  Answer(absl::NotFoundError("this one"));
  EXPECT_THAT(there_, ElementsAre(1));
  EXPECT_THAT(failed_, ElementsAre(2));
}

TEST_F(ReplicaStoreTest, ALostSourceIsGivenUp) {
  Replicate(Of({KeyNo(1)}));
  for (uint32_t i = 1; i < kMaxReplicaTries; ++i) {
    Answer(absl::UnavailableError("no connection"));
    EXPECT_THAT(transfer_.asks, IsEmpty());
    Turn(kMaxPauseUs);
    ASSERT_EQ(transfer_.asks.size(), 1u) << i;
  }
  Answer(absl::UnavailableError("no connection"));
  EXPECT_THAT(failed_, ElementsAre(1));
  EXPECT_FALSE(store_.busy());
  // One that is busy is asked again, however often.
  Replicate(Of({KeyNo(2)}));
  for (int i = 0; i < 50; ++i) {
    Answer(absl::ResourceExhaustedError("too much"));
    Turn(kAskAgainUs);
  }
  // One whose epoch is over, not.
  Answer(absl::AbortedError("an older epoch"));
  EXPECT_THAT(failed_, ElementsAre(1, 2));
}

TEST_F(ReplicaStoreTest, WhatComesDamagedIsAskedForAgainAndGivenUp) {
  share_.frame_bytes = kBlockBytes;  // a layer a frame
  Replicate(Of({KeyNo(1)}));
  ASSERT_EQ(transfer_.asks.size(), 2u);
  const ScriptedTransfer::Asked first = transfer_.Take();
  AnswerTo(first, FrameFor(first.ask));
  EXPECT_EQ(store_.num_blocks(), 1u);
  const std::vector<std::function<void(RowsFrame*)>> wrongs = {
      [](RowsFrame* f) { f->pieces[0].content_key.low ^= 1; },
      [](RowsFrame* f) { f->pieces[0].origin.model ^= 1; },
      [](RowsFrame* f) { f->rows.pop_back(); },
  };
  ASSERT_EQ(wrongs.size(), kMaxRefusals);
  for (const auto& wrong : wrongs) {
    EXPECT_THAT(failed_, IsEmpty());
    ASSERT_EQ(transfer_.asks.size(), 1u);
    const ScriptedTransfer::Asked asked = transfer_.Take();
    RowsFrame frame = FrameFor(asked.ask);
    wrong(&frame);
    AnswerTo(asked, frame);
  }
  EXPECT_THAT(failed_, ElementsAre(1));
  EXPECT_EQ(store_.num_blocks(), 0u);  // nor a part of it
}

TEST_F(ReplicaStoreTest, AReplicaWhoseBytesChangedIsDropped) {
  Replicate(Of({KeyNo(1), KeyNo(2)}));
  AnswerAll();
  Serve(kSecret);
  store_.data(KeyNo(2), 3)[100] ^= std::byte{1};
  EXPECT_TRUE(Asked(AskOf({KeyNo(1)})).ok());
  EXPECT_TRUE(absl::IsNotFound(Asked(AskOf({KeyNo(1), KeyNo(2)})).status()));
  EXPECT_EQ(store_.num_damaged(), 1u);
  EXPECT_FALSE(store_.has(KeyNo(2), 3));
  EXPECT_TRUE(store_.has(KeyNo(2), 2));
  Turn();
  // It can be fetched again.
  Replicate(Of({KeyNo(2)}));
  AnswerAll();
  EXPECT_TRUE(Asked(AskOf({KeyNo(1), KeyNo(2)})).ok());
}

TEST_F(ReplicaStoreTest, RowsBehindAllThatASequenceCanHaveAreRefused) {
  Replicate(Of({KeyNo(1), KeyNo(2)}));
  AnswerAll();
  Serve(kSecret);
  RowsAsk ask = AskOf({KeyNo(1), KeyNo(2)});
  // The second block's end is beyond 32 bits; the first one's is behind all positions.
  for (const uint32_t first : {~0u - 63, limits::kMaxPositionEmbeddings - 64}) {
    ask.first_row = first;
    EXPECT_TRUE(absl::IsInvalidArgument(Asked(ask).status())) << first;
  }
  ask.first_row = limits::kMaxPositionEmbeddings - 128;
  EXPECT_TRUE(Asked(ask).ok());
}

TEST_F(ReplicaStoreTest, NoMoreIsGivenThanPeersTake) {
  Replicate(Of({KeyNo(1), KeyNo(2)}));
  AnswerAll();
  Serve(kSecret);
  const RowsAsk ask = AskOf({KeyNo(1), KeyNo(2)});
  transfer_.waiting_bytes = limits::kTransferBytesUnderWay - 4 * kBlockBytes;
  EXPECT_TRUE(Asked(ask).ok());
  ++transfer_.waiting_bytes;
  EXPECT_TRUE(absl::IsResourceExhausted(Asked(ask).status()));
  transfer_.waiting_bytes = 0;
  EXPECT_TRUE(Asked(ask).ok());
}

TEST_F(ReplicaStoreTest, CopiesOutliveTheCoordinatorAndNothingElseDoes) {
  Replicate(Of({KeyNo(1)}));
  AnswerAll();
  Serve(kSecret);
  share_.frame_bytes = kBlockBytes;
  Replicate(Of({KeyNo(2)}));
  const ScriptedTransfer::Asked first = transfer_.Take();
  AnswerTo(first, FrameFor(first.ask));  // one of its two layers
  there_.clear();
  store_.EndTransfers();
  EXPECT_EQ(share_.asked_bytes, 0u);
  EXPECT_THAT(transfer_.asks, IsEmpty());
  EXPECT_EQ(transfer_.forgotten.size(), 1u);
  Turn();
  EXPECT_THAT(there_, IsEmpty());
  EXPECT_THAT(failed_, IsEmpty());
  EXPECT_EQ(store_.num_blocks(), 2u);
  EXPECT_TRUE(absl::IsNotFound(Asked(AskOf({KeyNo(1)})).status()));  // no secret is known
  Serve(kSecret);
  EXPECT_TRUE(Asked(AskOf({KeyNo(1)})).ok());
  store_.Clear();
  EXPECT_EQ(store_.num_blocks(), 0u);
  EXPECT_EQ(store_.taken_bytes(), 0u);
}

TEST_F(ReplicaStoreTest, WhatNobodyNamesAfterACoordinatorWasLostMakesRoom) {
  std::vector<ContentKey> keys;
  for (uint64_t i = 1; i <= 10; ++i) keys.push_back(KeyNo(i));
  Replicate(Of(keys));
  AnswerAll();
  EXPECT_EQ(store_.num_blocks(), 20u);
  store_.EndTransfers();
  // The next one's books are empty: it names what is of use to it, and forgets nothing.
  there_.clear();
  Replicate(Of({KeyNo(1), KeyNo(9)}));
  Turn();
  EXPECT_THAT(there_, ElementsAre(1, 9));
  Replicate(Of({KeyNo(11), KeyNo(12), KeyNo(13)}));
  AnswerAll();
  EXPECT_THAT(failed_, IsEmpty());
  EXPECT_THAT(there_, UnorderedElementsAre(1, 9, 11, 12, 13));
  for (const uint64_t key : {1, 9, 11, 12, 13}) EXPECT_TRUE(store_.has(KeyNo(key), 3)) << key;
  EXPECT_EQ(store_.num_blocks(), 20u);
  // What it named stays.
  for (uint64_t i = 21; i <= 40; ++i) Replicate(Of({KeyNo(i)}));
  AnswerAll();
  EXPECT_EQ(failed_.size(), 15u);
  for (const uint64_t key : {1, 9, 11, 12, 13}) EXPECT_TRUE(store_.has(KeyNo(key), 2)) << key;
}

TEST_F(ReplicaStoreTest, AsksComeBehindAllOthersAndKeepToTheirRate) {
  share_.asked_bytes = kReplicaBytesUnderWay;  // others fetch
  Replicate(Of({KeyNo(1)}));
  EXPECT_THAT(transfer_.asks, IsEmpty());
  EXPECT_TRUE(store_.busy());
  share_.asked_bytes = 0;
  Turn();
  AnswerAll();
  v1::Replicate slow = Of({KeyNo(2), KeyNo(3), KeyNo(4), KeyNo(5), KeyNo(6)});
  share_.frame_bytes = 2 * kBlockBytes;
  slow.set_bytes_per_s(20 * kBlockBytes);  // ten keys a second
  Replicate(slow);
  uint32_t num_asked = 0;
  for (int ms = 0; ms < 100; ++ms) {
    num_asked += static_cast<uint32_t>(transfer_.asks.size());
    AnswerAll();
    Turn();
  }
  EXPECT_GE(num_asked, 1u);
  EXPECT_LE(num_asked, 2u);
  Turn(1'000'000);
  for (int ms = 0; ms < 1'000; ++ms) {
    AnswerAll();
    Turn();
  }
  EXPECT_EQ(there_.size(), 6u);
}

TEST_F(ReplicaStoreTest, WhatIsMalformedFailsOrIsPassedOver) {
  for (const auto& wrong : std::vector<std::function<void(v1::Replicate*)>>{
           [](auto* r) { r->mutable_source()->set_layer_end(9); },
           [](auto* r) { r->mutable_source()->set_layer_begin(4); },
           [](auto* r) { r->mutable_source()->set_secret(0); },
           [](auto* r) { r->mutable_source()->clear_data_address(); },
       }) {
    v1::Replicate replicate = Of({KeyNo(1)});
    wrong(&replicate);
    failed_.clear();
    Replicate(replicate);
    Turn();
    EXPECT_THAT(failed_, ElementsAre(1));
  }
  failed_.clear();
  v1::Replicate replicate = Of({});
  replicate.set_keys("short");
  Replicate(replicate);
  Turn();
  EXPECT_THAT(failed_, IsEmpty());
  EXPECT_THAT(transfer_.asks, IsEmpty());
}

}  // namespace
}  // namespace strait
