// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/row_network.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/block_codec.h"
#include "tests/worker/polled_copies.h"
#include "worker/transport/transport.h"

namespace strait::sim {
namespace {

constexpr uint64_t kAnswerTimeoutUs =
    std::chrono::duration_cast<std::chrono::microseconds>(kAnswerTimeout).count();
constexpr uint64_t kSlowFactor = 1'000;
// A frame's second coming, after the first.
constexpr uint64_t kSecondUs = 20'000;

absl::Span<const std::byte> Bytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

absl::StatusOr<std::string> EncodeHead(const RowsFrame& frame) {
  TransferHeader header;
  header.sequence_id = frame.sequence.value;
  header.placement_term = frame.placement.term;
  header.placement_counter = frame.placement.counter;
  std::string head(TransferHeadBytes(static_cast<uint32_t>(frame.pieces.size())), '\0');
  STRAIT_RETURN_IF_ERROR(EncodeTransferHead(
      header, frame.pieces, {reinterpret_cast<std::byte*>(head.data()), head.size()}));
  return head;
}

absl::StatusOr<RowsFrame> Decode(const std::string& head, std::string rows) {
  STRAIT_ASSIGN_OR_RETURN(TransferHead decoded, DecodeTransferHead(Bytes(head)));
  if (decoded.header.payload_bytes != rows.size()) {
    return absl::DataLossError(absl::StrCat("a frame of ", rows.size(), " bytes, its head says ",
                                            decoded.header.payload_bytes));
  }
  size_t at = 0;
  for (const BlockHeader& piece : decoded.blocks) {
    STRAIT_RETURN_IF_ERROR(CheckRows(piece, Bytes(rows).subspan(at, piece.payload_bytes)));
    at += piece.payload_bytes;
  }
  return RowsFrame{SequenceId{decoded.header.sequence_id},
                   {decoded.header.placement_term, decoded.header.placement_counter},
                   std::move(decoded.blocks),
                   std::move(rows)};
}

}  // namespace

// ---------------------------------------------------------------- the network

bool RowNetwork::AreParted(const RowConnection& connection) const {
  return partition_->IsCut(connection.from_address, connection.to_address) ||
         parted_.contains({connection.from_address, connection.to_address}) ||
         parted_.contains({connection.to_address, connection.from_address});
}

bool RowNetwork::BreakOne() {
  std::vector<RowConnectionPtr> open;
  std::vector<RowConnectionPtr> waiting;
  std::erase_if(connections_, [](const auto& weak) { return weak.expired(); });
  for (const auto& weak : connections_) {
    const RowConnectionPtr connection = weak.lock();
    if (!connection->open) continue;
    open.push_back(connection);
    if (!connection->asked.empty()) waiting.push_back(connection);
  }
  const std::vector<RowConnectionPtr>& from = waiting.empty() ? open : waiting;
  if (from.empty()) return false;
  Break(from[world_->Random(0, from.size() - 1)], absl::UnavailableError("connection reset"));
  return true;
}

void RowNetwork::Break(const RowConnectionPtr& connection, const absl::Status& why) {
  if (!connection->open) return;
  connection->open = false;
  world_->Trace(absl::StrCat("rows from ", connection->to_address, " to ", connection->from_address,
                             ": ", why.message(), ", ", connection->asked.size(),
                             " asks are lost"));
  std::set<SequenceId> hit;
  for (const auto& [id, sequence] : std::exchange(connection->asked, {})) {
    if (hit.insert(sequence).second) on_fault_(RowFault::kBreak, sequence);
    SimRowTransfer* const from = connection->from;
    from->run_(Delay(), [from, id = id, why] { from->events_.on_rows(id, why); });
  }
}

void RowNetwork::Carry(const RowConnectionPtr& connection, AskId id, std::string head,
                       std::string rows) {
  const auto befalls = [this](uint32_t* num, double chance) {
    const bool by_chance = world_->Chance(chance);
    if (*num == 0) return by_chance;
    --*num;
    return true;
  };
  const bool is_slow =
      slow_.contains(connection->from_address) || slow_.contains(connection->to_address);
  const uint64_t bytes = head.size() + rows.size();
  connection->free_us = std::max(connection->free_us, world_->now_us()) +
                        bytes * 1'000'000 * (is_slow ? kSlowFactor : 1) / options_.bytes_per_s;
  if (world_->Chance(options_.break_chance)) {
    world_->At(world_->now_us() + (connection->free_us - world_->now_us()) / 2,
               [this, connection] { Break(connection, absl::UnavailableError("stream removed")); });
  }
  const uint64_t at_us = connection->free_us + Delay();
  auto frame = std::make_shared<absl::StatusOr<RowsFrame>>();
  if (befalls(&num_to_duplicate_, options_.duplicate_chance)) {
    auto again = std::make_shared<absl::StatusOr<RowsFrame>>(Decode(head, rows));
    world_->At(at_us + world_->Random(1, kSecondUs),
               [this, connection, id, again] { Deliver(connection, id, std::move(*again), true); });
  }
  if (befalls(&num_to_corrupt_, options_.corrupt_chance)) {
    std::string& part = world_->Chance(0.3) ? head : rows;
    if (world_->Chance(0.2)) {
      part.resize(world_->Random(0, part.size() - 1));
    } else {
      part[world_->Random(0, part.size() - 1)] ^= static_cast<char>(1u << world_->Random(0, 7));
    }
  }
  *frame = Decode(head, std::move(rows));
  if (!frame->ok()) *frame = absl::DataLossError(frame->status().message());
  world_->At(at_us,
             [this, connection, id, frame] { Deliver(connection, id, std::move(*frame), false); });
}

void RowNetwork::Deliver(const RowConnectionPtr& connection, AskId id,
                         absl::StatusOr<RowsFrame> frame, bool is_second) {
  if (!connection->open || AreParted(*connection)) return;
  const auto it = connection->asked.find(id);
  const bool is_awaited = it != connection->asked.end();
  if (frame.ok()) {
    if (is_second) {
      on_fault_(RowFault::kDuplicate, frame->sequence);
    } else if (!is_awaited) {
      on_fault_(RowFault::kLate, frame->sequence);
    }
  }
  if (is_awaited) {
    if (absl::IsDataLoss(frame.status())) on_fault_(RowFault::kCorrupt, it->second);
    connection->asked.erase(it);
  }
  SimRowTransfer* const from = connection->from;
  auto shared = std::make_shared<absl::StatusOr<RowsFrame>>(std::move(frame));
  from->run_(0, [from, id, shared] { from->events_.on_rows(id, std::move(*shared)); });
}

// ---------------------------------------------------------------- a worker's end

SimRowTransfer::SimRowTransfer(RowNetwork* network, std::string address, RowTransferEvents events,
                               RunAfter run)
    : network_(network),
      address_(std::move(address)),
      events_(std::move(events)),
      run_(std::move(run)) {
  network_->by_address_[address_] = this;
}

void SimRowTransfer::Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) {
  World* const world = network_->world_;
  RowConnectionPtr& connection = connections_[peer_address];
  if (connection == nullptr || !connection->open) {
    connection = std::make_shared<RowConnection>();
    connection->from = this;
    connection->from_address = address_;
    connection->to_address = peer_address;
    const auto peer = network_->by_address_.find(peer_address);
    connection->to = peer != network_->by_address_.end() ? peer->second : nullptr;
    network_->connections_.push_back(connection);
  }
  if (!connection->asked.emplace(id, ask.sequence).second) {
    return world->Violation(absl::StrCat("rows are asked for twice as ask ", id.value));
  }
  if (connection->to == nullptr) {
    return world->After(network_->Delay(), [network = network_, connection = connection] {
      network->Break(connection, absl::UnavailableError("connection refused"));
    });
  }
  world->After(kAnswerTimeoutUs, [network = network_, connection = connection, id] {
    if (!connection->asked.contains(id)) return;
    network->Break(connection, absl::UnavailableError("no answer"));
  });
  world->After(network_->Delay(), [network = network_, connection = connection, id, ask] {
    if (!connection->open || network->AreParted(*connection)) return;
    SimRowTransfer* const to = connection->to;
    to->run_(0, [to, connection, id, ask] { to->OnAsk(connection, id, ask); });
  });
}

