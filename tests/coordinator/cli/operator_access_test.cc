// SPDX-License-Identifier: Apache-2.0
//
// Defends: the verbs find the key that `strait up` made, and send it to no other machine.
#include "coordinator/cli/operator_access.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>

#include "coordinator/access/operator_key.h"

namespace strait::cli {
namespace {

namespace fs = std::filesystem;

Url UrlOf(const char* text) { return ParseUrl(text).value(); }

class OperatorAccessTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "strait-key-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
    setenv("XDG_RUNTIME_DIR", (dir_ + "/run").c_str(), 1);
    setenv("XDG_STATE_HOME", (dir_ + "/state").c_str(), 1);
    setenv("HOME", dir_.c_str(), 1);
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string dir_;
};

TEST_F(OperatorAccessTest, FindsByPortTheKeyOfThisMachine) {
  EXPECT_EQ(FindOperatorKey(UrlOf("127.0.0.1:8000"), "").value(), "");
  // Made by an `up` that had no XDG_RUNTIME_DIR.
  const std::string path = dir_ + "/state/strait/operator-key-8000";
  ASSERT_TRUE(MakeOperatorKey(path).ok());
  const std::string key = ReadOperatorKey(path, "key").value();
  for (const char* url : {"127.0.0.1:8000", "localhost:8000", "http://127.1.2.3:8000/v1"}) {
    EXPECT_EQ(FindOperatorKey(UrlOf(url), "").value(), key) << url;
  }
  EXPECT_EQ(FindOperatorKey(UrlOf("127.0.0.1:8001"), "").value(), "");
  // An address of documentation (RFC 5737): nobody's interface has it.
  EXPECT_EQ(FindOperatorKey(UrlOf("192.0.2.1:8000"), "").value(), "");
  EXPECT_EQ(FindOperatorKey(UrlOf("192.0.2.1:8000"), path).value(), key);
}

TEST_F(OperatorAccessTest, AFileThatIsNoKeyIsAnErrorAndNotPassedOver) {
  EXPECT_TRUE(absl::IsNotFound(FindOperatorKey(UrlOf("127.0.0.1:8000"), dir_ + "/no").status()));
  const std::string path = dir_ + "/run/strait/operator-key-8000";
  ASSERT_TRUE(MakeOperatorKey(path).ok());
  ASSERT_EQ(chmod(path.c_str(), 0644), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(FindOperatorKey(UrlOf("127.0.0.1:8000"), "").status()));
}

}  // namespace
}  // namespace strait::cli
