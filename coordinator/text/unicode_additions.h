// SPDX-License-Identifier: Apache-2.0
//
// Characters that Unicode added after version 14, which is what PCRE2 10.42 knows, up to version
// 16, which is what the regex engine of Hugging Face `tokenizers` knows. Without them a text with
// such a character would be cut, and so numbered, in another way.
//
// Thread:  constants.
// Why:     A PCRE2 that knows a newer Unicode has these already; naming them twice does no harm.
#pragma once

#include <span>

namespace strait {

struct CodePointRange {
  char32_t first;
  char32_t last;
};

// The additions to general category L, M, N, P or S, or to Nd for 'd'; empty for another letter.
std::span<const CodePointRange> UnicodeAdditions(char category);

// Additions of Unicode 17 to category N: the Digits pre-tokenizer knows them, its regexes do not.
std::span<const CodePointRange> Unicode17Numbers();

// True for a character in any of the tables above.
bool IsUnicodeAddition(char32_t code_point);

}  // namespace strait
