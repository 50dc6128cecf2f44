// SPDX-License-Identifier: Apache-2.0
//
// StepTables brings what a step's kernels look up to the device: rows, and where each sequence's
// blocks are in each layer: segments, which point into the tables that stay there (DeviceTables).
//
// Owns:    pinned host memory.     Borrows: the device region that mirrors it, and other StepTables.
// Thread:  loop thread; Fill only when its last copies have been made. What another one has brought
//          there is used by the stream before.
// Stream:  the copy of rows and segments is the last that Fill enqueues, and there is always one: so
//          kernels that begin early find all tables whole, and steps before ended (mla.h).
// Limits:  StepLimits::table_bytes, arrival_bytes: a batch within proto/base/limits.h whose blocks are
//          the pool's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/attention/mla.h"
#include "worker/backend.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/device_tables.h"
#include "worker/model/cuda/pinned.h"

namespace strait {

class StepTables {
 public:
  // `device`: [StepLimits::table_bytes].
  static absl::StatusOr<StepTables> Create(PinnedPool& pinned, const StepLimits& limits,
                                           std::byte* device);

  // REQUIRES: what StageBatch promises of a batch; checked.
  // `num_blocks`, `arrivals`: as DeviceTables::Bring.
  absl::Status Fill(const StageBatch& batch, uint32_t max_positions, uint32_t num_blocks,
                    DeviceTables* page_tables, absl::Span<std::byte> arrivals, cudaStream_t stream);

  // --- On the device, of the last Fill ---
  // [rows]; of BatchSequence::token_of_request LateTokenId.
  const int32_t* token_ids() const { return At<int32_t>(token_ids_); }
  const int32_t* positions() const { return At<int32_t>(positions_); }            // [rows]
  const int32_t* sequence_index() const { return At<int32_t>(sequence_index_); }  // [rows]
  // [sequences of the batch], of the stage's layer `layer`.
  const cuda::MlaSegment* segments(uint32_t layer) const {
    return At<cuda::MlaSegment>(segments_) + uint64_t{layer} * num_sequences_;
  }

 private:
  StepTables(PinnedMemory host, std::byte* device) : host_(std::move(host)), device_(device) {}
  template <class T>
  const T* At(uint64_t offset) const {
    return reinterpret_cast<const T*>(device_ + offset);
  }

  PinnedMemory host_;
  std::byte* device_;
  uint32_t num_sequences_ = 0;
  // Offsets in both memories.
  uint64_t token_ids_ = 0;
  uint64_t positions_ = 0;
  uint64_t sequence_index_ = 0;
  uint64_t segments_ = 0;
};

}  // namespace strait
