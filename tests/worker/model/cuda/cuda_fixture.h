// SPDX-License-Identifier: Apache-2.0
//
// What tests of the CUDA backend share: they skip, and say so, where there is no GPU; a tiny model;
// a backend of random weights.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "tests/worker/model/tiny_models.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cuda/cuda_backend.h"

namespace strait {

// A tiny model as the CUDA kernels take it.
inline ModelConfig OnCuda(ModelConfig config) {
  config.kv_lora_rank = 48;
  return config;
}

// With the heads of the published models, which may attend in the expanded form.
inline ModelConfig WithTrueHeads(ModelConfig config) {
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  return config;
}

inline std::unique_ptr<CudaBackend> MakeCuda(const CudaBackendOptions& options,
                                             std::unique_ptr<WeightSource> weights) {
  auto backend = CudaBackend::Create(options, std::move(weights));
  EXPECT_TRUE(backend.ok()) << backend.status();
  return backend.ok() ? *std::move(backend) : nullptr;
}

inline std::unique_ptr<CudaBackend> MakeCuda(const ModelConfig& config,
                                             const CudaBackendOptions& options, uint64_t seed = 1) {
  return MakeCuda(options, MakeRandomWeights(config, seed, 1));
}

template <class Base>
class SkippedWithoutGpu : public Base {
 protected:
  void SetUp() override {
    if (const auto device = OpenCudaDevice(0); !device.ok()) {
      EXPECT_EQ(device.status().code(), absl::StatusCode::kFailedPrecondition);
      GTEST_SKIP() << "SKIPPED, no GPU test ran: " << device.status().message();
    }
  }
};

using CudaTest = SkippedWithoutGpu<testing::Test>;
template <class Param>
using CudaTestWithParam = SkippedWithoutGpu<testing::TestWithParam<Param>>;

}  // namespace strait
