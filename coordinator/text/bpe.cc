// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/bpe.h"

#include <algorithm>
#include <limits>

namespace strait {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
constexpr size_t kScanSymbols = 32;  // up to here a scan beats the heap

uint64_t PairKey(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

// Turned around: the standard heap keeps the largest on top.
bool ComesLater(const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

Bpe Bpe::Create(const std::array<std::optional<uint32_t>, 256>& byte_ids,
                const std::vector<Merge>& merges) {
  Bpe bpe;
  bpe.byte_ids_ = byte_ids;
  bpe.rules_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    // Of a merge that is listed twice the later line counts, as in Hugging Face's map.
    bpe.rules_[PairKey(merges[rank].left, merges[rank].right)] = {static_cast<uint32_t>(rank),
                                                                  merges[rank].result};
  }
  return bpe;
}

const Bpe::Rule* Bpe::Find(uint32_t left, uint32_t right) const {
  const auto it = rules_.find(PairKey(left, right));
  return it == rules_.end() ? nullptr : &it->second;
}

void Bpe::Encode(std::string_view word, BpeScratch* scratch, std::vector<uint32_t>* ids) const {
  scratch->symbols.clear();
  for (const char byte : word) {
    const std::optional<uint32_t> id = byte_ids_[static_cast<unsigned char>(byte)];
    if (!id.has_value()) continue;
    const auto at = static_cast<uint32_t>(scratch->symbols.size());
    scratch->symbols.push_back({*id, at == 0 ? kNone : at - 1, at + 1, true});
  }
  if (scratch->symbols.empty()) return;
  scratch->symbols.back().next = kNone;
  if (scratch->symbols.size() <= kScanSymbols) {
    MergeByScan(scratch, ids);
  } else {
    MergeByHeap(scratch, ids);
  }
}

void Bpe::MergeByScan(BpeScratch* scratch, std::vector<uint32_t>* ids) const {
  // ranks[i]: rule of symbols i and i + 1.
  std::array<uint32_t, kScanSymbols> symbols;
  std::array<Rule, kScanSymbols> rules;
  size_t count = scratch->symbols.size();
  const auto look_up = [&](size_t i) {
    const Rule* rule = Find(symbols[i], symbols[i + 1]);
    rules[i] = rule == nullptr ? Rule{kNone, 0} : *rule;
  };
  for (size_t i = 0; i < count; ++i) symbols[i] = scratch->symbols[i].id;
  for (size_t i = 0; i + 1 < count; ++i) look_up(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (rules[i].rank < rules[best].rank) best = i;
    }
    if (rules[best].rank == kNone) break;
    symbols[best] = rules[best].id;
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    if (best + 2 < count) {
      std::copy(rules.begin() + best + 2, rules.begin() + count - 1, rules.begin() + best + 1);
    }
    --count;
    if (best > 0) look_up(best - 1);
    if (best + 1 < count) look_up(best);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.begin() + count);
}

void Bpe::MergeByHeap(BpeScratch* scratch, std::vector<uint32_t>* ids) const {
  auto& symbols = scratch->symbols;
  auto& heap = scratch->heap;
  heap.clear();
  const auto consider = [&](uint32_t position, bool sift) {
    const uint32_t next = symbols[position].next;
    if (next == kNone) return;
    const Rule* rule = Find(symbols[position].id, symbols[next].id);
    if (rule == nullptr) return;
    heap.push_back({rule->rank, position, rule->id});
    if (sift) std::push_heap(heap.begin(), heap.end(), ComesLater);
  };
  for (uint32_t i = 0; i + 1 < symbols.size(); ++i) consider(i, false);
  std::make_heap(heap.begin(), heap.end(), ComesLater);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), ComesLater);
    const BpeScratch::Candidate top = heap.back();
    heap.pop_back();
    auto& left = symbols[top.position];
    if (!left.alive || left.next == kNone) continue;
    auto& right = symbols[left.next];
    // A candidate is out of date when one of its two has since been merged with another neighbour.
    const Rule* rule = Find(left.id, right.id);
    if (rule == nullptr || rule->id != top.id) continue;
    left.id = top.id;
    left.next = right.next;
    right.alive = false;
    if (right.next != kNone) symbols[right.next].previous = top.position;
    if (left.previous != kNone) consider(left.previous, true);
    consider(top.position, true);
  }
  for (uint32_t at = 0; at != kNone; at = symbols[at].next) ids->push_back(symbols[at].id);
}

}  // namespace strait
