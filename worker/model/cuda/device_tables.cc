// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/device_tables.h"

#include <algorithm>

#include "kernels/cuda/attention/page_tables.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/reservation.h"
#include "worker/model/cuda/region.h"
#include "worker/model/cuda/status.h"

namespace strait {
namespace {

uint64_t NumColumns(uint32_t num_layers, uint32_t pool_blocks) {
  return num_layers == 0 ? 0 : TablePlaces::ColumnsFor(pool_blocks / num_layers);
}

// New entries as they lie in host memory, and then on the device.
struct Arrivals {
  cuda::PageTablePiece* pieces = nullptr;  // [num_pieces]
  uint32_t* entries = nullptr;             // [num_entries]
  uint64_t bytes = 0;

  Arrivals(std::byte* base, uint64_t num_pieces, uint64_t num_entries) {
    Region region(base);
    pieces = region.Take<cuda::PageTablePiece>(num_pieces);
    entries = region.Take<uint32_t>(num_entries);
    bytes = region.end();
  }
};

}  // namespace

uint64_t DeviceTables::DeviceBytes(uint32_t num_layers, uint32_t pool_blocks) {
  Region region(nullptr);
  region.Take<uint32_t>(NumColumns(num_layers, pool_blocks) * num_layers);
  return region.end() + ArrivalBytes(pool_blocks);
}

uint64_t DeviceTables::ArrivalBytes(uint32_t pool_blocks) {
  return Arrivals(nullptr, limits::kMaxStepSequences, pool_blocks).bytes;
}

DeviceTables::DeviceTables(const StageSpec& spec, std::byte* memory)
    : num_layers_(spec.layers.size()),
      pool_blocks_(spec.pool_blocks),
      books_(NumColumns(num_layers_, pool_blocks_)) {
  Region region(memory);
  tables_ = region.Take<uint32_t>(NumColumns(num_layers_, pool_blocks_) * num_layers_);
  arrivals_ = region.Take<std::byte>(ArrivalBytes(pool_blocks_));
}

absl::Status DeviceTables::Bring(const StageBatch& batch, uint32_t num_blocks,
                                 absl::Span<std::byte> host, cudaStream_t stream) {
  needs_.clear();
  for (const BatchSequence& sequence : batch.sequences) {
    STRAIT_CHECK(sequence.page_tables.size() == num_layers_);
    needs_.push_back(
        {sequence.tables_id, BlocksPerLayer(sequence.first_position + sequence.num_tokens)});
  }
  places_ = books_.Place(needs_);
  const absl::Status status = Upload(batch, num_blocks, host, stream);
  if (!status.ok()) books_.Forget();
  return status;
}

absl::Status DeviceTables::Upload(const StageBatch& batch, uint32_t num_blocks,
                                  absl::Span<std::byte> host, cudaStream_t stream) {
  const auto num_new = [&](size_t index) {
    return needs_[index].num_columns -
           std::min(needs_[index].num_columns, places_[index].num_known);
  };
  cuda::PageTableParams params;
  uint64_t num_entries = 0;
  for (size_t index = 0; index < needs_.size(); ++index) {
    const uint32_t count = num_new(index);
    params.num_pieces += count > 0 ? 1 : 0;
    params.max_count = std::max(params.max_count, count);
    num_entries += uint64_t{count} * num_layers_;
  }
  if (params.num_pieces == 0) return absl::OkStatus();
  const auto num_pieces = static_cast<uint64_t>(params.num_pieces);
  const Arrivals there(host.data(), num_pieces, num_entries);
  STRAIT_CHECK(there.bytes <= host.size(), "the batch is beyond the limits of a step");
  cuda::PageTablePiece* piece = there.pieces;
  uint32_t* entry = there.entries;
  for (size_t index = 0; index < needs_.size(); ++index) {
    const uint32_t count = num_new(index);
    if (count == 0) continue;
    const TablePlace& place = places_[index];
    piece->first = static_cast<int64_t>(place.first_column * num_layers_ + place.num_known);
    piece->source = entry - there.entries;
    piece->stride = place.num_columns;
    piece->count = count;
    ++piece;
    for (const absl::Span<const BlockId> table : batch.sequences[index].page_tables) {
      STRAIT_CHECK(table.size() >= needs_[index].num_columns);
      for (const BlockId block : table.subspan(place.num_known, count)) {
        STRAIT_CHECK(block < num_blocks, "a block beyond the worker's cache");
        *entry++ = block;
      }
    }
  }
  STRAIT_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(arrivals_, host.data(), there.bytes, cudaMemcpyHostToDevice, stream));
  const Arrivals here(arrivals_, num_pieces, num_entries);
  params.pieces = here.pieces;
  params.entries = here.entries;
  params.tables = tables_;
  params.num_layers = static_cast<int32_t>(num_layers_);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::AppendToPageTables(params, stream));
  entries_brought_ += num_entries;
  return absl::OkStatus();
}

}  // namespace strait
