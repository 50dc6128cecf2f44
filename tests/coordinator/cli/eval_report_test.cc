// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a server answers is used only when it is what was asked for; the figures and
// comparisons follow from it.
#include "coordinator/cli/eval_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "coordinator/cli/eval_server.h"
#include "coordinator/cli/status_json.h"

namespace strait::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

json::Value Parsed(std::string_view text) { return *json::Parse(text, "test"); }

// ---------------------------------------------------------------- a server's answers

absl::StatusOr<PromptScore> Read(const std::string& logprobs, size_t num_tokens, bool want_top) {
  const json::Value reply =
      Parsed("{\"choices\": [{\"index\": 0, \"logprobs\": " + logprobs + "}]}");
  return ReadPromptScore(reply.get_object(), num_tokens, want_top);
}

TEST(ReadPromptScoreTest, TakesAllButTheFirst) {
  const auto score = Read(R"({"token_logprobs": [null, -0.5, 0, -2],
      "top_logprobs": [null, {"a": -0.5}, {"b": 0, "c": 0}, {"d": -1, "e": -2}]})",
                          4, true);
  ASSERT_TRUE(score.ok()) << score.status();
  EXPECT_THAT(score->logprobs, ElementsAre(-0.5f, 0.0f, -2.0f));
  EXPECT_THAT(score->is_top, ElementsAre(1, 1, 0));
  EXPECT_TRUE(Read(R"({"token_logprobs": [null, -1]})", 2, false)->is_top.empty());
}

TEST(ReadPromptScoreTest, WhatIsNotAskedForIsAnError) {
  for (const char* bad : {
           R"({"token_logprobs": [null, -1]})",                     // too few
           R"({"token_logprobs": [null, -1, null]})",               // a hole
           R"({"token_logprobs": [null, -1, 0.5]})",                // more than certain
           R"({"token_logprobs": [null, -1, -9999.0]})",            // impossible
           R"({"token_logprobs": [null, -1, "x"]})",                // no number
           R"({"token_logprobs": 3})", R"({"tokens": []})", "null"  // no list at all
       }) {
    EXPECT_FALSE(Read(bad, 3, false).ok()) << bad;
  }
  EXPECT_FALSE(Read(R"({"token_logprobs": [null, -1]})", 2, true).ok());
  EXPECT_FALSE(Read(R"({"token_logprobs": [null, -1], "top_logprobs": [null, {}]})", 2, true).ok());
  const json::Value none = Parsed(R"({"choices": []})");
  EXPECT_FALSE(ReadPromptScore(none.get_object(), 2, false).ok());
}

TEST(PieceEndTest, CutsAfterLinesElseBetweenCharacters) {
  EXPECT_EQ(PieceEnd("short", 0, 10), 5u);
  EXPECT_EQ(PieceEnd("ab\ncd\nefgh", 0, 8), 6u);
  EXPECT_EQ(PieceEnd("ab\ncdefghi", 3, 4), 7u);
  EXPECT_EQ(PieceEnd("abc\xE2\x96\x81zz", 0, 5), 3u);
}

TEST(CacheBytesTest, StagesOfAnActivePipelineTell) {
  const json::Value status = Parsed(R"({"pipelines": [{"state": "loading", "stages": []},
      {"state": "active", "stages": [{"stage_id": 4}, {"stage_id": 3}]}], "workers": [{"stages": [
        {"stage_id": 3, "layer_begin": 2, "layer_end": 3, "block_bytes": 6400},
        {"stage_id": 4, "layer_begin": 0, "layer_end": 2, "block_bytes": 64000}]}]})");
  EXPECT_THAT(CacheBytesPerTokenByLayer(status.get_object()), ElementsAre(1000, 1000, 100));
}

TEST(CacheBytesTest, WhatIsNotToldIsEmpty) {
  for (
      const char* text :
      {"{}", R"({"pipelines": []})", R"({"pipelines": [{"state": "active", "stages": []}]})",
       R"({"pipelines": [{"state": "active", "stages": [{"stage_id": 1}]}]})",
       R"({"pipelines": [{"state": "active", "stages": [{"stage_id": 1}]}], "workers": [
                {"stages": [{"stage_id": 1, "layer_begin": 0, "layer_end": 2}]}]})",
       R"({"pipelines": [{"state": "active", "stages": [{"stage_id": 1}]}], "workers": [{"stages": [
                {"stage_id": 1, "layer_begin": 1, "layer_end": 2, "block_bytes": 64}]}]})"}) {
    EXPECT_TRUE(CacheBytesPerTokenByLayer(Parsed(text).get_object()).empty()) << text;
  }
}

