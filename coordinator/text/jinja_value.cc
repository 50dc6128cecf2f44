// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator/text/utf8.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::jinja {
namespace {

void AppendJsonString(std::string_view text, std::string* out) {
  out->push_back('"');
  for (const char c : text) {
    switch (c) {
      case '"':
        *out += "\\\"";
        break;
      case '\\':
        *out += "\\\\";
        break;
      case '\n':
        *out += "\\n";
        break;
      case '\r':
        *out += "\\r";
        break;
      case '\t':
        *out += "\\t";
        break;
      case '\f':
        *out += "\\f";
        break;
      case '\b':
        *out += "\\b";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          absl::StrAppend(out, absl::StrFormat("\\u%04x", static_cast<unsigned>(c)));
        } else {
          out->push_back(c);
        }
    }
  }
  out->push_back('"');
}

void NewLine(int indent, int level, std::string* out) {
  out->push_back('\n');
  out->append(static_cast<size_t>(indent * level), ' ');
}

absl::Status TooDeep() {
  return absl::ResourceExhaustedError(
      absl::StrCat("lists or dicts nested deeper than ", kMaxValueDepth));
}

}  // namespace

const Value* Dict::Find(std::string_view key) const {
  for (const auto& [name, value] : items) {
    if (name == key) return &value;
  }
  return nullptr;
}

Value* Namespace::Find(std::string_view name) {
  for (auto& [key, value] : members) {
    if (key == name) return &value;
  }
  return nullptr;
}

int Value::depth() const {
  if (is_list()) return list().depth;
  if (is_dict()) return dict().depth;
  return 0;
}

absl::StatusOr<Value> Value::MakeList(std::vector<Value> items) {
  int depth = 0;
  for (const Value& item : items) depth = std::max(depth, item.depth());
  if (depth >= kMaxValueDepth) return TooDeep();
  return Value(std::make_shared<const List>(List{std::move(items), depth + 1}));
}

absl::StatusOr<Value> Value::MakeDict(std::vector<std::pair<std::string, Value>> items) {
  int depth = 0;
  for (const auto& [key, item] : items) depth = std::max(depth, item.depth());
  if (depth >= kMaxValueDepth) return TooDeep();
  return Value(std::make_shared<const Dict>(Dict{std::move(items), depth + 1}));
}

absl::StatusOr<Value> Value::FromJson(const json::Value& value) {
  switch (value.kind()) {
    case boost::json::kind::null:
      return MakeNone();
    case boost::json::kind::bool_:
      return Bool(value.get_bool());
    case boost::json::kind::int64:
      return Int(value.get_int64());
    case boost::json::kind::uint64:
      return Float(static_cast<double>(value.get_uint64()));
    case boost::json::kind::double_:
      return Float(value.get_double());
    case boost::json::kind::string:
      return String(std::string(json::View(value.get_string())));
    case boost::json::kind::array: {
      std::vector<Value> items;
      items.reserve(value.get_array().size());
      for (const json::Value& item : value.get_array()) {
        STRAIT_ASSIGN_OR_RETURN(Value converted, FromJson(item));
        items.push_back(std::move(converted));
      }
      return MakeList(std::move(items));
    }
    case boost::json::kind::object: {
      std::vector<std::pair<std::string, Value>> items;
      items.reserve(value.get_object().size());
      for (const auto& [key, item] : value.get_object()) {
        STRAIT_ASSIGN_OR_RETURN(Value converted, FromJson(item));
        items.emplace_back(std::string(key.data(), key.size()), std::move(converted));
      }
      return MakeDict(std::move(items));
    }
  }
  return absl::InternalError("unknown JSON kind");
}

std::optional<int64_t> Value::AsInt() const {
  if (is_int()) return std::get<int64_t>(data_);
  if (is_bool()) return std::get<bool>(data_) ? 1 : 0;
  return std::nullopt;
}

std::optional<double> Value::AsNumber() const {
  if (is_float()) return std::get<double>(data_);
  if (const std::optional<int64_t> i = AsInt()) return static_cast<double>(*i);
  return std::nullopt;
}

Namespace* Value::AsNamespace() const {
  auto* const* ns = std::get_if<Namespace*>(&data_);
  return ns == nullptr ? nullptr : *ns;
}

const LoopState* Value::AsLoop() const {
  const auto* loop = std::get_if<std::shared_ptr<const LoopState>>(&data_);
  return loop == nullptr ? nullptr : loop->get();
}

bool Value::Truthy() const {
  if (is_undefined() || is_none()) return false;
  if (is_string()) return !string().empty();
  if (is_list()) return !list().items.empty();
  if (is_dict()) return !dict().items.empty();
  if (const std::optional<double> number = AsNumber()) return *number != 0;
  return true;
}

