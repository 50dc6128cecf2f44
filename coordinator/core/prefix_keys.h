// SPDX-License-Identifier: Apache-2.0
//
// PrefixKeys are the content keys of a sequence's full blocks, made when they are asked for first.
//
// Thread:  loop thread only.
// Why:     a key is 300 bytes of SHA-256, so a prompt of 128k tokens costs about a millisecond, once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "proto/model/content_key.h"

namespace strait {

class PrefixKeys {
 public:
  // All keys are forgotten. `source` names what `origin` was made of.
  void Reset(std::string source, const ContentDigest& origin) {
    source_ = std::move(source);
    digests_.assign(1, origin);
  }
  const std::string& source() const { return source_; }
  // Of its first block, if that was ever asked for.
  std::optional<ContentKey> First() const {
    return digests_.size() < 2 ? std::nullopt : std::optional<ContentKey>(KeyOf(digests_[1]));
  }
  bool is_reset() const { return !digests_.empty(); }

  // Of the block of tokens [64 * block, 64 * block + 64). REQUIRES: is_reset; tokens of the sequence from
  // position 0 on, that far; those that were given before are the same.
  ContentKey At(uint32_t block, absl::Span<const TokenId> tokens) {
    while (digests_.size() <= size_t{block} + 1) {
      const size_t begin = (digests_.size() - 1) * limits::kBlockTokens;
      digests_.push_back(Extend(digests_.back(), tokens.subspan(begin, limits::kBlockTokens)));
    }
    return KeyOf(digests_[size_t{block} + 1]);
  }

 private:
  std::string source_;
  std::vector<ContentDigest> digests_;  // of no block, one block, …
};

}  // namespace strait
