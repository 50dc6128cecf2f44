// SPDX-License-Identifier: Apache-2.0
//
// Defends: the instruction set is chosen by argument, then by STRAIT_SIMD, then the widest; what
// the CPU lacks or nobody knows is an error that says what to do.
#include "kernels/cpu/context.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <string>

namespace strait::cpu {
namespace {

class ContextTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const char* value = std::getenv("STRAIT_SIMD")) saved_ = value;
    unsetenv("STRAIT_SIMD");
  }
  void TearDown() override {
    if (!saved_.empty()) setenv("STRAIT_SIMD", saved_.c_str(), 1);
  }
  std::string saved_;
};

TEST_F(ContextTest, TakesTheWidestByItself) {
  auto context = Context::Create({.num_threads = 2});
  ASSERT_TRUE(context.ok());
  for (SimdLevel level : {SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (!SimdLevelAvailable(level)) continue;
    EXPECT_GE((*context)->simd_level(), level);
  }
  EXPECT_EQ((*context)->num_threads(), 2);
}

TEST_F(ContextTest, ObeysArgumentAndEnvironment) {
  setenv("STRAIT_SIMD", "portable", 1);
  EXPECT_EQ((*Context::Create({}))->simd_level(), SimdLevel::kPortable);
  if (!SimdLevelAvailable(SimdLevel::kAvx2)) GTEST_SKIP() << "this CPU lacks SIMD level avx2";
  EXPECT_EQ((*Context::Create({.simd = SimdLevel::kAvx2}))->simd_level(), SimdLevel::kAvx2);
  setenv("STRAIT_SIMD", "avx2", 1);
  EXPECT_EQ((*Context::Create({}))->simd_level(), SimdLevel::kAvx2);
}

TEST_F(ContextTest, RefusesUnknownNames) {
  setenv("STRAIT_SIMD", "AVX2", 1);
  const auto context = Context::Create({});
  EXPECT_EQ(context.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(context.status().message()).find("portable"), std::string::npos);
}

TEST_F(ContextTest, RefusesWhatTheCpuLacks) {
  if (SimdLevelAvailable(SimdLevel::kAvx512)) GTEST_SKIP() << "this CPU has every level";
  EXPECT_EQ(Context::Create({.simd = SimdLevel::kAvx512}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  setenv("STRAIT_SIMD", "avx512", 1);
  EXPECT_EQ(Context::Create({}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ContextTest, RefusesBadThreadCounts) {
  EXPECT_EQ(Context::Create({.num_threads = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Context::Create({.num_threads = kMaxThreads + 1}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(ContextTest, ScratchGrowsAndIsAligned) {
  auto context = *Context::Create({.num_threads = 2});
  for (int slot : {0, 1, Context::kShared}) {
    for (size_t count : {1, 1000, 10}) {
      float* scratch = context->Scratch(slot, count);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(scratch) % 64, 0u);
      scratch[count - 1] = 1.0f;
    }
  }
}

}  // namespace
}  // namespace strait::cpu
