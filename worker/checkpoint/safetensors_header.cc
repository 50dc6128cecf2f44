// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/safetensors_header.h"

#include <boost/json/basic_parser_impl.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"

namespace strait {
namespace {

using boost::json::string_view;
using boost::system::error_code;

// Follows the parser through the one form that a header may have. `expected` explains a refusal.
struct Handler {
  static constexpr std::size_t max_object_size = limits::kMaxTensorsPerFile;
  static constexpr std::size_t max_array_size = limits::kMaxTensorRank;
  static constexpr std::size_t max_key_size = limits::kMaxTensorNameBytes;
  static constexpr std::size_t max_string_size = std::size_t(-1);  // bounded by the header

  enum class Place { kStart, kTop, kMetadata, kTensor, kDType, kShape, kOffsets, kEnd };
  static constexpr unsigned kHasDType = 1, kHasShape = 2, kHasOffsets = 4, kHasAll = 7;

  std::vector<HeaderEntry> entries;
  const char* expected = "a JSON object";
  Place place = Place::kStart;
  bool in_array = false;
  unsigned seen = 0;
  std::string text;  // a key or string that comes in parts
  std::vector<uint64_t> numbers;

  bool Refuse(const char* what, error_code& ec) {
    expected = what;
    ec = boost::json::error::extra_data;
    return false;
  }
  // Makes `number` part of the array that is open.
  bool Number(uint64_t number, error_code& ec) {
    if (!in_array) return Refuse("no bare number here", ec);
    numbers.push_back(number);
    return true;
  }

  bool on_document_begin(error_code&) { return true; }
  bool on_document_end(error_code&) { return true; }

  bool on_object_begin(error_code& ec) {
    if (place == Place::kStart) {
      place = Place::kTop;
      return true;
    }
    if (place == Place::kTop && !text.empty()) {
      if (text == "__metadata__") {
        place = Place::kMetadata;
      } else {
        place = Place::kTensor;
        seen = 0;
        entries.emplace_back().name = std::move(text);
      }
      text.clear();
      return true;
    }
    return Refuse("no object here", ec);
  }
  bool on_object_end(std::size_t, error_code& ec) {
    if (place == Place::kTensor && seen != kHasAll) {
      return Refuse("dtype, shape and data_offsets in every tensor", ec);
    }
    place = place == Place::kTop ? Place::kEnd : Place::kTop;
    return true;
  }
  bool on_array_begin(error_code& ec) {
    if ((place != Place::kShape && place != Place::kOffsets) || in_array) {
      return Refuse("no list here", ec);
    }
    in_array = true;
    numbers.clear();
    return true;
  }
  bool on_array_end(std::size_t, error_code& ec) {
    in_array = false;
    HeaderEntry& entry = entries.back();
    if (place == Place::kShape) {
      entry.shape = numbers;
    } else {
      if (numbers.size() != 2) return Refuse("two numbers in data_offsets", ec);
      entry.begin = numbers[0];
      entry.end = numbers[1];
    }
    place = Place::kTensor;
    return true;
  }

  bool on_key_part(string_view part, std::size_t, error_code&) {
    text.append(part.data(), part.size());
    return true;
  }
  bool on_key(string_view part, std::size_t, error_code& ec) {
    text.append(part.data(), part.size());
    if (place == Place::kTop) {
      return text.empty() ? Refuse("tensor names that are not empty", ec) : true;
    }
    if (place == Place::kMetadata) {
      text.clear();
      return true;
    }
    const std::string key = std::move(text);
    text.clear();
    const unsigned bit = key == "dtype"          ? kHasDType
                         : key == "shape"        ? kHasShape
                         : key == "data_offsets" ? kHasOffsets
                                                 : 0u;
    if (bit == 0 || (seen & bit) != 0) {
      return Refuse("dtype, shape and data_offsets once each, and nothing else", ec);
    }
    seen |= bit;
    place = bit == kHasDType ? Place::kDType : bit == kHasShape ? Place::kShape : Place::kOffsets;
    return true;
  }
  bool on_string_part(string_view part, std::size_t, error_code&) {
    if (place == Place::kDType) text.append(part.data(), part.size());
    return true;
  }
  bool on_string(string_view part, std::size_t, error_code& ec) {
    if (place == Place::kMetadata) return true;
    if (place != Place::kDType) return Refuse("no string here", ec);
    text.append(part.data(), part.size());
    entries.back().dtype = std::move(text);
    text.clear();
    place = Place::kTensor;
    return true;
  }

  bool on_number_part(string_view, error_code&) { return true; }
  bool on_int64(std::int64_t value, string_view, error_code& ec) {
    if (value < 0) return Refuse("numbers that are not negative", ec);
    return Number(static_cast<uint64_t>(value), ec);
  }
  bool on_uint64(std::uint64_t value, string_view, error_code& ec) { return Number(value, ec); }
  bool on_double(double, string_view, error_code& ec) { return Refuse("whole numbers", ec); }
  bool on_bool(bool, error_code& ec) { return Refuse("no boolean here", ec); }
  bool on_null(error_code& ec) { return Refuse("no null here", ec); }
  bool on_comment_part(string_view, error_code&) { return true; }
  bool on_comment(string_view, error_code&) { return true; }
};

}  // namespace

absl::StatusOr<std::vector<HeaderEntry>> ParseSafetensorsHeader(std::string_view json,
                                                                const std::string& path) {
  boost::json::parse_options options;
  options.max_depth = 4;
  boost::json::basic_parser<Handler> parser(options);
  error_code ec;
  const std::size_t consumed = parser.write_some(false, json.data(), json.size(), ec);
  Handler& handler = parser.handler();
  if (!ec && consumed == json.size() && handler.place == Handler::Place::kEnd) {
    return std::move(handler.entries);
  }
  const bool over = ec == boost::json::error::array_too_large ||
                    ec == boost::json::error::object_too_large ||
                    ec == boost::json::error::key_too_large;
  if (over) {
    return absl::ResourceExhaustedError(absl::StrCat(
        path, ": header at byte ", consumed, ": ", ec.message(), "; at most ",
        limits::kMaxTensorsPerFile, " tensors of ", limits::kMaxTensorRank,
        " dimensions with names of ", limits::kMaxTensorNameBytes, " bytes are supported"));
  }
  const bool ours = ec == boost::json::error::extra_data;
  return absl::InvalidArgumentError(absl::StrCat(
      path, ": header is not what safetensors prescribe at byte ", consumed, ": expected ",
      ours || !ec ? std::string(handler.expected) : absl::StrCat("JSON (", ec.message(), ")"),
      "; download the file again"));
}

}  // namespace strait
