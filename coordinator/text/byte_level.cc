// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/byte_level.h"

#include <array>

#include "coordinator/text/utf8.h"

namespace strait {
namespace {

constexpr bool IsPrintable(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// Printable bytes stand for themselves; the others follow from U+0100 on, in order.
constexpr auto kCharacters = [] {
  std::array<char32_t, 256> characters{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) characters[byte] = IsPrintable(byte) ? byte : next++;
  return characters;
}();

constexpr auto kBytes = [] {
  std::array<int, 0x144> bytes{};
  for (int& byte : bytes) byte = -1;
  for (int byte = 0; byte < 256; ++byte) bytes[kCharacters[static_cast<size_t>(byte)]] = byte;
  return bytes;
}();

}  // namespace

char32_t ByteLevelCharacter(unsigned char byte) { return kCharacters[byte]; }

std::optional<std::string> ByteLevelDecode(std::string_view token) {
  std::string bytes;
  while (!token.empty()) {
    const Utf8Step step = NextUtf8(token);
    if (step.kind != Utf8Step::Kind::kCharacter || step.code_point >= kBytes.size() ||
        kBytes[step.code_point] < 0) {
      return std::nullopt;
    }
    bytes.push_back(static_cast<char>(kBytes[step.code_point]));
    token.remove_prefix(step.length);
  }
  return bytes;
}

std::string ByteLevelEncode(std::string_view bytes) {
  std::string token;
  for (const char byte : bytes) AppendUtf8(kCharacters[static_cast<unsigned char>(byte)], &token);
  return token;
}

}  // namespace strait
