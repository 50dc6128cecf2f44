// SPDX-License-Identifier: Apache-2.0
//
// Value is what a template expression evaluates to, with Python's rules for truth, equality, text
// and JSON.
//
// Borrows: a namespace, owned by the Renderer that made it.
// Thread:  immutable but for namespaces; one render, one thread.
// Errors:  InvalidArgument for an operation that Python refuses.
// Limits:  kMaxValueDepth levels of lists and dicts.
// Why:     Lists and dicts are shared and never changed, as in transformers' immutable sandbox;
//          only a namespace can be assigned to.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/base/json.h"

namespace strait::jinja {

inline constexpr int kMaxValueDepth = 128;

struct Namespace;
struct LoopState;
class Value;

struct List {
  std::vector<Value> items;
  int depth = 1;
};

struct Dict {
  std::vector<std::pair<std::string, Value>> items;  // in order of insertion
  int depth = 1;
  const Value* Find(std::string_view key) const;
};

class Value {
 public:
  struct Undefined {
    std::string name;  // for errors
  };
  struct None {};

  Value() : data_(Undefined{}) {}
  static Value MakeUndefined(std::string_view name) { return Value(Undefined{std::string(name)}); }
  static Value MakeNone() { return Value(None{}); }
  static Value Bool(bool b) { return Value(b); }
  static Value Int(int64_t i) { return Value(i); }
  static Value Float(double d) { return Value(d); }
  static Value String(std::string s) {
    return Value(std::make_shared<const std::string>(std::move(s)));
  }
  static absl::StatusOr<Value> MakeList(std::vector<Value> items);
  static absl::StatusOr<Value> MakeDict(std::vector<std::pair<std::string, Value>> items);
  static Value Of(Namespace* ns) { return Value(ns); }
  static Value Of(std::shared_ptr<const LoopState> loop) { return Value(std::move(loop)); }
  static absl::StatusOr<Value> FromJson(const json::Value& value);

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_string() const { return std::holds_alternative<StringPtr>(data_); }
  bool is_list() const { return std::holds_alternative<ListPtr>(data_); }
  bool is_dict() const { return std::holds_alternative<DictPtr>(data_); }

  // REQUIRES: is_…()
  const std::string& string() const { return *std::get<StringPtr>(data_); }
  const List& list() const { return *std::get<ListPtr>(data_); }
  const Dict& dict() const { return *std::get<DictPtr>(data_); }

  // The integer of an int or bool; the number of those or a float.
  std::optional<int64_t> AsInt() const;
  std::optional<double> AsNumber() const;
  Namespace* AsNamespace() const;   // null when it is none
  const LoopState* AsLoop() const;  // null when it is none
  const std::string& undefined_name() const { return std::get<Undefined>(data_).name; }

  bool Truthy() const;
  bool Equals(const Value& other) const;
  std::string_view TypeName() const;  // Python's: "str", "NoneType" …

  // str(value). Lists and dicts are refused: no template of ours prints Python's own notation.
  absl::StatusOr<std::string> ToText() const;

  // json.dumps(value, ensure_ascii=False, indent=indent), indent < 0 for none.
  absl::StatusOr<std::string> ToJson(int indent) const;

 private:
  using StringPtr = std::shared_ptr<const std::string>;
  using ListPtr = std::shared_ptr<const List>;
  using DictPtr = std::shared_ptr<const Dict>;
  using Data = std::variant<Undefined, None, bool, int64_t, double, StringPtr, ListPtr, DictPtr,
                            Namespace*, std::shared_ptr<const LoopState>>;
  explicit Value(Data data) : data_(std::move(data)) {}
  absl::Status AppendJson(int indent, int level, std::string* out) const;
  int depth() const;

  Data data_;
};

struct Namespace {
  std::vector<std::pair<std::string, Value>> members;
  Value* Find(std::string_view name);
};

// What `loop` is inside a for.
struct LoopState {
  std::vector<Value> items;
  size_t index0 = 0;
};

// Python's repr of a float: "1.0", "1e+16".
std::string FloatText(double value);

// Characters, as Python counts them. REQUIRES (all): valid UTF-8.
size_t CountCharacters(std::string_view text);
std::vector<std::string_view> Characters(std::string_view text);

// str.strip and its halves: of Python's white space, or of the characters in `of`.
enum class Sides { kLeft, kRight, kBoth };
std::string_view Strip(std::string_view text, Sides sides,
                       std::optional<std::string_view> of = std::nullopt);
bool IsPythonSpace(char32_t c);

}  // namespace strait::jinja
