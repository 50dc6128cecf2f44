// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/take_over.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace strait {

void TakeOverRows(absl::Span<const Predecessor> predecessors, LayerRange layers, bool needs_tokens,
                  uint32_t most_blocks, BlockPool* pool, Residents* to) {
  struct Taken {
    uint32_t rows = 0;
    uint32_t num_layers = 0;  // that have some
    absl::Span<const TokenId> tokens;
    absl::Span<const ContentKey> prefix;       // that all of its layers have
    std::vector<std::vector<BlockId>> tables;  // [layers], behind the prefix blocks of each
    std::vector<size_t> num_prefix;            // [layers], what those were
  };
  std::map<SequenceId, Taken> taken;
  std::map<ContentKey, std::vector<std::optional<BlockId>>> prefixes;  // [layers]
  for (const Predecessor& p : predecessors) {
    const auto [begin, end] = Intersection(layers, p.layers);
    if (begin >= end) continue;
    for (const HeldRows& held : p.residents->left()) {
      const absl::Span<const TokenId> tokens = p.residents->TokensLeft(held.id);
      const auto known = static_cast<size_t>(
          std::find(tokens.begin(), tokens.end(), kUnknownToken) - tokens.begin());
      const absl::Span<const ContentKey> prefix = p.residents->cache().prefix(held.id);
      Taken& sequence = taken[held.id];
      const bool is_new = sequence.tables.empty();
      sequence.tables.resize(layers.size());
      sequence.num_prefix.resize(layers.size());
      sequence.rows = is_new ? held.rows : std::min(sequence.rows, held.rows);
      if (is_new || prefix.size() < sequence.prefix.size()) sequence.prefix = prefix;
      sequence.num_layers += end - begin;
      if (known >= sequence.tokens.size()) sequence.tokens = tokens.subspan(0, known);
    }
    for (LayerIndex layer = begin; layer < end; ++layer) {
      const LayerIndex index = layer - layers.begin;
      LatentCache::Layer given = p.residents->cache().GiveLayer(layer - p.layers.begin);
      for (auto& [id, blocks] : given.tables) {
        Taken& sequence = taken.at(id);
        sequence.num_prefix[index] = p.residents->cache().prefix(id).size();
        blocks.erase(blocks.begin(),
                     blocks.begin() + static_cast<ptrdiff_t>(sequence.num_prefix[index]));
        sequence.tables[index] = std::move(blocks);
      }
      for (const auto& [key, block] : given.prefixes) {
        prefixes[key].resize(layers.size());
        prefixes[key][index] = block;
      }
    }
  }
  const auto give = [pool](std::vector<BlockId>* blocks, size_t num_left) {
    for (; blocks->size() > num_left; blocks->pop_back()) pool->Give(blocks->back());
  };
  for (auto& [id, sequence] : taken) {
    uint32_t rows = sequence.num_layers == layers.size() ? sequence.rows : 0;
    std::vector<TokenId> tokens(sequence.tokens.begin(), sequence.tokens.end());
    if (needs_tokens) rows = std::min(rows, static_cast<uint32_t>(tokens.size()));
    // What is a prefix block in some layers and its own in others, it cannot have.
    size_t num_prefix = sequence.prefix.size();
    const bool is_even = std::all_of(sequence.num_prefix.begin(), sequence.num_prefix.end(),
                                     [&](size_t blocks) { return blocks == num_prefix; });
    const auto prefix_rows = static_cast<uint32_t>(num_prefix) * limits::kBlockTokens;
    if (!is_even) rows = std::min(rows, prefix_rows);
    if (rows < prefix_rows) {
      num_prefix = rows / limits::kBlockTokens;
      rows = static_cast<uint32_t>(num_prefix) * limits::kBlockTokens;
    }
    tokens.resize(rows, kUnknownToken);
    const absl::Span<const ContentKey> prefix = sequence.prefix.subspan(0, num_prefix);
    uint64_t num_new = 0;  // prefix blocks that no sequence before it has
    for (const ContentKey& key : prefix) num_new += !to->cache().has_prefix(key);
    const uint64_t blocks =
        BlocksOfSequence(rows, layers.size()) - (num_prefix - num_new) * layers.size();
    const bool fits = rows > 0 && to->cache().blocks_used() + blocks <= most_blocks;
    for (std::vector<BlockId>& table : sequence.tables) {
      give(&table, fits ? BlocksPerLayer(rows) - num_prefix : 0);
    }
    if (!fits) continue;
    for (const ContentKey& key : prefix) {
      if (to->cache().has_prefix(key)) continue;
      std::vector<BlockId> own;
      for (std::optional<BlockId>& block : prefixes.at(key)) {
        own.push_back(*std::exchange(block, std::nullopt));
      }
      to->cache().AdoptPrefix(key, std::move(own));
    }
    to->AdoptLeft(id, tokens, prefix, std::move(sequence.tables));
  }
  for (const auto& [key, blocks] : prefixes) {
    for (const std::optional<BlockId>& block : blocks) {
      if (block) pool->Give(*block);
    }
  }
}

}  // namespace strait
