// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cctype>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator/text/unicode_additions.h"
#include "coordinator/text/utf8.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

// \s and \w of Oniguruma, as members of a class.
constexpr std::string_view kSpace = "\\p{White_Space}";
constexpr std::string_view kNotSpace = "\\P{White_Space}";
constexpr std::string_view kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";

std::string Ranges(std::span<const CodePointRange> ranges) {
  std::string members;
  for (const CodePointRange& range : ranges) {
    absl::StrAppend(&members, absl::StrFormat("\\x{%X}-\\x{%X}", static_cast<uint32_t>(range.first),
                                              static_cast<uint32_t>(range.last)));
  }
  return members;
}

// Copies a pattern construct by construct; what it does not know it refuses.
class Translator {
 public:
  Translator(std::string_view pattern, bool wide) : pattern_(pattern), wide_(wide) {}

  absl::StatusOr<std::string> Run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        STRAIT_RETURN_IF_ERROR(Escape());
      } else if (c == '[') {
        STRAIT_RETURN_IF_ERROR(in_class_ ? Refuse("a class inside a class", 1) : OpenClass());
      } else if (c == ']' && in_class_) {
        in_class_ = false;
        Copy(1);
      } else if (in_class_) {
        if (Next("&&")) return Refuse("class intersection", 2);
        Copy(1);
      } else if (c == '(') {
        STRAIT_RETURN_IF_ERROR(Group());
      } else {
        Copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  bool Next(std::string_view text) const { return pattern_.substr(at_, text.size()) == text; }

  void Copy(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  void Replace(size_t count, std::string_view members) {
    absl::StrAppend(&out_, in_class_ ? "" : "[", ToAbsl(members), in_class_ ? "" : "]");
    at_ += count;
  }

  absl::Status Refuse(std::string_view what, size_t length) const {
    return absl::UnimplementedError(
        absl::StrCat("regex construct ", ToAbsl(what), " \"", ToAbsl(pattern_.substr(at_, length)),
                     "\" at byte ", at_, " of ", ToAbsl(pattern_), " is not supported"));
  }

  absl::Status OpenClass() {
    in_class_ = true;
    Copy(Next("[^") ? 2 : 1);
    // "[]a]" means one thing here and another there.
    if (Next("]")) return Refuse("']' first in a class", 1);
    return absl::OkStatus();
  }

  absl::Status Group() {
    for (const std::string_view head : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (!Next(head)) continue;
      Copy(head.size());
      return absl::OkStatus();
    }
    if (Next("(?") || Next("(*")) return Refuse("group", 4);
    Copy(1);
    return absl::OkStatus();
  }

  absl::Status Escape() {
    if (at_ + 1 >= pattern_.size()) return Refuse("lone backslash", 1);
    const char c = pattern_[at_ + 1];
    switch (c) {
      case 's':
        Replace(2, kSpace);
        return absl::OkStatus();
      case 'S':
        Replace(2, kNotSpace);
        return absl::OkStatus();
      case 'd':
        Replace(2, absl::StrCat("\\p{Nd}", wide_ ? Ranges(UnicodeAdditions('d')) : ""));
        return absl::OkStatus();
      case 'w': {
        std::string members(kWord);
        if (wide_) {
          for (const char category : {'L', 'M', 'd'}) members += Ranges(UnicodeAdditions(category));
        }
        Replace(2, members);
        return absl::OkStatus();
      }
      case 'p':
      case 'P':
        return Property();
      case 'n':
      case 'r':
      case 't':
      case 'f':
        Copy(2);
        return absl::OkStatus();
      default:
        break;
    }
    const bool word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (word || static_cast<unsigned char>(c) >= 0x80) return Refuse("escape", 2);
    Copy(2);
    return absl::OkStatus();
  }

  absl::Status Property() {
    const size_t close = pattern_.find('}', at_);
    if (!(Next("\\p{") || Next("\\P{")) || close == std::string_view::npos) {
      return Refuse("property", 3);
    }
    const std::string_view whole = pattern_.substr(at_, close + 1 - at_);
    const std::string_view name = whole.substr(3, whole.size() - 4);
    const bool negated = whole[1] == 'P';
    static constexpr std::string_view kOneLetter = "LMNPSZ";
    // Two-letter categories are the same in both engines but for the newest characters.
    const bool one = name.size() == 1 && kOneLetter.find(name[0]) != std::string_view::npos;
    const bool two = name.size() == 2 && kOneLetter.find(name[0]) != std::string_view::npos &&
                     name[1] >= 'a' && name[1] <= 'z';
    if (!one && !two) return Refuse("property", whole.size());
    const std::string extra = wide_ && one ? Ranges(UnicodeAdditions(name[0])) : "";
    if (negated && !extra.empty()) {
      if (in_class_) return Refuse("negated property in a class", whole.size());
      absl::StrAppend(&out_, "[^\\p{", ToAbsl(name), "}", extra, "]");
      at_ += whole.size();
      return absl::OkStatus();
    }
    Replace(whole.size(), absl::StrCat(ToAbsl(whole), extra));
    return absl::OkStatus();
  }

  std::string_view pattern_;
  bool wide_;
  size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
using Code = std::unique_ptr<pcre2_code, CodeDeleter>;

absl::StatusOr<Code> CompileOne(const std::string& pattern, std::string_view shown) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  STRAIT_CHECK(context != nullptr, "out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  // Oniguruma's Ruby syntax: ^ and $ always know lines.
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error,
                          &offset, context.get()));
  if (code == nullptr) {
    char message[256] = {};
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof(message));
    return absl::InvalidArgumentError(
        absl::StrCat("regex ", ToAbsl(shown), " does not compile: ", message));
  }
  // Without JIT (an architecture that PCRE2 has none for) matching is slower and otherwise the
  // same.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

}  // namespace

