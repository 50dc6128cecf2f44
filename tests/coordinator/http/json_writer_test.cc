// SPDX-License-Identifier: Apache-2.0
//
// Defends: what JsonWriter writes is JSON that a parser reads back unchanged, and a float32 is
// printed as the shortest decimal that reads back to the same bits.
#include "coordinator/http/json_writer.h"

#include <bit>
#include <cstdlib>
#include <limits>
#include <random>

#include "gtest/gtest.h"
#include "proto/base/json.h"

namespace strait {
namespace {

std::string FloatText(float value) {
  JsonWriter json;
  json.Float(value);
  return json.Take();
}

TEST(JsonWriterTest, WritesNestedValues) {
  JsonWriter json;
  json.BeginObject().Key("a").BeginArray().Int(1).Int(-2).BeginObject().EndObject().EndArray();
  json.Key("b").Null().Key("c").Bool(true).Key("d").String("x").Key("e").Raw("[0]");
  json.EndObject();
  EXPECT_EQ(json.Take(), R"({"a":[1,-2,{}],"b":null,"c":true,"d":"x","e":[0]})");
}

TEST(JsonWriterTest, StringsReadBackUnchanged) {
  std::string all;
  for (int c = 0; c < 128; ++c) all += static_cast<char>(c);
  all += "é漢😀\u2028";
  JsonWriter json;
  json.String(all);
  const auto value = json::Parse(json.Take(), "test");
  ASSERT_TRUE(value.ok()) << value.status();
  EXPECT_EQ(json::View(value->get_string()), all);
}

TEST(JsonWriterTest, FloatsAreShortest) {
  EXPECT_EQ(FloatText(-0.1f), "-0.1");
  EXPECT_EQ(FloatText(-2.0f), "-2.0");
  EXPECT_EQ(FloatText(0), "0.0");
  EXPECT_EQ(FloatText(-16777216.0f), "-16777216.0");
  EXPECT_EQ(FloatText(-std::numeric_limits<float>::infinity()), "-9999.0");
  EXPECT_EQ(FloatText(std::numeric_limits<float>::quiet_NaN()), "null");
}

TEST(JsonWriterTest, FloatsReadBackToTheSameBits) {
  const unsigned seed = 20240611;
  std::mt19937 random(seed);
  for (int i = 0; i < 200000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (value != value || value - value != 0) continue;  // not finite
    const std::string text = FloatText(value);
    EXPECT_EQ(std::bit_cast<uint32_t>(std::strtof(text.c_str(), nullptr)),
              std::bit_cast<uint32_t>(value))
        << text << ", seed " << seed;
    const auto parsed = json::Parse(text, "test");
    ASSERT_TRUE(parsed.ok() && parsed->is_double()) << text;
  }
}

}  // namespace
}  // namespace strait
