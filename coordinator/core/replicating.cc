// SPDX-License-Identifier: Apache-2.0
//
// Cluster keeps copies of prefix blocks in other workers' host memory, and begins stages with them.
//
//   A block becomes a prefix block (KeepPrefix) ─▶ its stage has done so ─▶ the buddy is told its key (Replicate) and
//   fetches the rows ─▶ Replicated: the block is safe.
//   A stage that is activated without rows of a sequence fetches what copies there are (ActivateStage.restores).
#include <algorithm>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
namespace {

constexpr uint32_t kBlock = limits::kBlockTokens;
// Of one stage, told to its buddy and not answered.
constexpr uint32_t kMaxBlocksComing = 64;
// Copies that could not be made are tried again so often, so many at most.
constexpr uint64_t kCopyAgainUs = 1'000'000;
constexpr uint32_t kMaxCopiesAgain = kMaxBlocksComing;
// Keys in one message.
constexpr size_t kMaxForgottenAtOnce = 1 << 16;
// Of all restores of one activation.
constexpr uint64_t kMaxRestoredTokens = 2'000'000;

}  // namespace

uint64_t Cluster::ReplicaSecret(uint64_t what, uint64_t id) const {
  return EdgeNonce(EdgeNonce(context_->options.edge_secret, ~what), id);
}

std::optional<WorkerId> Cluster::ChooseBuddy(const StageSlot& slot) const {
  const Worker& own = workers_.at(slot.worker);
  std::map<WorkerId, uint32_t> stages;  // whose buddy it is
  for (const auto& [id, pipeline] : pipelines_) {
    for (const StageSlot& each : pipeline->slots) stages[each.copying.buddy] += 1;
  }
  const Worker* best = nullptr;
  const auto rank = [&](const Worker& worker) {
    const bool same_host = worker.host_id == own.host_id;
    return std::tuple(same_host, stages[worker.id], worker.id);
  };
  for (const auto& [id, worker] : workers_) {
    if (id == slot.worker || !MayGetCopies(id)) continue;
    if (best == nullptr || rank(worker) < rank(*best)) best = &worker;
  }
  if (best == nullptr) return std::nullopt;
  return best->id;
}

void Cluster::RenewBuddies(const Worker& newcomer) {
  if (!replicas_.Offers(newcomer.id)) return;
  for (auto& [id, pipeline] : pipelines_) {
    for (StageSlot& slot : pipeline->slots) {
      const Worker* buddy = FindWorker(slot.copying.buddy);
      if (buddy == nullptr || slot.state == StageSlot::State::kVacant) continue;
      const std::string& own = workers_.at(slot.worker).host_id;
      if (buddy->host_id == own && newcomer.host_id != own) slot.copying.buddy = WorkerId{};
    }
  }
}

bool Cluster::MayGetCopies(WorkerId id) const {
  return replicas_.Offers(id) && workers_.at(id).duty == Worker::Duty::kServes;
}

void Cluster::TellServePrefixes(const Pipeline& pipeline, StageSlot* slot) {
  slot->copying.served = pipeline.epoch;
  SendToWorker out{slot->worker, {}};
  v1::ServeRows* serve = out.message.mutable_serve_rows();
  serve->set_stage_id(slot->stage_id);
  ToWire(pipeline.epoch, serve->mutable_epoch());
  serve->set_secret(ReplicaSecret(pipeline.epoch.counter, slot->stage_id));
  context_->Send(std::move(out));
}

void Cluster::TellServeReplicas(WorkerId buddy) {
  if (!serves_replicas_.insert(buddy).second) return;
  SendToWorker out{buddy, {}};
  out.message.mutable_serve_rows()->set_secret(ReplicaSecret(0, buddy.value));
  context_->Send(std::move(out));
}

bool Cluster::IsHeldAnywhere(const ContentKey& key) const {
  return std::any_of(pipelines_.begin(), pipelines_.end(),
                     [&](const auto& entry) { return entry.second->scheduler.HoldsPrefix(key); });
}

bool Cluster::IsRecovering() const {
  return std::any_of(pipelines_.begin(), pipelines_.end(), [](const auto& entry) {
    return entry.second->served && entry.second->state != Pipeline::State::kActive;
  });
}

