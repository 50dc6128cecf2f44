// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/cuda_cache.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/mla.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/status.h"

namespace strait {

absl::StatusOr<std::unique_ptr<CudaCache>> CudaCache::Create(DeviceArena& arena, uint64_t most,
                                                             const ModelConfig& config,
                                                             RowFormat format) {
  std::unique_ptr<CudaCache> cache(new CudaCache());
  cache->device_ = arena.device();
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(cache->device_));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&cache->stream_, cudaStreamNonBlocking));
  STRAIT_ASSIGN_OR_RETURN(cache->memory_, arena.Take(0, most, "the latent cache"));
  CudaPool& pool = cache->pool_;
  pool.blocks = cache->memory_.data();
  pool.format = format;
  pool.block_bytes =
      static_cast<int64_t>(BlockBytes(format, config.kv_lora_rank, config.qk_rope_head_dim));
  cache->most_blocks_ = static_cast<uint32_t>(std::clamp<int64_t>(
      static_cast<int64_t>(most) / pool.block_bytes, 1, std::numeric_limits<int32_t>::max()));
  const auto rank = static_cast<int32_t>(config.kv_lora_rank);
  const auto rope = static_cast<int32_t>(config.qk_rope_head_dim);
  if (format == RowFormat::kBf16 &&
      cuda::MlaAutoPath(format, rank, rope) == cuda::MlaPath::kHopper) {
    // Of all blocks that there may ever be: a map says where they lie, not that they do.
    STRAIT_CUDA_RETURN_IF_ERROR(
        cuda::MakeMlaPoolMap(pool.blocks, cache->most_blocks_, pool.block_bytes, &pool.map));
  }
  return cache;
}

CudaCache::~CudaCache() {
  (void)cudaSetDevice(device_);
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::Status CudaCache::Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) {
  const auto block_bytes = static_cast<uint64_t>(pool_.block_bytes);
  const uint64_t bytes = num_blocks * block_bytes;
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(device_));
  const uint64_t before = memory_.bytes();
  if (num_blocks < num_blocks_) {
    for (const BlockMove& move : moves) {
      STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(pool_.blocks + move.to * block_bytes,
                                                  pool_.blocks + move.from * block_bytes,
                                                  block_bytes, cudaMemcpyDeviceToDevice, stream_));
    }
    STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
  }
  STRAIT_RETURN_IF_ERROR(
      memory_.Resize(bytes, absl::StrCat("a latent cache of ", num_blocks, " blocks")));
  num_blocks_ = num_blocks;
  if (memory_.bytes() > before) {
    // What a row's end was filled up with is never read as a number, but zeros are kinder to debug.
    STRAIT_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(pool_.blocks + before, 0, memory_.bytes() - before, stream_));
    STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
  }
  return absl::OkStatus();
}

}  // namespace strait
