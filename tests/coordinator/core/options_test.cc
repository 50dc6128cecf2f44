// SPDX-License-Identifier: Apache-2.0
//
// Options out of bounds are refused with the flag's name.
#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/fake_worker.h"

namespace strait {
namespace {

using testing::HasSubstr;

TEST(ValidateOptions, NamesTheFlag) {
  ASSERT_TRUE(ValidateOptions(CoreOptions(), SmallModel()).ok());
  const std::pair<std::string, std::function<void(CoreOptions*)>> cases[] = {
      {"--restore-timeout", [](CoreOptions* o) { o->restore_timeout_us = 0; }},
      {"--restore-timeout", [](CoreOptions* o) { o->restore_timeout_us = 3'600'000'001; }},
      {"--spare-wait", [](CoreOptions* o) { o->spare_wait_us = 86'400'000'001; }},
      {"--warm-spares", [](CoreOptions* o) { o->warm_spares = 1'000'000; }},
  };
  for (const auto& [flag, spoil] : cases) {
    CoreOptions options;
    spoil(&options);
    const absl::Status status = ValidateOptions(options, SmallModel());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.ToString(), HasSubstr(flag));
  }
}

}  // namespace
}  // namespace strait