void SimRowTransfer::Forget(AskId id) {
  for (const auto& [address, connection] : connections_) connection->asked.erase(id);
}

void SimRowTransfer::OnAsk(const RowConnectionPtr& connection, AskId id, const RowsAsk& ask) {
  // What was read before a break is looked at.
  const PeerAskId peer_ask{++last_peer_ask_.value};
  peer_asks_[peer_ask] = {connection, id};
  events_.on_ask(peer_ask, ask);
}

void SimRowTransfer::Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) {
  World* const world = network_->world_;
  const auto it = peer_asks_.find(id);
  if (it == peer_asks_.end()) {
    return world->Violation(absl::StrCat("ask ", id.value, " of a peer is answered twice"));
  }
  const PeerAsk asked = it->second;
  peer_asks_.erase(it);
  RowNetwork* const network = network_;
  if (!frame.ok()) {
    return world->After(network->Delay(), [network, asked, why = frame.status()] {
      network->Deliver(asked.connection, asked.id, why, false);
    });
  }
  // As a transfer's threads do: some time later, and whether the peer is still there only they learn.
  if (!asked.connection->open && world->Chance(0.5)) return;
  if (std::exchange(network->forge_, false)) {
    const uint64_t value = *GetHashRow(Bytes(frame->rows).data());
    PutHashRow(value + 1, reinterpret_cast<std::byte*>(frame->rows.data()));
  }
  size_t at = 0;
  for (BlockHeader& piece : frame->pieces) {
    SealBlockHeader(Bytes(frame->rows).subspan(at, piece.payload_bytes), &piece);
    at += piece.payload_bytes;
  }
  absl::StatusOr<std::string> head = EncodeHead(*frame);
  if (!head.ok()) return world->Violation("a frame has no head: " + head.status().ToString());
  auto shared = std::make_shared<RowsFrame>(*std::move(frame));
  run_(world->Random(0, 2'000),
       [this, id, shared] { events_.on_served(id, std::move(shared->pieces)); });
  if (!asked.connection->open) return;
  network->Carry(asked.connection, asked.id, *std::move(head), std::move(shared->rows));
}

void SimRowTransfer::Kill(bool silent) {
  if (!alive_) return;
  alive_ = false;
  network_->by_address_.erase(address_);
  for (const auto& [address, connection] : connections_) connection->open = false;
  for (const auto& weak : network_->connections_) {
    const RowConnectionPtr connection = weak.lock();
    if (!connection || connection->to != this || silent) continue;
    network_->world_->After(network_->Delay(), [network = network_, connection] {
      network->Break(connection, absl::UnavailableError("peer is gone"));
    });
  }
}

}  // namespace strait::sim
