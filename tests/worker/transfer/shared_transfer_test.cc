// SPDX-License-Identifier: Apache-2.0
//
// Defends: rows of workers of one host go through memory that both have, and by message where that cannot be; a peer that
// lies there is refused as over gRPC; and no place stays in use when nothing is asked any more.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/worker/transfer/rows_node.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transfer/shared_rows.h"

namespace strait {
namespace {

using testing::HasSubstr;

RowsAsk SizedAsk(uint32_t num_rows = 200) {
  RowsAsk ask = AnAsk(num_rows);
  ask.bytes = BytesOf(HashRowTraits(ask.layers), RangeOf(ask));
  return ask;
}

// As an Exporter answers.
void AnswerAsked(RowsNode* from, PeerAskId id, const RowsFrame& frame) {
  RowsFrame made{
      .sequence = frame.sequence, .placement = frame.placement, .pieces = frame.pieces, .rows = {}};
  from->transfer->TakeRows(id, frame.rows.size(), false, &made);
  std::memcpy(made.bytes().data(), frame.rows.data(), frame.rows.size());
  for (BlockHeader& piece : made.pieces) piece.row_checksum = 0;
  from->transfer->Answer(id, std::move(made));
}

void ExpectRows(const absl::StatusOr<RowsFrame>& frame, const RowsFrame& expected) {
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->pieces, expected.pieces);
  ASSERT_EQ(frame->bytes().size(), expected.rows.size());
  EXPECT_EQ(std::memcmp(frame->bytes().data(), expected.rows.data(), expected.rows.size()), 0);
}

void WaitUntilUnused(RowsNode* node) {
  while (node->transfer->shared_bytes_used() > 0) std::this_thread::sleep_for(1ms);
}

TEST(SharedTransferTest, RowsGoThroughMemoryThatBothHave) {
  RowsNode to;
  RowsNode from;
  const RowsAsk ask = SizedAsk();
  const RowsFrame frame = AFrame(ask);
  for (uint64_t id = 1; id <= 3; ++id) {
    to.transfer->Ask(AskId{id}, from.address(), ask);
    const auto asked = from.Next<RowsNode::Asked>();
    AnswerAsked(&from, asked.id, frame);
    EXPECT_EQ(from.Next<RowsNode::Served>().pieces, frame.pieces);
    const auto rows = to.Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{id});
    ExpectRows(rows.frame, frame);
    EXPECT_TRUE(rows.frame->lent.any());
    EXPECT_GT(to.transfer->shared_bytes_used(), 0u);
  }
  EXPECT_EQ(to.transfer->bytes().came_shared, 3 * frame.rows.size());
  EXPECT_EQ(to.transfer->bytes().came_by_grpc, 0u);
  EXPECT_EQ(from.transfer->bytes().went_shared, 3 * frame.rows.size());
  EXPECT_EQ(from.transfer->bytes().went_by_grpc, 0u);
  EXPECT_EQ(to.transfer->shared_bytes_used(), 0u);
}

TEST(SharedTransferTest, WhoSharesNothingSendsMessages) {
  for (const bool asker_shares : {true, false}) {
    RowsNode to({.shares_memory = asker_shares});
    RowsNode from({.shares_memory = !asker_shares});
    const RowsAsk ask = SizedAsk();
    const RowsFrame frame = AFrame(ask);
    for (uint64_t id = 1; id <= 2; ++id) {
      to.transfer->Ask(AskId{id}, from.address(), ask);
      // It offered something once, and saw that it is of no use.
      EXPECT_EQ(to.transfer->shared_bytes_used() > 0, asker_shares && id == 1);
      AnswerAsked(&from, from.Next<RowsNode::Asked>().id, frame);
      ExpectRows(to.Next<RowsNode::Rows>().frame, frame);
    }
    EXPECT_EQ(to.transfer->bytes().came_by_grpc, 2 * frame.rows.size());
    EXPECT_EQ(to.transfer->bytes().came_shared, 0u);
    EXPECT_EQ(from.transfer->bytes().went_by_grpc, 2 * frame.rows.size());
    EXPECT_EQ(from.transfer->bytes().went_shared, 0u);
    EXPECT_EQ(to.transfer->shared_bytes_used(), 0u);
  }
}

