// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/jinja_builtins.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "absl/strings/str_cat.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/utf8.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::jinja {
namespace {

using Values = std::vector<Value>;
using Result = absl::StatusOr<Value>;

absl::Status Refuse(std::string_view what, const Value& value) {
  if (value.is_undefined()) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToAbsl(what), " of '", value.undefined_name(), "', which is undefined"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(ToAbsl(what), " of a value of type ", ToAbsl(value.TypeName())));
}

absl::StatusOr<std::string_view> Text(const Value& value, std::string_view what) {
  if (value.is_string()) return std::string_view(value.string());
  return Refuse(what, value);
}

// The text of a filter's subject: filters take anything that can be printed.
absl::StatusOr<std::string> Soft(const Value& value) { return value.ToText(); }

Value Str(std::string_view text) { return Value::String(std::string(text)); }

Result Strings(const std::vector<std::string_view>& pieces) {
  Values items;
  items.reserve(pieces.size());
  for (const std::string_view piece : pieces) items.push_back(Str(piece));
  return Value::MakeList(std::move(items));
}

// The elements that `for` would visit.
absl::StatusOr<Values> Elements(const Value& value, std::string_view what) {
  if (value.is_undefined()) return Values();
  if (value.is_list()) return value.list().items;
  Values items;
  if (value.is_dict()) {
    for (const auto& [key, item] : value.dict().items) items.push_back(Value::String(key));
  } else if (value.is_string()) {
    for (const std::string_view character : Characters(value.string()))
      items.push_back(Str(character));
  } else {
    return Refuse(what, value);
  }
  return items;
}

Result Length(const Values& v, const Keywords&) {
  if (v[0].is_undefined()) return Value::Int(0);
  if (v[0].is_string()) return Value::Int(static_cast<int64_t>(CountCharacters(v[0].string())));
  STRAIT_ASSIGN_OR_RETURN(const Values items, Elements(v[0], "length"));
  return Value::Int(static_cast<int64_t>(items.size()));
}

template <Sides sides>
Result StripFilter(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string text, Soft(v[0]));
  if (v[1].is_undefined() || v[1].is_none()) return Str(Strip(text, sides));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view of, Text(v[1], "strip by characters"));
  return Str(Strip(text, sides, of));
}

Result ToJson(const Values& v, const Keywords&) {
  int64_t indent = -1;
  if (!v[1].is_undefined() && !v[1].is_none()) {
    const std::optional<int64_t> given = v[1].AsInt();
    if (!given.has_value() || *given < 0 || *given > 16) {
      return absl::InvalidArgumentError("tojson: indent must be an integer from 0 to 16");
    }
    indent = *given;
  }
  if (v[2].Truthy())
    return absl::InvalidArgumentError("tojson: ensure_ascii=true is not supported");
  STRAIT_ASSIGN_OR_RETURN(std::string text, v[0].ToJson(static_cast<int>(indent)));
  return Value::String(std::move(text));
}

// ASCII only: the case of other letters needs tables that no template asked for yet.
template <char first, char last>
Result ChangeCase(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(std::string text, Soft(v[0]));
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) {
      return absl::InvalidArgumentError("lower and upper of text beyond ASCII are not supported");
    }
    if (c >= first && c <= last) c = static_cast<char>(c ^ 0x20);
  }
  return Value::String(std::move(text));
}

Result Replace(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string text, Soft(v[0]));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view from, Text(v[1], "replace"));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view to, Text(v[2], "replace"));
  int64_t left = std::numeric_limits<int64_t>::max();
  if (const std::optional<int64_t> count = v[3].AsInt(); count.has_value() && *count >= 0) {
    left = *count;
  }
  if (from.empty()) return absl::InvalidArgumentError("replace of an empty string");
  std::string out;
  size_t at = 0;
  while (left-- > 0) {
    const size_t found = text.find(from, at);
    if (found == std::string::npos) break;
    out.append(text, at, found - at);
    out += to;
    if (out.size() > kMaxRenderBytes) {
      return absl::ResourceExhaustedError("replace makes a text over the limit");
    }
    at = found + from.size();
  }
  out.append(text, at);
  return Value::String(std::move(out));
}

