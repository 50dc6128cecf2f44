// SPDX-License-Identifier: Apache-2.0
//
// Defends: a safetensors file either describes its bytes completely and without contradiction, or
// it is refused with a message that names the file and the tensor. No broken file is read out of
// bounds.
#include "worker/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "tests/worker/checkpoint/fixture.h"

namespace strait {
namespace {

using ::strait::testing::FreshDir;
using ::strait::testing::RawSafetensors;
using ::strait::testing::RawTensor;
using ::strait::testing::Safetensors;
using ::strait::testing::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;

class SafetensorsTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> OpenBytes(const std::string& bytes) {
    WriteText(path_, bytes);
    return SafetensorsFile::Open(path_);
  }
  void ExpectRefused(const std::string& bytes, absl::StatusCode code, const std::string& part) {
    const auto file = OpenBytes(bytes);
    ASSERT_FALSE(file.ok()) << "accepted, should say " << part;
    EXPECT_EQ(file.status().code(), code) << file.status();
    EXPECT_THAT(std::string(file.status().message()), AllOf(HasSubstr(path_), HasSubstr(part)));
  }
  const std::string path_ = FreshDir() + "/model.safetensors";
};

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kExhausted = absl::StatusCode::kResourceExhausted;

std::string One(const std::string& entry) { return absl::StrCat("{\"a.weight\":", entry, "}"); }

TEST_F(SafetensorsTest, ReadsWhatWasWritten) {
  const auto file = OpenBytes(Safetensors({{"a", {"F32", {2, 1}, "12345678"}},
                                           {"b", {"U8", {3}, "xyz"}},
                                           {"empty", {"BF16", {0, 4}, ""}},
                                           {"scalar", {"I64", {}, "abcdefgh"}}}));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->tensors().size(), 4u);
  const TensorEntry* a = (*file)->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->dtype, "F32");
  EXPECT_EQ(a->shape, (std::vector<uint64_t>{2, 1}));
  EXPECT_EQ(std::memcmp((*file)->Data(*a), "12345678", 8), 0);
  const TensorEntry* scalar = (*file)->Find("scalar");
  ASSERT_NE(scalar, nullptr);
  EXPECT_EQ(std::memcmp((*file)->Data(*scalar), "abcdefgh", 8), 0);
  EXPECT_EQ((*file)->Find("c"), nullptr);
  EXPECT_EQ((*file)->Find("__metadata__"), nullptr);
}

TEST_F(SafetensorsTest, ReadsEscapedNamesAndKeysInAnyOrder) {
  const auto file = OpenBytes(RawSafetensors(
      R"( {"a\u0041\"" : {"data_offsets":[0,2],"shape":[ 2 ],"dtype":"U8"} } )", "xy"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_NE((*file)->Find("aA\""), nullptr);
}

TEST_F(SafetensorsTest, MissingFileOrDirectory) {
  EXPECT_EQ(SafetensorsFile::Open(path_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(FreshDir()).status().code(), kInvalid);
}

TEST_F(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string whole =
      Safetensors({{"a", {"F32", {3}, "123456789abc"}}, {"b", {"U8", {1}, "x"}}});
  for (size_t size = 0; size < whole.size(); ++size) {
    SCOPED_TRACE(size);
    ExpectRefused(whole.substr(0, size), kDataLoss, "download it again");
  }
  ASSERT_TRUE(OpenBytes(whole).ok());
  ExpectRefused(whole + "z", kDataLoss, "follow the last tensor");
}

TEST_F(SafetensorsTest, HeaderLengthIsBounded) {
  std::string huge(64, '\xff');
  ExpectRefused(huge, kInvalid, "limit");
  std::string over(64, '\0');
  const uint64_t length = limits::kMaxSafetensorsHeaderBytes + 1;
  std::memcpy(over.data(), &length, sizeof(length));
  ExpectRefused(over, kInvalid, "limit");
}

TEST_F(SafetensorsTest, MalformedHeadersAreRefused) {
  const char* const kHeaders[] = {
      "",
      "[]",
      "null",
      "{",
      "{}}",
      "{} {}",
      "{\"a\":1}",
      "{\"a\":\"b\"}",
      "{\"a\":[1]}",
      "{\"a\":null}",
      "{\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
      "{\"a\":{}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}",
      "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1.0],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[[1]],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[true],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":1}}",
      "{\"__metadata__\":{\"a\":1}}",
      "{\"__metadata__\":{\"a\":{}}}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[99999999999999999999,1]}}",
  };
  for (const char* header : kHeaders) {
    SCOPED_TRACE(header);
    ExpectRefused(RawSafetensors(header, "x"), kInvalid, "header");
  }
}

