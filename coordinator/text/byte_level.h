// SPDX-License-Identifier: Apache-2.0
//
// The byte-level alphabet of tokenizer.json: every byte has a printable character, so that any
// bytes can be spelled in a JSON vocabulary ("Ġthe" is " the").
//
// Thread:  any; pure functions.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace strait {

// The character that stands for `byte`.
char32_t ByteLevelCharacter(unsigned char byte);

// The bytes that `token` spells, or nothing when a character of it stands for no byte.
std::optional<std::string> ByteLevelDecode(std::string_view token);

std::string ByteLevelEncode(std::string_view bytes);

}  // namespace strait
