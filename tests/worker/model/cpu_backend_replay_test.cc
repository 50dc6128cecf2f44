// SPDX-License-Identifier: Apache-2.0
//
// Defends: whichever of three stages is replaced, the rows that the others kept and those that are computed
// again give the bits of an undisturbed run; a kept row goes through the layers without being stored.
#include <gtest/gtest.h>

#include "tests/worker/model/replay_case.h"
#include "tests/worker/model/tiny_models.h"

namespace strait {
namespace {

class CpuReplayTest : public testing::TestWithParam<RowFormat> {};

TEST_P(CpuReplayTest, WhicheverStageIsLost) {
  const auto run = [](std::optional<size_t> lost) {
    CpuBackendOptions options;
    options.memory_bytes = 1 << 30;
    options.row_format = GetParam();
    TestPipeline pipeline(options, MakeRandomWeights(TinyV3(), 3, 1), {2, 3, 5});
    return RunReplayCase(&pipeline, lost);
  };
  const std::vector<uint32_t> expected = run(std::nullopt);
  for (const size_t lost : {0, 1, 2}) EXPECT_EQ(run(lost), expected) << "stage " << lost;
}

INSTANTIATE_TEST_SUITE_P(Rows, CpuReplayTest, testing::Values(RowFormat::kFp32, RowFormat::kBf16));

}  // namespace
}  // namespace strait
