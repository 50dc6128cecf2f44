// SPDX-License-Identifier: Apache-2.0
//
// TablesDigest sums up which sequences a stage holds and how long they are:
// StageReport.tables_digest. A worker computes it from its page tables, the coordinator from its
// journal; they must be equal.
//
// Thread:  plain value.
// Why:     XXH3-64 over 16 bytes a sequence (id, then length, both little-endian uint64), by
//          rising id.
#pragma once

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "proto/base/check.h"
#include "proto/base/ids.h"

namespace strait {

static_assert(std::endian::native == std::endian::little);

class TablesDigest {
 public:
  // REQUIRES: ids rise from call to call.
  void Add(SequenceId id, uint32_t length) {
    STRAIT_CHECK(words_.empty() || words_[words_.size() - 2] < id.value, "ids must rise");
    words_.push_back(id.value);
    words_.push_back(length);
  }
  uint64_t Value() const { return XXH3_64bits(words_.data(), words_.size() * sizeof(uint64_t)); }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace strait
