// SPDX-License-Identifier: Apache-2.0
//
// Checkpoint is an open Hugging Face directory: its ModelConfig, and tensors by name.
//
// Owns:    the mappings of the shards that were asked for; a TensorView keeps its shard mapped.
// Thread:  any, synchronized inside (mu_ guards the table of open shards).
// Errors:  NotFound names tensor and file; InvalidArgument: config, index or a tensor's dtype or
//          shape is not what the model needs; DataLoss: a file contradicts itself.
// Limits:  limits::kMaxIndexBytes, kMaxShards.
// Why:     with an index, a tensor is looked for only where the index says: neighbours in a layer
//          may live in different shards. Shards are mapped when first needed, so a stage opens
//          only its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/weight.h"
#include "proto/model/model_config.h"
#include "worker/checkpoint/safetensors.h"

namespace strait {

// A tensor's bytes in its file, row-major. `data` may be unaligned.
struct TensorView {
  const std::byte* data = nullptr;
  WeightType type = WeightType::kBf16;
  std::vector<uint64_t> shape;
  uint64_t bytes = 0;
  std::shared_ptr<const SafetensorsFile> file;  // keeps `data` valid
};

class Checkpoint {
 public:
  static absl::StatusOr<std::shared_ptr<Checkpoint>> Open(const std::string& dir);

  const ModelConfig& config() const { return config_; }
  const std::string& dir() const { return dir_; }

  // Names of the safetensors files, sorted; none need have been opened.
  std::vector<std::string> files() const;

  // Whether the index (or the single file) lists `name`.
  bool Has(std::string_view name) const;

  // `shape` and one of `types` are what the caller needs; anything else is InvalidArgument.
  absl::StatusOr<TensorView> Get(std::string_view name, absl::Span<const uint64_t> shape,
                                 absl::Span<const WeightType> types);

 private:
  Checkpoint(std::string dir, ModelConfig config)
      : dir_(std::move(dir)), config_(std::move(config)) {}
  absl::Status ReadIndex();
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Shard(const std::string& file);

  // Constant after Open.
  const std::string dir_;
  const ModelConfig config_;
  absl::flat_hash_map<std::string, std::string> file_of_tensor_;  // empty: one file, no index
  std::shared_ptr<const SafetensorsFile> only_file_;              // null: there is an index

  mutable std::mutex mu_;
  absl::flat_hash_map<std::string, std::shared_ptr<const SafetensorsFile>> shards_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace strait