void Cluster::AdvanceReplicas() {
  for (const auto& [id, pipeline] : pipelines_) {
    if (!pipeline->scheduler.started()) continue;
    // Also where nobody makes copies any more: they would pile up.
    const std::vector<Scheduler::NewPrefix> made = pipeline->scheduler.TakeNewPrefixes();
    if (!replicas_.any()) continue;
    for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
      StageSlot& slot = pipeline->slots[i];
      // Steps are counted anew in each epoch, and what survived is new again.
      if (slot.copying.served != pipeline->epoch) {
        slot.copying.queue.clear();
        slot.copying.failed.clear();
      }
      if (!MayGetCopies(slot.copying.buddy)) {
        const std::optional<WorkerId> buddy = ChooseBuddy(slot);
        slot.copying.buddy = buddy.value_or(WorkerId{});
        slot.copying.queue.clear();
        slot.copying.failed.clear();
        slot.copying.num_coming = 0;
        if (!buddy) continue;
        TellServeReplicas(*buddy);
        // What the last one had is gone with it. What sequences have comes first; the rest, which may be much more, a
        // little at a time.
        for (const Scheduler::NewPrefix& prefix : pipeline->scheduler.AllPrefixes()) {
          const bool is_held = pipeline->scheduler.HoldsPrefix(prefix.key);
          (is_held ? slot.copying.queue : slot.copying.failed).push_back(prefix);
        }
      } else {
        slot.copying.queue.insert(slot.copying.queue.end(), made.begin(), made.end());
      }
      if (slot.copying.served != pipeline->epoch) TellServePrefixes(*pipeline, &slot);
      Replicate(*pipeline, i);
    }
  }
}

void Cluster::Replicate(const Pipeline& pipeline, uint32_t slot_index) {
  StageSlot& slot = pipelines_.at(pipeline.id)->slots[slot_index];
  Copying& copying = slot.copying;
  if (copying.queue.empty()) return;  // as at most events
  const uint64_t bytes = slot.layers.size() * context_->model.block_bytes;
  std::vector<ContentKey> keys;
  std::map<std::pair<LayerIndex, LayerIndex>, std::vector<ContentKey>> forget;
  while (!copying.queue.empty() && copying.num_coming < kMaxBlocksComing) {
    const Scheduler::NewPrefix next = copying.queue.front();
    if (pipeline.scheduler.ledger().reported(slot_index) < next.step.value) break;
    // What seems to be nobody's may be of those that wait for a stage to begin with it.
    const bool has_room =
        replicas_.limit_bytes(copying.buddy) - replicas_.used_bytes(copying.buddy) >= bytes;
    if (!has_room && IsRecovering()) break;
    copying.queue.pop_front();
    if (!pipeline.scheduler.HasPrefix(next.key, slot_index)) {  // it made room meanwhile
      if (pipeline.scheduler.IsOnHost(next.key)) copying.failed.push_back(next);
      continue;
    }
    if (replicas_.Has(next.key, slot.layers, copying.buddy)) continue;
    const Replicas::Place place = pipeline.scheduler.PlaceOfPrefix(next.key);
    if (!replicas_.HasBefore(place, copying.buddy)) {
      copying.failed.push_back(next);
      continue;
    }
    const auto parts = replicas_.MakeWay(next.key, slot.layers, copying.buddy);
    if (!parts) {
      copying.failed.push_back(next);
      continue;
    }
    for (const Replicas::Gone& each : *parts) {
      forget[{each.layers.begin, each.layers.end}].push_back(each.key);
    }
    const auto gone = replicas_.MakeRoom(
        copying.buddy, bytes, place, [this](const ContentKey& key) { return IsHeldAnywhere(key); });
    if (!gone) {
      ++context_->stats.replicas_refused;
      copying.failed.push_back(next);
      continue;
    }
    for (const Replicas::Gone& each : *gone) {
      forget[{each.layers.begin, each.layers.end}].push_back(each.key);
    }
    if (replicas_.limit_bytes(copying.buddy) - replicas_.used_bytes(copying.buddy) < bytes) {
      copying.failed.push_back(next);
      continue;
    }
    replicas_.Begin(next.key, place, slot.layers, slot.stage_id, copying.buddy, bytes);
    ++copying.num_coming;
    keys.push_back(next.key);
  }
  for (const auto& [layers, gone] : forget) {
    TellForget(copying.buddy, {layers.first, layers.second}, gone);
  }
  if (keys.empty()) return;
  SendToWorker out{copying.buddy, {}};
  v1::Replicate* message = out.message.mutable_replicate();
  *message->mutable_keys() = Pack(keys);
  message->set_bytes_per_s(context_->options.replicate_bytes_per_s);
  v1::RowsSource* source = message->mutable_source();
  source->set_layer_begin(slot.layers.begin);
  source->set_layer_end(slot.layers.end);
  source->set_stage_id(slot.stage_id);
  ToWire(pipeline.epoch, source->mutable_epoch());
  source->set_data_address(workers_.at(slot.worker).data_address);
  source->set_secret(ReplicaSecret(pipeline.epoch.counter, slot.stage_id));
  context_->Send(std::move(out));
}

