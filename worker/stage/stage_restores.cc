// SPDX-License-Identifier: Apache-2.0
//
// How a stage fetches rows that it is to have before it is active.
#include <algorithm>
#include <utility>

#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"
#include "worker/stage/stage_state.h"

namespace strait {
namespace {

// The part of `fetch` that is of blocks [begin, end).
v1::FetchRows PartOf(const v1::FetchRows& fetch, absl::Span<const ContentKey> keys, size_t begin,
                     size_t end) {
  v1::FetchRows part = fetch;
  const auto first = static_cast<uint32_t>(begin) * limits::kBlockTokens;
  const auto last = static_cast<uint32_t>(end) * limits::kBlockTokens;
  part.set_begin_row(first);
  part.set_end_row(last);
  part.set_keys(Pack(keys.subspan(begin, end - begin)));
  part.clear_tokens();
  const auto& ids = fetch.tokens().ids();
  part.mutable_tokens()->mutable_ids()->Add(ids.begin() + first, ids.begin() + last);
  return part;
}

}  // namespace

void Stage::Restore(const google::protobuf::RepeatedPtrField<v1::FetchRows>& restores,
                    uint32_t most_blocks, uint64_t until_us, uint64_t now_us) {
  State& s = *state_;
  STRAIT_CHECK(s.plans.empty() && s.ledger.next_step().value == 1 && !s.restoring);
  if (restores.empty()) return;
  s.restoring = true;
  s.restore_until_us = until_us;
  std::set<ContentKey> coming;
  const LatentCache& cache = s.residents.cache();
  for (const v1::FetchRows& fetch : restores) {
    // It has rows of its own.
    if (s.residents.FinishedRows(SequenceId{fetch.sequence_id()})) continue;
    if (cache.num_sequences() + s.restores.size() >= limits::kMaxSequencesResident) break;
    const uint32_t room = s.capacity_blocks - std::min(s.capacity_blocks, cache.blocks_taken());
    const uint32_t num_layers = s.model->spec().layers.size();
    RestoredSequence sequence =
        s.BeginRestore(fetch, std::min(room, most_blocks) / num_layers, &coming, now_us);
    if (sequence.is_fetched) {
      most_blocks -= static_cast<uint32_t>(sequence.keys.size() - sequence.num_shared) * num_layers;
    }
    s.restores.push_back(std::move(sequence));
  }
  if (s.IsRestored()) s.EndRestores();
}

RestoredSequence Stage::State::BeginRestore(const v1::FetchRows& fetch, uint32_t most_blocks,
                                            std::set<ContentKey>* coming, uint64_t now_us) {
  RestoredSequence sequence{.id = SequenceId{fetch.sequence_id()},
                            .placement = FromWire(fetch.placement())};
  auto keys = ParseContentKeys(fetch.keys());
  const auto num_rows = static_cast<uint32_t>(fetch.tokens().ids_size());
  if (!keys.ok() || keys->size() * limits::kBlockTokens != num_rows) return sequence;
  const auto is_known = [&](const ContentKey& key) {
    return residents.cache().has_prefix(key) || coming->contains(key);
  };
  const auto own = std::find_if_not(keys->begin(), keys->end(), is_known);
  const auto num_shared = static_cast<size_t>(own - keys->begin());
  const size_t end = std::min<size_t>(keys->size(), num_shared + most_blocks);
  // A key stands for all tokens before it: behind one that is new all are, or it is none.
  std::set<ContentKey> fetched(own, keys->begin() + static_cast<ptrdiff_t>(end));
  const bool is_chain =
      fetched.size() == end - num_shared && std::none_of(fetched.begin(), fetched.end(), is_known);
  sequence.num_shared = static_cast<uint32_t>(num_shared);
  if (is_chain && end > num_shared) {
    residents.Import(sequence.id, static_cast<uint32_t>(end - num_shared) * limits::kBlockTokens);
    sequence.is_fetched =
        importer.Restore(PartOf(fetch, *keys, num_shared, end), traits.vocab_size, now_us).ok();
    if (!sequence.is_fetched) residents.Close(sequence.id);
  }
  if (sequence.is_fetched) coming->merge(fetched);
  keys->resize(sequence.is_fetched ? end : num_shared);
  sequence.keys = *std::move(keys);
  const auto& ids = fetch.tokens().ids();
  sequence.tokens.assign(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(sequence.keys.size() *
                                                                           limits::kBlockTokens));
  return sequence;
}

bool Stage::State::IsRestored() const {
  return std::all_of(restores.begin(), restores.end(), [&](const RestoredSequence& sequence) {
    return !sequence.is_fetched || importer.IsRestored(sequence.id, sequence.placement);
  });
}

void Stage::State::EndRestores() {
  LatentCache& cache = residents.cache();
  const uint32_t num_layers = model->spec().layers.size();
  for (const RestoredSequence& sequence : std::exchange(restores, {})) {
    const absl::Span<const ContentKey> keys = sequence.keys;
    // What a sequence before it was to fetch may not have come.
    size_t num_here = 0;
    while (num_here < sequence.num_shared && cache.has_prefix(keys[num_here])) ++num_here;
    if (sequence.is_fetched) {
      const uint32_t fetched = importer.EndRestore(sequence.id, sequence.placement);
      if (num_here == sequence.num_shared) {
        for (uint32_t i = 0; i < fetched; ++i) cache.KeepPrefix(sequence.id, keys[num_here++]);
      }
      residents.Close(sequence.id);
    }
    if (num_here == 0) continue;
    residents.AdoptLeft(sequence.id,
                        absl::MakeConstSpan(sequence.tokens).first(num_here * limits::kBlockTokens),
                        keys.first(num_here), std::vector<std::vector<BlockId>>(num_layers));
  }
  restoring = false;
  ResetLedger();
}

}  // namespace strait
