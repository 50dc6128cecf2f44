// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/jinja_lexer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/text/jinja_value.h"
#include "coordinator/text/utf8.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::jinja {
namespace {

bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsHex(char c) { return IsDigit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

class Lexer {
 public:
  explicit Lexer(std::string_view source) {
    // Newlines are one kind, and one at the end of the file does not count.
    for (size_t i = 0; i < source.size(); ++i) {
      if (source[i] != '\r') {
        source_.push_back(source[i]);
      } else if (i + 1 == source.size() || source[i + 1] != '\n') {
        source_.push_back('\n');
      }
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  absl::StatusOr<std::vector<Token>> Run() {
    while (at_ < source_.size()) {
      size_t open = source_.find('{', at_);
      while (open != std::string::npos && open + 1 < source_.size() &&
             std::string_view("%#{").find(source_[open + 1]) == std::string_view::npos) {
        open = source_.find('{', open + 1);
      }
      if (open == std::string::npos || open + 1 >= source_.size()) {
        Emit(Token::Kind::kText, source_.substr(at_));
        Advance(source_.size() - at_);
        break;
      }
      STRAIT_RETURN_IF_ERROR(Tag(open));
    }
    Emit(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  void Emit(Token::Kind kind, std::string text) {
    if (kind == Token::Kind::kText && text.empty()) return;
    tokens_.push_back({kind, std::move(text), line_});
  }

  void Advance(size_t count) {
    line_ +=
        static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                    source_.begin() + static_cast<ptrdiff_t>(at_ + count), '\n'));
    at_ += count;
  }

  bool Next(std::string_view text) const {
    return std::string_view(source_).substr(at_, text.size()) == text;
  }

  void SkipSpace() {
    while (at_ < source_.size()) {
      const Utf8Step step = NextUtf8(std::string_view(source_).substr(at_));
      if (!IsPythonSpace(step.code_point)) break;
      Advance(step.length);
    }
  }

  // The text up to the tag at `open`, less the white space that the tag takes away.
  void TextBefore(size_t open, char mark, bool block) {
    std::string_view text = std::string_view(source_).substr(at_, open - at_);
    if (mark == '-') {
      text = Strip(text, Sides::kRight);
    } else if (block && mark != '+') {
      const size_t newline = text.rfind('\n');
      const size_t line_start = newline == std::string_view::npos ? 0 : newline + 1;
      if ((line_start > 0 || line_starting_) &&
          Strip(text.substr(line_start), Sides::kLeft).empty()) {
        text = text.substr(0, line_start);
      }
    }
    Emit(Token::Kind::kText, std::string(text));
    Advance(open - at_);
  }

  // After "%}" or "#}": '-' takes all white space along, otherwise the newline goes unless '+'
  // stood there.
  void AfterBlock(char mark) {
    if (mark == '-') {
      SkipSpace();
    } else if (mark != '+' && Next("\n")) {
      Advance(1);
    }
    line_starting_ = at_ > 0 && source_[at_ - 1] == '\n';
  }

  absl::Status Tag(size_t open) {
    const char kind = source_[open + 1];
    const char mark = open + 2 < source_.size() ? source_[open + 2] : '\0';
    const bool marked = mark == '-' || mark == '+';
    TextBefore(open, marked ? mark : '\0', kind != '{');
    if (kind == '#') return Comment(marked ? 3 : 2);
    Emit(kind == '{' ? Token::Kind::kOutputBegin : Token::Kind::kBlockBegin, "");
    Advance(2 + (marked ? 1 : 0));
    return Inside(kind == '{');
  }

  absl::Status Comment(size_t opening) {
    const int line = line_;
    const size_t begin = at_ + opening;
    const size_t close = source_.find("#}", begin);
    if (close == std::string::npos) return SyntaxError(line, "comment is never closed");
    const char before = close > begin ? source_[close - 1] : '\0';
    Advance(close + 2 - at_);
    AfterBlock(before == '-' || before == '+' ? before : '\0');
    return absl::OkStatus();
  }

  absl::Status Inside(bool output) {
    const std::string_view closer = output ? "}}" : "%}";
    const int opened = line_;
    std::string open_brackets;
    for (;;) {
      SkipSpace();
      if (at_ >= source_.size()) return SyntaxError(opened, "tag is never closed");
      if (open_brackets.empty()) {
        const char mark = source_[at_];
        const bool marked = (mark == '-' || (mark == '+' && !output)) &&
                            std::string_view(source_).substr(at_ + 1, 2) == closer;
        if (marked || Next(closer)) {
          Emit(output ? Token::Kind::kOutputEnd : Token::Kind::kBlockEnd, "");
          Advance(marked ? 3 : 2);
          if (!output) {
            AfterBlock(marked ? mark : '\0');
          } else {
            if (marked) SkipSpace();
            line_starting_ = source_[at_ - 1] == '\n';
          }
          return absl::OkStatus();
        }
      }
      STRAIT_RETURN_IF_ERROR(One(&open_brackets));
    }
  }

  absl::Status One(std::string* open_brackets) {
    const char c = source_[at_];
    if (IsNameStart(c)) {
      size_t end = at_;
      while (end < source_.size() && (IsNameStart(source_[end]) || IsDigit(source_[end]))) ++end;
      Emit(Token::Kind::kName, source_.substr(at_, end - at_));
      Advance(end - at_);
      return absl::OkStatus();
    }
    if (IsDigit(c)) return Number();
    if (c == '\'' || c == '"') return String(c);
    for (const std::string_view op :
         {"==", "!=", ">=", "<=", "//", "**", "+", "-", "/", "*", "%", "~", "[",
          "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ","}) {
      if (!Next(op)) continue;
      STRAIT_RETURN_IF_ERROR(Balance(op[0], open_brackets));
      Emit(Token::Kind::kOperator, std::string(op));
      Advance(op.size());
      return absl::OkStatus();
    }
    const size_t length = NextUtf8(std::string_view(source_).substr(at_)).length;
    return SyntaxError(line_,
                       absl::StrCat("unexpected character \"", source_.substr(at_, length), "\""));
  }

  absl::Status Balance(char c, std::string* open_brackets) const {
    static constexpr std::string_view kOpen = "([{";
    static constexpr std::string_view kClose = ")]}";
    if (kOpen.find(c) != std::string_view::npos) open_brackets->push_back(c);
    const size_t close = kClose.find(c);
    if (close == std::string_view::npos) return absl::OkStatus();
    if (open_brackets->empty() || open_brackets->back() != kOpen[close]) {
      return SyntaxError(line_, absl::StrCat("unexpected \"", std::string(1, c), "\""));
    }
    open_brackets->pop_back();
    return absl::OkStatus();
  }

  absl::Status Number() {
    size_t end = at_;
    while (end < source_.size() && IsDigit(source_[end])) ++end;
    Token::Kind kind = Token::Kind::kInteger;
    if (end + 1 < source_.size() && source_[end] == '.' && IsDigit(source_[end + 1])) {
      kind = Token::Kind::kFloat;
      ++end;
      while (end < source_.size() && IsDigit(source_[end])) ++end;
    }
    if (end < source_.size() && IsNameStart(source_[end])) {
      return Unsupported(line_,
                         absl::StrCat("number \"", source_.substr(at_, end + 1 - at_), "…\""));
    }
    Emit(kind, source_.substr(at_, end - at_));
    Advance(end - at_);
    return absl::OkStatus();
  }

  absl::Status String(char quote) {
    const int line = line_;
    std::string text;
    size_t at = at_ + 1;
    for (;;) {
      if (at >= source_.size()) return SyntaxError(line, "string is never closed");
      const char c = source_[at++];
      if (c == quote) break;
      if (c != '\\') {
        text.push_back(c);
        continue;
      }
      if (at >= source_.size()) return SyntaxError(line, "string is never closed");
      STRAIT_RETURN_IF_ERROR(Escape(source_[at++], &at, &text));
    }
    Emit(Token::Kind::kString, std::move(text));
    Advance(at - at_);
    return absl::OkStatus();
  }

  // Python's escapes; an unknown one stands for itself, backslash included.
  absl::Status Escape(char c, size_t* at, std::string* text) {
    static constexpr std::pair<char, char> kSimple[] = {
        {'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'\\', '\\'}, {'\'', '\''},
        {'"', '"'},  {'a', '\a'}, {'b', '\b'}, {'f', '\f'},  {'v', '\v'}};
    for (const auto& [name, value] : kSimple) {
      if (c != name) continue;
      text->push_back(value);
      return absl::OkStatus();
    }
    if (c == '\n') return absl::OkStatus();
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits > 0) {
      uint64_t value = 0;
      for (size_t i = 0; i < digits; ++i, ++*at) {
        if (*at >= source_.size() || !IsHex(source_[*at])) {
          return SyntaxError(line_, absl::StrCat("escape \\", std::string(1, c), " is cut off"));
        }
        const char h = source_[*at];
        value = value * 16 + static_cast<uint64_t>(IsDigit(h) ? h - '0' : (h | 0x20) - 'a' + 10);
      }
      if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
        return SyntaxError(line_, "escape of a code point that is no character");
      }
      AppendUtf8(static_cast<char32_t>(value), text);
      return absl::OkStatus();
    }
    if (c == 'N' || IsDigit(c)) {
      return Unsupported(line_, absl::StrCat("string escape \\", std::string(1, c)));
    }
    text->push_back('\\');
    text->push_back(c);
    return absl::OkStatus();
  }

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

absl::Status SyntaxError(int line, std::string_view message) {
  return absl::InvalidArgumentError(
      absl::StrCat("chat template, line ", line, ": ", ToAbsl(message)));
}

absl::Status Unsupported(int line, std::string_view construct) {
  return absl::UnimplementedError(
      absl::StrCat("chat template, line ", line, ": ", ToAbsl(construct), " is not supported"));
}

absl::StatusOr<std::vector<Token>> Lex(std::string_view source) { return Lexer(source).Run(); }

}  // namespace strait::jinja
