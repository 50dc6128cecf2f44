// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/json_writer.h"

#include <charconv>
#include <cmath>

namespace strait {
namespace {

constexpr char kHex[] = "0123456789abcdef";

}  // namespace

void JsonWriter::Separate() {
  if (comma_) out_ += ',';
  comma_ = true;
}

JsonWriter& JsonWriter::Open(char c) {
  Separate();
  out_ += c;
  comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::Close(char c) {
  out_ += c;
  comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::Key(std::string_view key) {
  Separate();
  Quote(key);
  out_ += ':';
  comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::String(std::string_view utf8) {
  Separate();
  Quote(utf8);
  return *this;
}

JsonWriter& JsonWriter::Raw(std::string_view json) {
  Separate();
  out_ += json;
  return *this;
}

JsonWriter& JsonWriter::Float(float value) {
  if (std::isnan(value)) return Null();
  if (std::isinf(value)) return Raw(value < 0 ? "-9999.0" : "9999.0");
  char text[32];
  const auto end = std::to_chars(text, text + sizeof(text), value).ptr;
  const std::string_view digits(text, static_cast<size_t>(end - text));
  Raw(digits);
  // A whole number stays recognizable as a float.
  if (digits.find_first_of(".e") == std::string_view::npos) out_ += ".0";
  return *this;
}

void JsonWriter::Quote(std::string_view utf8) {
  out_ += '"';
  size_t plain = 0;  // start of what needs no escape
  for (size_t i = 0; i < utf8.size(); ++i) {
    const auto c = static_cast<unsigned char>(utf8[i]);
    if (c >= 0x20 && c != '"' && c != '\\') continue;
    out_ += utf8.substr(plain, i - plain);
    plain = i + 1;
    out_ += '\\';
    switch (c) {
      case '"':
      case '\\':
        out_ += static_cast<char>(c);
        break;
      case '\n':
        out_ += 'n';
        break;
      case '\r':
        out_ += 'r';
        break;
      case '\t':
        out_ += 't';
        break;
      default:
        out_ += "u00";
        out_ += kHex[c >> 4];
        out_ += kHex[c & 15];
    }
  }
  out_ += utf8.substr(plain);
  out_ += '"';
}

}  // namespace strait
