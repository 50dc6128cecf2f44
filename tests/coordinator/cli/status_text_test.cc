// SPDX-License-Identifier: Apache-2.0
//
// Defends: what `strait status` shows of sequences is what `strait migrate` takes, moves under way
// have their line, and a server that tells nothing of them is shown without.
#include "coordinator/cli/status_text.h"

#include <gtest/gtest.h>

#include <string>

namespace strait::cli {
namespace {

std::string Describe(const char* text) {
  return DescribeStatus(json::Parse(text, "status").value().as_object());
}

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(StatusTextTest, SequencesHaveTheNamesThatMigrateTakes) {
  const std::string text = Describe(R"({"running": 3, "waiting": 0, "sequences": [
      {"id": 4, "request": "cmpl-one", "choice": 0, "pipeline_id": 1, "state": "decoding",
       "prompt_tokens": 5, "generated_tokens": 6, "rows": 10},
      {"id": 5, "request": "cmpl-two", "choice": 0}, {"id": 6, "request": "cmpl-two", "choice": 1},
      {"id": 7, "request": "cmpl-three", "choice": 2}]})");
  EXPECT_TRUE(Has(text, "4  cmpl-one  ")) << text;
  EXPECT_TRUE(Has(text, "5  cmpl-two/0")) << text;
  EXPECT_TRUE(Has(text, "6  cmpl-two/1")) << text;
  EXPECT_TRUE(Has(text, "7  cmpl-three/2")) << text;
  EXPECT_FALSE(Has(text, "move of")) << text;
}

TEST(StatusTextTest, MovesUnderWayAreShown) {
  const std::string text = Describe(R"({"migrations": [
      {"sequence": 12, "from": 1, "to": 2, "phase": "last rows", "rows": 640, "rows_total": 700,
       "moved_bytes": 1572864, "rounds": 3, "total_ms": 1234.5}]})");
  EXPECT_TRUE(Has(text, "move of  from  to  phase")) << text;
  EXPECT_TRUE(Has(text, "last rows")) << text;
  EXPECT_TRUE(Has(text, "640 / 700  1.50 MiB       3     1.23")) << text;
}

TEST(StatusTextTest, AServerThatTellsNothingIsShownWithout) {
  const std::string text = Describe(R"({"sequences": [{"id": 4}], "migrations": 3})");
  EXPECT_TRUE(Has(text, "No workers have joined.")) << text;
  EXPECT_TRUE(Has(text, "No pipeline is formed.")) << text;
  EXPECT_FALSE(Has(text, "move of")) << text;
}

}  // namespace
}  // namespace strait::cli
