// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/uploader.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/region.h"
#include "worker/model/cuda/status.h"

namespace strait {
namespace {

constexpr uint64_t kBufferBytes = 32 << 20;

const std::array<float, 256>& E4m3Values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table;
    for (int code = 0; code < 256; ++code) {
      __nv_fp8_e4m3 value;
      value.__x = static_cast<__nv_fp8_storage_t>(code);
      table[static_cast<size_t>(code)] = static_cast<float>(value);
    }
    return table;
  }();
  return values;
}

template <class T>
T Read(const void* from, int64_t index) {
  T value;  // may lie unaligned in a mapped file
  std::memcpy(&value, static_cast<const char*>(from) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

// Row `row` as real numbers.
void ReadRow(const WeightMatrix& m, int64_t row, float* to) {
  const int64_t first = row * m.cols;
  switch (m.type) {
    case WeightType::kFp32:
      for (int64_t c = 0; c < m.cols; ++c) to[c] = Read<float>(m.data, first + c);
      return;
    case WeightType::kBf16:
      for (int64_t c = 0; c < m.cols; ++c) {
        to[c] = __bfloat162float(Read<__nv_bfloat16>(m.data, first + c));
      }
      return;
    case WeightType::kFp16:
      for (int64_t c = 0; c < m.cols; ++c) to[c] = __half2float(Read<__half>(m.data, first + c));
      return;
    case WeightType::kFp8E4m3: {
      const float* scales = m.scale_inv + row / kFp8BlockSize * ((m.cols + 127) / kFp8BlockSize);
      for (int64_t c = 0; c < m.cols; ++c) {
        to[c] = E4m3Values()[Read<uint8_t>(m.data, first + c)] * scales[c / kFp8BlockSize];
      }
      return;
    }
  }
}

void WriteBf16(const float* from, int64_t count, int64_t step, std::byte* to) {
  for (int64_t i = 0; i < count; ++i) {
    const __nv_bfloat16 value = __float2bfloat16(from[i * step]);
    std::memcpy(to + 2 * i, &value, 2);
  }
}

std::byte* Writable(const void* device) {
  return static_cast<std::byte*>(const_cast<void*>(device));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Uploader>> Uploader::Create(PinnedPool& pinned) {
  std::unique_ptr<Uploader> up(new Uploader());
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&up->stream_, cudaStreamNonBlocking));
  for (Buffer& buffer : up->buffers_) {
    STRAIT_ASSIGN_OR_RETURN(buffer.memory, pinned.Take(kBufferBytes));
    STRAIT_CUDA_RETURN_IF_ERROR(
        cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming | cudaEventBlockingSync));
  }
  return up;
}

Uploader::~Uploader() {
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
  for (Buffer& buffer : buffers_) {
    if (buffer.copied != nullptr) (void)cudaEventDestroy(buffer.copied);
  }
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::Status Uploader::Rows(std::byte* to, uint64_t num_rows, uint64_t row_bytes,
                            const FillRow& fill) {
  const uint64_t rows_at_once = std::max<uint64_t>(1, kBufferBytes / row_bytes);
  STRAIT_CHECK(row_bytes <= kBufferBytes);
  for (uint64_t begin = 0; begin < num_rows; begin += rows_at_once) {
    const uint64_t count = std::min(rows_at_once, num_rows - begin);
    Buffer& buffer = buffers_[next_];
    next_ ^= 1;
    STRAIT_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(buffer.copied));
    for (uint64_t i = 0; i < count; ++i) fill(begin + i, buffer.data() + i * row_bytes);
    STRAIT_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        to + begin * row_bytes, buffer.data(), count * row_bytes, cudaMemcpyHostToDevice, stream_));
    STRAIT_CUDA_RETURN_IF_ERROR(cudaEventRecord(buffer.copied, stream_));
    bytes_ += count * row_bytes;
  }
  return absl::OkStatus();
}