// ---------------------------------------------------------------- figures

TargetResult Target(const std::string& name, std::vector<double> losses, uint32_t first_id) {
  TargetResult target;
  target.name = name;
  target.window = 5;
  target.buckets = {{0, 2}, {2, 5}};
  for (const double loss : losses) {
    WindowResult window;
    window.ids = {first_id, 2, 3, 4, 5};
    window.num_scored = 4;
    window.loss = loss;
    window.bucket_loss = {loss + 3, loss - 1};
    window.num_bytes = 8;
    target.windows.push_back(window);
  }
  RecallResult recall;
  recall.distance = 16;
  recall.contexts = {{{first_id, 7, 8}, {{1, 1}, {2, 1}}}};
  recall.right = {1, 0};
  target.recall = {recall};
  return target;
}

double Value(const json::Object& object, const char* key) {
  return object.at(key).at("value").to_number<double>();
}

TEST(TargetJsonTest, FiguresFollowFromTheWindows) {
  const json::Object json = TargetJson(Target("a", {1, 3}, 1));
  const json::Object& text = json.at("text").as_object();
  EXPECT_DOUBLE_EQ(Value(text, "nll"), 2);
  EXPECT_DOUBLE_EQ(Value(text, "perplexity"), std::exp(2.0));
  EXPECT_DOUBLE_EQ(Value(text, "bits_per_byte"), 2 * 8 / std::log(2.0) / 16);
  EXPECT_DOUBLE_EQ(Value(text, "last_minus_first"), -4);
  EXPECT_EQ(text.at("tokens").to_number<int>(), 8);
  EXPECT_EQ(json.at("recall").at(0).at("right").to_number<int>(), 1);
  EXPECT_TRUE(json.at("cache").is_null());
}

TEST(TargetJsonTest, OneWindowHasNoInterval) {
  const json::Object json = TargetJson(Target("a", {1}, 1));
  EXPECT_TRUE(json.at("text").at("nll").at("low").is_null());
  EXPECT_THAT(ReportTables(ReportJson({}, {}, {Target("a", {1}, 1)})), HasSubstr("2.718"));
}

TEST(ComparisonTest, EqualTokensArePairedByWindowAndQuestion) {
  TargetResult second = Target("b", {1.5, 3.5}, 1);
  second.recall[0].right = {1, 1};
  const json::Object json = ComparisonJson(Target("a", {1, 3}, 1), second);
  EXPECT_TRUE(json.at("same_tokens").as_bool());
  EXPECT_DOUBLE_EQ(Value(json, "nll"), 0.5);
  EXPECT_NEAR(json.at("nll").at("high").to_number<double>(), 0.5, 1e-12);  // equal everywhere
  EXPECT_DOUBLE_EQ(json.at("buckets").at(1).at("nll").at("value").to_number<double>(), 0.5);
  EXPECT_DOUBLE_EQ(json.at("recall").at(0).at("accuracy").at("value").to_number<double>(), 0.5);
  EXPECT_FALSE(json.contains("note"));
}

TEST(ComparisonTest, UnequalTokensCompareBitsPerByteAloneAndSaySo) {
  const TargetResult a = Target("a", {1, 3}, 1), b = Target("b", {2, 4}, 77);
  const json::Object json = ComparisonJson(a, b);
  EXPECT_FALSE(json.at("same_tokens").as_bool());
  EXPECT_FALSE(json.contains("nll"));
  EXPECT_FALSE(json.contains("recall"));
  EXPECT_DOUBLE_EQ(Value(json, "bits_per_byte"), 4 / std::log(2.0) / 8);
  const std::string tables = ReportTables(ReportJson({}, {}, {a, b}));
  EXPECT_THAT(tables, HasSubstr("tokenize the text differently"));
  EXPECT_THAT(tables, HasSubstr("bits per byte"));
}

}  // namespace
}  // namespace strait::cli
