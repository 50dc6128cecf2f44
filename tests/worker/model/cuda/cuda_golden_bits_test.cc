// SPDX-License-Identifier: Apache-2.0
//
// Defends: with --deterministic a change that is not meant to move a bit moves none, from one version of this
// program to the next, on a GPU of the same architecture. (That the way does not matter, is
// cuda_same_bits_test's: here each case runs one way.)
#include <gtest/gtest.h>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/cuda/hopper_models.h"
#include "tests/worker/model/golden_bits.h"

namespace strait {
namespace {

struct Case {
  const char* shape;
  RowFormat rows = RowFormat::kBf16;
  bool fp8_activations = false;
};

class CudaGoldenBitsTest : public CudaTestWithParam<Case> {};

TEST_P(CudaGoldenBitsTest, Checkpoint) {
  auto source = OpenCheckpointWeights(GoldenDir(GetParam().shape));
  ASSERT_TRUE(source.ok()) << source.status();
  const LayerIndex num_layers = (*source)->config().num_hidden_layers;
  TestPipeline pipeline(MakeCuda({.memory_bytes = 1 << 30,
                                  .deterministic = true,
                                  .row_format = GetParam().rows,
                                  .fp8_activations = GetParam().fp8_activations},
                                 *std::move(source)),
                        {1, num_layers});
  ExpectGoldenBits(pipeline.backend().numerics_id() + " " + GetParam().shape,
                   DigestOfCheckpoint(GetParam().shape, &pipeline, 100));
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaGoldenBitsTest,
                         testing::Values(Case{"v3-yarn"}, Case{"v3-odd"}, Case{"v2-lite"},
                                         Case{"v2"}, Case{"v3-fp8"},
                                         Case{"v3-fp8", RowFormat::kBf16, true},
                                         Case{"v3-yarn", RowFormat::kFp8},
                                         Case{"v2", RowFormat::kFp8}));

// Rows of Hopper's attention, and a context that crosses the 1,024-row spans which it is cut at.
struct LongCase {
  const char* name;
  ModelConfig (*config)();
  RowFormat rows;
};

class CudaGoldenBitsLongTest : public CudaTestWithParam<LongCase> {};

TEST_P(CudaGoldenBitsLongTest, SpansOfAttention) {
  const ModelConfig config = GetParam().config();
  TestPipeline pipeline(
      MakeCuda(
          config,
          {.memory_bytes = uint64_t{4} << 30, .deterministic = true, .row_format = GetParam().rows},
          3),
      {config.num_hidden_layers}, 4096);
  ExpectGoldenBits(pipeline.backend().numerics_id() + " " + GetParam().name + " 2,300 tokens",
                   DigestOfRandomTokens(2300, config.vocab_size, &pipeline, 333));
}

INSTANTIATE_TEST_SUITE_P(Models, CudaGoldenBitsLongTest,
                         testing::Values(LongCase{"16 heads", Lite512, RowFormat::kBf16},
                                         LongCase{"256 heads", Heads256, RowFormat::kBf16},
                                         LongCase{"16 heads", Lite512, RowFormat::kFp8},
                                         LongCase{"256 heads", Heads256, RowFormat::kFp8}));

}  // namespace
}  // namespace strait
