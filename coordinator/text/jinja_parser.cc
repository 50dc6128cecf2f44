// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/jinja_parser.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/jinja_builtins.h"
#include "coordinator/text/jinja_lexer.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::jinja {
namespace {

using Kind = Expression::Kind;
using Parsed = absl::StatusOr<ExpressionPtr>;

// Methods of dicts: as `x.name` without a call they are neither a key nor anything that we can
// print.
constexpr std::string_view kDictMethods[] = {"clear",      "copy",   "fromkeys", "get",
                                             "items",      "keys",   "pop",      "popitem",
                                             "setdefault", "update", "values"};

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Block> Run() {
    Block block;
    STRAIT_RETURN_IF_ERROR(ParseBlock({}, &block));
    return block;
  }

 private:
  // ---- Tokens ----
  const Token& Now() const { return tokens_[at_]; }
  const Token& Ahead(size_t count) const {
    return tokens_[std::min(at_ + count, tokens_.size() - 1)];
  }
  int line() const { return Now().line; }
  bool Is(Token::Kind kind) const { return Now().kind == kind; }
  bool IsName(std::string_view name) const { return Is(Token::Kind::kName) && Now().text == name; }
  bool IsOperator(std::string_view op) const {
    return Is(Token::Kind::kOperator) && Now().text == op;
  }
  bool Take(std::string_view op) {
    if (!IsOperator(op)) return false;
    ++at_;
    return true;
  }
  bool TakeName(std::string_view name) {
    if (!IsName(name)) return false;
    ++at_;
    return true;
  }
  std::string Shown() const {
    switch (Now().kind) {
      case Token::Kind::kEnd:
        return "end of template";
      case Token::Kind::kBlockEnd:
        return "%}";
      case Token::Kind::kOutputEnd:
        return "}}";
      default:
        return absl::StrCat("\"", Now().text, "\"");
    }
  }
  absl::Status Expected(std::string_view what) const {
    return SyntaxError(line(), absl::StrCat("expected ", ToAbsl(what), " before ", Shown()));
  }
  absl::Status Expect(std::string_view op) {
    return Take(op) ? absl::OkStatus() : Expected(absl::StrCat("\"", ToAbsl(op), "\""));
  }
  absl::StatusOr<std::string> Name() {
    if (!Is(Token::Kind::kName)) return Expected("a name");
    return tokens_[at_++].text;
  }

