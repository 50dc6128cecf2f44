// SPDX-License-Identifier: Apache-2.0
//
// PrefixLedger knows which prefix blocks a stage has, and which sequences have them, after all plans that
// it accepted. It is the part of PlanLedger's projected state that is about them.
//
// Owns:    keys alone, no blocks.
// Thread:  loop thread only.
// Errors:  InvalidArgument (malformed), FailedPrecondition (a key that is not here or is here twice, a block
//          that a sequence holds, blocks that do not follow each other, copies in host memory that are there or
//          not), ResourceExhausted (the host tier is full). A Change that failed is to be dropped.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"

namespace strait {

class PrefixLedger {
 public:
  using Keys = std::vector<ContentKey>;
  // What a plan changes, on top of the ledger.
  struct Change {
    absl::flat_hash_map<ContentKey, std::optional<uint32_t>, ContentKeyHash>
        holders;                                     // absent: dropped
    absl::flat_hash_map<SequenceId, Keys> prefixes;  // of sequences that it opens, closes, keeps of
    absl::flat_hash_map<ContentKey, bool, ContentKeyHash> on_host;    // false: forgotten
    absl::flat_hash_map<ContentKey, bool, ContentKeyHash> returning;  // false: dropped
    int64_t num_prefixes = 0;                                         // more, or fewer
    int64_t num_on_host = 0;                                          // likewise
  };

  // What an epoch left.
  void Left(SequenceId id, absl::Span<const ContentKey> prefix);

  // Prefix blocks of a sequence, by key.
  const Keys& PrefixOf(const Change& change, SequenceId id) const;
  uint64_t num_prefixes() const { return holders_.size(); }

  // It begins with these. REQUIRES: it has none.
  absl::Status Open(SequenceId id, Keys keys, Change* change) const;
  // All but its first `num_left` are its no more.
  void Leave(SequenceId id, size_t num_left, Change* change) const;
  // Its blocks from first_block on become prefix blocks where they are none; where others have these keys, it has
  // those in their place. So many of its own are its own no more; of these, it has others in their place.
  struct Kept {
    uint32_t num_new = 0;
    uint32_t num_joined = 0;
  };
  absl::StatusOr<Kept> Keep(SequenceId id, uint32_t first_block, absl::Span<const ContentKey> keys,
                            Change* change) const;
  absl::Status Drop(absl::Span<const ContentKey> keys, Change* change) const;
  void DropUnheld(Change* change) const;

  // Copies in host memory are made; of copies prefix blocks are made; copies go.
  absl::Status Offload(absl::Span<const ContentKey> keys, Change* change) const;
  absl::Status Return(absl::Span<const ContentKey> keys, Change* change) const;
  absl::Status Forget(absl::Span<const ContentKey> keys, Change* change) const;
  // A block that was on its way back is there.
  void Returned(const ContentKey& key) { returning_.erase(key); }
  bool has_host() const { return host_blocks_ > 0; }
  void SetHostBlocks(uint32_t host_blocks) { host_blocks_ = host_blocks; }

  void Commit(const Change& change);

 private:
  std::optional<uint32_t> Holders(const Change& change, const ContentKey& key) const;
  bool IsOnHost(const Change& change, const ContentKey& key) const;
  bool IsReturning(const Change& change, const ContentKey& key) const;

  absl::flat_hash_map<ContentKey, uint32_t, ContentKeyHash> holders_;
  absl::flat_hash_map<SequenceId, Keys> prefixes_;  // of sequences that have some
  using KeySet = absl::flat_hash_set<ContentKey, ContentKeyHash>;
  KeySet on_host_;
  KeySet returning_;  // on the device, without their rows
  uint32_t host_blocks_ = 0;
};

}  // namespace strait