Result Default(const Values& v, const Keywords&) {
  const bool missing = v[0].is_undefined() || (v[2].Truthy() && !v[0].Truthy());
  if (!missing) return v[0];
  return v[1].is_undefined() ? Str("") : v[1];
}

Result First(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const Values items, Elements(v[0], "first"));
  return items.empty() ? Value::MakeUndefined("first of nothing") : items.front();
}

Result Last(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const Values items, Elements(v[0], "last"));
  return items.empty() ? Value::MakeUndefined("last of nothing") : items.back();
}

Result JoinItems(const Value& list, std::string_view separator) {
  STRAIT_ASSIGN_OR_RETURN(const Values items, Elements(list, "join"));
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += separator;
    STRAIT_ASSIGN_OR_RETURN(const std::string text, Soft(items[i]));
    out += text;
    if (out.size() > kMaxRenderBytes) {
      return absl::ResourceExhaustedError("join makes a text over the limit");
    }
  }
  return Value::String(std::move(out));
}

Result JoinFilter(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string separator, Soft(v[1]));
  return JoinItems(v[0], separator);
}

Result JoinMethod(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string_view separator, Text(v[0], "join"));
  return JoinItems(v[1], separator);
}

Result ToList(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(Values items, Elements(v[0], "list"));
  return Value::MakeList(std::move(items));
}

Result ToStringFilter(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(std::string text, Soft(v[0]));
  return Value::String(std::move(text));
}

Result ToInt(const Values& v, const Keywords&) {
  const Value fallback = v[1].is_undefined() ? Value::Int(0) : v[1];
  if (const std::optional<int64_t> i = v[0].AsInt()) return Value::Int(*i);
  if (const std::optional<double> d = v[0].AsNumber()) {
    return *d > -9e18 && *d < 9e18 ? Value::Int(static_cast<int64_t>(*d)) : fallback;
  }
  if (!v[0].is_string()) return fallback;
  const std::string_view text = Strip(v[0].string(), Sides::kBoth);
  int64_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = parsed.ec == std::errc() && parsed.ptr == text.data() + text.size();
  return whole ? Value::Int(value) : fallback;
}

// str.split: by white space, or by a separator; at most `maxsplit` cuts.
Result Split(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(std::string_view text, Text(v[0], "split"));
  const int64_t limit = v[2].AsInt().value_or(-1);
  const auto may_cut = [&](size_t cuts) { return limit < 0 || static_cast<int64_t>(cuts) < limit; };
  std::vector<std::string_view> pieces;
  if (v[1].is_undefined() || v[1].is_none()) {
    for (text = Strip(text, Sides::kLeft); !text.empty(); text = Strip(text, Sides::kLeft)) {
      size_t length = 0;
      if (may_cut(pieces.size())) {
        while (length < text.size()) {
          const Utf8Step step = NextUtf8(text.substr(length));
          if (IsPythonSpace(step.code_point)) break;
          length += step.length;
        }
      } else {
        length = text.size();
      }
      pieces.push_back(text.substr(0, length));
      text.remove_prefix(length);
    }
    return Strings(pieces);
  }
  STRAIT_ASSIGN_OR_RETURN(const std::string_view separator, Text(v[1], "split"));
  if (separator.empty()) return absl::InvalidArgumentError("split by an empty separator");
  for (;;) {
    const size_t found = may_cut(pieces.size()) ? text.find(separator) : std::string_view::npos;
    pieces.push_back(text.substr(0, found));
    if (found == std::string_view::npos) return Strings(pieces);
    text.remove_prefix(found + separator.size());
  }
}