TEST_F(SafetensorsTest, LimitsOfRankAndNames) {
  ExpectRefused(RawSafetensors(
                    One(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})"), "x"),
                kExhausted, "dimensions");
  const std::string name(limits::kMaxTensorNameBytes + 1, 'n');
  ExpectRefused(Safetensors({{name, {"U8", {1}, "x"}}}), kExhausted, "names");
}

TEST_F(SafetensorsTest, ContradictionsNameTheTensor) {
  const std::pair<const char*, const char*> cases[] = {
      // More or fewer bytes than the shape has.
      {R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", "takes 8 bytes"},
      {R"({"dtype":"U8","shape":[2],"data_offsets":[0,4]})", "takes 2 bytes"},
      // Backwards, outside, with a hole before it.
      {R"({"dtype":"U8","shape":[1],"data_offsets":[4,3]})", "data_offsets"},
      {R"({"dtype":"U8","shape":[8],"data_offsets":[0,8]})", "truncated"},
      {R"({"dtype":"U8","shape":[2],"data_offsets":[2,4]})", "unused"},
      {R"({"dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]})",
       "truncated"},
      // Products that wrap around to something small.
      {R"({"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]})", "2^64"},
      {R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", "2^64"},
  };
  for (const auto& [entry, part] : cases) {
    SCOPED_TRACE(entry);
    ExpectRefused(RawSafetensors(One(entry), "1234"), kDataLoss, part);
    ExpectRefused(RawSafetensors(One(entry), "1234"), kDataLoss, "a.weight");
  }
  ExpectRefused(RawSafetensors(One(R"({"dtype":"Q4","shape":[4],"data_offsets":[0,4]})"), "1234"),
                kInvalid, "Q4");
}

TEST_F(SafetensorsTest, OverlapsAndDuplicatesAreRefused) {
  ExpectRefused(RawSafetensors(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
                                   "b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                               "1234"),
                kDataLoss, "inside another tensor");
  ExpectRefused(RawSafetensors(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                                   "a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                               "1234"),
                kDataLoss, "twice");
}

// Whatever byte of the header is damaged, the file is refused or read within its bounds.
TEST_F(SafetensorsTest, DamagedHeadersNeverReadOutside) {
  const uint32_t seed = 20240611;
  std::mt19937 random(seed);
  const std::string whole =
      Safetensors({{"a", {"F32", {3}, "123456789abc"}}, {"b", {"U8", {1}, "x"}}});
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = whole;
    for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
      bytes[random() % (bytes.size() - 13)] = static_cast<char>(random());
    }
    const auto file = OpenBytes(bytes);
    if (!file.ok()) continue;
    uint64_t sum = 0;
    for (const auto& [name, entry] : (*file)->tensors()) {
      ASSERT_LE(entry.begin + entry.bytes, bytes.size()) << "seed " << seed << " round " << round;
      for (uint64_t i = 0; i < entry.bytes; ++i) sum += uint64_t((*file)->Data(entry)[i]);
    }
    ASSERT_GT(sum, 0u) << "seed " << seed << " round " << round;
  }
}

}  // namespace
}  // namespace strait
