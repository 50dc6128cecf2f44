// SPDX-License-Identifier: Apache-2.0
//
// How an Importer fetches whole blocks by their keys, and that of a stage's first rows those are taken that come.
#include <algorithm>
#include <utility>

#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/epoch_wire.h"
#include "worker/transfer/importer.h"

namespace strait {

absl::Status Importer::Restore(const v1::FetchRows& fetch, uint32_t vocab_size, uint64_t now_us) {
  if (share_->transfer == nullptr) {
    return absl::FailedPreconditionError("this worker moves no rows");
  }
  const Key key = {SequenceId{fetch.sequence_id()}, FromWire(fetch.placement())};
  auto import = std::make_shared<Import>();
  import->key = key;
  import->is_restore = true;
  import->first_row = fetch.begin_row();
  import->rows_wanted = fetch.begin_row();  // MakeFetching goes on from there
  STRAIT_CHECK(imports_.emplace(key, import).second, "it is an import already");
  absl::StatusOr<FetchingPtr> made = MakeFetching(fetch, fetch.end_row(), vocab_size);
  if (made.ok() && (*made)->keys.empty()) {
    made = absl::InvalidArgumentError("what a stage begins with has keys");
  }
  if (!made.ok()) {
    imports_.erase(key);
    return made.status();
  }
  import->is_last = true;  // the whole pipeline stands still
  import->rows_wanted = import->rows_taken = fetch.end_row();
  import->rows_fetched = fetch.begin_row();
  import->layers_here.resize((*made)->keys.size());
  import->since_us = now_us;
  (*made)->import = std::move(import);
  fetches_.push_back(*std::move(made));
  return absl::OkStatus();
}

bool Importer::IsRestored(SequenceId id, PlacementEpoch placement) const {
  const Import* const import = imports_.at({id, placement}).get();
  return std::none_of(fetches_.begin(), fetches_.end(),
                      [&](const FetchingPtr& f) { return f->import.get() == import; });
}

uint32_t Importer::EndRestore(SequenceId id, PlacementEpoch placement) {
  const auto it = imports_.find({id, placement});
  STRAIT_CHECK(it != imports_.end() && it->second->is_restore, "nothing is restored of it");
  Import& import = *it->second;
  import.is_closed = true;
  restored_bytes_ += import.bytes;
  restored_shared_bytes_ += import.shared_bytes;
  DropAsked(import);
  const auto end = std::find_if(import.layers_here.begin(), import.layers_here.end(),
                                [&](uint32_t layers) { return layers < traits_.layers.size(); });
  const auto num_blocks = static_cast<uint32_t>(end - import.layers_here.begin());
  imports_.erase(it);
  return num_blocks;
}

void Importer::Miss(UnderWay under_way, absl::Status why, uint64_t now_us) {
  if (under_way.cut.misses >= kMaxMisses)
    return GiveUp(std::move(under_way), std::move(why), now_us);
  const uint64_t pause_us = kFirstMissUs << under_way.cut.misses++;
  AskAgain(std::move(under_way), pause_us, now_us);
}

void Importer::GiveUp(UnderWay under_way, absl::Status why, uint64_t now_us) {
  const std::shared_ptr<Import> import = under_way.fetching->import;
  if (!import->is_restore) {
    AskAgain(std::move(under_way), 0, now_us);
    return Fail(import.get(), std::move(why));
  }
  Release(under_way.cut);
  Count(import.get(), -1, now_us);
  GiveUpRows(under_way, why);
  EndDone(import.get());
}

void Importer::GiveUpRows(const UnderWay& under_way, const absl::Status& why) {
  Fetching& fetching = *under_way.fetching;
  const Cut& cut = under_way.cut;
  --fetching.num_open;
  if (absl::IsNotFound(why) && cut.range.count > limits::kBlockTokens) {
    // One of its blocks is not there: which one?
    for (uint32_t at = cut.range.count; at > 0; at -= limits::kBlockTokens) {
      Cut one = cut;
      one.range.first = cut.range.first + at - limits::kBlockTokens;
      one.range.count = limits::kBlockTokens;
      one.bytes = BytesOf(traits_, one.range);
      fetching.to_ask.push_front(one);
      ++fetching.num_open;
    }
    return;
  }
  // What is behind is of no use; what was asked for of it may come.
  fetching.useless_row = std::min(fetching.useless_row, cut.range.first);
  fetching.num_open -= std::erase_if(
      fetching.to_ask, [&](const Cut& other) { return other.range.first >= cut.range.first; });
}

}  // namespace strait
