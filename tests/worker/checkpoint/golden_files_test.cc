// SPDX-License-Identifier: Apache-2.0
//
// Defends: the checkpoints that tests/golden/generate.py wrote in the published layout open
// completely.
#include <gtest/gtest.h>

#include <filesystem>

#include "worker/checkpoint/weights.h"

namespace strait {
namespace {

TEST(GoldenFiles, EveryShapeLoadsWhole) {
  for (const char* name : {"v3-yarn", "v3-odd", "v2-lite", "v2", "v3-fp8"}) {
    SCOPED_TRACE(name);
    const auto source =
        OpenCheckpointWeights(std::string(STRAIT_SOURCE_DIR) + "/tests/golden/" + name);
    ASSERT_TRUE(source.ok()) << source.status();
    const ModelConfig& config = (*source)->config();
    const auto stage = LoadStageWeights(**source, {0, config.num_hidden_layers}, 2, {});
    ASSERT_TRUE(stage.ok()) << stage.status();
    uint64_t bytes = EmbeddingBytes(config) + HeadBytes(config);
    for (LayerIndex layer = 0; layer < config.num_hidden_layers; ++layer) {
      bytes += LayerWeightBytes(config, layer);
    }
    EXPECT_EQ(stage->bytes, bytes);
  }
}

}  // namespace
}  // namespace strait
