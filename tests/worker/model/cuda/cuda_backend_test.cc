// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage that does not fit says what it needs, what there is and what would fit, before
// weights are read; what the kernels cannot run is refused; nothing of a stage stays on the GPU.
#include "worker/model/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "proto/model_config.h"
#include "tests/worker/model/tiny_models.h"

namespace strait {
namespace {

class CudaBackendTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const auto device = OpenCudaDevice(0); !device.ok()) {
      GTEST_SKIP() << "SKIPPED, no GPU test ran: " << device.status().message();
    }
  }

  static ModelConfig Model() {
    ModelConfig config = TinyV3();
    config.kv_lora_rank = 48;
    return config;
  }

  static std::unique_ptr<CudaBackend> Make(const ModelConfig& config, uint64_t memory_bytes) {
    CudaBackendOptions options;
    options.memory_bytes = memory_bytes;
    auto backend = CudaBackend::Create(options, MakeRandomWeights(config, 1, 1));
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }

  static size_t FreeBytes() {
    size_t free = 0;
    size_t total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    return free;
  }
};

TEST_F(CudaBackendTest, TooLittleGpuMemory) {
  const ModelConfig config = Model();
  const auto backend = Make(config, uint64_t{1} << 50);
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 0x7fffffff;  // some terabytes
  const absl::Status status = backend->Load(spec, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  for (const char* part : {"needs", "weights", "cache", "workspace", "available", "would fit"}) {
    EXPECT_NE(status.message().find(part), std::string::npos) << part << " in: " << status;
  }
}

TEST_F(CudaBackendTest, BeyondItsBudget) {
  const ModelConfig config = Model();
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 100;
  EXPECT_EQ(Make(config, 1000)->Load(spec, {}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(CudaBackendTest, LayersThatAreNotThere) {
  const ModelConfig config = Model();
  StageSpec spec;
  spec.layers = {1, config.num_hidden_layers + 1};
  spec.pool_blocks = 1;
  EXPECT_EQ(Make(config, 1 << 30)->Load(spec, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaBackendTest, AStageGivesAllMemoryBack) {
  const ModelConfig config = Model();
  const auto backend = Make(config, 1 << 30);
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 1000;
  ASSERT_TRUE(backend->Load(spec, {}).ok());  // what CUDA itself takes at first
  const size_t before = FreeBytes();
  {
    const auto model = backend->Load(spec, {});
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_LT(FreeBytes(), before);
  }
  EXPECT_EQ(FreeBytes(), before);
}

TEST(CudaModelTest, ARankThatTheKernelsDoNotTake) {
  CudaBackendOptions options;
  if (const auto device = OpenCudaDevice(0); !device.ok()) {
    EXPECT_EQ(device.status().code(), absl::StatusCode::kFailedPrecondition);
    GTEST_SKIP() << "SKIPPED, no GPU test ran: " << device.status().message();
  }
  const auto backend = CudaBackend::Create(options, MakeRandomWeights(TinyV3(), 1, 1));
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument) << backend.status();
}

}  // namespace
}  // namespace strait
