// SPDX-License-Identifier: Apache-2.0
//
// What GPU tests share: the fixture that skips without a GPU, device buffers, comparisons.
//
// Why:     a device buffer is poisoned with NaN bit patterns when it is made, so that an element
//          that nobody wrote, or that should not have been read, shows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/device/device.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait::gpu_test {

inline const std::string& DeviceProblem() {
  static cuda::Device device;
  static const std::string problem = cuda::OpenDevice(0, &device);
  return problem;
}

class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!DeviceProblem().empty()) GTEST_SKIP() << "SKIPPED, no GPU test ran: " << DeviceProblem();
  }
  void TearDown() override {
    if (DeviceProblem().empty()) {
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
  }
};

// [count] T on the device; all bits set (NaN of every float format) until written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    void* data = nullptr;
    EXPECT_EQ(cudaMalloc(&data, bytes() + 1), cudaSuccess);
    data_ = static_cast<T*>(data);
    Poison();
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(static_cast<int64_t>(from.size())) {
    Put(from);
  }
  ~Buffer() { (void)cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void Poison() { EXPECT_EQ(cudaMemset(data_, 0xff, bytes()), cudaSuccess); }
  void Put(const std::vector<T>& from) {
    ASSERT_EQ(from.size(), static_cast<size_t>(count_));
    EXPECT_EQ(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  std::vector<T> Get() const {
    std::vector<T> to(static_cast<size_t>(count_));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
    EXPECT_EQ(cudaMemcpy(to.data(), data_, bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
    return to;
  }
  T* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  T* data_ = nullptr;
  const int64_t count_;
};

using Bf16 = __nv_bfloat16;

inline std::vector<Bf16> ToBf16(const std::vector<float>& from) {
  std::vector<Bf16> to;
  to.reserve(from.size());
  for (const float value : from) to.push_back(__float2bfloat16(value));
  return to;
}
inline std::vector<float> ToFloat(const std::vector<Bf16>& from) {
  std::vector<float> to;
  to.reserve(from.size());
  for (const Bf16 value : from) to.push_back(__bfloat162float(value));
  return to;
}
inline std::vector<float> RoundedToBf16(const std::vector<float>& from) {
  return ToFloat(ToBf16(from));
}

// ||a - b|| / ||b||; NaN if anything is.
inline double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

inline constexpr double kBf16Eps = 0x1p-8;  // half a unit in the last place of bf16, relative

}  // namespace strait::gpu_test