void Cluster::TellForget(WorkerId buddy, LayerRange layers, absl::Span<const ContentKey> keys) {
  for (size_t at = 0; at < keys.size(); at += kMaxForgottenAtOnce) {
    SendToWorker out{buddy, {}};
    v1::Replicate* forgets = out.message.mutable_replicate();
    *forgets->mutable_forget() = Pack(keys.subspan(at, kMaxForgottenAtOnce));
    forgets->set_layer_begin(layers.begin);
    forgets->set_layer_end(layers.end);
    // What the worker fetches at most is in this message, too.
    forgets->set_bytes_per_s(context_->options.replicate_bytes_per_s);
    context_->Send(std::move(out));
  }
}

void Cluster::FlushReplicas() {
  // What seems to be nobody's may be of those that wait for a stage to begin with it.
  if (IsRecovering() && !journal_->waiting().empty()) return;
  std::map<std::tuple<WorkerId, LayerIndex, LayerIndex>, std::vector<ContentKey>> forget;
  for (const auto& [worker, gone] :
       replicas_.DropUnheld([this](const ContentKey& key) { return IsHeldAnywhere(key); })) {
    forget[{worker, gone.layers.begin, gone.layers.end}].push_back(gone.key);
  }
  for (const auto& [where, keys] : forget) {
    TellForget(std::get<0>(where), {std::get<1>(where), std::get<2>(where)}, keys);
  }
}

void Cluster::CopyAgain(uint64_t now_us) {
  if (now_us < copy_again_us_) return;
  copy_again_us_ = now_us + kCopyAgainUs;
  for (const auto& [id, pipeline] : pipelines_) {
    for (StageSlot& slot : pipeline->slots) {
      std::deque<Scheduler::NewPrefix>& failed = slot.copying.failed;
      for (uint32_t i = 0; i < kMaxCopiesAgain && !failed.empty(); ++i) {
        slot.copying.queue.push_back(failed.front());
        failed.pop_front();
      }
    }
  }
}

void Cluster::OnReplicated(Worker* worker, const v1::Replicated& replicated, uint64_t now_us) {
  const auto end = [&](const std::string& packed, bool ok) -> absl::Status {
    const absl::StatusOr<std::vector<ContentKey>> keys = ParseContentKeys(packed);
    if (!keys.ok()) return keys.status();
    for (const ContentKey& key : *keys) {
      if (!replicas_.End(key, replicated.stage_id(), worker->id, ok)) {
        return absl::FailedPreconditionError("tells of a copy that nobody asked for");
      }
      ++(ok ? context_->stats.replicas_made : context_->stats.replicas_failed);
      for (const auto& [id, pipeline] : pipelines_) {
        for (StageSlot& slot : pipeline->slots) {
          if (slot.stage_id == replicated.stage_id() && slot.copying.buddy == worker->id) {
            slot.copying.num_coming -= slot.copying.num_coming > 0;
            if (!ok && pipeline->scheduler.started()) {
              slot.copying.failed.push_back({key, pipeline->scheduler.last_step()});
            }
          }
        }
      }
    }
    return absl::OkStatus();
  };
  absl::Status sound = end(replicated.keys(), true);
  if (sound.ok()) sound = end(replicated.failed(), false);
  context_->stats.replicated_bytes += replicated.fetched_bytes();
  context_->stats.replicated_shared_bytes += replicated.shared_bytes();
  if (!sound.ok()) Evict(worker->id, sound, now_us);
}

