// SPDX-License-Identifier: Apache-2.0
//
// Defends: an operator key is what its owner alone can read, and where the programs look for it is
// one place.
#include "coordinator/access/operator_key.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace strait {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class OperatorKeyTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "strait-key-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string Write(const std::string& text, mode_t mode = 0600) {
    const std::string path = dir_ + "/key";
    std::ofstream(path) << text;
    EXPECT_EQ(chmod(path.c_str(), mode), 0);
    return path;
  }
  static absl::Status Refusal(const std::string& path) {
    return ReadOperatorKey(path, "--operator-key-file").status();
  }

  std::string dir_;
};

TEST_F(OperatorKeyTest, IsReadWithoutTheWhiteSpaceAtItsEnd) {
  for (const char* end : {"", "\n", "\r\n", " \n\n"}) {
    const auto key = ReadOperatorKey(Write(std::string("0123456789abcdef") + end), "key");
    ASSERT_TRUE(key.ok()) << key.status();
    EXPECT_EQ(*key, "0123456789abcdef");
  }
  const std::string longest(kMaxOperatorKeyBytes, 'k');
  EXPECT_EQ(ReadOperatorKey(Write(longest + "\n"), "key").value(), longest);
}

TEST_F(OperatorKeyTest, WhatOthersMayReadIsRefusedWithTheFix) {
  for (const mode_t mode : {0640, 0604, 0620, 0602, 0601, 0610}) {
    const absl::Status refusal = Refusal(Write("0123456789abcdef", mode));
    EXPECT_TRUE(absl::IsFailedPrecondition(refusal)) << mode << ": " << refusal;
    EXPECT_THAT(std::string(refusal.message()), HasSubstr("chmod 600 " + dir_ + "/key"));
  }
  EXPECT_TRUE(Refusal(Write("0123456789abcdef", 0400)).ok());
}

TEST_F(OperatorKeyTest, WhatIsNoKeyIsRefusedWithTheFix) {
  for (const std::string& text :
       {std::string(), std::string("short"), std::string("0123456789 abcdef"),
        std::string("0123456789abcdef\nmore"), std::string("0123456789abcd\xc3\xa9"),
        std::string(kMaxOperatorKeyBytes + 1, 'k'), std::string(kMaxOperatorKeyBytes * 2, 'k')}) {
    const absl::Status refusal = Refusal(Write(text));
    EXPECT_TRUE(absl::IsInvalidArgument(refusal)) << text << ": " << refusal;
    EXPECT_THAT(std::string(refusal.message()), HasSubstr("/dev/urandom"));
  }
  EXPECT_TRUE(absl::IsNotFound(Refusal(dir_ + "/none")));
  EXPECT_TRUE(absl::IsFailedPrecondition(Refusal(dir_)));
  ASSERT_EQ(mkfifo((dir_ + "/pipe").c_str(), 0600), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(Refusal(dir_ + "/pipe")));  // and it does not hang
}

TEST_F(OperatorKeyTest, IsMadeForItsOwnerAloneAndAnewEachTime) {
  const std::string path = dir_ + "/state/strait/operator-key-8000";
  ASSERT_TRUE(MakeOperatorKey(path).ok());
  struct stat status = {};
  ASSERT_EQ(stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
  ASSERT_EQ(stat((dir_ + "/state/strait").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  const std::string first = ReadOperatorKey(path, "key").value();
  EXPECT_EQ(first.size(), 64u);
  ASSERT_TRUE(MakeOperatorKey(path).ok());
  EXPECT_NE(ReadOperatorKey(path, "key").value(), first);

  // What stands in its place is removed, and not written to.
  fs::remove(path);
  const std::string other = Write("another's file", 0644);
  fs::create_symlink(other, path);
  ASSERT_TRUE(MakeOperatorKey(path).ok());
  EXPECT_FALSE(fs::is_symlink(path));
  EXPECT_EQ(fs::file_size(other), 14u);
  const absl::Status refusal = MakeOperatorKey("/proc/none/strait/operator-key-1");
  EXPECT_TRUE(absl::IsUnavailable(refusal)) << refusal;
}

TEST_F(OperatorKeyTest, LiesInTheFoldersThatAreSetTheFirstFirst) {
  std::map<std::string, std::string> set = {
      {"XDG_RUNTIME_DIR", "/run/user/1"}, {"XDG_STATE_HOME", "/state"}, {"HOME", "/home/a"}};
  const auto paths = [&set] {
    return OperatorKeyPaths(8000, [&set](const char* name) -> const char* {
      const auto found = set.find(name);
      return found == set.end() ? nullptr : found->second.c_str();
    });
  };
  EXPECT_THAT(paths(),
              ElementsAre("/run/user/1/strait/operator-key-8000", "/state/strait/operator-key-8000",
                          "/home/a/.local/state/strait/operator-key-8000"));
  set["XDG_RUNTIME_DIR"] = "";
  set["XDG_STATE_HOME"] = "not/absolute";
  EXPECT_THAT(paths(), ElementsAre("/home/a/.local/state/strait/operator-key-8000"));
  set.erase("HOME");
  EXPECT_THAT(paths(), IsEmpty());
}

}  // namespace
}  // namespace strait
