// SPDX-License-Identifier: Apache-2.0
//
// Defends: a program starts where there is no NCCL, or a library that is none, and says what would
// help.
#include "worker/transport/nccl_library.h"

#include <gtest/gtest.h>

namespace strait {
namespace {

TEST(NcclLibrary, SaysWhatIsMissing) {
  const auto absent = LoadNccl("/nowhere/libnccl.so.2");
  EXPECT_EQ(absent.status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(absent.status().message().find("--nccl-library"), std::string::npos);
  const auto other = LoadNccl("libm.so.6");
  EXPECT_EQ(other.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(other.status().message().find("nccl"), std::string::npos) << other.status();
}

TEST(NcclLibrary, VersionsAsPeopleWriteThem) {
  EXPECT_EQ(NcclVersionText(22809), "2.28.9");
  EXPECT_EQ(NcclVersionText(21805), "2.18.5");
}

}  // namespace
}  // namespace strait