Result RSplit(const Values& v, const Keywords& keywords) {
  if (v[1].is_undefined() || v[1].is_none()) {
    return absl::InvalidArgumentError("rsplit without a separator is not supported");
  }
  STRAIT_ASSIGN_OR_RETURN(std::string_view text, Text(v[0], "rsplit"));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view separator, Text(v[1], "rsplit"));
  if (separator.empty()) return absl::InvalidArgumentError("rsplit by an empty separator");
  const int64_t limit = v[2].AsInt().value_or(-1);
  if (limit < 0) return Split(v, keywords);
  std::vector<std::string_view> pieces;
  for (;;) {
    const bool may_cut = static_cast<int64_t>(pieces.size()) < limit;
    const size_t found = may_cut ? text.rfind(separator) : std::string_view::npos;
    if (found == std::string_view::npos) break;
    pieces.push_back(text.substr(found + separator.size()));
    text = text.substr(0, found);
  }
  pieces.push_back(text);
  std::reverse(pieces.begin(), pieces.end());
  return Strings(pieces);
}

template <Sides sides>
Result StripMethod(const Values& v, const Keywords& keywords) {
  STRAIT_RETURN_IF_ERROR(Text(v[0], "strip").status());
  return StripFilter<sides>(v, keywords);
}

template <bool at_start>
Result Affix(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string_view text, Text(v[0], "startswith or endswith"));
  Values affixes{v[1]};
  if (v[1].is_list()) affixes = v[1].list().items;
  for (const Value& affix : affixes) {
    STRAIT_ASSIGN_OR_RETURN(const std::string_view part, Text(affix, "startswith or endswith"));
    if (at_start ? text.starts_with(part) : text.ends_with(part)) return Value::Bool(true);
  }
  return Value::Bool(false);
}

Result FindText(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string_view text, Text(v[0], "find"));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view part, Text(v[1], "find"));
  const size_t found = text.find(part);
  if (found == std::string_view::npos) return Value::Int(-1);
  return Value::Int(static_cast<int64_t>(CountCharacters(text.substr(0, found))));
}

Result CountText(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string_view text, Text(v[0], "count"));
  STRAIT_ASSIGN_OR_RETURN(const std::string_view part, Text(v[1], "count"));
  if (part.empty()) return Value::Int(static_cast<int64_t>(CountCharacters(text) + 1));
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string_view::npos;
       at = text.find(part, at + part.size())) {
    ++count;
  }
  return Value::Int(count);
}

absl::StatusOr<const Dict*> AsDict(const Value& value, std::string_view what) {
  if (value.is_dict()) return &value.dict();
  return Refuse(what, value);
}

Result DictGet(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const Dict* dict, AsDict(v[0], "get"));
  const Value* found = v[1].is_string() ? dict->Find(v[1].string()) : nullptr;
  if (found != nullptr) return *found;
  return v[2].is_undefined() ? Value::MakeNone() : v[2];
}

Result DictKeys(const Values& v, const Keywords&) {
  STRAIT_RETURN_IF_ERROR(AsDict(v[0], "keys").status());
  STRAIT_ASSIGN_OR_RETURN(Values keys, Elements(v[0], "keys"));
  return Value::MakeList(std::move(keys));
}

Result DictValues(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const Dict* dict, AsDict(v[0], "values"));
  Values items;
  for (const auto& [key, item] : dict->items) items.push_back(item);
  return Value::MakeList(std::move(items));
}

Result DictItems(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const Dict* dict, AsDict(v[0], "items"));
  Values items;
  for (const auto& [key, item] : dict->items) {
    STRAIT_ASSIGN_OR_RETURN(Value pair, Value::MakeList({Value::String(key), item}));
    items.push_back(std::move(pair));
  }
  return Value::MakeList(std::move(items));
}

template <bool (Value::*is)() const>
Result Is(const Values& v, const Keywords&) {
  return Value::Bool((v[0].*is)());
}

