// SPDX-License-Identifier: Apache-2.0
//
// The kernels around a layer's attention; what a block of LatentAppend does: latent_append.cuh.
#include "kernels/cuda/attention/latent.h"

#include "kernels/cuda/attention/latent_append.cuh"
#include "kernels/cuda/device/common.cuh"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void FillRopeTable(const RopeTableParams p) {
  StartNext();
  WaitForEarlier();
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t half = p.dim / 2;
  if (index >= p.num_tokens * half) return;
  const double angle = static_cast<double>(p.positions[index / half]) *
                       static_cast<double>(p.inv_freq[index % half]);
  double sine = 0;
  double cosine = 0;
  sincos(angle, &sine, &cosine);
  p.cos_sin[2 * index] = static_cast<float>(cosine * static_cast<double>(p.attention_scaling));
  p.cos_sin[2 * index + 1] = static_cast<float>(sine * static_cast<double>(p.attention_scaling));
}

// Grid: (num_tokens, AppendParts).
__global__ void __launch_bounds__(latent::kThreads)
    AppendRow(const __grid_constant__ LatentAppendParams p) {
  StartNext();
  latent::AppendPart(p, blockIdx.x, static_cast<int>(blockIdx.y));
}

__global__ void __launch_bounds__(kThreads) EmbedRow(const EmbeddingParams p) {
  StartNext();
  WaitForEarlier();
  const int64_t token = blockIdx.x;
  int32_t id = p.token_ids[token];
  if (id < 0) id = p.sampled_ids[-1 - id];
  const Bf16* const row = static_cast<const Bf16*>(p.table.data) + int64_t{id} * p.table.stride;
  for (int i = threadIdx.x; i < p.table.cols; i += kThreads) {
    p.y[token * p.table.cols + i] = __bfloat162float(row[i]);
  }
}

}  // namespace

cudaError_t RopeTable(const RopeTableParams& p, cudaStream_t stream) {
  const int64_t pairs = p.num_tokens * (p.dim / 2);
  if (pairs == 0) return cudaSuccess;
  return LaunchChained(FillRopeTable, dim3(static_cast<unsigned>((pairs + 127) / 128)), 128, 0,
                       stream, p);
}

cudaError_t LatentAppend(const LatentAppendParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.rank > latent::kThreads * latent::kHeld ||
      (p.format != RowFormat::kBf16 && p.format != RowFormat::kFp8)) {
    return cudaErrorInvalidValue;
  }
  return LaunchChained(AppendRow, dim3(static_cast<unsigned>(p.num_tokens), latent::AppendParts(p)),
                       latent::kThreads, 0, stream, p);
}

cudaError_t Embedding(const EmbeddingParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  return LaunchChained(EmbedRow, dim3(static_cast<unsigned>(p.num_tokens)), kThreads, 0, stream, p);
}

}  // namespace strait::cuda
