// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/copy_ahead.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
namespace {

constexpr uint32_t kBlock = limits::kBlockTokens;

// Its rows can be read: they are where all stages know of them.
bool IsReadable(const Residency& residency) {
  return residency.role == Residency::Role::kHome && !residency.leaving && residency.opened &&
         residency.scheduler->IsOpen(residency) && residency.rows.even();
}

}  // namespace

uint32_t CopyAhead::Copied::rows_there() const {
  return rows.empty() ? 0 : *std::min_element(rows.begin(), rows.end());
}

int CopyAhead::IndexOf(WorkerId worker, uint64_t stage_id) const {
  for (size_t i = 0; i < landings_.size(); ++i) {
    if (landings_[i].stage_id == stage_id && landings_[i].worker == worker) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

RowsPass CopyAhead::PassOf(SequenceId id, PlacementEpoch placement) const {
  return {context_->options.edge_secret, RowsUse::kAhead, id, placement};
}

std::vector<ContentKey> CopyAhead::KeysOf(const Residency& residency) {
  std::vector<ContentKey> keys;
  const uint32_t num_blocks = residency.prefix.blocks.least();
  keys.reserve(num_blocks);
  for (uint32_t i = 0; i < num_blocks; ++i) keys.push_back(residency.prefix.path[i]->key);
  return keys;
}

bool CopyAhead::Waits(const std::vector<ContentKey>& keys) const {
  return std::any_of(keys.begin(), keys.end(),
                     [&](const ContentKey& key) { return coming_.contains(key); });
}

// ---------------------------------------------------------------- what goes on

void CopyAhead::Advance(const Pipeline& from, uint64_t now_us) {
  ForgetGone(from, now_us);
  AskNew(from, /*all=*/false, now_us);
}

void CopyAhead::ForgetGone(const Pipeline& from, uint64_t now_us) {
  const auto& residents = from.scheduler.residents();
  for (auto it = sequences_.begin(); it != sequences_.end();) {
    const auto resident = residents.find(it->first);
    if (resident != residents.end() && resident->second->epoch == it->second.placement) {
      ++it;
      continue;
    }
    GiveUp(it->first, &it->second);
    it = sequences_.erase(it);
  }
  if (now_us >= progress_us_ + context_->options.migrate_stall_us && !IsThere()) {
    for (auto& [id, copied] : sequences_) {
      if (copied.rows_there() < copied.end_row) GiveUp(id, &copied);
    }
  }
}

void CopyAhead::AskNew(const Pipeline& from, bool all, uint64_t now_us) {
  if (landings_.empty()) return;
  uint64_t asked_bytes = 0;
  for (const auto& [id, residency] : from.scheduler.residents()) {
    if (!all && asked_bytes > kMaxAskedBytes) return;  // the rest at the next event
    // At most events nothing is due: what is cheap to know comes first.
    const auto it = sequences_.find(id);
    const bool is_new = it == sequences_.end();
    const Copied* const known = is_new ? nullptr : &it->second;
    if (is_new ? !all && waiting_.contains(id)
               : known->given_up || known->rows_there() < known->end_row ||
                     residency->rows.next() < known->end_row + kRoundRows) {
      continue;
    }
    if (!IsReadable(*residency)) continue;
    const uint32_t end_row = residency->scheduler->RowsReported(*residency);
    if (!is_new) {
      if (end_row < known->end_row + kRoundRows) continue;
      asked_bytes += Ask(from, *residency, &it->second, end_row, false, now_us);
      continue;
    }
    if (end_row == 0) continue;
    // At last nobody waits: what comes twice is one at the landing.
    if (!all && Waits(KeysOf(*residency))) {
      waiting_.insert(id);
      continue;
    }
    Copied& copied = sequences_[id];
    copied.placement = residency->epoch;
    copied.rows.resize(landings_.size());
    copied.bytes.resize(landings_.size());
    Serve(from, id, copied.placement, false);
    asked_bytes += Ask(from, *residency, &copied, end_row, false, now_us);
  }
}

bool CopyAhead::IsNear(const Pipeline& from, uint64_t now_us) const {
  if (landings_.empty() || now_us >= begin_us_ + context_->options.migrate_timeout_us) return true;
  uint64_t rest = 0, most = kAllRestRows;
  for (const auto& [id, residency] : from.scheduler.residents()) {
    const auto it = sequences_.find(id);
    if (it == sequences_.end()) {
      // One that computes rows again, or waits for another's, has rows that are worth waiting for. A prompt that has just
      // begun has not: there will always be one.
      if (waiting_.contains(id) || !residency->rows.even()) return false;
      continue;
    }
    const Copied& copied = it->second;
    if (copied.given_up) continue;
    const uint32_t left = residency->rows.next() - copied.rows_there();
    // It grows faster than its rows go over, or is a prompt: waiting is of no use.
    const bool outruns = copied.rounds >= kMaxAheadRounds;
    if (left > kRestRows && !outruns) return false;
    rest += outruns ? 0 : left;
    most += kRoundRows;
  }
  return rest <= most;
}

void CopyAhead::Finish(const Pipeline& from, uint64_t now_us) {
  ForgetGone(from, now_us);
  AskNew(from, /*all=*/true, now_us);
  for (const auto& [id, residency] : from.scheduler.residents()) {
    const auto it = sequences_.find(id);
    if (it == sequences_.end() || it->second.given_up || !IsReadable(*residency)) continue;
    Copied& copied = it->second;
    const uint32_t end_row = residency->rows.next();
    // Also without a row more, for the keys of now.
    if (end_row > copied.end_row || residency->prefix.blocks.least() > copied.num_keys) {
      Ask(from, *residency, &copied, end_row, true, now_us);
    }
  }
  progress_us_ = now_us;
}

bool CopyAhead::IsThere() const {
  return std::all_of(sequences_.begin(), sequences_.end(), [](const auto& entry) {
    return entry.second.given_up || entry.second.rows_there() == entry.second.end_row;
  });
}

void CopyAhead::CountRows(const Pipeline& from, uint64_t* rows, uint64_t* rows_total) const {
  if (landings_.empty()) return;
  for (const auto& [id, residency] : from.scheduler.residents()) {
    const auto it = sequences_.find(id);
    if (it != sequences_.end() && it->second.given_up) continue;
    *rows_total += residency->rows.next();
    if (it != sequences_.end()) *rows += it->second.rows_there();
  }
}

void CopyAhead::End(const Pipeline& from) {
  for (const auto& [id, copied] : sequences_) Serve(from, id, copied.placement, true);
}

// ---------------------------------------------------------------- what is told to workers

uint64_t CopyAhead::Ask(const Pipeline& from, const Residency& residency, Copied* copied,
                        uint32_t end_row, bool is_last, uint64_t now_us) {
  const Sequence& sequence = *residency.sequence;
  if (IsThere()) progress_us_ = now_us;  // nobody was waited for
  const uint32_t begin_row = std::exchange(copied->end_row, end_row);
  ++copied->rounds;
  std::vector<ContentKey> keys = KeysOf(residency);
  keys.resize(std::min<size_t>(keys.size(), end_row / kBlock));
  for (const ContentKey& key : keys) {
    if (!landed_.contains(key) && coming_.insert(key).second) copied->coming.push_back(key);
  }
  copied->num_keys = static_cast<uint32_t>(keys.size());
  for (const Landing& landing : landings_) {
    SendToWorker out{landing.worker, {}};
    v1::FetchRows& fetch = *out.message.mutable_fetch_rows();
    fetch = FetchFrom(from, sequence, PassOf(sequence.id, copied->placement), landing.layers,
                      begin_row, end_row, address_);
    fetch.set_stage_id(landing.stage_id);
    *fetch.mutable_prefix_keys() = Pack(keys);
    fetch.set_is_last(is_last);
    fetch.set_bytes_per_s(context_->options.migrate_bytes_per_s);
    context_->Send(std::move(out));
  }
  if (copied->rows_there() == end_row) Arrive(copied);
  return (end_row - begin_row) * sizeof(TokenId) + keys.size() * kContentKeyBytes;
}

void CopyAhead::Serve(const Pipeline& from, SequenceId id, PlacementEpoch placement,
                      bool end) const {
  for (const StageSlot& source : from.slots) {
    SendToWorker out{source.worker, {}};
    *out.message.mutable_serve_rows() = ServeOf(from.epoch, source.stage_id, PassOf(id, placement));
    out.message.mutable_serve_rows()->set_end(end);
    context_->Send(std::move(out));
  }
}

void CopyAhead::DropAt(SequenceId id) const {
  for (const Landing& landing : landings_) {
    SendToWorker out{landing.worker, {}};
    out.message.mutable_drop_landed()->set_stage_id(landing.stage_id);
    out.message.mutable_drop_landed()->set_sequence_id(id.value);
    context_->Send(std::move(out));
  }
}

void CopyAhead::GiveUp(SequenceId id, Copied* copied) {
  if (std::exchange(copied->given_up, true)) return;
  DropAt(id);
  for (const ContentKey& key : std::exchange(copied->coming, {})) coming_.erase(key);
  waiting_.clear();
}

// ---------------------------------------------------------------- what workers say

absl::Status CopyAhead::OnFetched(WorkerId worker, const v1::RowsFetched& told, uint64_t now_us) {
  const auto index = static_cast<size_t>(IndexOf(worker, told.stage_id()));
  const auto it = sequences_.find(SequenceId{told.sequence_id()});
  // Late: it left, or was dropped.
  if (it == sequences_.end() || FromWire(told.placement()) != it->second.placement ||
      it->second.given_up) {
    return absl::OkStatus();
  }
  Copied& copied = it->second;
  if (told.error_code() != 0) {
    GiveUp(it->first, &copied);
    return absl::OkStatus();
  }
  if (told.rows() < copied.rows[index] || told.rows() > copied.end_row) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", told.stage_id(), " tells ", told.rows(), " rows of sequence ",
                     told.sequence_id(), ", it had ", copied.rows[index], " of ", copied.end_row));
  }
  if (told.rows() > copied.rows[index] || told.fetched_bytes() > copied.bytes[index]) {
    progress_us_ = now_us;
  }
  copied.rows[index] = told.rows();
  const uint64_t bytes = std::max(copied.bytes[index], told.fetched_bytes());
  bytes_ += bytes - std::exchange(copied.bytes[index], bytes);
  if (copied.rows_there() == copied.end_row) Arrive(&copied);
  return absl::OkStatus();
}

void CopyAhead::Arrive(Copied* copied) {
  for (const ContentKey& key : std::exchange(copied->coming, {})) {
    coming_.erase(key);
    landed_.insert(key);
  }
  waiting_.clear();
}

Holdings CopyAhead::HoldingsOf(uint64_t stage_id) const {
  Holdings holdings;
  const bool is_known =
      std::any_of(landings_.begin(), landings_.end(),
                  [&](const Landing& landing) { return landing.stage_id == stage_id; });
  if (!is_known) return holdings;
  for (const auto& [id, copied] : sequences_) {
    if (copied.given_up) continue;
    holdings.emplace(id, MayHold{copied.end_row, copied.end_row, copied.num_keys});
  }
  return holdings;
}

}  // namespace strait
