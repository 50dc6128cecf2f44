// SPDX-License-Identifier: Apache-2.0
//
// Renderer runs a parsed template once.
//
// Owns:    the namespaces that the template makes.
// Borrows: the tree, for the time of Run.
// Thread:  one.
// Errors:  InvalidArgument, with the line, for what Python would refuse and for raise_exception;
//          ResourceExhausted over kMaxRenderBytes or kMaxRenderSteps (chat_template.h).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/text/jinja_ast.h"

namespace strait::jinja {

class Renderer {
 public:
  explicit Renderer(std::vector<std::pair<std::string, Value>> globals);

  absl::StatusOr<std::string> Run(const Block& block);

 private:
  enum class Flow { kOn, kBreak, kContinue };
  using Scope = std::vector<std::pair<std::string, Value>>;

  absl::StatusOr<Flow> RunBlock(const Block& block, std::string* out);
  absl::StatusOr<Flow> RunStatement(const Statement& statement, std::string* out);
  absl::StatusOr<Flow> RunFor(const Statement& statement, std::string* out);
  absl::Status RunSet(const Statement& statement);
  absl::Status Append(const Value& value, int line, std::string* out);

  absl::StatusOr<Value> Evaluate(const Expression& expression);
  absl::StatusOr<Value> EvaluateUnmarked(const Expression& expression);
  absl::StatusOr<Value> Attribute(const Value& subject, const std::string& name) const;
  absl::StatusOr<Value> Item(const Value& subject, const Value& key) const;
  absl::StatusOr<Value> Slice(const Expression& expression);
  absl::StatusOr<Value> Call(const Expression& expression);
  absl::StatusOr<Value> Arithmetic(const std::string& op, const Value& left, const Value& right);
  absl::StatusOr<Value> Compare(const Expression& expression);
  absl::StatusOr<Value> MakeNamespace(std::vector<std::pair<std::string, Value>> members);

  absl::Status Charge(size_t steps);
  absl::Status Bind(const std::vector<std::string>& targets, const Value& value);
  const Value* Find(std::string_view name) const;
  void Assign(const std::string& name, Value value);

  std::vector<Scope> scopes_;
  std::vector<std::unique_ptr<Namespace>> namespaces_;
  size_t steps_ = 0;
};

}  // namespace strait::jinja
