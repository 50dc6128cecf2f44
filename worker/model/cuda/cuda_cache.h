// SPDX-License-Identifier: Apache-2.0
//
// CudaCache is the latent blocks of a GPU worker: addresses for as many as its memory could ever hold,
// slabs for those that there are.
//
// Owns:    a lease of the arena, a stream.
// Thread:  as CacheMemory.
// Stream:  its own; Resize waits for it.
// Errors:  as CacheMemory.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "proto/model/model_config.h"
#include "worker/cache/cache_memory.h"
#include "worker/model/cuda/device_arena.h"
#include "worker/model/cuda/layers.h"

namespace strait {

class CudaCache final : public CacheMemory {
 public:
  // `most` bytes of blocks that there can be.
  static absl::StatusOr<std::unique_ptr<CudaCache>> Create(DeviceArena& arena, uint64_t most,
                                                           const ModelConfig& config,
                                                           RowFormat format);
  ~CudaCache() override;

  absl::Status Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) override;
  uint32_t num_blocks() const override { return num_blocks_; }
  // That there are addresses for.
  uint32_t most_blocks() const { return most_blocks_; }
  // Constant: what there is of it grows and shrinks at its end.
  const CudaPool& pool() const { return pool_; }

 private:
  CudaCache() = default;

  int device_ = 0;
  DeviceArena::Lease memory_;
  CudaPool pool_;
  uint32_t most_blocks_ = 0;
  cudaStream_t stream_ = nullptr;
  std::atomic<uint32_t> num_blocks_ = 0;
};

}  // namespace strait
