// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/take_over.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace strait {

void TakeOverRows(absl::Span<const Predecessor> predecessors, LayerRange layers, bool needs_tokens,
                  uint32_t most_blocks, BlockPool* pool, Residents* to) {
  struct Taken {
    uint32_t rows = 0;
    uint32_t num_layers = 0;  // that have some
    absl::Span<const TokenId> tokens;
    std::vector<std::vector<BlockId>> tables;  // [layers]
  };
  std::map<SequenceId, Taken> taken;
  for (const Predecessor& p : predecessors) {
    const LayerIndex begin = std::max(layers.begin, p.layers.begin);
    const LayerIndex end = std::min(layers.end, p.layers.end);
    if (begin >= end) continue;
    for (const HeldRows& held : p.residents->left()) {
      const absl::Span<const TokenId> tokens = p.residents->TokensLeft(held.id);
      const auto known = static_cast<size_t>(
          std::find(tokens.begin(), tokens.end(), kUnknownToken) - tokens.begin());
      Taken& sequence = taken[held.id];
      const bool is_new = sequence.tables.empty();
      sequence.tables.resize(layers.size());
      sequence.rows = is_new ? held.rows : std::min(sequence.rows, held.rows);
      sequence.num_layers += end - begin;
      if (known >= sequence.tokens.size()) sequence.tokens = tokens.subspan(0, known);
    }
    for (LayerIndex layer = begin; layer < end; ++layer) {
      for (auto& [id, blocks] : p.residents->cache().GiveLayer(layer - p.layers.begin)) {
        taken.at(id).tables[layer - layers.begin] = std::move(blocks);
      }
    }
  }
  for (auto& [id, sequence] : taken) {
    uint32_t rows = sequence.num_layers == layers.size() ? sequence.rows : 0;
    std::vector<TokenId> tokens(sequence.tokens.begin(), sequence.tokens.end());
    if (needs_tokens) rows = std::min(rows, static_cast<uint32_t>(tokens.size()));
    tokens.resize(rows, kUnknownToken);
    if (rows > 0 &&
        to->cache().blocks_used() + BlocksOfSequence(rows, layers.size()) <= most_blocks) {
      to->AdoptLeft(id, tokens, std::move(sequence.tables));
      continue;
    }
    for (const std::vector<BlockId>& table : sequence.tables) {
      for (const BlockId block : table) pool->Give(block);
    }
  }
}

}  // namespace strait
