// SPDX-License-Identifier: Apache-2.0
//
// A number for the weights themselves, so that workers with different ones never join one pipeline.
//
// Thread:  pure functions; WeightsFingerprint reads files.
// Errors:  those of Checkpoint and SafetensorsFile; NotFound if a shard that the index names is
//          missing; DataLoss if a file changes while it is read.
// Limits:  kSampleBytes at the begin and in the middle of every tensor.
// Why:     reading all of a large checkpoint at every start would take minutes. Copies of one
//          model agree; another training step changes nearly every tensor, so samples see it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace strait {

inline constexpr uint64_t kSampleBytes = 1024;

// Of names, dtypes, shapes, offsets, file sizes and sampled bytes of all files of the checkpoint.
absl::StatusOr<uint64_t> WeightsFingerprint(const std::string& dir);

// Of weights that are made from a seed.
uint64_t RandomWeightsFingerprint(uint64_t seed);

}  // namespace strait
