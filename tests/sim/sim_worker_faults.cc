// SPDX-License-Identifier: Apache-2.0
//
// What a worker suffers.
#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/sim/sim_worker.h"

namespace strait::sim {
namespace {

// Copies that may be damaged: of so many told last.
constexpr size_t kCopiesKnown = 64;

}  // namespace

bool SimWorker::CorruptHost() {
  const auto& taken = backend_.copy_faults.taken;
  // What changes while it is written back, nobody can find.
  if (taken.empty() || core_.CopiesRows()) return false;
  for (const auto& [data, bytes] : taken) {
    for (size_t at = world_->Random(0, 63); at < bytes; at += world_->Random(1, 4'000)) {
      data[at] ^= std::byte{0x10};
    }
  }
  return true;
}

void SimWorker::OnReplicate(const v1::Replicate& replicate) {
  const auto keys = ParseContentKeys(replicate.keys());
  if (!keys.ok()) return;
  for (const ContentKey& key : *keys) {
    copied_.emplace_back(
        key, LayerRange{replicate.source().layer_begin(), replicate.source().layer_end()});
    if (copied_.size() > kCopiesKnown) copied_.pop_front();
  }
}

bool SimWorker::CorruptReplica() {
  std::erase_if(
      copied_, [this](const auto& copy) { return !replicas().has(copy.first, copy.second.begin); });
  if (copied_.empty()) return false;
  const auto& [key, layers] = copied_[world_->Random(0, copied_.size() - 1)];
  // Of its memory, which it does not know to have changed.
  auto& store = const_cast<ReplicaStore&>(replicas());
  store.data(key, layers.begin)[world_->Random(0, store.block_bytes() - 1)] ^= std::byte{0x10};
  return true;
}

bool SimWorker::Lie(v1::StageReport* report) {
  if (report->error_code() != 0) return false;
  v1::TokenLogprob* sampled = nullptr;
  for (v1::SequenceResult& result : *report->mutable_results()) {
    if (result.has_sampled()) sampled = result.mutable_sampled();
  }
  const uint64_t kind = world_->Random(0, 6);
  if (kind >= 3 && sampled == nullptr) return false;  // next time
  switch (kind) {
    case 0:
      report->set_cache_bytes(report->cache_bytes() + 1);
      break;
    case 1:
      report->set_step_id(report->step_id() + world_->Random(1, 3));
      break;
    case 2:
      report->set_tables_digest(report->tables_digest() ^ 1);
      break;
    case 3:
      sampled->set_token_id(scenario_->model.vocab_size);
      break;
    case 4:
      sampled->set_logprob(std::numeric_limits<float>::quiet_NaN());
      break;
    case 5:
      report->mutable_results()->RemoveLast();
      break;
    case 6:
      report->mutable_results(0)->set_sequence_id(report->results(0).sequence_id() + 1);
      break;
  }
  world_->Trace(absl::StrCat("fault: w", instance_, " lies (kind ", kind, ") about step ",
                             report->step_id()));
  lie_next_ = false;
  lied_ = true;
  return true;
}

void SimWorker::Kill(bool silent) {
  alive_ = false;
  transport_.Kill();
  rows_.Kill(silent);
  core_.DropStages();
}

void SimWorker::Stall(uint64_t us) {
  stalled_until_us_ = std::max(stalled_until_us_, world_->now_us() + us);
  world_->At(stalled_until_us_, [this] { Drain(); });
}

bool SimWorker::RefuseLanding(const v1::FetchRows& fetch) {
  if (core_.StateOf(fetch.stage_id()) != WorkerCore::HostedState::kLoaded) return false;
  landing_finds_no_room_ = false;
  v1::FromWorker message;
  v1::RowsFetched* const told = message.mutable_rows_fetched();
  told->set_stage_id(fetch.stage_id());
  told->set_sequence_id(fetch.sequence_id());
  *told->mutable_epoch() = fetch.epoch();
  *told->mutable_placement() = fetch.placement();
  told->set_error_code(static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));
  told->set_error_message("no room");
  Tell(std::move(message));
  return true;
}

void SimWorker::Hang(uint64_t us) {
  hung_until_us_ = std::max(hung_until_us_, world_->now_us() + us);
}

void SimWorker::FailNextLoad(absl::Status why) {
  load_finds_no_room_ = absl::IsResourceExhausted(why);
  backend_.fail_next_load = std::move(why);
}

void SimWorker::FailNextStep() {
  const absl::Status bad = absl::InternalError("a bad device");
  (world_->Chance(0.5) ? backend_.fail_next_begin : backend_.fail_next_finish) = bad;
}

}  // namespace strait::sim
