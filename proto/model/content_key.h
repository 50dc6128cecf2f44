// SPDX-License-Identifier: Apache-2.0
//
// Content keys: what a prefix block is known by, wherever it lies. Two full blocks with the same key have
// the same rows.
//
// Thread:  pure functions and plain values.
// Errors:  ParseContentKeys: InvalidArgument.
// Source:  SHA-256 (FIPS 180-4); as a chain over blocks, so that a key stands for all tokens before it.
// Why:     a tenant may choose tokens so that keys collide, and would then read another's rows: so the
//          hash is a cryptographic one. The chain goes over whole digests, of a key 128 bits are kept.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/latent_block.h"

namespace strait {

inline constexpr size_t kContentKeyBytes = 16;
static_assert(sizeof(ContentKey) == kContentKeyBytes);

// For hash tables: a key is random already.
struct ContentKeyHash {
  size_t operator()(const ContentKey& key) const { return key.low; }
};
constexpr bool operator<(const ContentKey& a, const ContentKey& b) {
  return a.high != b.high ? a.high < b.high : a.low < b.low;
}

// All tokens from position 0 to a block's end, and what their rows follow from besides.
using ContentDigest = std::array<uint8_t, 32>;

// What rows follow from besides tokens. Blocks of unequal ones never have equal keys.
struct ContentOrigin {
  uint64_t model = 0;  // fingerprints as in Hello
  uint64_t weights = 0;
  std::string_view numerics;  // numerics_id of all layers
  std::string_view policy;    // how rows are kept
  std::string_view salt;      // who may share them: unequal salts share nothing
};

ContentDigest DigestOf(const ContentOrigin& origin);
// Of one block more. REQUIRES: kBlockTokens tokens.
ContentDigest Extend(const ContentDigest& before, absl::Span<const TokenId> tokens);
ContentKey KeyOf(const ContentDigest& digest);

// As KeepPrefix and others have them: packed, little-endian.
void AppendTo(const ContentKey& key, std::string* packed);
std::string Pack(absl::Span<const ContentKey> keys);
// Errors: not a multiple of kContentKeyBytes, or a key of 0, which stands for none.
absl::StatusOr<std::vector<ContentKey>> ParseContentKeys(std::string_view packed);

}  // namespace strait