void Cluster::SetRestores(const Pipeline& pipeline, StageSlot* slot, v1::ActivateStage* activate) {
  if (!replicas_.any()) return;
  // Of what it may hold at most so much is its own already.
  const uint64_t block_bytes = slot->layers.size() * context_->model.block_bytes;
  uint64_t room = slot->cache_bytes / block_bytes;
  for (const auto& [id, holding] : slot->may_hold) {
    if (slot->restored.contains(id)) continue;
    room -= std::min<uint64_t>(room, (holding.planned + kBlock - 1) / kBlock);
  }
  uint64_t tokens = 0;
  std::set<ContentKey> counted;
  for (const auto& [id, sequence] : journal_->waiting()) {
    const bool was_here =
        sequence->last_pipeline == pipeline.id || !pipelines_.contains(sequence->last_pipeline);
    const bool is_there = slot->may_hold.contains(id) && !slot->restored.contains(id);
    if (!sequence->was_placed || !was_here || is_there) continue;
    // More could not be placed.
    if (slot->may_hold.size() >= context_->options.max_running) break;
    std::vector<Replicas::Part> parts;
    std::vector<ContentKey> keys = CopiesOf(pipeline, sequence, slot->layers, &parts);
    uint64_t blocks = 0;
    for (size_t b = 0; b < keys.size(); ++b) {
      const bool is_new = !counted.contains(keys[b]);
      if (blocks + is_new > room) keys.resize(b);
      blocks += b < keys.size() && is_new;
    }
    const auto rows = static_cast<uint32_t>(keys.size()) * kBlock;
    if (rows == 0 || tokens + rows > kMaxRestoredTokens) continue;
    tokens += rows;
    room -= blocks;
    counted.insert(keys.begin(), keys.end());
    v1::FetchRows* restore = activate->add_restores();
    restore->set_stage_id(slot->stage_id);
    ToWire(pipeline.epoch, restore->mutable_epoch());
    restore->set_sequence_id(id.value);
    ToWire(journal_->NextPlacement(), restore->mutable_placement());
    restore->set_end_row(rows);
    restore->mutable_tokens()->mutable_ids()->Add(sequence->tokens.begin(),
                                                  sequence->tokens.begin() + rows);
    *restore->mutable_keys() = Pack(keys);
    restore->set_is_last(true);
    for (const Replicas::Part& part : parts) {
      v1::RowsSource* source = restore->add_sources();
      source->set_layer_begin(part.layers.begin);
      source->set_layer_end(part.layers.end);
      source->set_data_address(workers_.at(part.worker).data_address);
      source->set_secret(ReplicaSecret(0, part.worker.value));
    }
    slot->restored.insert(id);
    AddHolding(id, {rows, rows, static_cast<uint32_t>(keys.size())}, &slot->may_hold);
    context_->stats.restored_rows += rows;
  }
  activate->set_restore_timeout_ms(
      static_cast<uint32_t>(context_->options.restore_timeout_us / 1000));
}

