// SPDX-License-Identifier: Apache-2.0
#include "proto/base/text.h"

#include <cstdint>

#include "proto/base/check.h"

namespace strait {
namespace {

constexpr std::string_view kCut = "…";

uint8_t Byte(std::string_view text, size_t index) { return static_cast<uint8_t>(text[index]); }

std::string Escaped(char c) {
  if (c == '\n') return "\\n";
  if (c == '\t') return "\\t";
  if (c == '\r') return "\\r";
  constexpr char kHex[] = "0123456789abcdef";
  const auto byte = static_cast<uint8_t>(c);
  return {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
}

}  // namespace

size_t PrintableBytes(std::string_view text) {
  if (text.empty()) return 0;
  const uint8_t lead = Byte(text, 0);
  if (lead < 0x80) return lead >= 0x20 && lead != 0x7f ? 1 : 0;
  const size_t size = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < size) return 0;
  uint32_t code = lead & (0xff >> (size + 1));
  for (size_t i = 1; i < size; ++i) {
    if ((Byte(text, i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (Byte(text, i) & 0x3f);
  }
  if (code < 0xa0) return 0;  // the control characters after ASCII
  if (size == 3 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) return 0;
  if (size == 4 && (code < 0x10000 || code > 0x10ffff)) return 0;
  return size;
}

std::string PrintableText(std::string_view text, size_t bytes_max) {
  STRAIT_CHECK(bytes_max >= kCut.size());
  std::string out;
  size_t cut_at = 0;  // the longest prefix after which there is room for kCut
  while (!text.empty()) {
    const size_t bytes = PrintableBytes(text);
    const std::string piece = bytes > 0 ? std::string(text.substr(0, bytes)) : Escaped(text[0]);
    if (piece.size() > bytes_max - out.size()) {
      out.resize(cut_at);
      out += kCut;
      return out;
    }
    out += piece;
    if (out.size() <= bytes_max - kCut.size()) cut_at = out.size();
    text.remove_prefix(bytes > 0 ? bytes : 1);
  }
  return out;
}

}  // namespace strait
