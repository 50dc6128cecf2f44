// SPDX-License-Identifier: Apache-2.0
//
// What a sequence costs, in bytes of latent blocks: one pure function of policy, length and layers,
// used by the coordinator to reserve and by the worker to allocate. Both assert, at every step, that
// use equals the sum over distinct blocks. What a block costs in bytes is proto/latent_block.h's.
//
// Thread:  pure functions.
// Why:     no worker evicts or refuses on its own, so the coordinator must know the cost exactly. Under
//          the exact policy all blocks are alike and lie contiguously, at the price of BlockBytes; those of
//          a policy with tiers differ, and lie in units (proto/model/cache_tiers.h), at the price of
//          UnitBlockBytes. The exact policy is asked for at every step, so it goes first and inline.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "proto/latent_block.h"
#include "proto/model/cache_tiers.h"

namespace strait {

constexpr const char* RowFormatName(RowFormat format) {
  return format == RowFormat::kFp32   ? "fp32"
         : format == RowFormat::kBf16 ? "bf16"
         : format == RowFormat::kFp8  ? "fp8"
                                      : "int4";
}
// Of what --cache-format has: formats that new rows are written in, so not int4.
constexpr std::optional<RowFormat> RowFormatOf(std::string_view name) {
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kFp8}) {
    if (name == RowFormatName(format)) return format;
  }
  return std::nullopt;
}

// Latent blocks of one layer that hold `length` rows, under the exact policy.
constexpr uint32_t BlocksPerLayer(uint32_t length) {
  return (length + limits::kBlockTokens - 1) / limits::kBlockTokens;
}

// Latent blocks of a stage with `num_layers` layers.
constexpr uint64_t BlocksOfSequence(uint32_t length, uint32_t num_layers) {
  return uint64_t{BlocksPerLayer(length)} * num_layers;
}

// How the rows of a sequence are kept. Without tiers the policy is exact: every row in every layer, whole,
// in blocks of one size.
struct CachePolicy {
  uint64_t block_bytes = 0;           // exact: of one latent block of one layer
  const CacheTiers* tiers = nullptr;  // null: exact. Outlives the policy
  friend bool operator==(const CachePolicy&, const CachePolicy&) = default;
};

constexpr CachePolicy ExactPolicy(RowFormat format, uint32_t rank, uint32_t rope) {
  return {BlockBytes(format, rank, rope)};
}

// Bytes that a sequence of `length` rows, which shares none, holds in these layers.
constexpr uint64_t HeldBytes(const CachePolicy& policy, uint32_t length, LayerRange layers) {
  if (policy.tiers != nullptr) [[unlikely]] {
    return policy.tiers->HeldBytes(length, layers);
  }
  return BlocksOfSequence(length, layers.size()) * policy.block_bytes;
}

// Whether lengths `a` and `b` cost the same in every layer, held and reserved. With tiers, too: policy points
// are multiples of a block.
constexpr bool CostTheSame(const CachePolicy&, uint32_t a, uint32_t b) {
  return BlocksPerLayer(a) == BlocksPerLayer(b);
}

// The most that it holds at any length up to `length`: who grows so far must have so much. The exact
// policy gives nothing back while a sequence grows, so it is what the length itself holds.
constexpr uint64_t ReservedBytes(const CachePolicy& policy, uint32_t length, LayerRange layers) {
  if (policy.tiers != nullptr) [[unlikely]] {
    return policy.tiers->ReservedBytes(length, layers);
  }
  return HeldBytes(policy, length, layers);
}

// The longest sequence whose ReservedBytes these layers have in `bytes`; with tiers no longer than
// limits::kMaxPositionEmbeddings.
constexpr uint64_t RowsThatFit(const CachePolicy& policy, uint64_t bytes, LayerRange layers) {
  if (policy.tiers != nullptr) [[unlikely]] {
    return policy.tiers->RowsThatFit(bytes, layers);
  }
  return bytes / policy.block_bytes / layers.size() * limits::kBlockTokens;
}

}  // namespace strait
