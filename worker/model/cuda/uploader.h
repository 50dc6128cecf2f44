// SPDX-License-Identifier: Apache-2.0
//
// Uploader copies weights to the device through two pinned buffers: one is filled while the other
// is on its way.
//
// Owns:    its stream and buffers.     Borrows: sources, during a call; destinations.
// Thread:  one.
// Errors:  InvalidArgument: a tensor in another precision than there is room for; those of CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/gemm/matrix.h"
#include "kernels/weight.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cuda/pinned.h"

namespace strait {

// Rows of a matrix in groups (heads): `rows` stored ones become `padded`, the others zero.
struct HeadRows {
  uint64_t rows = 1;
  uint64_t padded = 1;
};

class Uploader {
 public:
  static absl::StatusOr<std::unique_ptr<Uploader>> Create(PinnedPool& pinned);
  ~Uploader();

  absl::Status Vector(const VectorView& from, float* to);
  // `group`: which of the matrices that lie one after the other at `to`.
  absl::Status Matrix(const WeightMatrix& from, const cuda::Matrix& to, uint64_t group = 0,
                      HeadRows heads = {});
  // Rows, or columns, [index * n, (index + 1) * n) of `from`, where `to` has n. With fp8 they begin
  // at a scale's first.
  absl::Status RowSlice(const WeightMatrix& from, uint64_t index, const cuda::Matrix& to,
                        uint64_t group);
  absl::Status ColumnSlice(const WeightMatrix& from, uint64_t index, const cuda::Matrix& to,
                           uint64_t group);
  // What rounding `from` to bf16 leaves, in bf16.
  absl::Status Rest(const WeightMatrix& from, const cuda::Matrix& to);
  // Takes kv_b_proj apart: `key_up` and `value_up` of all heads.
  absl::Status UpProjections(const WeightMatrix& kv_b_proj, uint64_t num_heads, uint64_t nope,
                             const cuda::Matrix& key_up, const cuda::Matrix& value_up);
  // Waits until all is on the device.
  absl::Status Finish();

  uint64_t bytes() const { return bytes_; }  // handed to the device so far

 private:
  struct Buffer {
    PinnedMemory memory;
    std::byte* data() const { return memory.data(); }
    cudaEvent_t copied = nullptr;
  };
  using FillRow = std::function<void(uint64_t row, std::byte* to)>;

  Uploader() = default;
  // Copies `num_rows` rows of `row_bytes` that `fill` makes.
  absl::Status Rows(std::byte* to, uint64_t num_rows, uint64_t row_bytes, const FillRow& fill);

  cudaStream_t stream_ = nullptr;
  Buffer buffers_[2];
  int next_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace strait
