// SPDX-License-Identifier: Apache-2.0
//
// RowNetwork and SimRowTransfer: the RowTransfer seam in virtual time. Asks and frames come in any order, as
// late as the seed and a bandwidth say; connections break; frames are damaged, come twice, or come when
// nobody waits for them any more.
//
// Owns:    RowNetwork knows the connections; a SimRowTransfer is one worker's end.
// Thread:  one. Events come in the worker's own time: none from a worker that stands still, or is dead.
// Errors:  as row_transfer.h says. A peer that is not there, or does not answer, is Unavailable later. What the
//          contract forbids is a violation of the World.
// Why:     heads and checksums are those of proto/wire/block_codec.h, made and checked over the bytes that
//          travel, as over gRPC.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "tests/sim/partition.h"
#include "tests/sim/world.h"
#include "worker/transfer/row_transfer.h"

namespace strait::sim {

class SimRowTransfer;

// What may happen to rows on their way.
enum class RowFault { kBreak, kCorrupt, kDuplicate, kLate };

struct RowNetworkOptions {
  uint64_t delay_us_max = 1'000;
  uint64_t bytes_per_s = 100'000'000;  // of each connection
  double corrupt_chance = 0;           // of a frame
  double duplicate_chance = 0;
  double break_chance = 0;  // of the connection, while a frame is on it
};

// From one worker to another that it asks.
struct RowConnection {
  SimRowTransfer* from = nullptr;
  SimRowTransfer* to = nullptr;  // null: nobody is there
  std::string from_address;
  std::string to_address;
  bool open = true;
  uint64_t free_us = 0;  // when what was sent is through
  std::map<AskId, SequenceId> asked;
};
using RowConnectionPtr = std::shared_ptr<RowConnection>;

class RowNetwork {
 public:
  // Told when rows of a sequence, or asks for them, meet a fault.
  using OnFault = std::function<void(RowFault, SequenceId)>;
  RowNetwork(World* world, const Partition* partition, const RowNetworkOptions& options,
             OnFault on_fault)
      : world_(world), partition_(partition), options_(options), on_fault_(std::move(on_fault)) {}

  // A random connection breaks, one that waits for rows if there is any. False: there is none.
  bool BreakOne();
  // It befalls the next frame that leaves.
  void CorruptNext() { ++num_to_corrupt_; }
  void DuplicateNext() { ++num_to_duplicate_; }
  // Rows from and to this address take a thousand times as long.
  void Slow(const std::string& address) { slow_.insert(address); }
  // Nothing that these two send each other arrives.
  void Part(const std::string& a, const std::string& b) { parted_.insert({a, b}); }
  // As before of all these.
  void Mend() {
    slow_.clear();
    parted_.clear();
  }
  // A row of the next frame that leaves changes before it is sealed: no checksum tells of it. For a test of the
  // simulator itself.
  void ForgeNext() { forge_ = true; }

 private:
  friend class SimRowTransfer;
  uint64_t Delay() { return world_->Random(10, options_.delay_us_max); }
  bool AreParted(const RowConnection& connection) const;
  void Break(const RowConnectionPtr& connection, const absl::Status& why);
  void Carry(const RowConnectionPtr& connection, AskId id, std::string head, std::string rows);
  void Deliver(const RowConnectionPtr& connection, AskId id, absl::StatusOr<RowsFrame> frame,
               bool is_second);

  World* const world_;
  const Partition* const partition_;
  const RowNetworkOptions options_;
  const OnFault on_fault_;
  std::map<std::string, SimRowTransfer*> by_address_;
  std::vector<std::weak_ptr<RowConnection>> connections_;
  std::set<std::string> slow_;
  std::set<std::pair<std::string, std::string>> parted_;
  uint32_t num_to_corrupt_ = 0;
  uint32_t num_to_duplicate_ = 0;
  bool forge_ = false;
};

class SimRowTransfer final : public RowTransfer {
 public:
  // `run` puts a callback into its worker's own time (which may be stalled) after a delay.
  using RunAfter = std::function<void(uint64_t delay_us, std::function<void()>)>;
  SimRowTransfer(RowNetwork* network, std::string address, RowTransferEvents events, RunAfter run);

  void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) override;
  void Forget(AskId id) override;
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) override;

  // The process is gone. `silent`: who asked it finds out by waiting.
  void Kill(bool silent);

 private:
  friend class RowNetwork;
  struct PeerAsk {
    RowConnectionPtr connection;
    AskId id;
  };
  void OnAsk(const RowConnectionPtr& connection, AskId id, const RowsAsk& ask);

  RowNetwork* const network_;
  const std::string address_;
  const RowTransferEvents events_;
  const RunAfter run_;
  bool alive_ = true;
  std::map<std::string, RowConnectionPtr> connections_;  // by whom it asks
  PeerAskId last_peer_ask_;
  std::map<PeerAskId, PeerAsk> peer_asks_;  // not answered
};

}  // namespace strait::sim
