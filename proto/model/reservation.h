// SPDX-License-Identifier: Apache-2.0
//
// What a sequence costs in latent blocks: one pure function, used by the coordinator to reserve
// and by the worker to allocate. Both assert, at every step, that use equals the sum over distinct
// blocks. What a block costs in bytes is proto/latent_block.h's.
//
// Thread:  pure functions.
// Why:     no worker evicts or refuses on its own, so the coordinator must know the cost exactly.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "proto/base/limits.h"
#include "proto/latent_block.h"

namespace strait {

// As --cache-format has them.
constexpr const char* RowFormatName(RowFormat format) {
  return format == RowFormat::kFp32 ? "fp32" : format == RowFormat::kBf16 ? "bf16" : "fp8";
}
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

}  // namespace strait
