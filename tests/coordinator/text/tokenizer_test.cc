// SPDX-License-Identifier: Apache-2.0
//
// Defends: text becomes the same ids, and ids the same text, as in Hugging Face's tokenizers; a
// file that we cannot run as they would is refused with an error that names the entry.
#include "coordinator/text/tokenizer.h"

#include <thread>

#include "absl/strings/str_cat.h"
#include "coordinator/text/detokenizer.h"
#include "gmock/gmock.h"
#include "golden.h"

namespace strait {
namespace {

using ::strait::testing::GoldenConfig;
using ::strait::testing::GoldenJson;
using ::strait::testing::GoldenPath;
using ::strait::testing::GoldenTokenizer;
using ::strait::testing::Str;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Expand(const json::Value& text) {
  if (text.is_string()) return Str(text);
  std::string out;
  for (int64_t i = 0; i < text.as_array()[1].as_int64(); ++i) out += Str(text.as_array()[0]);
  return out;
}

std::vector<uint32_t> ExpectedIds(const json::Object& test) {
  std::vector<uint32_t> ids;
  if (const json::Value* plain = json::Find(test, "ids")) {
    for (const json::Value& id : plain->as_array())
      ids.push_back(static_cast<uint32_t>(id.as_int64()));
    return ids;
  }
  const json::Array& runs = test.at("runs").as_array();
  for (size_t i = 0; i < runs.size(); i += 2) {
    ids.insert(ids.end(), static_cast<size_t>(runs[i + 1].as_int64()),
               static_cast<uint32_t>(runs[i].as_int64()));
  }
  return ids;
}

// `model` is merged one level deep, every other member is replaced, as in make_tokenizer.py.
json::Value Patched(json::Value file, const json::Object& patch) {
  for (const auto& [key, value] : patch) {
    if (key != "model") {
      file.as_object()[key] = value;
      continue;
    }
    for (const auto& [name, member] : value.as_object())
      file.as_object()["model"].as_object()[name] = member;
  }
  return file;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(const json::Value& file) {
  return Tokenizer::Parse(boost::json::serialize(file), "tokenizer.json");
}

TEST(TokenizerTest, IdsAndTextsOfHuggingFaceOnEveryVariant) {
  const json::Value file = GoldenJson("tokenizer.json");
  const json::Value groups = GoldenJson("hard_strings.json");
  const json::Array& strings = groups.as_array()[0].as_object().at("cases").as_array();
  size_t checked = 0;
  for (const json::Value& group : groups.as_array()) {
    const std::string name = Str(group.at("name"));
    const auto tokenizer = Parse(Patched(file, group.at("patch").as_object()));
    ASSERT_TRUE(tokenizer.ok()) << name << ": " << tokenizer.status();
    for (const json::Value& value : group.at("cases").as_array()) {
      const json::Object& test = value.as_object();
      const json::Value& place = test.at("text");
      const std::string text = Expand(
          place.is_int64() ? strings[static_cast<size_t>(place.as_int64())].at("text") : place);
      SCOPED_TRACE(
          absl::StrCat(name, ": ", boost::json::serialize(json::Value(text.substr(0, 100)))));
      const std::vector<uint32_t> expected = ExpectedIds(test);
      const auto ids = (*tokenizer)->Encode(text, true);
      ASSERT_TRUE(ids.ok()) << ids.status();
      ASSERT_EQ(*ids, expected);

      const json::Value* other = json::Find(test, "decoded");
      const std::string decoded = other != nullptr ? Str(*other) : text;
      ASSERT_EQ((*tokenizer)->Decode(*ids, false).value(), decoded);
      const json::Value* plain = test.if_contains("plain");
      ASSERT_EQ((*tokenizer)->Decode(*ids, true).value(), plain != nullptr ? Str(*plain) : decoded);

      Detokenizer detokenizer(**tokenizer, /*skip_special_tokens=*/false);
      std::string streamed = detokenizer.Push(*ids);
      streamed += detokenizer.Flush();
      ASSERT_EQ(streamed, decoded);
      ++checked;
    }
  }
  EXPECT_GT(checked, 3000u);
}

TEST(TokenizerTest, VocabularyLookups) {
  const auto tokenizer = GoldenTokenizer();
  EXPECT_EQ(tokenizer->vocab_size(), 640u);
  for (uint32_t id = 0; id < 640; ++id) {
    ASSERT_TRUE(tokenizer->IdToToken(id).has_value()) << id;
    EXPECT_EQ(tokenizer->TokenToId(*tokenizer->IdToToken(id)), id);
    EXPECT_FALSE(tokenizer->TokenBytes(id).empty()) << id;
  }
  EXPECT_EQ(tokenizer->IdToToken(640), std::nullopt);
  EXPECT_EQ(tokenizer->TokenBytes(640), "");
  EXPECT_FALSE(tokenizer->IsSpecial(640));
  EXPECT_EQ(tokenizer->TokenToId("no such token"), std::nullopt);
  EXPECT_TRUE(tokenizer->IsSpecial(0));
  EXPECT_EQ(tokenizer->IdToToken(0), "<｜begin▁of▁sentence｜>");
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->TokenToId("Ġthe")), " the");
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->TokenToId("Ã")), "\xC3");
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->TokenToId("<｜User｜>")), "<｜User｜>");
  EXPECT_FALSE(tokenizer->IsSpecial(*tokenizer->TokenToId("<｜User｜>")));
}

