// SPDX-License-Identifier: Apache-2.0
//
// HashBackend runs the HashModel through real page tables, each step when it is finished, each copy
// of rows when it is polled: as late as they may. Copied rows can be checked by value: GetHashRow of
// tests/worker/polled_copies.h gives what CacheRow of hash_model.h made.
//
// Owns:    the cache, noise before use.
// Thread:  the simulator's one thread, or a worker's loop; atomics any.
// Errors:  Load: ResourceExhausted beyond its memory, or whatever `fail_next_load` says; the next
//          Begin or Finish: whatever `fail_next_begin` and `fail_next_finish` say; copies: what
//          `copy_faults` say. A copy or step that BlockCopies forbids, or page tables other than
//          BatchSequence::tables_id promises, end the process.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "coordinator/core/core.h"
#include "tests/sim/hash_model.h"
#include "tests/worker/number_cache.h"
#include "tests/worker/polled_copies.h"
#include "worker/backend.h"

namespace strait::sim {

class HashBackend : public Backend {
 public:
  HashBackend(const ModelShape* model, uint64_t memory_bytes, uint64_t weights = kHashWeights)
      : model_(model),
        memory_bytes_(memory_bytes),
        weights_(weights),
        cache_([this](int64_t blocks) {
          return Take(blocks * static_cast<int64_t>(block_bytes()));
        }) {}

  absl::StatusOr<std::unique_ptr<StageModel>> Load(
      const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) override;
  NumberCache& cache() override { return cache_; }
  uint32_t hidden_row_bytes() const override { return sizeof(uint64_t); }
  uint64_t block_bytes() const override { return model_->block_bytes; }
  RowShape row_shape() const override { return kHashRowShape; }
  uint32_t num_layers() const override {
    return static_cast<uint32_t>(model_->layer_weight_bytes.size());
  }
  uint32_t vocab_size() const override { return model_->vocab_size; }
  uint32_t max_positions() const override { return model_->max_positions; }
  std::string numerics_id() const override { return "hash"; }

  const ModelShape& model() const { return *model_; }
  uint64_t weights() const { return weights_; }
  uint64_t used_bytes() const { return used_bytes_; }

  absl::Status fail_next_load;
  absl::Status fail_next_begin;
  absl::Status fail_next_finish;
  CopyFaults copy_faults;
  uint32_t rows_ahead = 0;  // steps of so many are taken ahead; 0: none is
  // Of granted rows that began before they were known.
  std::atomic<uint64_t> late_ids = 0;
  std::atomic<bool> done = true;  // what steps that are begun say of themselves

 private:
  friend class HashStage;
  // Gives back where `bytes` is negative.
  absl::Status Take(int64_t bytes);

  const ModelShape* const model_;
  const uint64_t memory_bytes_;
  const uint64_t weights_;
  NumberCache cache_;
  std::atomic<uint64_t> used_bytes_ = 0;  // the loader's thread adds, the loop's gives back
  // How many models have each layer, the embedding (at num_layers) and the head (behind it).
  std::map<LayerIndex, std::atomic<int>> num_having_;
};

}  // namespace strait::sim
