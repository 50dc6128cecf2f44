// SPDX-License-Identifier: Apache-2.0
//
// The tree of a parsed template.
//
// Thread:  immutable once parsed.
// Limits:  kMaxExpressionDepth levels of an expression, kMaxTemplateNesting of blocks: evaluation
//          recurses.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/text/jinja_value.h"

namespace strait::jinja {

inline constexpr int kMaxExpressionDepth = 500;

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;
struct Builtin;

struct Expression {
  enum class Kind {
    kLiteral,    // literal
    kName,       // name
    kList,       // operands
    kDict,       // operands: key, value, key, value …
    kAttribute,  // operands[0].name
    kItem,       // operands[0][operands[1]]
    kSlice,      // operands[0][operands[1]:operands[2]:operands[3]], each but the first may be null
    kBuiltin,    // builtin applied to operands (for filter, test and method: the first is the
                 // subject)
    kNot,        // of operands[0]
    kNegate,
    kAnd,
    kOr,
    kConditional,  // operands[0] if operands[1] else operands[2] (may be null)
    kConcat,       // all operands as text (~)
    kArithmetic,   // operands[0] name operands[1], name one of + - * / // %
    kCompare,      // operands[0] operators[0] operands[1] operators[1] operands[2] …
  };
  Kind kind;
  int line;
  int depth = 1;
  std::string name;
  Value literal;
  std::vector<ExpressionPtr> operands;
  std::vector<std::pair<std::string, ExpressionPtr>> keywords;
  std::vector<std::string> operators;  // ==, !=, <, <=, >, >=, in, not in
  const Builtin* builtin = nullptr;
};

struct Statement;
using Block = std::vector<Statement>;

struct Statement {
  enum class Kind {
    kText,      // text
    kOutput,    // expression
    kSet,       // targets = expression; with `attribute`: targets[0].attribute = expression
    kSetBlock,  // targets[0] = what body writes
    kFor,       // targets in expression [if condition]: body, else otherwise
    kIf,        // branches, otherwise
    kBreak,
    kContinue,
  };
  struct Branch {
    ExpressionPtr condition;
    Block body;
  };
  Kind kind;
  int line;
  std::string text;
  std::vector<std::string> targets;
  std::string attribute;
  ExpressionPtr expression;
  ExpressionPtr condition;
  Block body;
  Block otherwise;
  std::vector<Branch> branches;
};

}  // namespace strait::jinja