TEST(TokenizerTest, ConfigDecidesWhatStandsAroundAText) {
  TokenizerConfig config = GoldenConfig();
  const std::string path = GoldenPath("tokenizer.json");
  const auto plain = *(*Tokenizer::Load(path))->Encode("hello", true);
  ASSERT_FALSE(plain.empty());

  const auto with_bos = Tokenizer::Load(path, &config);
  ASSERT_TRUE(with_bos.ok()) << with_bos.status();
  EXPECT_EQ((*with_bos)->bos_id(), 0u);
  EXPECT_EQ((*with_bos)->eos_id(), 1u);
  std::vector<uint32_t> expected = plain;
  expected.insert(expected.begin(), 0);
  EXPECT_EQ((*with_bos)->Encode("hello", true).value(), expected);
  EXPECT_EQ((*with_bos)->Encode("hello", false).value(), plain);
  EXPECT_THAT((*with_bos)->Encode("", true).value(), ElementsAre(0));
  EXPECT_THAT((*with_bos)->Encode("", false).value(), ElementsAre());

  config.add_eos_token = true;
  expected.push_back(1);
  EXPECT_EQ((*Tokenizer::Load(path, &config))->Encode("hello", true).value(), expected);

  config.bos_token = "<nowhere>";
  EXPECT_THAT(Tokenizer::Load(path, &config).status().ToString(),
              ::testing::AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("<nowhere>"),
                               HasSubstr("add_bos_token")));
}

TEST(TokenizerTest, TextThatIsNotUtf8IsRefusedWithItsPlace) {
  const auto tokenizer = GoldenTokenizer();
  for (const auto& [text, place] :
       std::vector<std::pair<std::string, size_t>>{{"abc\xFF", 3},
                                                   {"\x80", 0},
                                                   {"é\xC3", 2},
                                                   {"aaaaaaaaaaaa\xED\xA0\x80", 12},
                                                   {"x\xC0\x80", 1},
                                                   {"\xF5\x80\x80\x80", 0},
                                                   {"中\xE4\xB8", 3}}) {
    const auto ids = tokenizer->Encode(text, false);
    EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(ids.status().ToString(), HasSubstr(absl::StrCat("at byte ", place)));
  }
}

