// SPDX-License-Identifier: Apache-2.0
//
// Defends: with --deterministic, whichever of three stages is replaced, the rows that the others kept and
// those that are computed again give the bits of an undisturbed run.
#include <gtest/gtest.h>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/replay_case.h"

namespace strait {
namespace {

class CudaReplayTest : public CudaTestWithParam<RowFormat> {};

TEST_P(CudaReplayTest, WhicheverStageIsLost) {
  const auto run = [](std::optional<size_t> lost) {
    TestPipeline pipeline(
        MakeCuda(
            OnCuda(TinyV3()),
            {.memory_bytes = uint64_t{1} << 30, .deterministic = true, .row_format = GetParam()},
            3),
        {1, 3, 5});
    return RunReplayCase(&pipeline, lost);
  };
  const std::vector<uint32_t> expected = run(std::nullopt);
  for (const size_t lost : {0, 1, 2}) EXPECT_EQ(run(lost), expected) << "stage " << lost;
}

INSTANTIATE_TEST_SUITE_P(Rows, CudaReplayTest, testing::Values(RowFormat::kBf16, RowFormat::kFp8));

}  // namespace
}  // namespace strait
