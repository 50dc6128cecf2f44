// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/jinja_renderer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/jinja_builtins.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::jinja {
namespace {

constexpr std::string_view kPrefix = "chat template, line ";
constexpr size_t kBytesPerStep = 1024;  // a long text costs more steps than a short one

absl::Status AtLine(const absl::Status& status, int line) {
  if (status.ok() || absl::StartsWith(status.message(), ToAbsl(kPrefix))) return status;
  return absl::Status(status.code(), absl::StrCat(ToAbsl(kPrefix), line, ": ", status.message()));
}

absl::Status Refuse(std::string_view what, const Value& value) {
  if (value.is_undefined()) {
    return absl::InvalidArgumentError(absl::StrCat("'", value.undefined_name(), "' is undefined"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(ToAbsl(what), " of a value of type ", ToAbsl(value.TypeName())));
}

// Python's rounding is towards minus infinity.
int64_t FloorDivide(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

absl::StatusOr<bool> Less(const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) return a.string() < b.string();
  if (a.AsInt().has_value() && b.AsInt().has_value()) return *a.AsInt() < *b.AsInt();
  const std::optional<double> x = a.AsNumber();
  const std::optional<double> y = b.AsNumber();
  if (x.has_value() && y.has_value()) return *x < *y;
  return Refuse("comparison", x.has_value() || a.is_string() ? b : a);
}

// A Python slice as first index, step and count.
struct Steps {
  int64_t start;
  int64_t step;
  int64_t count;
};

Steps SliceSteps(std::optional<int64_t> start, std::optional<int64_t> stop, int64_t step,
                 int64_t size) {
  const auto clamp = [&](std::optional<int64_t> bound, int64_t missing) {
    if (!bound.has_value()) return missing;
    const int64_t index = *bound < 0 ? std::max<int64_t>(*bound, -size) + size : *bound;
    const bool before = *bound < -size;
    if (step > 0) return before ? 0 : std::min(index, size);
    return before ? int64_t{-1} : std::min(index, size - 1);
  };
  const int64_t first = clamp(start, step > 0 ? 0 : size - 1);
  const int64_t last = clamp(stop, step > 0 ? size : -1);
  int64_t count = 0;
  if (step > 0 && last > first) count = (last - first - 1) / step + 1;
  if (step < 0 && last < first) count = (first - last - 1) / -step + 1;
  return {first, step, count};
}

}  // namespace

Renderer::Renderer(std::vector<std::pair<std::string, Value>> globals) {
  scopes_.push_back(std::move(globals));
}

absl::StatusOr<std::string> Renderer::Run(const Block& block) {
  std::string out;
  STRAIT_RETURN_IF_ERROR(RunBlock(block, &out).status());
  return out;
}

absl::Status Renderer::Charge(size_t steps) {
  steps_ += steps;
  if (steps_ <= kMaxRenderSteps) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("more than ", kMaxRenderSteps, " steps"));
}

const Value* Renderer::Find(std::string_view name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    for (const auto& [key, value] : *scope) {
      if (key == name) return &value;
    }
  }
  return nullptr;
}

void Renderer::Assign(const std::string& name, Value value) {
  for (auto& [key, known] : scopes_.back()) {
    if (key != name) continue;
    known = std::move(value);
    return;
  }
  scopes_.back().emplace_back(name, std::move(value));
}

absl::Status Renderer::Bind(const std::vector<std::string>& targets, const Value& value) {
  if (targets.size() == 1) {
    Assign(targets[0], value);
    return absl::OkStatus();
  }
  if (!value.is_list() || value.list().items.size() != targets.size()) {
    return absl::InvalidArgumentError(absl::StrCat("needs ", targets.size(), " values to unpack"));
  }
  for (size_t i = 0; i < targets.size(); ++i) Assign(targets[i], value.list().items[i]);
  return absl::OkStatus();
}

