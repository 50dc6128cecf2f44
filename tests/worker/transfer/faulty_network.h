// SPDX-License-Identifier: Apache-2.0
//
// FaultyNetwork carries rows between WorkerCores of one thread: in any order, late, and with the faults that
// are asked of it. Each ask is answered once, as RowTransfer promises, and sometimes once more.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "proto/wire/block_codec.h"
#include "worker/core/worker_core.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

// Of a hundred.
struct NetworkFaults {
  uint32_t lost = 0;     // Unavailable, before or after the peer has read its rows
  uint32_t damaged = 0;  // DataLoss
  uint32_t foreign = 0;  // a header is another one
  uint32_t twice = 0;    // comes again
  uint32_t silent = 0;   // OnServed of it does not come: the peer is gone
};

class FaultyNetwork {
 public:
  explicit FaultyNetwork(uint32_t seed) : rng_(seed) {}

  RowTransfer* Join(const std::string& address) {
    return ports_.emplace(address, std::make_unique<Port>(this, address)).first->second.get();
  }
  void SetCore(const std::string& address, WorkerCore* core) { ports_.at(address)->core = core; }

  // Delivers one of what is under way, if there is anything.
  bool Deliver(uint64_t now_us) {
    if (under_way_.empty()) return false;
    std::swap(under_way_[Below(static_cast<uint32_t>(under_way_.size()))], under_way_.back());
    const Message message = std::move(under_way_.back());
    under_way_.pop_back();
    message(now_us);
    return true;
  }
  void DeliverAll(uint64_t now_us) {
    while (Deliver(now_us)) {
    }
  }

  NetworkFaults faults;
  int num_faults = 0;
  uint64_t num_frames = 0;

 private:
  using Message = std::function<void(uint64_t now_us)>;
  struct Asker {
    std::string address;
    AskId id;
  };
  struct Port final : public RowTransfer {
    Port(FaultyNetwork* n, std::string a) : network(n), address(std::move(a)) {}
    void Ask(AskId id, const std::string& peer, const RowsAsk& ask) override {
      network->OnAsk({address, id}, peer, ask);
    }
    void Forget(AskId) override {}
    void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) override {
      network->OnAnswer(this, id, std::move(frame));
    }
    FaultyNetwork* const network;
    const std::string address;
    WorkerCore* core = nullptr;
  };

  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(rng_() % end); }
  bool Happens(uint32_t percent) {
    const bool happens = Below(100) < percent;
    num_faults += happens;
    return happens;
  }

  void OnAsk(const Asker& asker, const std::string& peer, const RowsAsk& ask) {
    if (ports_.count(peer) == 0 || Happens(faults.lost)) {
      return Tell(asker, absl::UnavailableError("the ask was lost"));
    }
    const PeerAskId id{++last_peer_ask_};
    asked_[id] = asker;
    under_way_.push_back(
        [this, peer, id, ask](uint64_t now_us) { ports_.at(peer)->core->OnAsk(id, ask, now_us); });
  }

  void OnAnswer(Port* from, PeerAskId id, absl::StatusOr<RowsFrame> frame) {
    const Asker asker = asked_.at(id);
    asked_.erase(id);
    if (!frame.ok()) return Tell(asker, frame.status());
    ++num_frames;
    Seal(&*frame);
    const std::vector<BlockHeader> pieces = frame->pieces;
    if (!Happens(faults.silent)) {
      under_way_.push_back(
          [from, id, pieces](uint64_t now_us) { from->core->OnServed(id, pieces, now_us); });
    } else {
      return Tell(asker, absl::UnavailableError("the connection broke"));
    }
    if (Happens(faults.lost)) return Tell(asker, absl::UnavailableError("the answer was lost"));
    if (Happens(faults.damaged)) return Tell(asker, absl::DataLossError("a bit was lost"));
    if (Happens(faults.foreign)) {
      BlockHeader& piece = frame->pieces[Below(static_cast<uint32_t>(frame->pieces.size()))];
      switch (Below(7)) {
        case 0:
          frame->sequence.value ^= 1;
          break;
        case 1:
          frame->placement.counter ^= 1;
          break;
        case 2:
          piece.layer ^= 1;
          break;
        case 3:
          piece.first_position ^= 64;
          break;
        case 4:
          piece.origin.model ^= 1;
          break;
        case 5:
          frame->pieces.pop_back();
          break;
        default:
          frame->rows.pop_back();
      }
    }
    if (Happens(faults.twice)) Tell(asker, *frame);
    Tell(asker, std::move(frame));
  }

  static void Seal(RowsFrame* frame) {
    size_t at = 0;
    for (BlockHeader& piece : frame->pieces) {
      SealBlockHeader(
          {reinterpret_cast<const std::byte*>(frame->rows.data()) + at, piece.payload_bytes},
          &piece);
      at += piece.payload_bytes;
    }
  }

  void Tell(const Asker& asker, absl::StatusOr<RowsFrame> frame) {
    under_way_.push_back([this, asker, frame = std::move(frame)](uint64_t now_us) {
      ports_.at(asker.address)->core->OnRows(asker.id, frame, now_us);
    });
  }

  std::mt19937 rng_;
  std::map<std::string, std::unique_ptr<Port>> ports_;
  std::map<PeerAskId, Asker> asked_;
  std::vector<Message> under_way_;
  uint64_t last_peer_ask_ = 0;
};

}  // namespace strait
