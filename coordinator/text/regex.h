// SPDX-License-Identifier: Apache-2.0
//
// Regex finds the matches of a tokenizer.json's pattern, written for Oniguruma, by PCRE2's JIT.
//
// Thread:  immutable after Compile; a RegexScratch serves one thread at a time.
// Errors:  Compile: Unimplemented naming a construct that the two engines do not surely share;
//          InvalidArgument for a pattern that is wrong. FindAll: ResourceExhausted over PCRE2's
//          limits.
// Limits:  kMaxPatternBytes; PCRE2's default match and heap limits.
// Why:     \s and character classes mean different sets in the two engines (U+180E; characters
//          newer than PCRE2's Unicode), so they are spelled out. The wider classes are slower, and
//          rarely needed: a pattern is compiled without and with them, and the text decides.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait {

inline constexpr size_t kMaxPatternBytes = 1u << 16;

struct TextRange {
  size_t begin;
  size_t end;
  friend bool operator==(const TextRange&, const TextRange&) = default;
};

// Room for one match; reused from call to call.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class Regex {
 public:
  static absl::StatusOr<Regex> Compile(std::string_view pattern);
  // Matches `literal` as it stands.
  static absl::StatusOr<Regex> CompileLiteral(std::string_view literal);
  // One character that is a number to the Digits pre-tokenizer.
  static absl::StatusOr<Regex> CompileDigit();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // Appends to `matches` what a search from left to right finds, without overlaps. `newer_unicode`
  // says whether `text` may hold a character of unicode_additions.h. REQUIRES: `text` is valid
  // UTF-8.
  absl::Status FindAll(std::string_view text, bool newer_unicode, RegexScratch* scratch,
                       std::vector<TextRange>* matches) const;

 private:
  struct Impl;
  explicit Regex(std::unique_ptr<const Impl> impl);
  static absl::StatusOr<Regex> CompileBoth(const std::string& plain, const std::string& wide,
                                           std::string_view shown);
  std::unique_ptr<const Impl> impl_;
};

// The pattern in PCRE2's words; `wide` adds the characters of unicode_additions.h to their classes.
absl::StatusOr<std::string> TranslatePattern(std::string_view pattern, bool wide);

}  // namespace strait
