// SPDX-License-Identifier: Apache-2.0
//
// What kernel tests share: seeds, random tensors, stored weights, contexts of a level.
//
// Why:     a weight lies at an odd multiple of its element in a buffer of exactly its size, as a
//          memory-mapped checkpoint may have it, so that a sanitizer sees every byte read beyond
//          it.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/weight.h"

namespace strait::kernel_test {

// A fresh seed in each run, or STRAIT_TEST_SEED; printed by every test that uses it.
inline uint64_t Seed() {
  static const uint64_t seed = [] {
    const char* forced = std::getenv("STRAIT_TEST_SEED");
    return forced ? std::strtoull(forced, nullptr, 10) : std::random_device{}();
  }();
  return seed;
}
#define STRAIT_TRACE_SEED() \
  SCOPED_TRACE("STRAIT_TEST_SEED=" + std::to_string(::strait::kernel_test::Seed()))

using Rng = std::mt19937_64;

inline std::vector<float> RandomFloats(Rng& rng, int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(rng);
  return values;
}

class StoredWeight {
 public:
  StoredWeight(Rng& rng, WeightType type, int64_t rows, int64_t cols, float scale = 1.0f) {
    const int64_t bytes = WeightElementBytes(type);
    storage_ = std::make_unique<char[]>(static_cast<size_t>((rows * cols + 1) * bytes));
    char* data = storage_.get() + bytes;
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < rows * cols; ++i) Put(type, normal(rng), data + i * bytes);
    matrix_ = {data, nullptr, type, rows, cols};
    if (type == WeightType::kFp8E4m3) {
      for (int64_t i = 0; i < rows * cols; ++i) {  // any code but NaN
        const auto code = static_cast<uint8_t>(rng());
        data[i] = static_cast<char>((code & 0x7f) == 0x7f ? code - 1 : code);
      }
      std::uniform_real_distribution<float> scales(0.5f, 1.5f);
      scales_.resize(static_cast<size_t>(((rows + 127) / 128) * ((cols + 127) / 128)));
      for (float& s : scales_) s = scales(rng) * scale / 128.0f;
      matrix_.scale_inv = scales_.data();
    }
  }
  const WeightMatrix& matrix() const { return matrix_; }

 private:
  static void Put(WeightType type, float value, char* to) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    uint16_t half = 0;
    switch (type) {
      case WeightType::kFp32:
        std::memcpy(to, &value, 4);
        return;
      case WeightType::kBf16:
        half = static_cast<uint16_t>(bits >> 16);
        break;
      case WeightType::kFp16:  // ordinary magnitudes only: exponent rebased, mantissa cut
        if (std::abs(value) > 1e-4f && std::abs(value) < 6e4f) {
          half = static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                                       (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
        } else {
          half = static_cast<uint16_t>(bits >> 13 & 0x83ffu);  // some subnormal
        }
        break;
      case WeightType::kFp8E4m3:
        return;
    }
    std::memcpy(to, &half, 2);
  }

  std::unique_ptr<char[]> storage_;
  std::vector<float> scales_;
  WeightMatrix matrix_;
};

inline std::unique_ptr<cpu::Context> MakeContext(cpu::SimdLevel level, int num_threads = 1) {
  auto context = cpu::Context::Create({.num_threads = num_threads, .simd = level});
  if (!context.ok()) {
    ADD_FAILURE() << context.status().ToString();
    std::abort();
  }
  return *std::move(context);
}

// Runs once for each level; a level that this CPU lacks is skipped with the reason.
class LevelTest : public testing::TestWithParam<cpu::SimdLevel> {
 protected:
  void SetUp() override {
    if (!cpu::SimdLevelAvailable(GetParam())) {
      GTEST_SKIP() << "this CPU lacks SIMD level " << cpu::SimdLevelName(GetParam());
    }
  }
};

inline std::string LevelName(const testing::TestParamInfo<cpu::SimdLevel>& info) {
  return std::string(cpu::SimdLevelName(info.param));
}
#define STRAIT_FOR_EACH_LEVEL(fixture)                                                            \
  INSTANTIATE_TEST_SUITE_P(                                                                       \
      Levels, fixture,                                                                            \
      testing::Values(cpu::SimdLevel::kPortable, cpu::SimdLevel::kAvx2, cpu::SimdLevel::kAvx512), \
      kernel_test::LevelName)

inline constexpr WeightType kAllTypes[] = {WeightType::kFp32, WeightType::kBf16, WeightType::kFp16,
                                           WeightType::kFp8E4m3};

// Equal bit for bit: NaN equals itself, -0 differs from 0.
inline testing::AssertionResult SameBits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return testing::AssertionFailure()
             << "element " << i << " of " << count << ": " << a[i] << " and " << b[i];
    }
  }
  return testing::AssertionSuccess();
}
inline testing::AssertionResult SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return testing::AssertionFailure() << "sizes differ";
  return SameBits(a.data(), b.data(), static_cast<int64_t>(a.size()));
}

// |a - b| <= bound everywhere, and nothing is NaN.
inline testing::AssertionResult Within(const std::vector<float>& a, const std::vector<float>& b,
                                       double bound) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(static_cast<double>(a[i]) - b[i]) <= bound)) {
      return testing::AssertionFailure() << "element " << i << " of " << a.size() << ": " << a[i]
                                         << " and " << b[i] << ", apart by more than " << bound;
    }
  }
  return testing::AssertionSuccess();
}

inline constexpr double kEps = 0x1p-24;  // half a unit in the last place of fp32

}  // namespace strait::kernel_test