std::vector<ContentKey> Cluster::CopiesOf(const Pipeline& pipeline, Sequence* sequence,
                                          LayerRange layers,
                                          std::vector<Replicas::Part>* parts) const {
  std::vector<ContentKey> longest;
  const uint32_t most = sequence->rows_settled() / kBlock;
  const std::optional<ContentKey> first =
      most > 0 ? pipeline.scheduler.KeyIfKnown(sequence, 0) : std::nullopt;
  if (!first) return longest;
  // One worker that has most of it, or several, each with some of the layers.
  std::vector<std::vector<Replicas::Part>> choices;
  for (const WorkerId keeper : replicas_.KeepersOf(*first, layers)) {
    choices.push_back({{keeper, layers}});
  }
  choices.push_back(replicas_.Find(*first, layers));
  for (std::vector<Replicas::Part>& choice : choices) {
    std::vector<ContentKey> keys;
    for (uint32_t b = 0; b < most && !choice.empty(); ++b) {
      const std::optional<ContentKey> key = pipeline.scheduler.KeyIfKnown(sequence, b);
      const bool are_there =
          std::all_of(choice.begin(), choice.end(), [&](const Replicas::Part& part) {
            return replicas_.IsThere(*key, part.layers, part.worker);
          });
      if (!are_there) break;
      keys.push_back(*key);
    }
    if (keys.size() <= longest.size()) continue;
    longest = std::move(keys);
    *parts = std::move(choice);
  }
  return longest;
}

bool Cluster::BeginsWithCopies(Sequence* sequence, uint64_t now_us) const {
  if (!replicas_.any() || !sequence->was_placed || sequence->rows_settled() < kBlock) return false;
  const auto it = pipelines_.find(sequence->last_pipeline);
  if (it == pipelines_.end()) return false;
  const Pipeline& pipeline = *it->second;
  if (pipeline.state == Pipeline::State::kActive || !pipeline.served || pipeline.failures > 0 ||
      pipeline.num_vacant() > 0 ||
      now_us > pipeline.since_us + context_->options.restore_timeout_us) {
    return false;
  }
  const std::optional<ContentKey> key = pipeline.scheduler.KeyIfKnown(sequence, 0);
  return key && std::any_of(pipeline.slots.begin(), pipeline.slots.end(), [&](const auto& slot) {
           return !replicas_.Find(*key, slot.layers).empty();
         });
}

uint32_t Cluster::ProtectedRows(const Pipeline& pipeline, const Residency& residency) const {
  // What was there once is there, unless a copy was lost since.
  if (residency.losses_seen != replicas_.losses()) {
    residency.losses_seen = replicas_.losses();
    residency.protected_blocks = 0;
    residency.keepers.clear();
  }
  residency.keepers.resize(pipeline.slots.size());
  const auto& path = residency.prefix.path;
  const auto has = [&](WorkerId keeper, const StageSlot& slot, uint32_t block) {
    return keeper != slot.worker && replicas_.IsThere(path[block]->key, slot.layers, keeper);
  };
  // A stage is given what one worker has from the first block on: its buddy, or the buddy of another pipeline.
  const auto is_safe = [&](uint32_t slot_index, uint32_t block) {
    const StageSlot& slot = pipeline.slots[slot_index];
    WorkerId& keeper = residency.keepers[slot_index];
    if (has(keeper, slot, block)) return true;
    for (const WorkerId other : replicas_.KeepersOf(path[block]->key, slot.layers)) {
      uint32_t end = 0;
      while (end <= block && has(other, slot, end)) ++end;
      if (end <= block) continue;
      keeper = other;
      return true;
    }
    return false;
  };
  uint32_t& block = residency.protected_blocks;
  for (; block < path.size(); ++block) {
    for (uint32_t i = 0; i < pipeline.slots.size(); ++i) {
      if (!is_safe(i, block)) return block * kBlock;
    }
  }
  return block * kBlock;
}

bool Cluster::IsProtected(const Pipeline& pipeline, const Residency& residency) const {
  return residency.rows.next() <= ProtectedRows(pipeline, residency) + 2 * kBlock - 1;
}

void Cluster::CountProtected(uint64_t now_us) {
  const uint64_t passed_us = now_us - std::min(now_us, std::exchange(counted_us_, now_us));
  if (!replicas_.any() || passed_us == 0) return;
  for (const auto& [id, pipeline] : pipelines_) {
    if (!pipeline->scheduler.started()) continue;
    for (const auto& [sequence_id, residency] : pipeline->scheduler.residents()) {
      if (residency->role != Residency::Role::kHome || residency->sequence->generated() == 0) {
        continue;
      }
      context_->stats.decoding_us += passed_us;
      if (IsProtected(*pipeline, *residency)) context_->stats.protected_us += passed_us;
    }
  }
}

}  // namespace strait