absl::Status Uploader::Vector(const VectorView& from, float* to) {
  STRAIT_CHECK(!from.empty() && to != nullptr);
  const uint64_t bytes = uint64_t{from.size} * sizeof(float);
  return Rows(reinterpret_cast<std::byte*>(to), 1, bytes,
              [&](uint64_t, std::byte* row) { std::memcpy(row, from.data, bytes); });
}

absl::Status Uploader::Matrix(const WeightMatrix& from, const cuda::Matrix& to, uint64_t group,
                              HeadRows heads) {
  const bool fp8 = to.scales != nullptr;
  STRAIT_CHECK(to.data != nullptr && from.cols == to.cols);
  const uint64_t num_heads = static_cast<uint64_t>(from.rows) / heads.rows;
  STRAIT_CHECK(num_heads * heads.padded == static_cast<uint64_t>(to.rows));
  if (fp8 && from.type != WeightType::kFp8E4m3) {
    return absl::InvalidArgumentError(
        "config.json announces fp8 weights, but a linear weight of the checkpoint is not fp8");
  }
  const uint64_t element = fp8 ? 1 : 2;
  const uint64_t row_bytes = static_cast<uint64_t>(to.stride) * element;
  const uint64_t used_bytes = static_cast<uint64_t>(to.cols) * element;
  const bool as_stored = fp8 || from.type == WeightType::kBf16;
  std::vector<float> values(as_stored ? 0 : static_cast<size_t>(from.cols));
  STRAIT_RETURN_IF_ERROR(
      Rows(Writable(to.data) + group * static_cast<uint64_t>(to.rows) * row_bytes,
           static_cast<uint64_t>(to.rows), row_bytes, [&](uint64_t row, std::byte* out) {
             const uint64_t in_head = row % heads.padded;
             if (in_head >= heads.rows) {
               std::memset(out, 0, row_bytes);
               return;
             }
             const uint64_t stored = row / heads.padded * heads.rows + in_head;
             if (as_stored) {
               std::memcpy(out, static_cast<const std::byte*>(from.data) + stored * used_bytes,
                           used_bytes);
             } else {
               ReadRow(from, static_cast<int64_t>(stored), values.data());
               WriteBf16(values.data(), from.cols, 1, out);
             }
             std::memset(out + used_bytes, 0, row_bytes - used_bytes);
           }));
  if (!fp8) return absl::OkStatus();
  STRAIT_CHECK(heads.rows == heads.padded, "scales belong to rows as stored");
  const uint64_t num_scales =
      Region::ScaleCount(static_cast<uint64_t>(to.rows), static_cast<uint64_t>(to.cols));
  return Rows(Writable(to.scales + group * num_scales), 1, num_scales * sizeof(float),
              [&](uint64_t, std::byte* out) {
                std::memcpy(out, from.scale_inv, num_scales * sizeof(float));
              });
}

absl::Status Uploader::RowSlice(const WeightMatrix& from, uint64_t index, const cuda::Matrix& to,
                                uint64_t group) {
  const int64_t begin = static_cast<int64_t>(index) * to.rows;
  STRAIT_CHECK(begin + to.rows <= from.rows);
  WeightMatrix slice = from;
  slice.rows = to.rows;
  slice.data =
      static_cast<const std::byte*>(from.data) + begin * from.cols * WeightElementBytes(from.type);
  if (from.scale_inv != nullptr) {
    STRAIT_CHECK(begin % kFp8BlockSize == 0);
    slice.scale_inv += begin / kFp8BlockSize * ((from.cols + kFp8BlockSize - 1) / kFp8BlockSize);
  }
  return Matrix(slice, to, group);
}

