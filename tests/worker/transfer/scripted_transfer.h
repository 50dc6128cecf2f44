// SPDX-License-Identifier: Apache-2.0
//
// ScriptedTransfer is a RowTransfer whose peers are the test: it keeps what is asked and answered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "proto/wire/block_codec.h"
#include "tests/worker/polled_copies.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/transfer_share.h"

namespace strait {

class ScriptedTransfer final : public RowTransfer {
 public:
  struct Asked {
    AskId id;
    std::string address;
    RowsAsk ask;
  };
  void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) override {
    asks.push_back({id, peer_address, ask});
  }
  void Forget(AskId id) override {
    forgotten.push_back(id);
    std::erase_if(asks, [id](const Asked& asked) { return asked.id == id; });
  }
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) override {
    answers.emplace(id.value, std::move(frame));
  }
  uint64_t WaitingBytes() override { return waiting_bytes; }
  bool TakeRows(PeerAskId id, size_t bytes, bool may_be_device, RowsFrame* frame) override {
    if (without_memory.contains(id.value)) return false;
    return RowTransfer::TakeRows(id, bytes, may_be_device, frame);
  }
  // The oldest ask that was not taken.
  Asked Take() {
    Asked asked = std::move(asks.front());
    asks.erase(asks.begin());
    return asked;
  }

  std::vector<Asked> asks;
  std::vector<AskId> forgotten;
  uint64_t waiting_bytes = 0;
  std::set<uint64_t> without_memory;  // answers that get none now
  std::map<uint64_t, absl::StatusOr<RowsFrame>> answers;
};

// The rows' traits of models whose rows are one number each.
inline RowTraits HashRowTraits(LayerRange layers, BlockOrigin origin = {}) {
  return {.layers = layers, .shape = kHashRowShape, .origin = origin};
}

// The frame that answers an ask, where value(layer, position) are a sequence's rows.
template <class Value>
RowsFrame FrameOf(const RowsAsk& ask, Value value, BlockOrigin origin = {}) {
  RowsFrame frame{.sequence = ask.sequence, .placement = ask.placement, .pieces = {}, .rows = {}};
  const RowTraits traits = HashRowTraits(ask.layers, origin);
  ForPieces({ask.layers, ask.first_row, ask.num_rows}, [&](LayerIndex layer, uint32_t first,
                                                           uint32_t count) {
    BlockHeader header = PieceHeader(traits, layer, first, count);
    std::string rows(header.payload_bytes, '\0');
    for (uint32_t i = 0; i < count; ++i) {
      PutHashRow(value(layer, first + i),
                 reinterpret_cast<std::byte*>(rows.data()) + i * kHashRowBytes);
    }
    SealBlockHeader({reinterpret_cast<const std::byte*>(rows.data()), rows.size()}, &header);
    frame.pieces.push_back(header);
    frame.rows += rows;
  });
  return frame;
}

}  // namespace strait