Result IsDefined(const Values& v, const Keywords&) { return Value::Bool(!v[0].is_undefined()); }
Result IsTrue(const Values& v, const Keywords&) {
  return Value::Bool(v[0].is_bool() && v[0].Truthy());
}
Result IsFalse(const Values& v, const Keywords&) {
  return Value::Bool(v[0].is_bool() && !v[0].Truthy());
}
Result IsIterable(const Values& v, const Keywords&) {
  return Value::Bool(v[0].is_undefined() || v[0].is_string() || v[0].is_list() || v[0].is_dict());
}
Result IsSequence(const Values& v, const Keywords&) {
  // Python asks for a length and items by key: an undefined value has both.
  return IsIterable(v, {});
}
Result IsInteger(const Values& v, const Keywords&) { return Value::Bool(v[0].is_int()); }
Result IsEqual(const Values& v, const Keywords&) { return Value::Bool(v[0].Equals(v[1])); }
Result IsIn(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const bool in, Contains(v[1], v[0]));
  return Value::Bool(in);
}
template <int64_t remainder>
Result HasRemainder(const Values& v, const Keywords&) {
  const std::optional<int64_t> i = v[0].AsInt();
  if (!i.has_value()) return Refuse("odd or even", v[0]);
  return Value::Bool((*i & 1) == remainder);
}

Result RaiseException(const Values& v, const Keywords&) {
  STRAIT_ASSIGN_OR_RETURN(const std::string message, Soft(v[0]));
  return absl::InvalidArgumentError(message);
}

Result Range(const Values& v, const Keywords&) {
  int64_t bounds[3] = {0, 0, 1};
  for (size_t i = 0; i < 3; ++i) {
    if (v[i].is_undefined() && i > 0) continue;
    const std::optional<int64_t> bound = v[i].AsInt();
    if (!bound.has_value()) return Refuse("range", v[i]);
    bounds[i] = *bound;
  }
  if (v[1].is_undefined()) std::swap(bounds[0], bounds[1]);
  if (bounds[2] == 0) return absl::InvalidArgumentError("range with a step of 0");
  // The bound of Jinja's sandbox.
  static constexpr size_t kMaxRange = 100'000;
  Values items;
  const auto inside = [&](int64_t i) { return bounds[2] > 0 ? i < bounds[1] : i > bounds[1]; };
  for (int64_t i = bounds[0]; inside(i);) {
    if (items.size() >= kMaxRange) {
      return absl::ResourceExhaustedError(absl::StrCat("range of more than ", kMaxRange));
    }
    items.push_back(Value::Int(i));
    if (__builtin_add_overflow(i, bounds[2], &i)) break;
  }
  return Value::MakeList(std::move(items));
}

Result MakeDictValue(const Values&, const Keywords& keywords) {
  return Value::MakeDict({keywords.begin(), keywords.end()});
}

// The Renderer makes namespaces itself: it owns them.
Result MakeNamespace(const Values&, const Keywords&) {
  return absl::InternalError("namespace() is the renderer's");
}

const Builtin* Lookup(const std::vector<Builtin>& table, std::string_view name) {
  const auto it = std::find_if(table.begin(), table.end(),
                               [&](const Builtin& builtin) { return builtin.name == name; });
  return it == table.end() ? nullptr : &*it;
}

}  // namespace

const Builtin* FindFunction(std::string_view name) {
  static const std::vector<Builtin> table = {
      {"namespace", 0, 0, {"*"}, MakeNamespace},
      {"dict", 0, 0, {"*"}, MakeDictValue},
      {"range", 1, 3, {}, Range},
      {"raise_exception", 1, 1, {}, RaiseException},
  };
  return Lookup(table, name);
}

