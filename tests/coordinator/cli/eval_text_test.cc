// SPDX-License-Identifier: Apache-2.0
//
// Defends: text is read whole or refused with the place and the fix; windows hold every document's
// same positions.
#include "coordinator/cli/eval_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "coordinator/cli/eval_windows.h"

namespace strait::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

class ReadTextTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/textXXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ + "/" + name, std::ios::binary) << bytes;
    return folder_ + "/" + name;
  }
  std::string folder_;
};

TEST_F(ReadTextTest, PlainTextIsOneDocument) {
  const auto file = ReadText(Write("a.txt", "one\ntwo\n"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE(file->is_lines);
  EXPECT_THAT(file->documents, ElementsAre("one\ntwo\n"));
  EXPECT_EQ(file->num_bytes, 8u);
}

TEST_F(ReadTextTest, JsonLinesAreDocumentsAndXzIsDecompressed) {
  const std::string lines = "{\"text\": \"eins\"}\n\n{\"id\": 2, \"text\": \"zw\\u00f6lf\"}";
  const std::string path = Write("a.jsonl", lines);
  const auto plain = ReadText(path);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_TRUE(plain->is_lines);
  EXPECT_THAT(plain->documents, ElementsAre("eins", "zw\xC3\xB6lf"));
  EXPECT_EQ(plain->num_bytes, 10u);
  ASSERT_EQ(std::system(("xz -k '" + path + "'").c_str()), 0) << "this test needs xz-utils";
  const auto packed = ReadText(path + ".xz");
  ASSERT_TRUE(packed.ok()) << packed.status();
  EXPECT_TRUE(packed->is_lines);
  EXPECT_EQ(packed->documents, plain->documents);
}

TEST_F(ReadTextTest, XzThatIsNoneOrCutShortIsRefused) {
  const auto none = ReadText(Write("a.jsonl.xz", "{\"text\": \"x\"}\n"));
  EXPECT_EQ(none.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(none.status()), HasSubstr("xz cannot decompress it"));

  const std::string path = Write("b.txt", std::string(100'000, 'x'));
  ASSERT_EQ(std::system(("xz -k '" + path + "'").c_str()), 0) << "this test needs xz-utils";
  std::filesystem::resize_file(path + ".xz", std::filesystem::file_size(path + ".xz") - 20);
  EXPECT_EQ(ReadText(path + ".xz").status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(ReadTextTest, MissingFileAndFolderAreNamed) {
  const auto missing = ReadText(folder_ + "/absent");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(missing.status()), HasSubstr(folder_ + "/absent"));
  EXPECT_THAT(Message(ReadText(folder_).status()), HasSubstr(folder_));
}

TEST_F(ReadTextTest, EmptyTextIsRefused) {
  for (const auto& path :
       {Write("a.txt", ""), Write("a.jsonl", "\n\n"), Write("b.jsonl", "{\"text\": \"\"}\n")}) {
    const auto file = ReadText(path);
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument) << path;
    EXPECT_THAT(Message(file.status()), HasSubstr(path + " is empty")) << path;
  }
}

TEST(ParseTextTest, BadLinesAreNumbered) {
  for (const char* bad : {"{\"text\": ", "[1]", "\"text\"", "{\"words\": \"x\"}", "{\"text\": 3}",
                          "{\"text\": null}"}) {
    const auto file = ParseText("f.jsonl", true, std::string("{\"text\": \"x\"}\n\n") + bad);
    ASSERT_FALSE(file.ok()) << bad;
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(Message(file.status()), HasSubstr("f.jsonl line 3")) << bad;
    EXPECT_THAT(Message(file.status()), HasSubstr("each line must be {\"text\"")) << bad;
  }
}

TEST(ParseTextTest, BytesThatAreNoUtf8AreNamedByOffset) {
  for (const bool is_lines : {false, true}) {
    const auto file = ParseText("f", is_lines, "{\"text\": \"\xE4\"}");
    ASSERT_FALSE(file.ok());
    EXPECT_THAT(Message(file.status()), HasSubstr("f is not UTF-8 at byte 10"));
  }
}

// ---------------------------------------------------------------- windows

TEST(BucketTest, DefaultEdgesAreClippedToTheWindow) {
  const std::vector<uint32_t> edges = {0, 1024, 4096, 8192};
  EXPECT_THAT(*MakeBuckets(edges, true, 8192),
              ElementsAre(Bucket{0, 1024}, Bucket{1024, 4096}, Bucket{4096, 8192}));
  EXPECT_THAT(*MakeBuckets(edges, true, 8191),
              ElementsAre(Bucket{0, 1024}, Bucket{1024, 4096}, Bucket{4096, 8191}));
  EXPECT_THAT(*MakeBuckets(edges, true, 1024), ElementsAre(Bucket{0, 1024}));
}

TEST(BucketTest, GivenEdgesMustRiseWithinTheWindow) {
  const auto message = [](std::vector<uint32_t> edges) {
    return Message(MakeBuckets(edges, false, 100).status());
  };
  EXPECT_THAT(message({0, 101}), HasSubstr("101 is beyond the window of 100"));
  EXPECT_THAT(message({0, 50, 50}), HasSubstr("edges must rise"));
  EXPECT_THAT(message({7}), HasSubstr("at least two"));
  // Position 0 is not scored, so a bucket of it alone is none.
  EXPECT_THAT(*MakeBuckets(std::vector<uint32_t>{0, 1, 100}, false, 100),
              ElementsAre(Bucket{1, 100}));
}

TEST(CutWindowsTest, LinesGiveTheirBeginningAndPlainTextIsCut) {
  TextFile file;
  file.path = "f";
  file.is_lines = true;
  const std::vector<TokenIds> tokens = {{1, 2, 3, 4, 5, 6, 7}, {8, 9}, {10, 11, 12}};
  const TokenIds bos = {99};
  EXPECT_THAT(*CutWindows(file, tokens, bos, 4, 0),
              ElementsAre(TokenIds{99, 1, 2, 3}, TokenIds{99, 10, 11, 12}));
  EXPECT_THAT(*CutWindows(file, tokens, bos, 4, 1), ElementsAre(TokenIds{99, 1, 2, 3}));
  file.is_lines = false;
  const std::vector<TokenIds> one = {{1, 2, 3, 4, 5, 6, 7}};
  EXPECT_THAT(*CutWindows(file, one, bos, 4, 0),
              ElementsAre(TokenIds{99, 1, 2, 3}, TokenIds{99, 4, 5, 6}));
  EXPECT_THAT(*CutWindows(file, one, {}, 7, 0), ElementsAre(TokenIds{1, 2, 3, 4, 5, 6, 7}));
}

TEST(CutWindowsTest, TextShorterThanAWindowNamesTheLongestWindow) {
  TextFile file;
  file.path = "f";
  const auto plain = CutWindows(file, std::vector<TokenIds>{{1, 2, 3}}, {99}, 5, 0);
  EXPECT_EQ(plain.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(plain.status()),
              HasSubstr("f is shorter than a window: it has 4 tokens, a window 5"));
  EXPECT_THAT(Message(plain.status()), HasSubstr("--window 4 or less"));
  file.is_lines = true;
  const auto lines = CutWindows(file, std::vector<TokenIds>{{1}, {1, 2}}, {99}, 5, 0);
  EXPECT_THAT(Message(lines.status()), HasSubstr("the longest has 3 tokens"));
}

TEST(MeanLossTest, LeavesTheFirstPositionOutAndStaysInTheBucket) {
  const std::vector<float> logprobs = {-1, -2, -4, -8};  // of positions 1 to 4
  EXPECT_DOUBLE_EQ(MeanLoss(logprobs, {0, 5}), 15.0 / 4);
  EXPECT_DOUBLE_EQ(MeanLoss(logprobs, {0, 2}), 1);
  EXPECT_DOUBLE_EQ(MeanLoss(logprobs, {2, 4}), 3);
}

TEST(WholeCharacterBytesTest, LeavesOutHalvesAtTheEndsAlone) {
  EXPECT_EQ(WholeCharacterBytes("\xEF\xBF\xBD\xEF\xBF\xBD"
                                "ab\xC3\xB6\xEF\xBF\xBD"),
            4u);
  EXPECT_EQ(WholeCharacterBytes("a\xEF\xBF\xBD"
                                "b"),
            5u);
  EXPECT_EQ(WholeCharacterBytes("\xEF\xBF\xBD"), 0u);
}

}  // namespace
}  // namespace strait::cli