absl::Status Renderer::Append(const Value& value, int line, std::string* out) {
  const absl::StatusOr<std::string> text = value.ToText();
  if (!text.ok()) return AtLine(text.status(), line);
  if (out->size() + text->size() > kMaxRenderBytes) {
    return AtLine(absl::ResourceExhaustedError(
                      absl::StrCat("prompt of more than ", kMaxRenderBytes, " bytes")),
                  line);
  }
  *out += *text;
  return absl::OkStatus();
}

absl::StatusOr<Renderer::Flow> Renderer::RunBlock(const Block& block, std::string* out) {
  for (const Statement& statement : block) {
    if (absl::Status charged = Charge(1); !charged.ok()) return AtLine(charged, statement.line);
    STRAIT_ASSIGN_OR_RETURN(const Flow flow, RunStatement(statement, out));
    if (flow != Flow::kOn) return flow;
  }
  return Flow::kOn;
}

absl::StatusOr<Renderer::Flow> Renderer::RunStatement(const Statement& statement,
                                                      std::string* out) {
  switch (statement.kind) {
    case Statement::Kind::kText:
      STRAIT_RETURN_IF_ERROR(Append(Value::String(statement.text), statement.line, out));
      return Flow::kOn;
    case Statement::Kind::kOutput: {
      STRAIT_ASSIGN_OR_RETURN(const Value value, Evaluate(*statement.expression));
      STRAIT_RETURN_IF_ERROR(Append(value, statement.line, out));
      return Flow::kOn;
    }
    case Statement::Kind::kSet: {
      const absl::Status status = RunSet(statement);
      if (!status.ok()) return AtLine(status, statement.line);
      return Flow::kOn;
    }
    case Statement::Kind::kSetBlock: {
      std::string text;
      scopes_.emplace_back();
      const absl::StatusOr<Flow> flow = RunBlock(statement.body, &text);
      scopes_.pop_back();
      STRAIT_RETURN_IF_ERROR(flow.status());
      Assign(statement.targets[0], Value::String(std::move(text)));
      return Flow::kOn;
    }
    case Statement::Kind::kFor:
      return RunFor(statement, out);
    case Statement::Kind::kIf:
      for (const Statement::Branch& branch : statement.branches) {
        STRAIT_ASSIGN_OR_RETURN(const Value condition, Evaluate(*branch.condition));
        if (condition.Truthy()) return RunBlock(branch.body, out);
      }
      return RunBlock(statement.otherwise, out);
    case Statement::Kind::kBreak:
      return Flow::kBreak;
    case Statement::Kind::kContinue:
      return Flow::kContinue;
  }
  return absl::InternalError("unknown statement");
}

absl::Status Renderer::RunSet(const Statement& statement) {
  STRAIT_ASSIGN_OR_RETURN(Value value, Evaluate(*statement.expression));
  if (statement.attribute.empty()) return Bind(statement.targets, value);
  const Value* target = Find(statement.targets[0]);
  Namespace* ns = target == nullptr ? nullptr : target->AsNamespace();
  if (ns == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("cannot set .", statement.attribute, " of '",
                                                   statement.targets[0],
                                                   "', which is no namespace"));
  }
  if (Value* member = ns->Find(statement.attribute)) {
    *member = std::move(value);
  } else {
    ns->members.emplace_back(statement.attribute, std::move(value));
  }
  return absl::OkStatus();
}