TEST(TokenizerTest, IdsOutsideTheVocabularyAreRefused) {
  const auto tokenizer = GoldenTokenizer();
  const std::vector<uint32_t> ids{5, 6, 640};
  EXPECT_THAT(
      tokenizer->Decode(ids, true).status().ToString(),
      ::testing::AllOf(HasSubstr("token id 640"), HasSubstr("index 2"), HasSubstr("640 tokens")));
  const std::vector<uint32_t> huge{0xFFFFFFFFu};
  EXPECT_EQ(tokenizer->Decode(huge, false).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TokenizerTest, OneTokenizerServesManyThreads) {
  const auto tokenizer = GoldenTokenizer();
  const std::string text = "Threads share one tokenizer; 123 中文 \U0001F600 <｜User｜> strait\n\n";
  const std::vector<uint32_t> expected = *tokenizer->Encode(text, false);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) wrong[t] += *tokenizer->Encode(text, false) != expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(0));
}

TEST(TokenizerTest, AVeryLongWordIsNoTrap) {
  // A quadratic merge would take minutes here, and the suite's time limit would end it.
  const auto tokenizer = GoldenTokenizer();
  for (const std::string piece : {"a", "ab", " ", "中", "\n", "!", "e\xCC\x81", "9"}) {
    std::string text;
    while (text.size() < 400'000) text += piece;
    const auto ids = tokenizer->Encode(text, false);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(tokenizer->Decode(*ids, false).value(), text);
  }
}

TEST(TokenizerTest, SpacesThatEndNoLineAreNoTrap) {
  // DeepSeek-V2's "\s+$" is tried from every space of a run that something else follows.
  json::Value file = GoldenJson("tokenizer.json");
  const json::Value groups = GoldenJson("hard_strings.json");
  for (const json::Value& group : groups.as_array()) {
    if (group.at("name") == "v2") file = Patched(file, group.at("patch").as_object());
  }
  const auto tokenizer = Parse(file);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::string text = std::string(400'000, ' ') + "\U0001F600";
  EXPECT_EQ((*tokenizer)->Decode((*tokenizer)->Encode(text, false).value(), false).value(), text);
}

TEST(TokenizerTest, AMissingFileIsNotFound) {
  const auto tokenizer = Tokenizer::Load("/nowhere/tokenizer.json");
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(tokenizer.status().ToString(), HasSubstr("/nowhere/tokenizer.json"));
}

TEST(TokenizerTest, ATruncatedFileIsRefusedWhereverItEnds) {
  const std::string whole = boost::json::serialize(GoldenJson("tokenizer.json"));
  for (size_t size = 0; size < whole.size(); size += 97) {
    const auto tokenizer = Tokenizer::Parse(whole.substr(0, size), "tokenizer.json");
    ASSERT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << size;
    ASSERT_THAT(tokenizer.status().ToString(), HasSubstr("tokenizer.json"));
  }
}

// One change to the good file, and what the error must say.
struct Broken {
  std::string patch;
  absl::StatusCode code;
  std::string part;
};

TEST(TokenizerTest, BrokenFilesAreRefusedByName) {
  using Code = absl::StatusCode;
  const std::string split = R"({"type":"Split","pattern":{"Regex":"%"},"behavior":"Isolated"})";
  const auto pre = [](const std::string& steps) {
    return R"({"pre_tokenizer":{"type":"Sequence","pretokenizers":[)" + steps +
           R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]}})";
  };
  const auto regex = [&](const std::string& pattern) {
    std::string step = split;
    return pre(step.replace(step.find('%'), 1, pattern) + ",");
  };
  const std::vector<Broken> cases = {
      {R"({"model":null})", Code::kInvalidArgument, "\"model\" must be an object, not null"},
      {R"({"model":{"type":"Unigram"}})", Code::kUnimplemented, "Unigram"},
      {R"({"model":{"type":5}})", Code::kInvalidArgument, "\"type\" must be a string"},
      {R"({"model":{"vocab":null}})", Code::kInvalidArgument, "vocab"},
      {R"({"model":{"vocab":[1]}})", Code::kInvalidArgument, "vocab"},
      {R"({"model":{"vocab":{"a":1,"b":1},"merges":[]}})", Code::kInvalidArgument,
       "id 1 is given to both"},
      {R"({"model":{"vocab":{"a":-1},"merges":[]}})", Code::kResourceExhausted, "id -1"},
      {R"({"model":{"vocab":{"a":4000000000},"merges":[]}})", Code::kResourceExhausted,
       "4000000000"},
      {R"({"model":{"vocab":{"a":1.5},"merges":[]}})", Code::kInvalidArgument,
       "\"a\" must be an integer"},
      {R"({"model":{"vocab":{"a":99999999999999999999},"merges":[]}})", Code::kInvalidArgument,
       "integer"},
      {R"({"model":{"vocab":{"":1},"merges":[]}})", Code::kInvalidArgument, "0 bytes"},
      {R"({"model":{"merges":["a"]}})", Code::kInvalidArgument, "merges[0]"},
      {R"({"model":{"merges":["a b c"]}})", Code::kInvalidArgument, "merges[0]"},
      {R"({"model":{"merges":[["a"]]}})", Code::kInvalidArgument, "merges[0]"},
      {R"({"model":{"merges":[["a",5]]}})", Code::kInvalidArgument, "merges[0]"},
      {R"({"model":{"merges":[7]}})", Code::kInvalidArgument, "merges[0]"},
      {R"({"model":{"merges":["Ġ Ġ","qqq t"]}})", Code::kInvalidArgument,
       "merges[1]: token \"qqq\""},
      {R"({"model":{"merges":["q x"]}})", Code::kInvalidArgument, "\"qx\" is not in the vocab"},
      {R"({"model":{"merges":null}})", Code::kInvalidArgument, "merges"},
      {R"({"model":{"dropout":0.1}})", Code::kUnimplemented, "dropout"},
      {R"({"model":{"unk_token":"<unk>"}})", Code::kUnimplemented, "unk_token"},
      {R"({"model":{"byte_fallback":true}})", Code::kUnimplemented, "byte_fallback"},
      {R"({"model":{"continuing_subword_prefix":"##"}})", Code::kUnimplemented,
       "continuing_subword_prefix"},
      {R"({"model":{"ignore_merges":"yes"}})", Code::kInvalidArgument, "ignore_merges"},
      {R"({"normalizer":{"type":"NFC"}})", Code::kUnimplemented, "NFC"},
      {R"({"normalizer":{"type":"Sequence","normalizers":[{"type":"Lowercase"}]}})",
       Code::kUnimplemented, "Lowercase"},
      {R"({"pre_tokenizer":null})", Code::kUnimplemented, "ByteLevel"},
      {R"({"pre_tokenizer":{"type":"Metaspace"}})", Code::kUnimplemented, "Metaspace"},
      {pre(R"({"type":"Whitespace"},)"), Code::kUnimplemented, "Whitespace"},
      {pre(R"(5,)"), Code::kInvalidArgument, "pre_tokenizer[0]"},
      {pre(R"({"type":"Split","pattern":{"Regex":"a"},"behavior":"Sideways"},)"),
       Code::kInvalidArgument, "Sideways"},
      {pre(R"({"type":"Split","pattern":{},"behavior":"Isolated"},)"), Code::kNotFound, "String"},
      {pre(R"({"type":"ByteLevel","use_regex":false,"add_prefix_space":false},)"),
       Code::kUnimplemented, "after ByteLevel"},
      {regex("(a"), Code::kInvalidArgument, "does not compile"},
      {regex("[a"), Code::kInvalidArgument, "does not compile"},
      {regex("a\\\\hb"), Code::kUnimplemented, "\\h"},
      {regex("\\\\Ka"), Code::kUnimplemented, "\\K"},
      {regex("[a&&b]"), Code::kUnimplemented, "intersection"},
      {regex("[[:alpha:]]"), Code::kUnimplemented, "class inside"},
      {regex("(?<name>a)"), Code::kUnimplemented, "group"},
      {regex("(*VERB)"), Code::kUnimplemented, "group"},
      {regex("\\\\p{Han}"), Code::kUnimplemented, "property"},
      {regex("\\\\b"), Code::kUnimplemented, "escape"},
      {R"({"decoder":null})", Code::kUnimplemented, "decoder"},
      {R"({"decoder":{"type":"Metaspace"}})", Code::kUnimplemented, "Metaspace"},
      {R"({"post_processor":{"type":"BertProcessing"}})", Code::kUnimplemented, "BertProcessing"},
      {R"({"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"x"}}],"special_tokens":{}}})",
       Code::kNotFound, "\"x\" is missing"},
      {R"({"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"x"}}],"special_tokens":{"x":{"ids":[640]}}}})",
       Code::kInvalidArgument, "outside the vocabulary"},
      {R"({"post_processor":{"type":"TemplateProcessing","single":[],"special_tokens":{}}})",
       Code::kInvalidArgument, "no place for the text"},
      {R"({"added_tokens":5})", Code::kInvalidArgument, "added_tokens"},
      {R"({"added_tokens":[5]})", Code::kInvalidArgument, "added_tokens[0]"},
      {R"({"added_tokens":[{"id":5}]})", Code::kNotFound, "content"},
      {R"({"added_tokens":[{"id":"5","content":"x"}]})", Code::kInvalidArgument,
       "\"id\" must be an integer"},
      {R"({"added_tokens":[{"id":9,"content":"new"}]})", Code::kInvalidArgument,
       "id 9 is given to both"},
      {R"({"added_tokens":[{"id":9999999,"content":"new"}]})", Code::kResourceExhausted, "9999999"},
      {R"({"added_tokens":[{"id":700,"content":"a"}]})", Code::kInvalidArgument, "has id 700 here"},
      {R"({"added_tokens":[{"id":700,"content":"new","lstrip":1}]})", Code::kInvalidArgument,
       "lstrip"},
  };
  const json::Value file = GoldenJson("tokenizer.json");
  for (const Broken& broken : cases) {
    const auto patch = json::Parse(broken.patch, "patch");
    ASSERT_TRUE(patch.ok()) << patch.status() << broken.patch;
    json::Value changed = file;
    const json::Value* model = patch->as_object().if_contains("model");
    if (model != nullptr && !model->is_object()) {
      changed.as_object()["model"] = *model;
    } else {
      changed = Patched(file, patch->as_object());
    }
    const absl::Status status = Parse(changed).status();
    EXPECT_EQ(status.code(), broken.code) << broken.patch << ": " << status;
    EXPECT_THAT(status.ToString(), HasSubstr(broken.part)) << broken.patch;
    EXPECT_THAT(status.ToString(), HasSubstr("tokenizer.json")) << broken.patch;
  }
}

