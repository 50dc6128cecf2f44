// SPDX-License-Identifier: Apache-2.0
//
// PolledCopies is the BlockCopies of models whose rows are one number each: a copy is made when it
// is polled, as late as it may, and what its caller must not do ends the process.
//
// Borrows: the cache and CopyFaults; they outlive it.
// Shapes:  a row is the number and a check of it (PutHashRow), so rows can be checked by value. What
//          a Write brings must pass: a receiver looks before it writes.
// Errors:  Poll: Internal if CopyFaults says so.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/latent_block.h"
#include "tests/worker/number_cache.h"
#include "worker/backend.h"
#include "worker/cache/copy_list.h"

namespace strait {

inline constexpr RowFormat kHashRowFormat = RowFormat::kFp32;  // what headers say of such rows
inline constexpr uint32_t kHashRank = 2;
inline constexpr uint32_t kHashRope = 2;
inline constexpr uint32_t kHashRowBytes = RowBytes(kHashRowFormat, kHashRank, kHashRope);
static_assert(kHashRowBytes == 2 * sizeof(uint64_t));
inline constexpr RowShape kHashRowShape = {kHashRowFormat, kHashRank, kHashRope};

inline uint64_t HashRowCheck(uint64_t value) {
  uint64_t x = (value ^ 0xC0FFEE) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9u;
  return x ^ (x >> 29);
}
inline void PutHashRow(uint64_t value, std::byte* to) {
  const uint64_t words[2] = {value, HashRowCheck(value)};
  std::memcpy(to, words, sizeof(words));
}
// Nothing if it is no such row.
inline std::optional<uint64_t> GetHashRow(const std::byte* from) {
  uint64_t words[2];
  std::memcpy(words, from, sizeof(words));
  if (words[1] != HashRowCheck(words[0])) return std::nullopt;
  return words[0];
}

struct CopyFaults {
  uint32_t delay_polls = 0;            // polls that a copy asked for from now on outlasts
  std::map<std::byte*, size_t> taken;  // memory that Take gave, while it lasts
  bool fail_next = false;  // the next copy that ends does so with an error, and spoils its rows
};

class PolledCopies final : public BlockCopies {
 public:
  PolledCopies(uint32_t num_layers, NumberCache* cache, CopyFaults* faults)
      : num_layers_(num_layers), cache_(cache), faults_(faults) {}
  ~PolledCopies() override {
    for (Copy& copy : under_way_) Make(copy);
  }

  // What the model does with steps.
  void StepBegun(const StageBatch& batch) {
    ++steps_begun_;
    if (!under_way_.empty()) CheckRows(batch);
    begun_.push_back(UsesOf(batch));
    cache_->StepBegun();
  }
  void StepFinished() {
    ++steps_finished_;
    begun_.pop_front();
    cache_->StepFinished();
  }

  using BlockCopies::Read;
  using BlockCopies::Write;
  absl::StatusOr<CopyId> Read(absl::Span<const BlockRows> list, RowsOut to,
                              CopyAfter after) override {
    return Start(list, CopyWay::kRead, after, to.bytes.size(), to.bytes.data(), nullptr);
  }
  absl::StatusOr<CopyId> Write(absl::Span<const BlockRows> list, RowsIn from,
                               CopyAfter after) override {
    return Start(list, CopyWay::kWrite, after, from.bytes.size(), nullptr, from.bytes.data());
  }

  std::vector<CopyEnd> Poll() override {
    std::vector<CopyEnd> ends;
    for (Copy& copy : under_way_) copy.polls_left -= copy.polls_left > 0;
    while (!under_way_.empty() && under_way_.front().polls_left == 0 &&
           under_way_.front().behind_steps <= steps_finished_) {
      Copy copy = std::move(under_way_.front());
      under_way_.pop_front();
      const bool fails = std::exchange(faults_->fail_next, false);
      fails ? Spoil(copy) : Make(copy);
      Mark(copy, -1);
      ends.push_back(
          {copy.id, fails ? absl::InternalError("the copy was told to fail") : absl::OkStatus()});
    }
    return ends;
  }
  size_t num_under_way() const override { return under_way_.size(); }
  uint32_t row_bytes() const override { return kHashRowBytes; }
  absl::StatusOr<CopyMemory> Take(size_t bytes) override {
    std::byte* const data = new std::byte[bytes];
    faults_->taken[data] = bytes;
    return CopyMemory{{data,
                       [faults = faults_](std::byte* gone) {
                         faults->taken.erase(gone);
                         delete[] gone;
                       }},
                      bytes};
  }

 private:
  struct Copy {
    CopyId id;
    std::vector<CopyPiece> pieces;
    std::byte* read_to = nullptr;
    const std::byte* write_from = nullptr;
    uint64_t behind_steps = 0;
    uint32_t polls_left = 0;
  };
  struct Marks {  // copies under way that have the row
    int reads = 0;
    int writes = 0;
  };

  // Rows of the pool that a step uses, from each block's first on, and from which of them on it writes.
  struct Uses {
    uint32_t write_begin = 0;
    uint32_t end = 0;
  };
  using StepUses = std::map<uint64_t, Uses>;  // by block