absl::StatusOr<Renderer::Flow> Renderer::RunFor(const Statement& statement, std::string* out) {
  STRAIT_ASSIGN_OR_RETURN(const Value iterable, Evaluate(*statement.expression));
  std::vector<Value> items;
  if (iterable.is_list()) {
    items = iterable.list().items;
  } else if (!iterable.is_undefined()) {
    const std::vector<Value> arguments{iterable};
    const absl::StatusOr<Value> listed = FindFilter("list")->call(arguments, {});
    if (!listed.ok()) return AtLine(listed.status(), statement.line);
    items = listed->list().items;
  }
  if (absl::Status charged = Charge(items.size()); !charged.ok())
    return AtLine(charged, statement.line);

  if (statement.condition != nullptr) {
    std::vector<Value> chosen;
    for (const Value& item : items) {
      scopes_.emplace_back();
      const absl::Status bound = Bind(statement.targets, item);
      const absl::StatusOr<Value> condition =
          bound.ok() ? Evaluate(*statement.condition) : absl::StatusOr<Value>(bound);
      scopes_.pop_back();
      if (!condition.ok()) return AtLine(condition.status(), statement.line);
      if (condition->Truthy()) chosen.push_back(item);
    }
    items = std::move(chosen);
  }
  if (items.empty()) return RunBlock(statement.otherwise, out);

  const auto loop = std::make_shared<LoopState>(LoopState{.items = std::move(items)});
  for (; loop->index0 < loop->items.size(); ++loop->index0) {
    // Each round has variables of its own; what lives longer is in a namespace.
    scopes_.emplace_back();
    Assign("loop", Value::Of(loop));
    const absl::Status bound = Bind(statement.targets, loop->items[loop->index0]);
    const absl::StatusOr<Flow> flow = bound.ok()
                                          ? RunBlock(statement.body, out)
                                          : absl::StatusOr<Flow>(AtLine(bound, statement.line));
    scopes_.pop_back();
    STRAIT_RETURN_IF_ERROR(flow.status());
    if (*flow == Flow::kBreak) break;
  }
  return Flow::kOn;
}

absl::StatusOr<Value> Renderer::Evaluate(const Expression& expression) {
  absl::Status charged = Charge(1);
  if (!charged.ok()) return AtLine(charged, expression.line);
  absl::StatusOr<Value> value = EvaluateUnmarked(expression);
  if (!value.ok()) return AtLine(value.status(), expression.line);
  if (!value->is_string()) return value;
  const size_t bytes = value->string().size();
  if (bytes > kMaxRenderBytes) {
    return AtLine(
        absl::ResourceExhaustedError(absl::StrCat("text of more than ", kMaxRenderBytes, " bytes")),
        expression.line);
  }
  charged = Charge(bytes / kBytesPerStep);
  if (!charged.ok()) return AtLine(charged, expression.line);
  return value;
}