bool Value::Equals(const Value& other) const {
  if (is_int() && other.is_int()) return AsInt() == other.AsInt();
  if (is_number() && other.is_number()) return AsNumber() == other.AsNumber();
  if (data_.index() != other.data_.index()) return false;
  if (is_undefined() || is_none()) return true;
  if (is_string()) return string() == other.string();
  if (is_list()) {
    const auto& a = list().items;
    const auto& b = other.list().items;
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const Value& x, const Value& y) { return x.Equals(y); });
  }
  if (is_dict()) {
    if (dict().items.size() != other.dict().items.size()) return false;
    return std::all_of(dict().items.begin(), dict().items.end(), [&](const auto& item) {
      const Value* twin = other.dict().Find(item.first);
      return twin != nullptr && item.second.Equals(*twin);
    });
  }
  return AsNamespace() == other.AsNamespace() && AsLoop() == other.AsLoop();
}

std::string_view Value::TypeName() const {
  static constexpr std::string_view kNames[] = {
      "undefined", "NoneType", "bool", "int", "float", "str", "list", "dict", "namespace", "loop"};
  return kNames[data_.index()];
}

absl::StatusOr<std::string> Value::ToText() const {
  if (is_undefined()) return std::string();
  if (is_none()) return std::string("None");
  if (is_bool()) return std::string(*AsInt() != 0 ? "True" : "False");
  if (is_int()) return absl::StrCat(*AsInt());
  if (is_float()) return FloatText(*AsNumber());
  if (is_string()) return string();
  return absl::InvalidArgumentError(
      absl::StrCat("a ", ToAbsl(TypeName()), " cannot be printed as text; use tojson"));
}

absl::StatusOr<std::string> Value::ToJson(int indent) const {
  std::string out;
  STRAIT_RETURN_IF_ERROR(AppendJson(indent, 0, &out));
  return out;
}

absl::Status Value::AppendJson(int indent, int level, std::string* out) const {
  const std::string_view separator = indent < 0 ? ", " : ",";
  const auto item_start = [&](bool first) {
    if (!first) *out += separator;
    if (indent >= 0) NewLine(indent, level + 1, out);
  };
  const auto close = [&](bool empty, char bracket) {
    if (indent >= 0 && !empty) NewLine(indent, level, out);
    out->push_back(bracket);
  };
  if (is_none()) {
    *out += "null";
  } else if (is_bool()) {
    *out += *AsInt() != 0 ? "true" : "false";
  } else if (is_int()) {
    absl::StrAppend(out, *AsInt());
  } else if (is_float()) {
    const double d = *AsNumber();
    *out += std::isnan(d)   ? "NaN"
            : std::isinf(d) ? (d > 0 ? "Infinity" : "-Infinity")
                            : FloatText(d);
  } else if (is_string()) {
    AppendJsonString(string(), out);
  } else if (is_list()) {
    out->push_back('[');
    bool first = true;
    for (const Value& item : list().items) {
      item_start(std::exchange(first, false));
      STRAIT_RETURN_IF_ERROR(item.AppendJson(indent, level + 1, out));
    }
    close(first, ']');
  } else if (is_dict()) {
    out->push_back('{');
    bool first = true;
    for (const auto& [key, item] : dict().items) {
      item_start(std::exchange(first, false));
      AppendJsonString(key, out);
      *out += ": ";
      STRAIT_RETURN_IF_ERROR(item.AppendJson(indent, level + 1, out));
    }
    close(first, '}');
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("tojson cannot write a value of type ", ToAbsl(TypeName())));
  }
  return absl::OkStatus();
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto shortest =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<size_t>(shortest.ptr - buffer));
  int exponent = 0;
  const char* digits = text.data() + text.find('e') + 1;
  if (*digits == '+') ++digits;
  std::from_chars(digits, text.data() + text.size(), exponent);
  if (exponent >= -4 && exponent < 16) {
    const auto fixed =
        std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
    std::string out(buffer, fixed.ptr);
    if (out.find('.') == std::string::npos) out += ".0";
    return out;
  }
  return std::string(text);
}

bool IsPythonSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

size_t CountCharacters(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

std::vector<std::string_view> Characters(std::string_view text) {
  std::vector<std::string_view> characters;
  while (!text.empty()) {
    const size_t length = NextUtf8(text).length;
    characters.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return characters;
}

std::string_view Strip(std::string_view text, Sides sides, std::optional<std::string_view> of) {
  const auto strips = [&](std::string_view character) {
    if (of.has_value()) return of->find(character) != std::string_view::npos;
    return IsPythonSpace(NextUtf8(character).code_point);
  };
  if (sides != Sides::kRight) {
    while (!text.empty()) {
      const size_t length = NextUtf8(text).length;
      if (!strips(text.substr(0, length))) break;
      text.remove_prefix(length);
    }
  }
  if (sides != Sides::kLeft) {
    while (!text.empty()) {
      size_t begin = text.size() - 1;
      while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
      if (!strips(text.substr(begin))) break;
      text = text.substr(0, begin);
    }
  }
  return text;
}

}  // namespace strait::jinja
