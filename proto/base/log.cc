// SPDX-License-Identifier: Apache-2.0
#include "proto/base/log.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/text.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace strait {
namespace {

bool json_lines = false;
std::string process_name = "strait";

spdlog::logger& Logger() {
  static auto logger = [] {
    auto made = std::make_shared<spdlog::logger>("strait",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %v");
    return made;
  }();
  return *logger;
}

// What is no printable UTF-8 goes out escaped: a peer's text must not move a terminal's cursor, nor
// break a line in two, nor make JSON unreadable.
void AppendQuoted(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    const char c = text[0];
    const auto byte = static_cast<unsigned char>(c);
    const size_t bytes = PrintableBytes(text);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (bytes > 0) {
      out += text.substr(0, bytes);
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += "\\u00";
      out += "0123456789abcdef"[byte >> 4];
      out += "0123456789abcdef"[byte & 15];
    }
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  out += '"';
}

bool NeedsQuotes(std::string_view text) {
  if (text.empty() || text.find_first_of(" \"=\\") != std::string_view::npos) return true;
  while (!text.empty()) {
    const size_t bytes = PrintableBytes(text);
    if (bytes == 0) return true;
    text.remove_prefix(bytes);
  }
  return false;
}

const char* LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "?";
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void InitLog(std::string_view process, LogLevel least, bool json) {
  process_name = std::string(process);
  json_lines = json;
  Logger().set_level(ToSpdlog(least));
  Logger().set_pattern(json ? "%v" : "%Y-%m-%dT%H:%M:%S.%e %L %v");
  Logger().flush_on(spdlog::level::debug);
}

absl::Status ParseLogLevel(std::string_view text, LogLevel* level) {
  for (LogLevel l : {LogLevel::kDebug, LogLevel::kInfo, LogLevel::kWarning, LogLevel::kError}) {
    if (text == LevelName(l)) {
      *level = l;
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level '", ToAbsl(text), "' is unknown: use debug, info, warning or error"));
}

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields) {
  if (!Logger().should_log(ToSpdlog(level))) return;
  std::string line;
  if (json_lines) {
    const double now_s =
        std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    line = fmt::format("{{\"time\":{:.3f},\"level\":\"{}\",\"process\":", now_s, LevelName(level));
    AppendQuoted(line, process_name);
    line += ",\"message\":";
    AppendQuoted(line, message);
    for (const LogField& field : fields) {
      line += ',';
      AppendQuoted(line, field.key);
      line += ':';
      if (field.number && field.value.find_first_of("in") == std::string::npos) {
        line += field.value;
      } else {
        AppendQuoted(line, field.value);
      }
    }
    line += '}';
  } else {
    line = process_name;
    line += ": ";
    line += PrintableText(message, std::string::npos);
    for (const LogField& field : fields) {
      line += ' ';
      line += field.key;
      line += '=';
      if (NeedsQuotes(field.value)) {
        AppendQuoted(line, field.value);
      } else {
        line += field.value;
      }
    }
  }
  Logger().log(ToSpdlog(level), "{}", line);
}

}  // namespace strait