absl::StatusOr<Value> Renderer::EvaluateUnmarked(const Expression& expression) {
  using Kind = Expression::Kind;
  const auto& operands = expression.operands;
  switch (expression.kind) {
    case Kind::kLiteral:
      return expression.literal;
    case Kind::kName: {
      const Value* value = Find(expression.name);
      return value == nullptr ? Value::MakeUndefined(expression.name) : *value;
    }
    case Kind::kList: {
      std::vector<Value> items;
      for (const ExpressionPtr& operand : operands) {
        STRAIT_ASSIGN_OR_RETURN(Value item, Evaluate(*operand));
        items.push_back(std::move(item));
      }
      return Value::MakeList(std::move(items));
    }
    case Kind::kDict: {
      std::vector<std::pair<std::string, Value>> items;
      for (size_t i = 0; i < operands.size(); i += 2) {
        STRAIT_ASSIGN_OR_RETURN(const Value key, Evaluate(*operands[i]));
        STRAIT_ASSIGN_OR_RETURN(Value value, Evaluate(*operands[i + 1]));
        if (!key.is_string()) return Refuse("dict key", key);
        std::erase_if(items, [&](const auto& item) { return item.first == key.string(); });
        items.emplace_back(key.string(), std::move(value));
      }
      return Value::MakeDict(std::move(items));
    }
    case Kind::kAttribute: {
      STRAIT_ASSIGN_OR_RETURN(const Value subject, Evaluate(*operands[0]));
      return Attribute(subject, expression.name);
    }
    case Kind::kItem: {
      STRAIT_ASSIGN_OR_RETURN(const Value subject, Evaluate(*operands[0]));
      STRAIT_ASSIGN_OR_RETURN(const Value key, Evaluate(*operands[1]));
      return Item(subject, key);
    }
    case Kind::kSlice:
      return Slice(expression);
    case Kind::kBuiltin:
      return Call(expression);
    case Kind::kNot: {
      STRAIT_ASSIGN_OR_RETURN(const Value value, Evaluate(*operands[0]));
      return Value::Bool(!value.Truthy());
    }
    case Kind::kNegate: {
      STRAIT_ASSIGN_OR_RETURN(const Value value, Evaluate(*operands[0]));
      if (value.is_float()) return Value::Float(-*value.AsNumber());
      return Arithmetic("-", Value::Int(0), value);
    }
    case Kind::kAnd: {
      STRAIT_ASSIGN_OR_RETURN(Value left, Evaluate(*operands[0]));
      if (!left.Truthy()) return left;
      return Evaluate(*operands[1]);
    }
    case Kind::kOr: {
      STRAIT_ASSIGN_OR_RETURN(Value left, Evaluate(*operands[0]));
      if (left.Truthy()) return left;
      return Evaluate(*operands[1]);
    }
    case Kind::kConditional: {
      STRAIT_ASSIGN_OR_RETURN(const Value condition, Evaluate(*operands[1]));
      if (condition.Truthy()) return Evaluate(*operands[0]);
      if (operands[2] == nullptr) return Value::MakeUndefined("inline if without else");
      return Evaluate(*operands[2]);
    }
    case Kind::kConcat: {
      std::string text;
      for (const ExpressionPtr& operand : operands) {
        STRAIT_ASSIGN_OR_RETURN(const Value value, Evaluate(*operand));
        STRAIT_RETURN_IF_ERROR(Append(value, expression.line, &text));
      }
      return Value::String(std::move(text));
    }
    case Kind::kArithmetic: {
      STRAIT_ASSIGN_OR_RETURN(const Value left, Evaluate(*operands[0]));
      STRAIT_ASSIGN_OR_RETURN(const Value right, Evaluate(*operands[1]));
      return Arithmetic(expression.name, left, right);
    }
    case Kind::kCompare:
      return Compare(expression);
  }
  return absl::InternalError("unknown expression");
}

absl::StatusOr<Value> Renderer::Attribute(const Value& subject, const std::string& name) const {
  if (Namespace* ns = subject.AsNamespace()) {
    const Value* member = ns->Find(name);
    return member == nullptr ? Value::MakeUndefined(name) : *member;
  }
  if (const LoopState* loop = subject.AsLoop()) {
    const size_t at = loop->index0;
    const auto& items = loop->items;
    const auto number = [](size_t n) { return Value::Int(static_cast<int64_t>(n)); };
    if (name == "index0") return number(at);
    if (name == "index") return number(at + 1);
    if (name == "first") return Value::Bool(at == 0);
    if (name == "last") return Value::Bool(at + 1 == items.size());
    if (name == "length") return number(items.size());
    if (name == "revindex") return number(items.size() - at);
    if (name == "revindex0") return number(items.size() - at - 1);
    if (name == "previtem") return at == 0 ? Value::MakeUndefined(name) : items[at - 1];
    if (name == "nextitem") {
      return at + 1 == items.size() ? Value::MakeUndefined(name) : items[at + 1];
    }
    return absl::UnimplementedError(absl::StrCat("loop.", name, " is not supported"));
  }
  if (subject.is_undefined()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", subject.undefined_name(), "' is undefined and has no '", name, "'"));
  }
  if (subject.is_dict()) {
    if (const Value* value = subject.dict().Find(name)) return *value;
  }
  return Value::MakeUndefined(name);
}

