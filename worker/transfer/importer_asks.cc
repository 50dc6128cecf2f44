// SPDX-License-Identifier: Apache-2.0
//
// How an Importer asks: for how much at once, in which order, and in how large frames.
#include <algorithm>
#include <utility>

#include "proto/base/limits.h"
#include "worker/transfer/importer.h"

namespace strait {

void Importer::Release(const Cut& cut) {
  share_->asked_bytes -= cut.bytes;
  asked_bytes_ -= cut.bytes;
}

void Importer::Count(Import* import, int change, uint64_t now_us) {
  if (import->num_under_way > 0 && now_us > import->since_us) {
    import->us += now_us - import->since_us;
  }
  import->since_us = now_us;
  import->num_under_way = static_cast<size_t>(static_cast<int64_t>(import->num_under_way) + change);
}

bool Importer::MayAsk(const Fetching& fetching, const Cut& cut, uint64_t now_us) const {
  const Import& import = *fetching.import;
  if (cut.range.first + cut.range.count > import.rows_taken || now_us < cut.not_before_us) {
    return false;
  }
  const auto peer = peers_.find(fetching.sources[cut.source].address);
  return peer == peers_.end() || now_us >= peer->second.not_before_us;
}

bool Importer::HasAllowance(const Fetching& fetching, uint64_t now_us) {
  Import& import = *fetching.import;
  if (fetching.bytes_per_s == 0) return true;
  // What is owed of the rounds before would be the client's pause.
  if (import.is_last && fetching.end_row - fetching.begin_row <= limits::kBlockTokens) return true;
  // A tenth of a second's worth at most is saved up.
  const uint64_t idle_us = std::min<uint64_t>(now_us - import.refilled_us, 100'000);
  const auto rate = static_cast<double>(fetching.bytes_per_s);
  const auto refill = static_cast<int64_t>(rate * static_cast<double>(idle_us) / 1e6);
  if (refill > 0) {
    import.allowance = std::min(import.allowance + refill, static_cast<int64_t>(rate / 10));
    import.refilled_us = now_us;
  }
  return import.allowance >= 0;
}

void Importer::Ask(bool last, uint64_t now_us) {
  if (share_->transfer == nullptr) return;
  const uint64_t limit = last ? limits::kTransferBytesUnderWay : kBulkBytesUnderWay;
  const size_t most_asks = last ? kMaxAsksUnderWay : kBulkAsksUnderWay;
  for (auto it = fetches_.begin(); it != fetches_.end(); ++it) {
    const FetchingPtr& fetching = *it;
    if (fetching->import->is_last != last) continue;
    std::deque<Cut>& cuts = fetching->to_ask;
    for (auto cut = cuts.begin(); cut != cuts.end();) {
      if (share_->asks.size() >= most_asks || share_->asked_bytes + cut->bytes > limit) {
        return;
      }
      if (!HasAllowance(*fetching, now_us)) break;
      if (!MayAsk(*fetching, *cut, now_us)) {
        ++cut;
        continue;
      }
      cut = CutSmaller(fetching.get(), cut);
      Cut asked = *cut;
      cut = cuts.erase(cut);
      SendAsk(fetching, asked, now_us);
    }
  }
}

std::deque<Importer::Cut>::iterator Importer::CutSmaller(Fetching* fetching,
                                                         std::deque<Cut>::iterator cut) const {
  const auto peer = peers_.find(fetching->sources[cut->source].address);
  if (peer == peers_.end() || cut->bytes <= peer->second.frame_bytes) return cut;
  const uint64_t most = peer->second.frame_bytes;
  // The pieces stay the same: both ends sum up pieces.
  const std::vector<LayerRows> ranges = fetching->keys.empty()
                                            ? CutRange(traits_, cut->range, most)
                                            : CutBlocks(traits_, cut->range, most);
  std::vector<Cut> smaller(ranges.size(), *cut);
  for (size_t i = 0; i < ranges.size(); ++i) {
    smaller[i].range = ranges[i];
    smaller[i].bytes = BytesOf(traits_, ranges[i]);
  }
  fetching->num_open += smaller.size() - 1;
  cut = fetching->to_ask.erase(cut);
  return fetching->to_ask.insert(cut, smaller.begin(), smaller.end());
}

void Importer::SendAsk(const FetchingPtr& fetching, Cut cut, uint64_t now_us) {
  Import& import = *fetching->import;
  const Source& source = fetching->sources[cut.source];
  const AskId id{++share_->last_ask.value};
  share_->asks.emplace(id, this);
  share_->asked_bytes += cut.bytes;
  asked_bytes_ += cut.bytes;
  if (fetching->bytes_per_s > 0) import.allowance -= static_cast<int64_t>(cut.bytes);
  Count(&import, 1, now_us);
  asked_.emplace(id, UnderWay{fetching, cut, {}, {}});
  share_->transfer->Ask(id, source.address, AskOf(*fetching, cut));
}

RowsAsk Importer::AskOf(const Fetching& fetching, const Cut& cut) const {
  const Source& source = fetching.sources[cut.source];
  RowsAsk ask = {.stage_id = source.stage_id,
                 .epoch = source.epoch,
                 .sequence = fetching.import->key.first,
                 .placement = fetching.import->key.second,
                 .secret = source.secret,
                 .layers = cut.range.layers,
                 .first_row = cut.range.first,
                 .num_rows = cut.range.count,
                 .keys = {},
                 .bytes = cut.bytes,
                 .on_device = source.stage_id != 0};
  if (source.stage_id != 0) return ask;
  const auto first =
      fetching.keys.begin() + (cut.range.first - fetching.begin_row) / limits::kBlockTokens;
  ask.keys.assign(first, first + cut.range.count / limits::kBlockTokens);
  return ask;
}

}  // namespace strait