TEST(SharedTransferTest, WhereThereIsNoRoomRowsGoByMessage) {
  RowsNode to;
  RowsNode from;
  RowsAsk ask = SizedAsk();
  const RowsFrame frame = AFrame(ask);
  ask.bytes = limits::kTransferFrameBytes;  // each takes as much room
  constexpr uint64_t kFit = kSharedRowsBytes / limits::kTransferFrameBytes;
  for (uint64_t id = 1; id <= kFit + 1; ++id) to.transfer->Ask(AskId{id}, from.address(), ask);
  for (uint64_t id = 1; id <= kFit + 1; ++id) {
    AnswerAsked(&from, from.Next<RowsNode::Asked>().id, frame);
    ExpectRows(to.Next<RowsNode::Rows>().frame, frame);
  }
  EXPECT_EQ(to.transfer->bytes().came_shared, kFit * frame.rows.size());
  EXPECT_EQ(to.transfer->bytes().came_by_grpc, frame.rows.size());
}

TEST(SharedTransferTest, WhatAPeerLiesAboutIsDamagedAndNoMore) {
  std::vector<LentRows> held;
  // By the row that is asked for.
  EvilPeer evil([&](const v1::RowsRequest& request) -> std::optional<std::string> {
    const SharedPlace place = PlaceOf(request);
    const RowsFrame frame = AFrame(FromWire(request));
    EXPECT_TRUE(place.any());
    const auto reply = [&](uint64_t ticket) {
      return BytesOf(
          *EncodeFrame(request.request_id(), frame, Buffers(), {.place_ticket = ticket}));
    };
    const auto mapped = MappedRegion::Map(place, {});
    EXPECT_TRUE(mapped.ok()) << mapped.status();
    if (request.first_row() == 0) return reply(place.ticket);  // and nothing was written
    auto writes = (*mapped)->Write(place, frame.rows.size());
    EXPECT_TRUE(writes.ok()) << writes.status();
    std::memcpy(writes->memory.data(), frame.rows.data(), frame.rows.size());
    if (request.first_row() == 1) {  // it has not said that it left
      held.push_back(*std::move(writes));
      return reply(place.ticket);
    }
    if (request.first_row() == 2) writes->memory.back() ^= std::byte{1};
    *writes = {};
    if (request.first_row() == 3) return reply(place.ticket + 1);
    if (request.first_row() == 4) {  // rows of another length
      RowsAsk other = FromWire(request);
      other.num_rows += 10'000;
      return BytesOf(*EncodeFrame(request.request_id(), AFrame(other), Buffers(),
                                  {.place_ticket = place.ticket}));
    }
    return reply(place.ticket);
  });
  RowsNode to;
  for (uint32_t what = 0; what <= 5; ++what) {
    RowsAsk ask = SizedAsk();
    ask.first_row = what;
    to.transfer->Ask(AskId{what + 1}, evil.address(), ask);
    const auto rows = to.Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{what + 1});
    if (what < 5) {
      EXPECT_TRUE(absl::IsDataLoss(rows.frame.status())) << what << ": " << rows.frame.status();
    } else {
      ExpectRows(rows.frame, AFrame(ask));
    }
  }
  EXPECT_GT(to.transfer->shared_bytes_used(), 0u);
  held.clear();
  EXPECT_EQ(to.transfer->shared_bytes_used(), 0u);
}

TEST(SharedTransferTest, ATicketWhereNothingWasOfferedIsDamaged) {
  EvilPeer evil([](const v1::RowsRequest& request) -> std::optional<std::string> {
    return BytesOf(*EncodeFrame(request.request_id(), AFrame(FromWire(request)), Buffers(),
                                {.place_ticket = 12345}));
  });
  RowsNode to({.shares_memory = false});
  to.transfer->Ask(AskId{1}, evil.address(), SizedAsk());
  EXPECT_TRUE(absl::IsDataLoss(to.Next<RowsNode::Rows>().frame.status()));
}

TEST(SharedTransferTest, AForgottenAsksPlaceIsKeptUntilItIsAnswered) {
  RowsNode to;
  RowsNode from;
  const RowsAsk ask = SizedAsk();
  to.transfer->Ask(AskId{1}, from.address(), ask);
  const auto first = from.Next<RowsNode::Asked>();
  RowsFrame made{.sequence = {}, .placement = {}, .pieces = {}, .rows = {}};
  from.transfer->TakeRows(first.id, ask.bytes, false, &made);
  to.transfer->Forget(AskId{1});
  EXPECT_GT(to.transfer->shared_bytes_used(), 0u);
  // Errors and rows alike.
  to.transfer->Ask(AskId{2}, from.address(), ask);
  const auto second = from.Next<RowsNode::Asked>();
  to.transfer->Forget(AskId{2});
  from.transfer->Answer(second.id, absl::NotFoundError("it left"));
  from.transfer->Answer(first.id, std::move(made));
  WaitUntilUnused(&to);
}

