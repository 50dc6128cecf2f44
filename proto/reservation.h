// SPDX-License-Identifier: Apache-2.0
//
// What a sequence costs in latent blocks: one pure function, used by the coordinator to reserve
// and by the worker to allocate. Both assert, at every step, that use equals the sum over distinct
// blocks.
//
// Thread:  pure functions.
// Why:     no worker evicts or refuses on its own, so the coordinator must know the cost exactly.
#pragma once

#include <cstdint>

#include "proto/limits.h"

namespace strait {

enum class RowFormat : uint8_t { kFp32 = 0, kBf16 = 1 };

// Latent blocks of one layer that hold `length` rows, under the exact policy.
constexpr uint32_t BlocksPerLayer(uint32_t length) {
  return (length + limits::kBlockTokens - 1) / limits::kBlockTokens;
}

// Latent blocks of a stage with `num_layers` layers.
constexpr uint64_t BlocksOfSequence(uint32_t length, uint32_t num_layers) {
  return uint64_t{BlocksPerLayer(length)} * num_layers;
}

// One cache row: latent[rank] then rope_key[rope], rounded up to kRowAlign bytes.
constexpr uint32_t RowBytes(RowFormat format, uint32_t rank, uint32_t rope) {
  const uint32_t element = format == RowFormat::kFp32 ? 4 : 2;
  const uint32_t bytes = (rank + rope) * element;
  return (bytes + limits::kRowAlign - 1) / limits::kRowAlign * limits::kRowAlign;
}

constexpr uint64_t BlockBytes(RowFormat format, uint32_t rank, uint32_t rope) {
  return uint64_t{RowBytes(format, rank, rope)} * limits::kBlockTokens;
}

}  // namespace strait