  static StepUses UsesOf(const StageBatch& batch) {
    StepUses uses;
    for (const BatchSequence& sequence : batch.sequences) {
      const uint32_t end = sequence.first_position + sequence.num_tokens;
      const uint32_t write_begin = sequence.is_cached ? end : sequence.first_position;
      for (const auto& table : sequence.page_tables) {
        for (uint32_t first = 0; first < end; first += limits::kBlockTokens) {
          const auto within = [&](uint32_t position) {
            return position <= first ? 0 : std::min(position - first, limits::kBlockTokens);
          };
          // A block that sequences share is written by one at most.
          Uses& block = uses.try_emplace(table.at(first / limits::kBlockTokens),
                                         Uses{limits::kBlockTokens, 0})
                            .first->second;
          block.write_begin = std::min(block.write_begin, within(write_begin));
          block.end = std::max(block.end, within(end));
        }
      }
    }
    return uses;
  }
  // What begun steps still do with the copy's rows.
  void CheckAfterFinished(const Copy& copy) const {
    for (const StepUses& step : begun_) {
      ForRows(copy, [&](uint64_t row, uint64_t) {
        const auto it = step.find(row / limits::kBlockTokens);
        if (it == step.end()) return;
        const uint64_t at = row % limits::kBlockTokens;
        STRAIT_CHECK(
            at >= it->second.end || (copy.read_to != nullptr && at < it->second.write_begin),
            "a copy that follows finished steps has rows that a begun step uses");
      });
    }
  }

  absl::StatusOr<CopyId> Start(absl::Span<const BlockRows> list, CopyWay way, CopyAfter after,
                               size_t bytes, std::byte* read_to, const std::byte* write_from) {
    Copy copy;
    STRAIT_ASSIGN_OR_RETURN(
        copy.pieces, CutCopy(list, way, num_layers_, cache_->num_blocks(), kHashRowBytes, bytes));
    STRAIT_RETURN_IF_ERROR(CheckCopiesUnderWay(under_way_.size()));
    copy.id = CopyId{++last_id_.value};
    copy.read_to = read_to;
    copy.write_from = write_from;
    copy.behind_steps = after == CopyAfter::kBegunSteps ? steps_begun_ : 0;
    if (after == CopyAfter::kFinishedSteps) CheckAfterFinished(copy);
    copy.polls_left = faults_->delay_polls;
    Mark(copy, 1);
    under_way_.push_back(std::move(copy));
    return last_id_;
  }

  // visit(row of the pool, offset in the buffer)
  template <class Visit>
  static void ForRows(const Copy& copy, Visit visit) {
    for (const CopyPiece& piece : copy.pieces) {
      for (uint64_t at = 0; at < piece.bytes; at += kHashRowBytes) {
        visit((piece.pool_offset + at) / kHashRowBytes, piece.buffer_offset + at);
      }
    }
  }
  void Make(const Copy& copy) {
    ForRows(copy, [&](uint64_t row, uint64_t offset) {
      if (copy.read_to != nullptr) {
        PutHashRow(cache_->RowAt(row), copy.read_to + offset);
        return;
      }
      const std::optional<uint64_t> value = GetHashRow(copy.write_from + offset);
      STRAIT_CHECK(value.has_value(), "bytes that are no row were written into a pool");
      cache_->RowAt(row) = *value;
    });
  }
  void Spoil(const Copy& copy) {
    ForRows(copy, [&](uint64_t row, uint64_t offset) {
      if (copy.read_to != nullptr) {
        std::memset(copy.read_to + offset, 0xEE, kHashRowBytes);
      } else {
        cache_->RowAt(row) = ~cache_->RowAt(row);
      }
    });
  }
  void Mark(const Copy& copy, int by) {
    ForRows(copy, [&](uint64_t row, uint64_t) {
      (copy.read_to != nullptr ? marks_[row].reads : marks_[row].writes) += by;
    });
  }
  void CheckRows(const StageBatch& batch) const {
    for (const BatchSequence& sequence : batch.sequences) {
      const uint32_t end = sequence.first_position + sequence.num_tokens;
      for (const auto& table : sequence.page_tables) {
        for (uint32_t position = 0; position < end; ++position) {
          const uint64_t block = table.at(position / limits::kBlockTokens);
          const auto it =
              marks_.find(block * limits::kBlockTokens + position % limits::kBlockTokens);
          if (it == marks_.end()) continue;
          const Marks& marks = it->second;
          STRAIT_CHECK(marks.writes == 0, "a step uses rows that a copy is to write");
          STRAIT_CHECK(marks.reads == 0 || position < sequence.first_position || sequence.is_cached,
                       "a step writes rows that a copy is to read");
        }
      }
    }
  }

  const uint32_t num_layers_;
  NumberCache* const cache_;
  CopyFaults* const faults_;
  std::map<uint64_t, Marks> marks_;  // by row of the cache
  std::deque<Copy> under_way_;
  std::deque<StepUses> begun_;  // of steps that are not finished
  CopyId last_id_;
  uint64_t steps_begun_ = 0;
  uint64_t steps_finished_ = 0;
};

}  // namespace strait
