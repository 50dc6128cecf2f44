// SPDX-License-Identifier: Apache-2.0
//
// tokenizer_check TOKENIZER.json STRINGS.json: prints, for each string of a JSON array, one JSON
// line with its ids and with their text, whole and as the detokenizer streams it.
// check_tokenizer.py compares them with Hugging Face's. With a third argument N, encodes everything
// N times and prints the speed instead.
#include <boost/json/serialize.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "coordinator/text/detokenizer.h"
#include "coordinator/text/tokenizer.h"
#include "proto/base/json.h"

namespace strait {
namespace {

constexpr size_t kMaxStringsBytes = 512u << 20;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "tokenizer_check: %s\n", status.ToString().c_str());
  return 1;
}

int Speed(const Tokenizer& tokenizer, const json::Array& strings, int rounds) {
  size_t bytes = 0;
  size_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < rounds; ++round) {
    for (const json::Value& text : strings) {
      const auto ids = tokenizer.Encode(json::View(text.as_string()), false);
      if (!ids.ok()) return Fail(ids.status());
      bytes += text.as_string().size();
      tokens += ids->size();
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("{\"bytes\": %zu, \"tokens\": %zu, \"seconds\": %.3f, \"mb_per_s\": %.2f}\n", bytes,
              tokens, seconds, static_cast<double>(bytes) / 1e6 / seconds);
  return 0;
}

int Main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: tokenizer_check TOKENIZER.json STRINGS.json [ROUNDS]\n");
    return 2;
  }
  const auto tokenizer = Tokenizer::Load(argv[1]);
  if (!tokenizer.ok()) return Fail(tokenizer.status());
  const auto strings = json::ParseFile(argv[2], kMaxStringsBytes);
  if (!strings.ok()) return Fail(strings.status());
  if (!strings->is_array()) return Fail(absl::InvalidArgumentError("STRINGS.json is no array"));
  if (argc > 3) return Speed(**tokenizer, strings->get_array(), std::atoi(argv[3]));
  for (const json::Value& value : strings->get_array()) {
    if (!value.is_string()) return Fail(absl::InvalidArgumentError("STRINGS.json: not a string"));
    const auto ids = (*tokenizer)->Encode(json::View(value.get_string()), true);
    if (!ids.ok()) return Fail(ids.status());
    const auto text = (*tokenizer)->Decode(*ids, false);
    const auto plain = (*tokenizer)->Decode(*ids, true);
    if (!text.ok()) return Fail(text.status());
    if (!plain.ok()) return Fail(plain.status());
    Detokenizer detokenizer(**tokenizer, /*skip_special_tokens=*/false);
    std::string streamed;
    for (const uint32_t id : *ids) streamed += detokenizer.Push(id);
    streamed += detokenizer.Flush();
    json::Object line;
    line["ids"] = json::Array(ids->begin(), ids->end());
    line["text"] = *text;
    line["plain"] = *plain;
    line["streamed"] = streamed;
    std::printf("%s\n", boost::json::serialize(line).c_str());
  }
  return 0;
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) { return strait::Main(argc, argv); }