TEST(SharedTransferTest, APeerThatIsGoneLeavesItsPlacesOnceItsCopiesHaveEnded) {
  RowsNode to;
  auto from = std::make_unique<RowsNode>();
  const RowsAsk ask = SizedAsk();
  std::vector<PeerAskId> asked;
  for (uint64_t id = 1; id <= 3; ++id) {
    to.transfer->Ask(AskId{id}, from->address(), ask);
    asked.push_back(from->Next<RowsNode::Asked>().id);
  }
  RowsFrame written{.sequence = {}, .placement = {}, .pieces = {}, .rows = {}};
  from->transfer->TakeRows(asked[0], ask.bytes, false, &written);
  RowsFrame left = written;
  left.lent = {};
  from->transfer->TakeRows(asked[1], ask.bytes, false, &left);
  left.lent = {};
  from.reset();
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(absl::IsUnavailable(to.Next<RowsNode::Rows>().frame.status()));
  }
  // A copy into the first one goes on.
  EXPECT_EQ(to.transfer->shared_bytes_used(),
            (ask.bytes + kSharedUnitBytes - 1) / kSharedUnitBytes * kSharedUnitBytes);
  std::memset(written.bytes().data(), 1, written.bytes().size());
  written.lent = {};
  EXPECT_EQ(to.transfer->shared_bytes_used(), 0u);
}

TEST(SharedTransferTest, RowsOfTheSameWorkerTakeNoStream) {
  for (const bool shares : {true, false}) {
    RowsNode node({.shares_memory = shares});
    node.transfer->SetAddress("itself:1");  // nobody is there
    const RowsAsk ask = SizedAsk();
    const RowsFrame frame = AFrame(ask);
    node.transfer->Ask(AskId{1}, "itself:1", ask);
    const auto asked = node.Next<RowsNode::Asked>();
    EXPECT_EQ(asked.ask.secret, ask.secret);
    AnswerAsked(&node, asked.id, frame);
    EXPECT_EQ(node.Next<RowsNode::Served>().pieces, frame.pieces);
    {
      const auto rows = node.Next<RowsNode::Rows>();
      EXPECT_EQ(rows.id, AskId{1});
      ExpectRows(rows.frame, frame);
      EXPECT_EQ(rows.frame->lent.any(), shares);
    }
    EXPECT_EQ(node.transfer->bytes().came_shared, frame.rows.size());
    node.transfer->Ask(AskId{2}, "itself:1", ask);
    node.transfer->Answer(node.Next<RowsNode::Asked>().id, absl::OutOfRangeError("not finished"));
    EXPECT_TRUE(absl::IsOutOfRange(node.Next<RowsNode::Rows>().frame.status()));
    WaitUntilUnused(&node);
    // One that is never answered is no harm.
    node.transfer->Ask(AskId{3}, "itself:1", ask);
  }
}

TEST(SharedTransferTest, ManyFramesUseTheSameMemoryAgain) {
  RowsNode to;
  RowsNode from;
  for (uint64_t round = 1; round <= 40; ++round) {
    std::vector<RowsFrame> frames;
    for (uint32_t i = 0; i < 5; ++i) {
      RowsAsk ask = SizedAsk(200 + i * 64);
      ask.first_row = static_cast<uint32_t>(round);
      ask.bytes = BytesOf(HashRowTraits(ask.layers), RangeOf(ask));
      to.transfer->Ask(AskId{round * 10 + i}, from.address(), ask);
      frames.push_back(AFrame(ask));
    }
    for (uint32_t i = 0; i < 5; ++i) {
      AnswerAsked(&from, from.Next<RowsNode::Asked>().id, frames[i]);
    }
    for (uint32_t i = 0; i < 5; ++i) {
      const auto rows = to.Next<RowsNode::Rows>();
      ExpectRows(rows.frame, frames[rows.id.value - round * 10]);
    }
  }
  EXPECT_EQ(to.transfer->bytes().came_by_grpc, 0u);
  EXPECT_EQ(to.transfer->shared_bytes_used(), 0u);
}

}  // namespace
}  // namespace strait
