// SPDX-License-Identifier: Apache-2.0
//
// DeviceTables keeps the page tables of a stage's sequences on the device, from step to step: a step
// brings the entries that are new.
//
// Owns:    the books of what is there (TablePlaces).
// Borrows: device memory; the batch, and pinned memory of the caller's, as Bring says.
// Thread:  loop thread only.
// Shapes:  the tables of a sequence lie in one place, [num_layers, room] entries.
// Stream:  new entries are one copy and one launch behind it, both behind the kernels of steps before:
//          so a place may go to another sequence while a step that is begun has yet to read it. A copy
//          must lie between this and the step's first kernel, which begins early: StepTables'.
// Errors:  Bring: those of CUDA; all is brought anew then.
// Limits:  DeviceBytes and ArrivalBytes suffice for a batch within proto/base/limits.h that has no more
//          blocks than the stage may hold.
// Why:     a sequence of 128k tokens has 2,048 entries in each layer, and every 64th step of it adds one:
//          to copy them all in every step was half a megabyte a sequence of 61 layers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "worker/backend.h"
#include "worker/model/cuda/table_places.h"

namespace strait {

class DeviceTables {
 public:
  // Device memory that a block of the pool takes at most, but for what does not grow with it.
  static constexpr uint64_t kBytesEachBlock = 3 * sizeof(BlockId);
  // Device memory of the tables of a stage that holds so many blocks, and of their new entries.
  static uint64_t DeviceBytes(uint32_t num_layers, uint32_t pool_blocks);
  // Of a step's new entries on their way, host and device.
  static uint64_t ArrivalBytes(uint32_t pool_blocks);

  // memory: [DeviceBytes] on the device.
  DeviceTables(const StageSpec& spec, std::byte* memory);

  // Afterwards, in the stream's order, all blocks up to the batch's last rows are in their tables.
  // `num_blocks` of the worker's cache, of which the batch's blocks are.
  // `host`: [ArrivalBytes] pinned, free until the stream has passed this.
  // REQUIRES: what StageBatch promises of a batch; checked.
  absl::Status Bring(const StageBatch& batch, uint32_t num_blocks, absl::Span<std::byte> host,
                     cudaStream_t stream);

  // On the device, of the last Bring: the table of its sequence `index` in the stage's layer `layer`.
  const uint32_t* Table(uint32_t index, uint32_t layer) const {
    const TablePlace& place = places_[index];
    return tables_ + place.first_column * num_layers_ + uint64_t{layer} * place.num_columns;
  }
  uint32_t num_layers() const { return num_layers_; }
  uint64_t entries_brought() const { return entries_brought_; }  // ever
  absl::Status CheckIntegrity() const { return books_.CheckIntegrity(); }

 private:
  absl::Status Upload(const StageBatch& batch, uint32_t num_blocks, absl::Span<std::byte> host,
                      cudaStream_t stream);

  uint32_t num_layers_;
  uint32_t pool_blocks_;
  uint32_t* tables_;
  std::byte* arrivals_;
  TablePlaces books_;
  absl::Span<const TablePlace> places_;
  uint64_t entries_brought_ = 0;
  std::vector<TablePlaces::Need> needs_;  // of the last batch; kept for its memory
};

}  // namespace strait
