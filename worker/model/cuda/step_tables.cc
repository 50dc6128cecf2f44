// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/step_tables.h"

#include <limits>
#include <utility>

#include "kernels/cuda/attention/latent.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/region.h"

namespace strait {

absl::StatusOr<StepTables> StepTables::Create(PinnedPool& pinned, const StepLimits& limits,
                                              std::byte* device) {
  STRAIT_ASSIGN_OR_RETURN(PinnedMemory host, pinned.Take(limits.table_bytes));
  return StepTables(std::move(host), device);
}

absl::Status StepTables::Fill(const StageBatch& batch, uint32_t max_positions, uint32_t num_blocks,
                              DeviceTables* page_tables, absl::Span<std::byte> arrivals,
                              cudaStream_t stream) {
  STRAIT_RETURN_IF_ERROR(page_tables->Bring(batch, num_blocks, arrivals, stream));
  num_sequences_ = static_cast<uint32_t>(batch.sequences.size());
  const uint32_t num_layers = page_tables->num_layers();
  Region region(host_.data());
  auto* const token_ids = region.Take<int32_t>(batch.num_tokens);
  auto* const positions = region.Take<int32_t>(batch.num_tokens);
  auto* const sequence_index = region.Take<int32_t>(batch.num_tokens);
  auto* const segments = region.Take<cuda::MlaSegment>(uint64_t{num_layers} * num_sequences_);
  STRAIT_CHECK(region.end() <= host_.bytes(), "the batch is beyond the limits of a step");
  const auto offset = [&](const void* at) {
    return static_cast<uint64_t>(static_cast<const std::byte*>(at) - host_.data());
  };
  token_ids_ = offset(token_ids);
  positions_ = offset(positions);
  sequence_index_ = offset(sequence_index);
  segments_ = offset(segments);

  uint32_t row = 0;
  for (uint32_t index = 0; index < num_sequences_; ++index) {
    const BatchSequence& sequence = batch.sequences[index];
    const uint32_t end = sequence.first_position + sequence.num_tokens;
    STRAIT_CHECK(sequence.num_tokens > 0 && end <= max_positions);
    STRAIT_CHECK(sequence.tokens.size() == end && row + sequence.num_tokens <= batch.num_tokens);
    for (uint32_t position = sequence.first_position; position < end; ++position, ++row) {
      token_ids[row] = static_cast<int32_t>(sequence.tokens[position]);
      positions[row] = static_cast<int32_t>(position);
      sequence_index[row] = static_cast<int32_t>(index);
    }
    if (sequence.token_of_request) {
      token_ids[row - 1] = cuda::LateTokenId(*sequence.token_of_request);
    }
    for (uint32_t layer = 0; layer < num_layers; ++layer) {
      cuda::MlaSegment& segment = segments[uint64_t{layer} * num_sequences_ + index];
      segment = {};
      segment.page_table = page_tables->Table(index, layer);
      segment.num_rows = std::numeric_limits<int32_t>::max();
      segment.is_cached = sequence.is_cached;
    }
  }
  STRAIT_CHECK(row == batch.num_tokens);
  STRAIT_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(device_, host_.data(), region.end(), cudaMemcpyHostToDevice, stream));
  return absl::OkStatus();
}

}  // namespace strait
