// SPDX-License-Identifier: Apache-2.0
//
// Defends: a tensor comes from exactly the file that the index names, with the shape and dtype that
// were asked for; an index cannot reach outside its directory; every refusal names tensor and file.
#include "worker/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "tests/worker/checkpoint/fixture.h"

namespace strait {
namespace {

using ::strait::testing::FreshDir;
using ::strait::testing::Safetensors;
using ::strait::testing::TinyConfig;
using ::strait::testing::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr WeightType kBf16[] = {WeightType::kBf16};
constexpr WeightType kAny[] = {WeightType::kFp32, WeightType::kBf16};

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteText(dir_ + "/config.json", TinyConfig()); }
  void WriteIndex(const std::string& map) {
    WriteText(dir_ + "/model.safetensors.index.json",
              absl::StrCat("{\"metadata\": {}, \"weight_map\": ", map, "}"));
  }
  void ExpectOpenFails(absl::StatusCode code, const std::string& part) {
    const auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_FALSE(checkpoint.ok()) << "opened, should say " << part;
    EXPECT_EQ(checkpoint.status().code(), code) << checkpoint.status();
    EXPECT_THAT(std::string(checkpoint.status().message()),
                AllOf(HasSubstr(dir_), HasSubstr(part)));
  }
  const std::string dir_ = FreshDir();
};

TEST_F(CheckpointTest, SingleFile) {
  WriteText(dir_ + "/model.safetensors",
            Safetensors({{"a", {"BF16", {2, 2}, "12345678"}}, {"f", {"F64", {1}, "12345678"}}}));
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto view = (*checkpoint)->Get("a", {2, 2}, kAny);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->type, WeightType::kBf16);
  EXPECT_EQ(view->bytes, 8u);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(view->data), 8), "12345678");
  EXPECT_TRUE((*checkpoint)->Has("a"));
  EXPECT_FALSE((*checkpoint)->Has("b"));

  const auto missing = (*checkpoint)->Get("b", {2}, kAny).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()),
              AllOf(HasSubstr("\"b\""), HasSubstr("/model.safetensors")));
  const auto shape = (*checkpoint)->Get("a", {4}, kAny).status();
  EXPECT_EQ(shape.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(shape.message()),
              AllOf(HasSubstr("\"a\""), HasSubstr("[2, 2]"), HasSubstr("[4]")));
  EXPECT_EQ((*checkpoint)->Get("a", {2, 2, 1}, kAny).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto dtype = (*checkpoint)->Get("f", {1}, kAny).status();
  EXPECT_EQ(dtype.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(dtype.message()), AllOf(HasSubstr("F64"), HasSubstr("F32, BF16")));
}

TEST_F(CheckpointTest, ViewsOutliveTheCheckpoint) {
  WriteText(dir_ + "/model.safetensors", Safetensors({{"a", {"BF16", {4}, "12345678"}}}));
  TensorView view;
  {
    auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_TRUE(checkpoint.ok());
    view = (*checkpoint)->Get("a", {4}, kBf16).value();
  }
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(view.data), 8), "12345678");
}

// Shards list a tensor of the same name: only the index decides, and only its shard is opened.
TEST_F(CheckpointTest, TheIndexDecidesAndShardsOpenLazily) {
  WriteText(dir_ + "/m-1.safetensors", Safetensors({{"a", {"BF16", {1}, "11"}}}));
  WriteText(dir_ + "/m-2.safetensors",
            Safetensors({{"a", {"BF16", {1}, "22"}}, {"b", {"BF16", {1}, "bb"}}}));
  WriteText(dir_ + "/m-3.safetensors", "damaged");
  WriteIndex(R"({"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors",
                 "d": "m-4.safetensors", "e": "m-1.safetensors"})");
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto a = (*checkpoint)->Get("a", {1}, kBf16);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(a->data), 2), "11");
  EXPECT_TRUE((*checkpoint)->Get("b", {1}, kBf16).ok());
  EXPECT_EQ((*checkpoint)->Get("b", {1}, kBf16)->file, (*checkpoint)->Get("b", {1}, kBf16)->file);

  EXPECT_EQ((*checkpoint)->Get("c", {1}, kBf16).status().code(), absl::StatusCode::kDataLoss);
  const auto no_file = (*checkpoint)->Get("d", {1}, kBf16).status();
  EXPECT_EQ(no_file.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(no_file.message()), HasSubstr("m-4.safetensors"));
  const auto lie = (*checkpoint)->Get("e", {1}, kBf16).status();
  EXPECT_EQ(lie.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(lie.message()), AllOf(HasSubstr("m-1.safetensors"), HasSubstr("\"e\"")));
  const auto unlisted = (*checkpoint)->Get("z", {1}, kBf16).status();
  EXPECT_EQ(unlisted.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unlisted.message()), AllOf(HasSubstr("\"z\""), HasSubstr("index.json")));
}

TEST_F(CheckpointTest, TheIndexCannotEscape) {
  for (const char* file :
       {"../m.safetensors", "/etc/passwd", "a/m.safetensors", "a\\\\m.safetensors", "",
        ".hidden.safetensors", "..", "m.bin", "m.safetensors/..", "m\\u0000.safetensors"}) {
    SCOPED_TRACE(file);
    WriteIndex(absl::StrCat("{\"a\": \"", file, "\"}"));
    ExpectOpenFails(absl::StatusCode::kInvalidArgument, "same directory");
  }
  WriteIndex(absl::StrCat("{\"a\": \"", std::string(300, 'm'), ".safetensors\"}"));
  ExpectOpenFails(absl::StatusCode::kInvalidArgument, "same directory");
}

TEST_F(CheckpointTest, BrokenIndexOrConfigIsRefused) {
  ExpectOpenFails(absl::StatusCode::kNotFound, "neither");
  WriteIndex("[]");
  ExpectOpenFails(absl::StatusCode::kInvalidArgument, "weight_map");
  WriteIndex("{\"a\": 3}");
  ExpectOpenFails(absl::StatusCode::kInvalidArgument, "\"a\"");
  WriteText(dir_ + "/model.safetensors.index.json", "{}");
  ExpectOpenFails(absl::StatusCode::kInvalidArgument, "weight_map");
  WriteText(dir_ + "/model.safetensors.index.json", "{\"weight_map\": ");
  ExpectOpenFails(absl::StatusCode::kInvalidArgument, "index.json");
  WriteText(dir_ + "/model.safetensors", "short");
  ExpectOpenFails(absl::StatusCode::kDataLoss, "too few");
  std::filesystem::remove(dir_ + "/config.json");
  ExpectOpenFails(absl::StatusCode::kNotFound, "config.json");
}

}  // namespace
}  // namespace strait
