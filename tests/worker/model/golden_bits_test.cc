// SPDX-License-Identifier: Apache-2.0
//
// Defends: on CPUs a change that is not meant to move a bit moves none, from one version of this program to
// the next. (That the way does not matter, is cpu_backend_same_bits_test's: here each case runs one way.)
#include "tests/worker/model/golden_bits.h"

#include <gtest/gtest.h>

#include "tests/worker/model/tiny_models.h"

namespace strait {
namespace {

struct Case {
  const char* shape;
  RowFormat rows;
};

class GoldenBitsTest : public testing::TestWithParam<Case> {};

TEST_P(GoldenBitsTest, Checkpoint) {
  auto source = OpenCheckpointWeights(GoldenDir(GetParam().shape));
  ASSERT_TRUE(source.ok()) << source.status();
  const LayerIndex num_layers = (*source)->config().num_hidden_layers;
  CpuBackendOptions options;
  options.memory_bytes = 1 << 30;
  options.row_format = GetParam().rows;
  TestPipeline pipeline(options, *std::move(source), {1, num_layers});
  ExpectGoldenBits(pipeline.backend().numerics_id() + " " + GetParam().shape,
                   DigestOfCheckpoint(GetParam().shape, &pipeline, 100));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GoldenBitsTest,
    testing::Values(Case{"v3-yarn", RowFormat::kFp32}, Case{"v3-odd", RowFormat::kFp32},
                    Case{"v2-lite", RowFormat::kFp32}, Case{"v2", RowFormat::kFp32},
                    Case{"v3-fp8", RowFormat::kFp32}, Case{"v3-yarn", RowFormat::kBf16},
                    Case{"v2-lite", RowFormat::kBf16}));

// A context that crosses the 1,024-row spans which attention is folded in.
TEST(GoldenBitsLongTest, SpansOfAttention) {
  ModelConfig config = TinyV3();
  config.max_position_embeddings = 4096;
  CpuBackendOptions options;
  options.memory_bytes = 1 << 30;
  TestPipeline pipeline(options, MakeRandomWeights(config, 3, 1), {config.num_hidden_layers}, 4096);
  ExpectGoldenBits(pipeline.backend().numerics_id() + " tiny-v3 2,300 tokens",
                   DigestOfRandomTokens(2300, config.vocab_size, &pipeline, 333));
}

}  // namespace
}  // namespace strait
