// SPDX-License-Identifier: Apache-2.0
//
// StepTables brings what a step's kernels look up to the device: rows, and where each sequence's
// blocks are in each layer.
//
// Owns:    pinned host memory.     Borrows: the device region that mirrors it, and other StepTables.
// Thread:  loop thread; Fill only when its last copy has been made. What another one has brought
//          there is used by the stream before.
// Limits:  StepLimits::table_bytes: a batch within proto/base/limits.h whose blocks are the pool's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/attention/mla.h"
#include "worker/backend.h"
#include "worker/model/cuda/pinned.h"

namespace strait {

class StepTables {
 public:
  static absl::StatusOr<StepTables> Create(uint64_t bytes, std::byte* device);

  // REQUIRES: what StageBatch promises of a batch; checked.
  absl::Status Fill(const StageBatch& batch, const StageSpec& spec, uint32_t max_positions,
                    cudaStream_t stream);

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
