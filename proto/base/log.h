// SPDX-License-Identifier: Apache-2.0
//
// The log: one line an event, to stderr, as `time level message key=value …` or as JSON lines.
//
//   Log(LogLevel::kWarning, "worker lost", {{"worker", id}, {"reason", status.ToString()}});
//
// Thread:  any, synchronized inside.
// Why:     a facade of one file, so that the library behind it (spdlog) can be changed in one
//          place.
#pragma once

#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace strait {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

struct LogField {
  LogField(std::string_view k, std::string_view v) : key(k), value(v) {}
  LogField(std::string_view k, const char* v) : key(k), value(v) {}
  LogField(std::string_view k, const std::string& v) : key(k), value(v) {}
  LogField(std::string_view k, const absl::Status& v) : key(k), value(v.ToString()) {}
  template <class T>
  requires std::integral<T> || std::floating_point<T> LogField(std::string_view k, T v)
      : key(k), value(std::to_string(v)), number(true) {}
  std::string_view key;
  std::string value;
  bool number = false;
};

// `process` names the program in every line ("coordinator", "worker-2"). Call once, before threads start.
void InitLog(std::string_view process, LogLevel least, bool json);

// "debug", "info", "warning" or "error"; InvalidArgument names the choices otherwise.
absl::Status ParseLogLevel(std::string_view text, LogLevel* level);

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {});

}  // namespace strait