TEST(TokenizerTest, AbsurdSizesAreRefused) {
  const json::Value file = GoldenJson("tokenizer.json");
  const std::string long_token(kMaxTokenBytes + 1, 'x');
  json::Object vocab;
  vocab[long_token] = 1;
  EXPECT_THAT(Parse(Patched(file, {{"model", json::Object{{"vocab", vocab}}}})).status().ToString(),
              HasSubstr(absl::StrCat(kMaxTokenBytes + 1, " bytes")));

  json::Array many;
  for (size_t i = 0; i <= kMaxAddedTokens; ++i) {
    many.push_back(json::Object{{"id", 1000 + i}, {"content", "t" + std::to_string(i)}});
  }
  EXPECT_EQ(Parse(Patched(file, {{"added_tokens", many}})).status().code(),
            absl::StatusCode::kResourceExhausted);

  const std::string deep = std::string(5000, '[') + std::string(5000, ']');
  EXPECT_EQ(Tokenizer::Parse(deep, "tokenizer.json").status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(TokenizerConfigTest, ReadsTokensFlagsAndTemplates) {
  const TokenizerConfig config = GoldenConfig();
  EXPECT_EQ(config.bos_token, "<｜begin▁of▁sentence｜>");  // an object in the file
  EXPECT_EQ(config.pad_token, "<｜end▁of▁sentence｜>");    // a string
  EXPECT_EQ(config.unk_token, "");                         // null
  EXPECT_EQ(config.add_bos_token, true);
  ASSERT_EQ(config.chat_templates.size(), 1u);
  EXPECT_EQ(config.chat_templates[0].name, "default");
}

}  // namespace
}  // namespace strait
