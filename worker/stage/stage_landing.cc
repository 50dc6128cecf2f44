// SPDX-License-Identifier: Apache-2.0
//
// How rows come to a stage that is in no epoch yet, a landing: it takes blocks for a sequence when its rows are asked
// for, and what came is left for its first epoch, or for the stage that follows it.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/epoch_wire.h"
#include "worker/stage/stage_state.h"

namespace strait {
namespace {

constexpr uint32_t kBlock = limits::kBlockTokens;

// That it can be the next of a sequence of which `before` came, null: nothing.
absl::Status CheckLanding(const v1::FetchRows& fetch, absl::Span<const ContentKey> keys,
                          const LandedSequence* before, uint32_t num_rows, uint32_t max_positions) {
  const bool has_rows = fetch.end_row() > fetch.begin_row();
  const bool has_keys = before != nullptr && fetch.end_row() == fetch.begin_row();
  if ((!has_rows && !has_keys) || fetch.end_row() > max_positions ||
      static_cast<uint32_t>(fetch.tokens().ids_size()) != fetch.end_row() - fetch.begin_row() ||
      keys.size() * kBlock > fetch.end_row()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows ", fetch.begin_row(), " to ", fetch.end_row(), " of at most ",
                     max_positions, " with ", fetch.tokens().ids_size(), " tokens, of which ",
                     keys.size(), " blocks have keys"));
  }
  if (before == nullptr) {
    if (fetch.begin_row() == 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("nothing of it came, and rows from ", fetch.begin_row(), " on are next"));
  }
  if (before->placement != FromWire(fetch.placement())) {
    return absl::FailedPreconditionError(
        absl::StrCat("rows of placement ", ToString(before->placement), " came; drop those first"));
  }
  if (fetch.begin_row() != num_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows from ", fetch.begin_row(), " on, ", num_rows, " were asked for before"));
  }
  if (keys.size() >= before->keys.size() &&
      std::equal(before->keys.begin(), before->keys.end(), keys.begin())) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("its blocks had other keys before");
}

}  // namespace

absl::Status Stage::State::Land(const v1::FetchRows& fetch, uint64_t now_us) {
  const SequenceId id{fetch.sequence_id()};
  const PlacementEpoch placement = FromWire(fetch.placement());
  STRAIT_ASSIGN_OR_RETURN(std::vector<ContentKey> keys, ParseContentKeys(fetch.prefix_keys()));
  const auto it = landed.find(id);
  const LandedSequence* const before = it == landed.end() ? nullptr : &it->second;
  LatentCache& cache = residents.cache();
  const uint32_t num_rows = before == nullptr ? 0 : cache.length(id);
  STRAIT_RETURN_IF_ERROR(CheckLanding(fetch, keys, before, num_rows, traits.max_positions));
  if (before == nullptr && cache.num_sequences() >= limits::kMaxSequencesResident) {
    return absl::ResourceExhaustedError(absl::StrCat(
        cache.num_sequences(), " sequences landed, at most ", limits::kMaxSequencesResident));
  }
  size_t num_shared = 0;  // leading blocks that another sequence has here
  while (before == nullptr && num_shared < keys.size() && cache.has_prefix(keys[num_shared])) {
    ++num_shared;
  }
  const auto shared_rows = static_cast<uint32_t>(num_shared) * kBlock;
  const uint32_t num_layers = model->spec().layers.size();
  const uint64_t blocks = BlocksOfSequence(fetch.end_row(), num_layers) -
                          BlocksOfSequence(std::max(num_rows, shared_rows), num_layers);
  if (cache.blocks_taken() + blocks > capacity_blocks) {
    return absl::ResourceExhaustedError(absl::StrCat("rows to ", fetch.end_row(), " take ", blocks,
                                                     " latent blocks more, ", cache.blocks_taken(),
                                                     " of ", capacity_blocks, " are taken"));
  }
  const auto& ids = fetch.tokens().ids();
  residents.Import(id, fetch.end_row(), absl::MakeConstSpan(keys).first(num_shared));
  importer.Take(id, placement, fetch.end_row(), {ids.begin(), ids.begin() + shared_rows});
  landed[id] = {placement, std::move(keys)};
  v1::FetchRows rest = fetch;
  rest.clear_prefix_keys();
  if (shared_rows > 0) {
    rest.set_begin_row(shared_rows);
    rest.mutable_tokens()->mutable_ids()->erase(rest.tokens().ids().begin(),
                                                rest.tokens().ids().begin() + shared_rows);
  }
  if (rest.begin_row() < rest.end_row()) {
    importer.Fetch(rest, fetch.end_row(), traits.vocab_size, now_us);
  }
  return absl::OkStatus();
}

void Stage::State::KeepLanded() {
  LatentCache& cache = residents.cache();
  for (const auto& [id, sequence] : landed) {
    const size_t num_full = importer.TokensHere(id, sequence.placement).size() / kBlock;
    const size_t end = std::min(sequence.keys.size(), num_full);
    for (size_t i = cache.prefix(id).size(); i < end; ++i) {
      const ContentKey& key = sequence.keys[i];
      // Where they come from it is one block, too: another sequence's rows may have come before these did.
      cache.has_prefix(key) ? cache.JoinPrefix(id, key) : cache.KeepPrefix(id, key);
    }
  }
}

std::vector<std::pair<SequenceId, std::vector<TokenId>>> Stage::State::TakeLanded() {
  KeepLanded();
  std::vector<std::pair<SequenceId, std::vector<TokenId>>> here;
  for (const auto& [id, sequence] : std::exchange(landed, {})) {
    const absl::Span<const TokenId> tokens = importer.TokensHere(id, sequence.placement);
    here.emplace_back(id, std::vector<TokenId>(tokens.begin(), tokens.end()));
  }
  return here;
}

void Stage::State::LeaveLanded(std::vector<std::pair<SequenceId, std::vector<TokenId>>> here) {
  for (auto& [id, tokens] : here) residents.LeaveImport(id, std::move(tokens));
}

void Stage::DropLanded(SequenceId id) {
  State& s = *state_;
  if (s.landed.erase(id) == 0) return;
  s.importer.Close(id);
  s.residents.Close(id);
  s.residents.cache().DropUnheldPrefixes();
}

}  // namespace strait
