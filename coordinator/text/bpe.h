// SPDX-License-Identifier: Apache-2.0
//
// Bpe turns the bytes of one word into token ids by merging neighbours, lowest rank first, the
// leftmost of equals first.
//
// Thread:  immutable after Create; a BpeScratch serves one thread at a time.
// Errors:  Create: InvalidArgument naming a merge of tokens that do not exist; ResourceExhausted.
// Limits:  kMaxMerges, kMaxVocabSize (tokenizer.h).
// Why:     A heap over a linked list: n log n for a word of n bytes, so that 100 kB of one letter
//          is no trap. Most words are short; for those a plain scan is quicker and gives the same
//          merges.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace strait {

struct BpeScratch {
  struct Symbol {
    uint32_t id;
    uint32_t previous;
    uint32_t next;
    bool alive;
  };
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    uint32_t id;
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
};

class Bpe {
 public:
  struct Merge {
    uint32_t left;
    uint32_t right;
    uint32_t result;
  };

  // `byte_ids`: the token of each byte alone; a byte without one is left out of the result, as
  // Hugging Face does. `merges` in order of rank.
  static Bpe Create(const std::array<std::optional<uint32_t>, 256>& byte_ids,
                    const std::vector<Merge>& merges);

  // Appends the ids of `word`.
  void Encode(std::string_view word, BpeScratch* scratch, std::vector<uint32_t>* ids) const;

 private:
  struct Rule {
    uint32_t rank;
    uint32_t id;
  };
  const Rule* Find(uint32_t left, uint32_t right) const;
  void MergeByScan(BpeScratch* scratch, std::vector<uint32_t>* ids) const;
  void MergeByHeap(BpeScratch* scratch, std::vector<uint32_t>* ids) const;

  std::array<std::optional<uint32_t>, 256> byte_ids_;
  absl::flat_hash_map<uint64_t, Rule> rules_;
};

}  // namespace strait