absl::StatusOr<Value> Renderer::Item(const Value& subject, const Value& key) const {
  const std::optional<int64_t> index = key.AsInt();
  if (index.has_value() && (subject.is_list() || subject.is_string())) {
    const std::vector<std::string_view> characters =
        subject.is_string() ? Characters(subject.string()) : std::vector<std::string_view>();
    const auto size =
        static_cast<int64_t>(subject.is_list() ? subject.list().items.size() : characters.size());
    const int64_t at = *index < 0 ? *index + size : *index;
    if (at < 0 || at >= size) return Value::MakeUndefined(absl::StrCat("item ", *index));
    if (subject.is_list()) return subject.list().items[static_cast<size_t>(at)];
    return Value::String(std::string(characters[static_cast<size_t>(at)]));
  }
  if (key.is_string() && !subject.is_list() && !subject.is_string()) {
    return Attribute(subject, key.string());
  }
  if (subject.is_undefined()) return Refuse("item", subject);
  return Value::MakeUndefined(key.is_string() ? key.string() : "item");
}

absl::StatusOr<Value> Renderer::Slice(const Expression& expression) {
  STRAIT_ASSIGN_OR_RETURN(const Value subject, Evaluate(*expression.operands[0]));
  std::optional<int64_t> bounds[3];
  for (size_t i = 0; i < 3; ++i) {
    if (expression.operands[i + 1] == nullptr) continue;
    STRAIT_ASSIGN_OR_RETURN(const Value bound, Evaluate(*expression.operands[i + 1]));
    if (bound.is_none()) continue;
    bounds[i] = bound.AsInt();
    if (!bounds[i].has_value()) return Refuse("slice bound", bound);
    // Far outside is as good as just outside, and cannot overflow.
    static constexpr int64_t kFar = std::numeric_limits<int32_t>::max();
    bounds[i] = std::clamp(*bounds[i], -kFar, kFar);
  }
  const int64_t step = bounds[2].value_or(1);
  if (step == 0) return absl::InvalidArgumentError("slice with a step of 0");
  if (subject.is_list()) {
    const auto& items = subject.list().items;
    const Steps steps = SliceSteps(bounds[0], bounds[1], step, static_cast<int64_t>(items.size()));
    STRAIT_RETURN_IF_ERROR(Charge(static_cast<size_t>(steps.count)));
    std::vector<Value> chosen;
    for (int64_t i = 0; i < steps.count; ++i) {
      chosen.push_back(items[static_cast<size_t>(steps.start + i * step)]);
    }
    return Value::MakeList(std::move(chosen));
  }
  if (!subject.is_string()) return Refuse("slice", subject);
  const std::vector<std::string_view> characters = Characters(subject.string());
  const Steps steps =
      SliceSteps(bounds[0], bounds[1], step, static_cast<int64_t>(characters.size()));
  std::string text;
  for (int64_t i = 0; i < steps.count; ++i) {
    text += characters[static_cast<size_t>(steps.start + i * step)];
  }
  return Value::String(std::move(text));
}

absl::StatusOr<Value> Renderer::MakeNamespace(std::vector<std::pair<std::string, Value>> members) {
  namespaces_.push_back(std::make_unique<Namespace>(Namespace{std::move(members)}));
  return Value::Of(namespaces_.back().get());
}

absl::StatusOr<Value> Renderer::Call(const Expression& expression) {
  std::vector<Value> values;
  for (const ExpressionPtr& operand : expression.operands) {
    if (operand == nullptr) {
      values.emplace_back();
      continue;
    }
    STRAIT_ASSIGN_OR_RETURN(Value value, Evaluate(*operand));
    values.push_back(std::move(value));
  }
  Keywords keywords;
  for (const auto& [name, operand] : expression.keywords) {
    STRAIT_ASSIGN_OR_RETURN(Value value, Evaluate(*operand));
    keywords.emplace_back(name, std::move(value));
  }
  if (expression.builtin->name == "namespace") return MakeNamespace(std::move(keywords));
  STRAIT_ASSIGN_OR_RETURN(Value result, expression.builtin->call(values, keywords));
  if (result.is_list()) STRAIT_RETURN_IF_ERROR(Charge(result.list().items.size()));
  return result;
}

