// SPDX-License-Identifier: Apache-2.0
//
// JsonWriter writes the JSON of responses, front to back, into one string.
//
// Thread:  one thread at a time.
// Errors:  none; strings must be UTF-8, keys and values come in a valid order (the caller's
//          promise).
// Why:     a log-probability is printed as the shortest decimal that reads back to the same
//          float32; Boost.JSON knows only doubles, and a chunk a token is not worth a tree of
//          values.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace strait {

class JsonWriter {
 public:
  JsonWriter& BeginObject() { return Open('{'); }
  JsonWriter& EndObject() { return Close('}'); }
  JsonWriter& BeginArray() { return Open('['); }
  JsonWriter& EndArray() { return Close(']'); }
  JsonWriter& Key(std::string_view key);

  JsonWriter& String(std::string_view utf8);
  template <std::integral T>
  JsonWriter& Int(T value) {
    Separate();
    out_ += std::to_string(value);
    return *this;
  }
  // What is not finite becomes -9999.0 (minus infinity: clients expect a number) or null (not a
  // number).
  JsonWriter& Float(float value);
  JsonWriter& Bool(bool value) { return Raw(value ? "true" : "false"); }
  JsonWriter& Null() { return Raw("null"); }
  // `json` is one complete value.
  JsonWriter& Raw(std::string_view json);

  std::string Take() { return std::move(out_); }

 private:
  JsonWriter& Open(char c);
  JsonWriter& Close(char c);
  void Separate();
  void Quote(std::string_view utf8);

  std::string out_;
  bool comma_ = false;  // the next key or value needs one before it
};

}  // namespace strait
