// SPDX-License-Identifier: Apache-2.0
//
// Defends: JSON that is wrong is refused with the place, the key and the wanted type; bounds hold.
#include "proto/base/json.h"

#include <cstdio>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace strait {
namespace {

using ::testing::HasSubstr;
using Code = absl::StatusCode;

json::Object Sample() {
  return json::
      Parse(R"({"s":"x","i":5,"w":64.0,"d":1.5,"b":true,"n":null,"o":{"k":1},"a":[1],"u":18446744073709551615})",
            "t")
          ->as_object();
}

TEST(JsonTest, ErrorsSayWhereTheTextIsWrong) {
  const auto status = [](std::string_view text) {
    return json::Parse(text, "request body").status();
  };
  EXPECT_THAT(status("{\"a\": tru}").ToString(),
              HasSubstr("request body: not valid JSON at byte 6"));
  EXPECT_THAT(status("{\"a\": 1").ToString(), HasSubstr("cut off after 7 bytes"));
  EXPECT_THAT(status("").ToString(), HasSubstr("cut off after 0 bytes"));
  EXPECT_THAT(status("{} x").ToString(), HasSubstr("byte"));
  EXPECT_EQ(status("{\"a\": \"\xFF\"}").code(), Code::kInvalidArgument);
  EXPECT_EQ(status(R"("\ud800")").code(), Code::kInvalidArgument);
  EXPECT_TRUE(status(" {} \n").ok());
}

TEST(JsonTest, NestingIsBounded) {
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_TRUE(json::Parse(nested(json::kMaxJsonDepth), "t").ok());
  EXPECT_EQ(json::Parse(nested(json::kMaxJsonDepth + 1), "t").status().code(),
            Code::kResourceExhausted);
  EXPECT_EQ(json::Parse(nested(100'000), "t").status().code(), Code::kResourceExhausted);
}

TEST(JsonTest, GettersReturnValuesAndNameWhatIsWrong) {
  const json::Object o = Sample();
  EXPECT_EQ(*json::GetString(o, "s", "t"), "x");
  EXPECT_EQ(*json::GetInt(o, "i", "t"), 5);
  EXPECT_EQ(*json::GetInt(o, "w", "t"), 64);
  EXPECT_EQ(*json::GetDouble(o, "d", "t"), 1.5);
  EXPECT_EQ(*json::GetDouble(o, "i", "t"), 5.0);
  EXPECT_EQ(*json::GetBool(o, "b", "t"), true);
  EXPECT_EQ((*json::GetObject(o, "o", "t"))->size(), 1u);
  EXPECT_EQ((*json::GetArray(o, "a", "t"))->size(), 1u);
  EXPECT_EQ(json::GetInt(o, "zz", "config.json").status().ToString(),
            "NOT_FOUND: config.json: \"zz\" is missing");
  EXPECT_EQ(json::GetInt(o, "d", "config.json").status().ToString(),
            "INVALID_ARGUMENT: config.json: \"d\" must be an integer, not a number");
  EXPECT_EQ(json::GetInt(o, "u", "t").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(json::GetString(o, "n", "t").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(json::GetBool(o, "i", "t").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(json::GetObject(o, "a", "t").status().code(), Code::kInvalidArgument);
}

TEST(JsonTest, DefaultsStandForAbsentAndNullOnly) {
  const json::Object o = Sample();
  EXPECT_EQ(*json::GetIntOr(o, "zz", 9, "t"), 9);
  EXPECT_EQ(*json::GetIntOr(o, "n", 9, "t"), 9);
  EXPECT_EQ(*json::GetIntOr(o, "i", 9, "t"), 5);
  EXPECT_FALSE(json::GetIntOr(o, "s", 9, "t").ok());
  EXPECT_EQ(*json::GetStringOr(o, "n", "f", "t"), "f");
  EXPECT_EQ(*json::GetBoolOr(o, "zz", true, "t"), true);
  EXPECT_EQ(*json::GetDoubleOr(o, "n", 2.5, "t"), 2.5);
  EXPECT_EQ(json::Find(o, "n"), nullptr);
  EXPECT_NE(json::Find(o, "i"), nullptr);
}

TEST(JsonTest, IntegersKeepTheirBounds) {
  const json::Object o = Sample();
  EXPECT_EQ(*json::GetIntIn(o, "i", 5, 5, "t"), 5);
  EXPECT_THAT(json::GetIntIn(o, "i", 6, 8, "t").status().ToString(),
              HasSubstr("\"i\" is 5, outside 6 to 8"));
}

TEST(JsonTest, FilesAreBounded) {
  const std::string path = ::testing::TempDir() + "/json_test.json";
  std::ofstream(path) << "[1, 2, 3]";
  EXPECT_EQ(json::ParseFile(path, 9)->as_array().size(), 3u);
  EXPECT_EQ(json::ParseFile(path, 8).status().code(), Code::kResourceExhausted);
  EXPECT_THAT(json::ParseFile(path, 8).status().ToString(), HasSubstr(path));
  std::remove(path.c_str());
  EXPECT_EQ(json::ParseFile(path, 9).status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace strait