absl::StatusOr<Value> Renderer::Arithmetic(const std::string& op, const Value& left,
                                           const Value& right) {
  if (op == "+" && left.is_string() && right.is_string()) {
    if (left.string().size() + right.string().size() > kMaxRenderBytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("text of more than ", kMaxRenderBytes, " bytes"));
    }
    return Value::String(absl::StrCat(left.string(), right.string()));
  }
  if (op == "+" && left.is_list() && right.is_list()) {
    std::vector<Value> items = left.list().items;
    items.insert(items.end(), right.list().items.begin(), right.list().items.end());
    STRAIT_RETURN_IF_ERROR(Charge(items.size()));
    return Value::MakeList(std::move(items));
  }
  if (op == "*" && left.is_string() && right.AsInt().has_value()) {
    const int64_t times = std::max<int64_t>(*right.AsInt(), 0);
    const size_t size = left.string().size();
    if (size > 0 && times > static_cast<int64_t>(kMaxRenderBytes / size)) {
      return absl::ResourceExhaustedError(
          absl::StrCat("text of more than ", kMaxRenderBytes, " bytes"));
    }
    std::string text;
    for (int64_t i = 0; size > 0 && i < times; ++i) text += left.string();
    return Value::String(std::move(text));
  }
  if (!left.is_number() || !right.is_number()) {
    if (left.is_undefined()) return Refuse(op, left);
    if (right.is_undefined()) return Refuse(op, right);
    return absl::InvalidArgumentError(absl::StrCat(
        "cannot apply ", op, " to ", ToAbsl(left.TypeName()), " and ", ToAbsl(right.TypeName())));
  }
  const bool divides = op == "/" || op == "//" || op == "%";
  if (divides && *right.AsNumber() == 0) return absl::InvalidArgumentError("division by zero");
  const std::optional<int64_t> a = left.AsInt();
  const std::optional<int64_t> b = right.AsInt();
  if (!a.has_value() || !b.has_value() || op == "/") {
    const double x = *left.AsNumber();
    const double y = *right.AsNumber();
    if (op == "+") return Value::Float(x + y);
    if (op == "-") return Value::Float(x - y);
    if (op == "*") return Value::Float(x * y);
    if (op == "/") return Value::Float(x / y);
    if (op == "//") return Value::Float(std::floor(x / y));
    return Value::Float(x - y * std::floor(x / y));
  }
  int64_t result = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(*a, *b, &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(*a, *b, &result);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(*a, *b, &result);
  } else if (*a == std::numeric_limits<int64_t>::min() && *b == -1) {
    overflow = true;
  } else {
    result = op == "//" ? FloorDivide(*a, *b) : *a - *b * FloorDivide(*a, *b);
  }
  if (overflow) return absl::InvalidArgumentError("integer over 64 bits");
  return Value::Int(result);
}

absl::StatusOr<Value> Renderer::Compare(const Expression& expression) {
  STRAIT_ASSIGN_OR_RETURN(Value left, Evaluate(*expression.operands[0]));
  for (size_t i = 0; i < expression.operators.size(); ++i) {
    STRAIT_ASSIGN_OR_RETURN(Value right, Evaluate(*expression.operands[i + 1]));
    const std::string& op = expression.operators[i];
    absl::StatusOr<bool> holds = false;
    if (op == "==" || op == "!=") {
      holds = left.Equals(right) == (op == "==");
    } else if (op == "in" || op == "not in") {
      holds = Contains(right, left);
      if (holds.ok() && op == "not in") holds = !*holds;
    } else if (op == "<" || op == ">") {
      holds = op == "<" ? Less(left, right) : Less(right, left);
    } else {
      holds = op == "<=" ? Less(right, left) : Less(left, right);
      if (holds.ok()) holds = !*holds;
    }
    STRAIT_RETURN_IF_ERROR(holds.status());
    if (!*holds) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

}  // namespace strait::jinja
