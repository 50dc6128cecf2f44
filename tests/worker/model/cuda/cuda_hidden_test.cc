// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage's results do not depend on where hidden states come and go, on the device from
// an edge's memory or through host memory, to the last bit; not in a prompt of several tiles, not
// in decode steps, whose graphs are captured once and replayed with other addresses.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "proto/base/limits.h"
#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/test_pipeline.h"

namespace strait {
namespace {

class CudaHiddenTest : public CudaTest {
 protected:
  static ModelConfig Model() { return OnCuda(TinyV3()); }

  // A prompt of many rows, then decode steps of three sequences. All results, in order.
  static std::vector<std::string> Results(HiddenMemory memory) {
    TestPipeline pipeline(MakeCuda(Model(), {.memory_bytes = 1 << 30}, 5),
                          {1, 2, Model().num_hidden_layers}, 4096);
    pipeline.memory = std::move(memory);
    std::vector<std::string> all;
    const auto keep = [&](const v1::StepPlan& plan) {
      for (const v1::SequenceResult& result : pipeline.Run(plan)) {
        all.push_back(result.SerializeAsString());
      }
    };
    std::vector<uint32_t> lengths = {700, 3, 64};
    v1::StepPlan prompts = pipeline.Plan();
    for (uint64_t id = 1; id <= lengths.size(); ++id) AddOpen(&prompts, id);
    for (uint64_t id = 1; id <= lengths.size(); ++id) {
      std::vector<TokenId> tokens;
      for (uint32_t i = 0; i < lengths[id - 1]; ++i) {
        tokens.push_back((i * 7 + static_cast<uint32_t>(id)) % Model().vocab_size);
      }
      WantSample(AddRows(&prompts, id, 0, tokens), lengths[id - 1] - 1, 5);
    }
    keep(prompts);
    for (uint32_t step = 0; step < 6; ++step) {
      v1::StepPlan decode = pipeline.Plan();
      for (uint64_t id = 1; id <= lengths.size(); ++id) {
        WantSample(AddRows(&decode, id, lengths[id - 1]++, {step + 3}), 0, 5);
      }
      keep(decode);
    }
    return all;
  }
};

TEST_F(CudaHiddenTest, SameBitsFromTheDeviceAndThroughTheHost) {
  const std::vector<std::string> host = Results({});
  int taken = 0;
  int given_back = 0;
  const std::vector<std::string> device = Results([&](size_t bytes) {
    // Another place each time, and none that was zero before.
    void* place = nullptr;
    EXPECT_EQ(cudaMalloc(&place, bytes + 256 * (taken % 3)), cudaSuccess);
    EXPECT_EQ(cudaMemset(place, 0xFF, bytes), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ++taken;
    return HiddenBuffer(static_cast<std::byte*>(place), bytes, [place, &given_back] {
      EXPECT_EQ(cudaFree(place), cudaSuccess);
      ++given_back;
    });
  });
  EXPECT_EQ(taken, 14) << "two edges, seven steps";
  EXPECT_EQ(given_back, taken);
  ASSERT_EQ(host.size(), device.size());
  for (size_t i = 0; i < host.size(); ++i) EXPECT_EQ(host[i], device[i]) << "result " << i;
}

}  // namespace
}  // namespace strait
