// SPDX-License-Identifier: Apache-2.0
//
// Defends: a template gives the text that jinja2 gives, set up as transformers does, and fails
// where that fails; what we do not support is refused at load, naming construct and line; no
// template runs for ever.
#include "coordinator/text/chat_template.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "golden.h"

namespace strait {
namespace {

using ::strait::testing::GoldenConfig;
using ::strait::testing::GoldenJson;
using ::strait::testing::Str;
using ::testing::HasSubstr;

ChatInput Input(const json::Object& group, const json::Object& test) {
  const auto find = [&](std::string_view key) {
    const json::Value* value = json::Find(test, key);
    return value != nullptr ? value : json::Find(group, key);
  };
  ChatInput input;
  if (const json::Value* messages = find("messages")) input.messages = messages->as_array();
  if (const json::Value* tools = find("tools")) input.tools = *tools;
  if (const json::Value* variables = find("variables")) input.variables = variables->as_object();
  if (const json::Value* prompt = find("add_generation_prompt"))
    input.add_generation_prompt = prompt->as_bool();
  return input;
}

TEST(ChatTemplateTest, TextsAndErrorsOfJinja) {
  const TokenizerConfig config = GoldenConfig();
  const json::Value groups = GoldenJson("chat_cases.json");
  size_t texts = 0;
  size_t errors = 0;
  for (const json::Value& group : groups.as_array()) {
    if (group.at("name") == "refused") continue;
    for (const json::Value& value : group.at("cases").as_array()) {
      const json::Object& test = value.as_object();
      const json::Value* source = json::Find(test, "template");
      if (source == nullptr) source = json::Find(group.as_object(), "template");
      SCOPED_TRACE(source != nullptr ? Str(*source) : boost::json::serialize(test));
      const auto chat = source != nullptr ? ChatTemplate::Parse(Str(*source), config)
                                          : ChatTemplate::Load(config);
      const json::Value* expected = test.if_contains("expected");
      if (expected != nullptr) {
        ASSERT_TRUE(chat.ok()) << chat.status();
      } else if (!chat.ok()) {
        continue;
      }
      const auto text = (*chat)->Render(Input(group.as_object(), test));
      if (expected != nullptr) {
        ASSERT_TRUE(text.ok()) << text.status();
        EXPECT_EQ(*text, Str(*expected));
        ++texts;
      } else {
        EXPECT_FALSE(text.ok()) << "jinja2: " << Str(test.at("error")) << "\nours: " << *text;
        ++errors;
      }
    }
  }
  EXPECT_GT(texts, 170u);
  EXPECT_GT(errors, 40u);
}

TEST(ChatTemplateTest, WhatIsNotSupportedIsRefusedAtLoad) {
  const json::Value groups = GoldenJson("chat_cases.json");
  size_t checked = 0;
  for (const json::Value& group : groups.as_array()) {
    if (group.at("name") != "refused") continue;
    for (const json::Value& test : group.at("cases").as_array()) {
      const std::string source = Str(test.at("template"));
      const auto chat = ChatTemplate::Parse(source, {});
      ASSERT_FALSE(chat.ok()) << source;
      EXPECT_THAT(chat.status().ToString(), HasSubstr(Str(test.at("contains")))) << source;
      EXPECT_THAT(chat.status().ToString(), HasSubstr("chat template, line ")) << source;
      ++checked;
    }
  }
  EXPECT_GT(checked, 50u);
}

absl::Status RenderStatus(std::string_view source) {
  const auto chat = ChatTemplate::Parse(source, {});
  if (!chat.ok()) return chat.status();
  return (*chat)->Render({}).status();
}

TEST(ChatTemplateTest, ErrorsNameTheLine) {
  EXPECT_THAT(RenderStatus("a\nb\n{{ 'x' + 1 }}").ToString(),
              HasSubstr("line 3: cannot apply + to str and int"));
  EXPECT_THAT(
      RenderStatus("{% for x in [1] %}\n{{ raise_exception('no ' ~ x) }}{% endfor %}").ToString(),
      HasSubstr("line 2: no 1"));
  EXPECT_THAT(RenderStatus("\n\n{{ messages[0].content }}").ToString(), HasSubstr("line 3"));
  EXPECT_EQ(RenderStatus("{{ [1, 2] }}").code(), absl::StatusCode::kInvalidArgument);
}

TEST(ChatTemplateTest, NoTemplateRunsForEverOrGrowsWithoutEnd) {
  using Code = absl::StatusCode;
  const std::string loops =
      "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
  EXPECT_EQ(RenderStatus(loops).code(), Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + "
                         "n.s %}{% endfor %}")
                .code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ "
                         "n.s %}{% endfor %}")
                .code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = n.l + "
                         "n.l %}{% endfor %}")
                .code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{% set n = namespace(l=[1]) %}{% for i in range(9999) %}{% set n.l = "
                         "[n.l] %}{% endfor %}")
                .code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{{ 'x' * 999999999999 }}").code(), Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{{ ('x' * 9999999).replace('x', 'yyyyyyyyyyyy') }}").code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{% for i in range(10) %}{{ 'x' * 9999999 }}{% endfor %}").code(),
            Code::kResourceExhausted);
  EXPECT_EQ(RenderStatus("{{ 9223372036854775807 + 1 }}").code(), Code::kInvalidArgument);
  EXPECT_EQ(RenderStatus("{{ (-9223372036854775807 - 1) // -1 }}").code(), Code::kInvalidArgument);
  EXPECT_EQ(ChatTemplate::Parse(std::string(kMaxTemplateBytes + 1, 'x'), {}).status().code(),
            Code::kResourceExhausted);
  EXPECT_EQ(ChatTemplate::Parse("\xFF", {}).status().code(), Code::kInvalidArgument);
}