absl::Status Uploader::ColumnSlice(const WeightMatrix& from, uint64_t index, const cuda::Matrix& to,
                                   uint64_t group) {
  const int64_t begin = static_cast<int64_t>(index) * to.cols;
  STRAIT_CHECK(begin + to.cols <= from.cols && from.rows == to.rows);
  // A copy, dense as Matrix() wants it: shared experts are few.
  const int64_t element = WeightElementBytes(from.type);
  std::vector<std::byte> data(static_cast<size_t>(int64_t{to.rows} * to.cols * element));
  for (int64_t row = 0; row < to.rows; ++row) {
    std::memcpy(data.data() + row * to.cols * element,
                static_cast<const std::byte*>(from.data) + (row * from.cols + begin) * element,
                static_cast<size_t>(to.cols * element));
  }
  WeightMatrix slice = from;
  slice.data = data.data();
  slice.cols = to.cols;
  std::vector<float> scales;
  if (from.scale_inv != nullptr) {
    STRAIT_CHECK(begin % kFp8BlockSize == 0);
    const int64_t from_cols = (from.cols + kFp8BlockSize - 1) / kFp8BlockSize;
    const int64_t to_cols = (to.cols + kFp8BlockSize - 1) / kFp8BlockSize;
    for (int64_t row = 0; row * kFp8BlockSize < to.rows; ++row) {
      const float* at = from.scale_inv + row * from_cols + begin / kFp8BlockSize;
      scales.insert(scales.end(), at, at + to_cols);
    }
    slice.scale_inv = scales.data();
  }
  return Matrix(slice, to, group);
}

absl::Status Uploader::Rest(const WeightMatrix& from, const cuda::Matrix& to) {
  STRAIT_CHECK(to.scales == nullptr && from.rows == to.rows && from.cols == to.cols);
  const uint64_t row_bytes = static_cast<uint64_t>(to.stride) * 2;
  std::vector<float> values(static_cast<size_t>(from.cols));
  return Rows(Writable(to.data), static_cast<uint64_t>(to.rows), row_bytes,
              [&](uint64_t row, std::byte* out) {
                ReadRow(from, static_cast<int64_t>(row), values.data());
                for (float& value : values) {
                  value -= __bfloat162float(__float2bfloat16(value));
                }
                std::memset(out, 0, row_bytes);
                WriteBf16(values.data(), from.cols, 1, out);
              });
}

absl::Status Uploader::UpProjections(const WeightMatrix& kv_b, uint64_t num_heads, uint64_t nope,
                                     const cuda::Matrix& key_up, const cuda::Matrix& value_up) {
  const auto rank = static_cast<uint64_t>(kv_b.cols);
  const auto value = static_cast<uint64_t>(value_up.rows);
  STRAIT_CHECK(static_cast<uint64_t>(kv_b.rows) == num_heads * (nope + value));
  const uint64_t key_bytes = static_cast<uint64_t>(key_up.stride) * 2;
  const uint64_t value_bytes = static_cast<uint64_t>(value_up.stride) * 2;
  std::vector<float> head(nope * rank);  // W_UK of one head
  std::vector<float> row(rank);
  STRAIT_RETURN_IF_ERROR(
      Rows(Writable(key_up.data), num_heads * rank, key_bytes, [&](uint64_t index, std::byte* out) {
        const uint64_t r = index % rank;
        if (r == 0) {
          for (uint64_t d = 0; d < nope; ++d) {
            ReadRow(kv_b, static_cast<int64_t>(index / rank * (nope + value) + d),
                    head.data() + d * rank);
          }
        }
        std::memset(out, 0, key_bytes);
        WriteBf16(head.data() + r, static_cast<int64_t>(nope), static_cast<int64_t>(rank), out);
      }));
  return Rows(Writable(value_up.data), num_heads * value, value_bytes,
              [&](uint64_t index, std::byte* out) {
                const uint64_t stored = index / value * (nope + value) + nope + index % value;
                ReadRow(kv_b, static_cast<int64_t>(stored), row.data());
                std::memset(out, 0, value_bytes);
                WriteBf16(row.data(), static_cast<int64_t>(rank), 1, out);
              });
}

absl::Status Uploader::Finish() {
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
  return absl::OkStatus();
}

}  // namespace strait