struct RegexScratch::Impl {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  ~Impl() { pcre2_match_data_free(data); }
};

RegexScratch::RegexScratch() : impl_(std::make_unique<Impl>()) {
  STRAIT_CHECK(impl_->data != nullptr, "out of memory");
}
RegexScratch::~RegexScratch() = default;

struct Regex::Impl {
  Code plain;
  Code wide;
};

Regex::Regex(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

absl::StatusOr<std::string> TranslatePattern(std::string_view pattern, bool wide) {
  // A run of spaces that ends no line would be tried from each of its spaces. Where the first one
  // fails all do, so only the first is tried: the same matches in linear time.
  if (pattern == "\\s+$") pattern = "(?<!\\s)\\s+$";
  return Translator(pattern, wide).Run();
}

absl::StatusOr<Regex> Regex::CompileBoth(const std::string& plain, const std::string& wide,
                                         std::string_view shown) {
  auto impl = std::make_unique<Impl>();
  STRAIT_ASSIGN_OR_RETURN(impl->plain, CompileOne(plain, shown));
  STRAIT_ASSIGN_OR_RETURN(impl->wide, CompileOne(wide, shown));
  return Regex(std::move(impl));
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "regex of ", pattern.size(), " bytes, more than the limit of ", kMaxPatternBytes));
  }
  if (const std::optional<size_t> bad = FindInvalidUtf8(pattern)) {
    return absl::InvalidArgumentError(absl::StrCat("regex is not UTF-8 at byte ", *bad));
  }
  STRAIT_ASSIGN_OR_RETURN(const std::string plain, TranslatePattern(pattern, false));
  STRAIT_ASSIGN_OR_RETURN(const std::string wide, TranslatePattern(pattern, true));
  return CompileBoth(plain, wide, pattern);
}

absl::StatusOr<Regex> Regex::CompileLiteral(std::string_view literal) {
  if (literal.size() > kMaxPatternBytes || literal.empty()) {
    return absl::InvalidArgumentError("a split pattern must have 1 to 65536 bytes");
  }
  std::string pattern;
  for (const char c : literal) {
    absl::StrAppend(&pattern,
                    (static_cast<unsigned char>(c) < 0x80) && !std::isalnum(c) ? "\\" : "");
    pattern.push_back(c);
  }
  return CompileBoth(pattern, pattern, literal);
}

absl::StatusOr<Regex> Regex::CompileDigit() {
  const std::string wide =
      absl::StrCat("[\\p{N}", Ranges(UnicodeAdditions('N')), Ranges(Unicode17Numbers()), "]");
  return CompileBoth("\\p{N}", wide, "\\p{N}");
}

absl::Status Regex::FindAll(std::string_view text, bool newer_unicode, RegexScratch* scratch,
                            std::vector<TextRange>* matches) const {
  const pcre2_code* code = newer_unicode ? impl_->wide.get() : impl_->plain.get();
  pcre2_match_data* data = scratch->impl_->data;
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t at = 0;
  std::optional<size_t> last_end;
  while (at <= text.size()) {
    int rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, data, nullptr);
    // The JIT's stack is small; the interpreter takes its memory from the heap.
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                       nullptr);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return absl::OkStatus();
    if (rc < 0) {
      char message[256] = {};
      pcre2_get_error_message(rc, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof(message));
      return absl::ResourceExhaustedError(
          absl::StrCat("splitting ", text.size(), " bytes into words failed: ", message));
    }
    const TextRange match{bounds[0], bounds[1]};
    if (match.begin == match.end && last_end == match.end) {
      if (match.end == text.size()) return absl::OkStatus();
      at = match.end + NextUtf8(text.substr(match.end)).length;
      continue;
    }
    matches->push_back(match);
    last_end = at = match.end;
  }
  return absl::OkStatus();
}

}  // namespace strait