TEST(ChatTemplateTest, AValueMayOutliveItsLoop) {
  const auto chat = ChatTemplate::Parse(
      "{% set n = namespace() %}{% for x in [7, 8] %}{% set n.l = loop %}{% endfor %}{{ n.l.length "
      "}}",
      {});
  ASSERT_TRUE(chat.ok()) << chat.status();
  EXPECT_EQ((*chat)->Render({}).value(), "2");
}

TEST(ChatTemplateTest, NamedTemplatesAndTheirAbsence) {
  TokenizerConfig config;
  config.chat_templates = {{"default", "D"}, {"tool_use", "T"}};
  EXPECT_EQ((*ChatTemplate::Load(config))->Render({}).value(), "D");
  EXPECT_EQ((*ChatTemplate::Load(config, "tool_use"))->Render({}).value(), "T");
  const absl::Status missing = ChatTemplate::Load(config, "rag").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(missing.ToString(), HasSubstr("default, tool_use"));
  EXPECT_EQ(ChatTemplate::Load({}).status().code(), absl::StatusCode::kNotFound);
}

TEST(ChatTemplateTest, VariablesCannotReplaceTheConversation) {
  const auto chat = ChatTemplate::Parse("{{ bos_token }}{{ thinking }}", {.bos_token = "B"});
  ASSERT_TRUE(chat.ok());
  EXPECT_EQ((*chat)->Render({.variables = {{"thinking", 1}}}).value(), "B1");
  EXPECT_EQ((*chat)->Render({.variables = {{"messages", 1}}}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ChatTemplateTest, DamagedTemplatesNeverCrash) {
  const std::string source = GoldenConfig().chat_templates[0].source;
  const uint32_t seed = 11;
  std::mt19937 random(seed);
  ChatInput input;
  input.messages.push_back(json::Object{{"role", "user"}, {"content", "x"}});
  input.messages.push_back(json::Object{{"role", "assistant"}, {"content", "y</think>z"}});
  size_t parsed = 0;
  for (int round = 0; round < 3000; ++round) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed << " round " << round);
    std::string damaged = source;
    for (int hits = 1 + static_cast<int>(random() % 3); hits > 0; --hits) {
      const size_t at = random() % damaged.size();
      const size_t length = random() % 12;
      switch (random() % 3) {
        case 0:
          damaged.erase(at, length);
          break;
        case 1:
          damaged.insert(at, damaged.substr(random() % damaged.size(), length));
          break;
        default:
          damaged[at] = "{}%#-'\"()[].|~ =x1"[random() % 18];
      }
    }
    const auto chat = ChatTemplate::Parse(damaged, {});
    if (!chat.ok()) continue;
    ++parsed;
    (void)(*chat)->Render(input);
  }
  EXPECT_GT(parsed, 100u);
}

}  // namespace
}  // namespace strait