  // ---- Expressions ----
  // Every node is made here: its depth bounds the recursion of Render and of destruction.
  Parsed Make(Kind kind, int at_line, std::vector<ExpressionPtr> operands, std::string name = "") {
    auto node = std::make_unique<Expression>();
    node->kind = kind;
    node->line = at_line;
    node->name = std::move(name);
    for (const ExpressionPtr& operand : operands) {
      if (operand != nullptr) node->depth = std::max(node->depth, operand->depth + 1);
    }
    node->operands = std::move(operands);
    if (node->depth > kMaxExpressionDepth) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "chat template, line ", at_line, ": expression deeper than ", kMaxExpressionDepth));
    }
    return node;
  }
  template <typename... Operands>
  static std::vector<ExpressionPtr> Of(Operands... operands) {
    std::vector<ExpressionPtr> list;
    (list.push_back(std::move(operands)), ...);
    return list;
  }
  Parsed Literal(Value value, int at_line) {
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr node, Make(Kind::kLiteral, at_line, {}));
    node->literal = std::move(value);
    return node;
  }

  // Guards the parser's own recursion; call at every way down.
  class Nest {
   public:
    explicit Nest(Parser* parser) : parser_(parser) { ++parser_->nesting_; }
    ~Nest() { --parser_->nesting_; }
    absl::Status Check() const {
      if (parser_->nesting_ <= kMaxTemplateNesting) return absl::OkStatus();
      return absl::ResourceExhaustedError(absl::StrCat(
          "chat template, line ", parser_->line(), ": nested deeper than ", kMaxTemplateNesting));
    }

   private:
    Parser* parser_;
  };

  Parsed ParseExpression() {
    const Nest nest(this);
    STRAIT_RETURN_IF_ERROR(nest.Check());
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr value, ParseOr());
    while (IsName("if")) {
      const int at_line = line();
      ++at_;
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr condition, ParseOr());
      ExpressionPtr otherwise;
      if (TakeName("else")) {
        STRAIT_ASSIGN_OR_RETURN(otherwise, ParseExpression());
      }
      STRAIT_ASSIGN_OR_RETURN(
          value, Make(Kind::kConditional, at_line,
                      Of(std::move(value), std::move(condition), std::move(otherwise))));
    }
    return value;
  }

  // "a, b" is a tuple, which here is a list.
  Parsed ParseTuple() {
    const int at_line = line();
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr first, ParseExpression());
    if (!IsOperator(",")) return first;
    std::vector<ExpressionPtr> items = Of(std::move(first));
    while (Take(",")) {
      if (Is(Token::Kind::kBlockEnd) || Is(Token::Kind::kOutputEnd) || IsOperator(")")) break;
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr item, ParseExpression());
      items.push_back(std::move(item));
    }
    return Make(Kind::kList, at_line, std::move(items));
  }

  Parsed ParseOr() {
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr left, ParseAnd());
    while (IsName("or")) {
      const int at_line = line();
      ++at_;
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr right, ParseAnd());
      STRAIT_ASSIGN_OR_RETURN(left,
                              Make(Kind::kOr, at_line, Of(std::move(left), std::move(right))));
    }
    return left;
  }

  Parsed ParseAnd() {
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr left, ParseNot());
    while (IsName("and")) {
      const int at_line = line();
      ++at_;
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr right, ParseNot());
      STRAIT_ASSIGN_OR_RETURN(left,
                              Make(Kind::kAnd, at_line, Of(std::move(left), std::move(right))));
    }
    return left;
  }

  Parsed ParseNot() {
    const Nest nest(this);
    STRAIT_RETURN_IF_ERROR(nest.Check());
    if (!IsName("not")) return ParseCompare();
    const int at_line = line();
    ++at_;
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr operand, ParseNot());
    return Make(Kind::kNot, at_line, Of(std::move(operand)));
  }

  std::string TakeComparison() {
    for (const std::string_view op : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (Take(op)) return std::string(op);
    }
    if (TakeName("in")) return "in";
    if (IsName("not") && Ahead(1).kind == Token::Kind::kName && Ahead(1).text == "in") {
      at_ += 2;
      return "not in";
    }
    return "";
  }

  Parsed ParseCompare() {
    const int at_line = line();
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr first, ParseSum());
    std::vector<std::string> operators;
    std::vector<ExpressionPtr> operands = Of(std::move(first));
    for (std::string op = TakeComparison(); !op.empty(); op = TakeComparison()) {
      operators.push_back(std::move(op));
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr next, ParseSum());
      operands.push_back(std::move(next));
    }
    if (operators.empty()) return std::move(operands[0]);
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr node, Make(Kind::kCompare, at_line, std::move(operands)));
    node->operators = std::move(operators);
    return node;
  }

  Parsed ParseSum() {
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr left, ParseConcat());
    while (IsOperator("+") || IsOperator("-")) {
      const Token op = tokens_[at_++];
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr right, ParseConcat());
      STRAIT_ASSIGN_OR_RETURN(
          left, Make(Kind::kArithmetic, op.line, Of(std::move(left), std::move(right)), op.text));
    }
    return left;
  }

  Parsed ParseConcat() {
    const int at_line = line();
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr first, ParseProduct());
    if (!IsOperator("~")) return first;
    std::vector<ExpressionPtr> operands = Of(std::move(first));
    while (Take("~")) {
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr next, ParseProduct());
      operands.push_back(std::move(next));
    }
    return Make(Kind::kConcat, at_line, std::move(operands));
  }

  Parsed ParseProduct() {
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr left, ParseUnary(true));
    while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
      const Token op = tokens_[at_++];
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr right, ParseUnary(true));
      STRAIT_ASSIGN_OR_RETURN(
          left, Make(Kind::kArithmetic, op.line, Of(std::move(left), std::move(right)), op.text));
    }
    if (IsOperator("**")) return Unsupported(line(), "operator **");
    return left;
  }

  Parsed ParseUnary(bool with_filter) {
    const Nest nest(this);
    STRAIT_RETURN_IF_ERROR(nest.Check());
    ExpressionPtr node;
    if (IsOperator("-")) {
      const int at_line = line();
      ++at_;
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr operand, ParseUnary(false));
      STRAIT_ASSIGN_OR_RETURN(node, Make(Kind::kNegate, at_line, Of(std::move(operand))));
    } else if (IsOperator("+")) {
      return Unsupported(line(), "unary +");
    } else {
      STRAIT_ASSIGN_OR_RETURN(node, ParsePrimary());
    }
    STRAIT_ASSIGN_OR_RETURN(node, ParsePostfix(std::move(node)));
    if (!with_filter) return node;
    return ParseFiltersAndTests(std::move(node));
  }

  Parsed ParsePrimary() {
    const Token token = Now();
    switch (token.kind) {
      case Token::Kind::kName:
        ++at_;
        if (token.text == "true" || token.text == "True")
          return Literal(Value::Bool(true), token.line);
        if (token.text == "false" || token.text == "False")
          return Literal(Value::Bool(false), token.line);
        if (token.text == "none" || token.text == "None")
          return Literal(Value::MakeNone(), token.line);
        return Make(Kind::kName, token.line, {}, token.text);
      case Token::Kind::kString: {
        std::string text;
        // Neighbouring strings are one.
        while (Is(Token::Kind::kString)) text += tokens_[at_++].text;
        return Literal(Value::String(std::move(text)), token.line);
      }
      case Token::Kind::kInteger: {
        ++at_;
        int64_t value = 0;
        const char* end = token.text.data() + token.text.size();
        if (std::from_chars(token.text.data(), end, value).ec != std::errc()) {
          return Unsupported(token.line, absl::StrCat("integer ", token.text));
        }
        return Literal(Value::Int(value), token.line);
      }
      case Token::Kind::kFloat: {
        ++at_;
        double value = 0;
        std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
        return Literal(Value::Float(value), token.line);
      }
      default:
        break;
    }
    if (Take("(")) {
      if (Take(")")) return Make(Kind::kList, token.line, {});
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr inner, ParseTuple());
      STRAIT_RETURN_IF_ERROR(Expect(")"));
      return inner;
    }
    if (Take("[")) return ParseListRest(token.line);
    if (Take("{")) return ParseDictRest(token.line);
    return Expected("an expression");
  }

  Parsed ParseListRest(int at_line) {
    std::vector<ExpressionPtr> items;
    while (!Take("]")) {
      if (!items.empty()) {
        STRAIT_RETURN_IF_ERROR(Expect(","));
        if (Take("]")) break;
      }
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr item, ParseExpression());
      items.push_back(std::move(item));
    }
    return Make(Kind::kList, at_line, std::move(items));
  }

  Parsed ParseDictRest(int at_line) {
    std::vector<ExpressionPtr> items;
    while (!Take("}")) {
      if (!items.empty()) {
        STRAIT_RETURN_IF_ERROR(Expect(","));
        if (Take("}")) break;
      }
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr key, ParseExpression());
      STRAIT_RETURN_IF_ERROR(Expect(":"));
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr value, ParseExpression());
      items.push_back(std::move(key));
      items.push_back(std::move(value));
    }
    return Make(Kind::kDict, at_line, std::move(items));
  }

  Parsed ParsePostfix(ExpressionPtr node) {
    for (;;) {
      const int at_line = line();
      if (Take(".")) {
        STRAIT_ASSIGN_OR_RETURN(std::string name, Name());
        if (Take("(")) {
          STRAIT_ASSIGN_OR_RETURN(node,
                                  ParseCall(FindMethod(name), absl::StrCat("method .", name, "()"),
                                            std::move(node), at_line));
          continue;
        }
        if (std::find(std::begin(kDictMethods), std::end(kDictMethods), name) !=
            std::end(kDictMethods)) {
          return Unsupported(at_line, absl::StrCat("method .", name, " without a call"));
        }
        STRAIT_ASSIGN_OR_RETURN(
            node, Make(Kind::kAttribute, at_line, Of(std::move(node)), std::move(name)));
      } else if (Take("[")) {
        STRAIT_ASSIGN_OR_RETURN(node, ParseSubscript(std::move(node), at_line));
      } else if (IsOperator("(")) {
        if (node->kind != Kind::kName) return Unsupported(at_line, "call of an expression");
        ++at_;
        const std::string name = node->name;
        STRAIT_ASSIGN_OR_RETURN(
            node,
            ParseCall(FindFunction(name), absl::StrCat("function ", name, "()"), nullptr, at_line));
      } else {
        return node;
      }
    }
  }

  Parsed ParseSubscript(ExpressionPtr node, int at_line) {
    std::vector<ExpressionPtr> parts = Of(std::move(node));
    bool slice = false;
    for (;;) {
      ExpressionPtr part;
      if (!IsOperator(":") && !IsOperator("]")) {
        STRAIT_ASSIGN_OR_RETURN(part, ParseExpression());
      }
      parts.push_back(std::move(part));
      if (!Take(":")) break;
      slice = true;
    }
    STRAIT_RETURN_IF_ERROR(Expect("]"));
    if (slice) {
      if (parts.size() > 4) return SyntaxError(at_line, "slice of more than three parts");
      parts.resize(4);
      return Make(Kind::kSlice, at_line, std::move(parts));
    }
    if (parts[1] == nullptr) return SyntaxError(at_line, "empty subscript");
    return Make(Kind::kItem, at_line, std::move(parts));
  }

  Parsed ParseFiltersAndTests(ExpressionPtr node) {
    for (;;) {
      const int at_line = line();
      if (Take("|")) {
        STRAIT_ASSIGN_OR_RETURN(node, ParseFilter(std::move(node), at_line));
      } else if (TakeName("is")) {
        STRAIT_ASSIGN_OR_RETURN(node, ParseTest(std::move(node), at_line));
      } else {
        return node;
      }
    }
  }

  Parsed ParseFilter(ExpressionPtr subject, int at_line) {
    STRAIT_ASSIGN_OR_RETURN(const std::string name, Name());
    const Builtin* filter = FindFilter(name);
    const std::string shown = absl::StrCat("filter \"", name, "\"");
    if (Take("(")) return ParseCall(filter, shown, std::move(subject), at_line);
    return MakeCall(filter, shown, Of(std::move(subject)), {}, at_line);
  }

  Parsed ParseTest(ExpressionPtr subject, int at_line) {
    const bool negated = TakeName("not");
    STRAIT_ASSIGN_OR_RETURN(const std::string name, Name());
    const Builtin* test = FindTest(name);
    const std::string shown = absl::StrCat("test \"", name, "\"");
    ExpressionPtr node;
    if (Take("(")) {
      STRAIT_ASSIGN_OR_RETURN(node, ParseCall(test, shown, std::move(subject), at_line));
    } else {
      std::vector<ExpressionPtr> values = Of(std::move(subject));
      if (test != nullptr && test->max_values > 1) {
        STRAIT_ASSIGN_OR_RETURN(ExpressionPtr argument, ParsePrimary());
        STRAIT_ASSIGN_OR_RETURN(argument, ParsePostfix(std::move(argument)));
        values.push_back(std::move(argument));
      }
      STRAIT_ASSIGN_OR_RETURN(node, MakeCall(test, shown, std::move(values), {}, at_line));
    }
    if (!negated) return node;
    return Make(Kind::kNot, at_line, Of(std::move(node)));
  }

  using KeywordExpressions = std::vector<std::pair<std::string, ExpressionPtr>>;

  // After the "(": the arguments of `builtin`, whose subject, if not null, comes first.
  Parsed ParseCall(const Builtin* builtin, const std::string& shown, ExpressionPtr subject,
                   int at_line) {
    std::vector<ExpressionPtr> values;
    KeywordExpressions keywords;
    if (subject != nullptr) values.push_back(std::move(subject));
    bool first = true;
    while (!Take(")")) {
      if (!first) {
        STRAIT_RETURN_IF_ERROR(Expect(","));
        if (Take(")")) break;
      }
      first = false;
      if (IsOperator("*") || IsOperator("**")) return Unsupported(line(), "argument unpacking");
      std::string keyword;
      if (Is(Token::Kind::kName) && Ahead(1).kind == Token::Kind::kOperator &&
          Ahead(1).text == "=") {
        keyword = Now().text;
        at_ += 2;
      }
      STRAIT_ASSIGN_OR_RETURN(ExpressionPtr argument, ParseExpression());
      if (!keyword.empty()) {
        keywords.emplace_back(std::move(keyword), std::move(argument));
      } else if (!keywords.empty()) {
        return SyntaxError(at_line, "plain argument after a keyword argument");
      } else {
        values.push_back(std::move(argument));
      }
    }
    return MakeCall(builtin, shown, std::move(values), std::move(keywords), at_line);
  }

  Parsed MakeCall(const Builtin* builtin, const std::string& shown,
                  std::vector<ExpressionPtr> values, KeywordExpressions keywords, int at_line) {
    if (builtin == nullptr) return Unsupported(at_line, shown);
    const bool any_keyword = !builtin->keywords.empty() && builtin->keywords[0] == "*";
    if (!any_keyword) {
      // A keyword that names a value goes to that value's place.
      const size_t places = builtin->max_values - builtin->keywords.size();
      for (auto& [name, value] : keywords) {
        const auto it = std::find(builtin->keywords.begin(), builtin->keywords.end(), name);
        if (it == builtin->keywords.end()) {
          return Unsupported(at_line, absl::StrCat(shown, " with argument ", name, "="));
        }
        const size_t place = places + static_cast<size_t>(it - builtin->keywords.begin());
        if (place < values.size() && values[place] != nullptr) {
          return SyntaxError(at_line, absl::StrCat(shown, ": argument ", name, " given twice"));
        }
        if (place >= values.size()) values.resize(place + 1);
        values[place] = std::move(value);
      }
      keywords.clear();
    }
    if (values.size() < builtin->min_values || values.size() > builtin->max_values) {
      return SyntaxError(at_line, absl::StrCat(shown, ": wrong number of arguments"));
    }
    values.resize(builtin->max_values);
    STRAIT_ASSIGN_OR_RETURN(ExpressionPtr node, Make(Kind::kBuiltin, at_line, std::move(values)));
    for (const auto& [name, value] : keywords)
      node->depth = std::max(node->depth, value->depth + 1);
    node->keywords = std::move(keywords);
    node->builtin = builtin;
    return node;
  }

  // ---- Statements ----
  absl::Status ParseBlock(std::initializer_list<std::string_view> ends, Block* block) {
    const Nest nest(this);
    STRAIT_RETURN_IF_ERROR(nest.Check());
    for (;;) {
      switch (Now().kind) {
        case Token::Kind::kEnd:
          if (ends.size() == 0) return absl::OkStatus();
          return SyntaxError(line(), absl::StrCat("template ends where {% ",
                                                  ToAbsl(*(ends.end() - 1)), " %} is missing"));
        case Token::Kind::kText:
          block->push_back({.kind = Statement::Kind::kText, .line = line(), .text = Now().text});
          ++at_;
          break;
        case Token::Kind::kOutputBegin: {
          Statement output{.kind = Statement::Kind::kOutput, .line = line()};
          ++at_;
          STRAIT_ASSIGN_OR_RETURN(output.expression, ParseTuple());
          if (!Is(Token::Kind::kOutputEnd)) return Expected("}}");
          ++at_;
          block->push_back(std::move(output));
          break;
        }
        case Token::Kind::kBlockBegin: {
          const std::string& name = Ahead(1).text;
          if (Ahead(1).kind == Token::Kind::kName &&
              std::find(ends.begin(), ends.end(), name) != ends.end()) {
            return absl::OkStatus();
          }
          ++at_;
          STRAIT_RETURN_IF_ERROR(ParseStatement(block));
          break;
        }
        default:
          return Expected("a statement");
      }
    }
  }

  absl::Status EndTag() {
    if (!Is(Token::Kind::kBlockEnd)) return Expected("%}");
    ++at_;
    return absl::OkStatus();
  }

  // The "{% name %}" at which ParseBlock stopped.
  absl::Status TakeTag() {
    at_ += 2;
    return EndTag();
  }

  absl::Status ParseStatement(Block* block) {
    const int at_line = line();
    STRAIT_ASSIGN_OR_RETURN(const std::string name, Name());
    Statement statement{.kind = Statement::Kind::kText, .line = at_line};
    if (name == "if") {
      STRAIT_RETURN_IF_ERROR(ParseIf(&statement));
    } else if (name == "for") {
      STRAIT_RETURN_IF_ERROR(ParseFor(&statement));
    } else if (name == "set") {
      STRAIT_RETURN_IF_ERROR(ParseSet(&statement));
    } else if (name == "break" || name == "continue") {
      if (loops_ == 0) return SyntaxError(at_line, absl::StrCat(name, " outside a loop"));
      statement.kind = name == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue;
      STRAIT_RETURN_IF_ERROR(EndTag());
    } else if (name.starts_with("end") || name == "else" || name == "elif") {
      return SyntaxError(at_line, absl::StrCat("{% ", name, " %} without its beginning"));
    } else {
      return Unsupported(at_line, absl::StrCat("statement {% ", name, " %}"));
    }
    block->push_back(std::move(statement));
    return absl::OkStatus();
  }

  absl::Status ParseIf(Statement* statement) {
    statement->kind = Statement::Kind::kIf;
    for (;;) {
      Statement::Branch branch;
      STRAIT_ASSIGN_OR_RETURN(branch.condition, ParseTuple());
      STRAIT_RETURN_IF_ERROR(EndTag());
      STRAIT_RETURN_IF_ERROR(ParseBlock({"elif", "else", "endif"}, &branch.body));
      statement->branches.push_back(std::move(branch));
      const std::string next = Ahead(1).text;
      if (next == "elif") {
        at_ += 2;
        continue;
      }
      STRAIT_RETURN_IF_ERROR(TakeTag());
      if (next == "endif") return absl::OkStatus();
      STRAIT_RETURN_IF_ERROR(ParseBlock({"endif"}, &statement->otherwise));
      return TakeTag();
    }
  }

  absl::Status ParseFor(Statement* statement) {
    statement->kind = Statement::Kind::kFor;
    STRAIT_RETURN_IF_ERROR(ParseTargets(statement));
    if (!TakeName("in")) return Expected("\"in\"");
    // Not ParseExpression: an "if" here filters the loop.
    STRAIT_ASSIGN_OR_RETURN(statement->expression, ParseOr());
    if (IsOperator(",")) return Unsupported(line(), "for over a bare tuple");
    if (TakeName("if")) {
      STRAIT_ASSIGN_OR_RETURN(statement->condition, ParseExpression());
    }
    if (IsName("recursive")) return Unsupported(line(), "recursive loop");
    STRAIT_RETURN_IF_ERROR(EndTag());
    ++loops_;
    const absl::Status body = ParseBlock({"else", "endfor"}, &statement->body);
    --loops_;
    STRAIT_RETURN_IF_ERROR(body);
    const bool has_else = Ahead(1).text == "else";
    STRAIT_RETURN_IF_ERROR(TakeTag());
    if (!has_else) return absl::OkStatus();
    STRAIT_RETURN_IF_ERROR(ParseBlock({"endfor"}, &statement->otherwise));
    return TakeTag();
  }

  absl::Status ParseTargets(Statement* statement) {
    const bool bracket = Take("(");
    do {
      const int at_line = line();
      STRAIT_ASSIGN_OR_RETURN(std::string name, Name());
      if (name == "true" || name == "false" || name == "none" || name == "loop") {
        return SyntaxError(at_line, absl::StrCat("cannot assign to ", name));
      }
      statement->targets.push_back(std::move(name));
    } while (Take(","));
    return bracket ? Expect(")") : absl::OkStatus();
  }

  absl::Status ParseSet(Statement* statement) {
    statement->kind = Statement::Kind::kSet;
    STRAIT_RETURN_IF_ERROR(ParseTargets(statement));
    if (Take(".")) {
      if (statement->targets.size() != 1)
        return Unsupported(line(), "attribute in a list of targets");
      STRAIT_ASSIGN_OR_RETURN(statement->attribute, Name());
    }
    if (Take("=")) {
      STRAIT_ASSIGN_OR_RETURN(statement->expression, ParseTuple());
      return EndTag();
    }
    if (IsOperator("|")) return Unsupported(line(), "filter on a set block");
    if (!Is(Token::Kind::kBlockEnd)) return Expected("\"=\"");
    if (statement->targets.size() != 1) return SyntaxError(line(), "set block of several targets");
    statement->kind = Statement::Kind::kSetBlock;
    STRAIT_RETURN_IF_ERROR(EndTag());
    // A break inside would leave the block half written; Jinja's own compiler refuses it as well.
    const int loops = std::exchange(loops_, 0);
    const absl::Status body = ParseBlock({"endset"}, &statement->body);
    loops_ = loops;
    STRAIT_RETURN_IF_ERROR(body);
    return TakeTag();
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  size_t nesting_ = 0;
  int loops_ = 0;
};

}  // namespace

absl::StatusOr<Block> ParseTemplate(std::string_view source) {
  STRAIT_ASSIGN_OR_RETURN(std::vector<Token> tokens, Lex(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace strait::jinja