const Builtin* FindFilter(std::string_view name) {
  static const std::vector<Builtin> table = {
      {"length", 1, 1, {}, Length},
      {"count", 1, 1, {}, Length},
      {"trim", 1, 2, {"chars"}, StripFilter<Sides::kBoth>},
      {"tojson", 1, 3, {"indent", "ensure_ascii"}, ToJson},
      {"lower", 1, 1, {}, ChangeCase<'A', 'Z'>},
      {"upper", 1, 1, {}, ChangeCase<'a', 'z'>},
      {"replace", 3, 4, {"old", "new", "count"}, Replace},
      {"default", 1, 3, {"default_value", "boolean"}, Default},
      {"d", 1, 3, {"default_value", "boolean"}, Default},
      {"first", 1, 1, {}, First},
      {"last", 1, 1, {}, Last},
      {"join", 1, 2, {"d"}, JoinFilter},
      {"list", 1, 1, {}, ToList},
      {"string", 1, 1, {}, ToStringFilter},
      {"safe", 1, 1, {}, ToStringFilter},
      {"int", 1, 2, {"default"}, ToInt},
      {"items", 1, 1, {}, DictItems},
  };
  return Lookup(table, name);
}

const Builtin* FindTest(std::string_view name) {
  static const std::vector<Builtin> table = {
      {"defined", 1, 1, {}, IsDefined},
      {"undefined", 1, 1, {}, Is<&Value::is_undefined>},
      {"none", 1, 1, {}, Is<&Value::is_none>},
      {"string", 1, 1, {}, Is<&Value::is_string>},
      {"mapping", 1, 1, {}, Is<&Value::is_dict>},
      {"number", 1, 1, {}, Is<&Value::is_number>},
      {"integer", 1, 1, {}, IsInteger},
      {"float", 1, 1, {}, Is<&Value::is_float>},
      {"boolean", 1, 1, {}, Is<&Value::is_bool>},
      {"true", 1, 1, {}, IsTrue},
      {"false", 1, 1, {}, IsFalse},
      {"iterable", 1, 1, {}, IsIterable},
      {"sequence", 1, 1, {}, IsSequence},
      {"eq", 2, 2, {}, IsEqual},
      {"equalto", 2, 2, {}, IsEqual},
      {"in", 2, 2, {}, IsIn},
      {"even", 1, 1, {}, HasRemainder<0>},
      {"odd", 1, 1, {}, HasRemainder<1>},
  };
  return Lookup(table, name);
}

const Builtin* FindMethod(std::string_view name) {
  static const std::vector<Builtin> table = {
      {"split", 1, 3, {"sep", "maxsplit"}, Split},
      {"rsplit", 1, 3, {"sep", "maxsplit"}, RSplit},
      {"strip", 1, 2, {}, StripMethod<Sides::kBoth>},
      {"lstrip", 1, 2, {}, StripMethod<Sides::kLeft>},
      {"rstrip", 1, 2, {}, StripMethod<Sides::kRight>},
      {"replace", 3, 4, {}, Replace},
      {"startswith", 2, 2, {}, Affix<true>},
      {"endswith", 2, 2, {}, Affix<false>},
      {"lower", 1, 1, {}, ChangeCase<'A', 'Z'>},
      {"upper", 1, 1, {}, ChangeCase<'a', 'z'>},
      {"find", 2, 2, {}, FindText},
      {"count", 2, 2, {}, CountText},
      {"join", 2, 2, {}, JoinMethod},
      {"get", 2, 3, {}, DictGet},
      {"keys", 1, 1, {}, DictKeys},
      {"values", 1, 1, {}, DictValues},
      {"items", 1, 1, {}, DictItems},
  };
  return Lookup(table, name);
}

absl::StatusOr<bool> Contains(const Value& haystack, const Value& needle) {
  if (haystack.is_string()) {
    STRAIT_ASSIGN_OR_RETURN(const std::string_view part, Text(needle, "search in a string"));
    return haystack.string().find(part) != std::string::npos;
  }
  if (haystack.is_dict())
    return needle.is_string() && haystack.dict().Find(needle.string()) != nullptr;
  STRAIT_ASSIGN_OR_RETURN(const Values items, Elements(haystack, "\"in\" on the right"));
  return std::any_of(items.begin(), items.end(),
                     [&](const Value& item) { return item.Equals(needle); });
}

}  // namespace strait::jinja
