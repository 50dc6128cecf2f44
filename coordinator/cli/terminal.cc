// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace strait::cli {
namespace {

constexpr int kBarCells = 30;

// Width on a terminal, as far as this program's own text needs it: UTF-8 continuation bytes take
// none.
size_t Width(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

bool LooksNumeric(std::string_view text) {
  if (text.empty() || text == "-") return true;
  if (text[0] == '-') text.remove_prefix(1);  // a negative number
  return text[0] >= '0' && text[0] <= '9';
}

}  // namespace

Terminal::Terminal() : is_tty_(isatty(STDERR_FILENO) == 1) {}

Terminal::~Terminal() { EndProgress(); }

void Terminal::ClearLocked() {
  if (bar_shown_) std::fputs("\r\033[K", stderr);
  bar_shown_ = false;
}

void Terminal::Say(std::string_view line) {
  const std::lock_guard<std::mutex> lock(mu_);
  ClearLocked();
  std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
  std::fflush(stderr);
}

void Terminal::Progress(std::string_view what, double fraction) {
  const std::lock_guard<std::mutex> lock(mu_);
  std::string line(what);
  if (fraction >= 0) {
    fraction = std::min(fraction, 1.0);
    if (is_tty_) {
      const int full = static_cast<int>(std::lround(fraction * kBarCells));
      line += " [" + std::string(static_cast<size_t>(full), '#') +
              std::string(static_cast<size_t>(kBarCells - full), '.') + "]";
    }
    line += " " + std::to_string(static_cast<int>(fraction * 100)) + " %";
  }
  if (line == last_line_ && (bar_shown_ || !is_tty_)) return;
  if (is_tty_) {
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
    bar_shown_ = true;
  } else {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_line_at_ < std::chrono::milliseconds(kSparseLineMs)) return;
    last_line_at_ = now;
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  last_line_ = line;
  std::fflush(stderr);
}

void Terminal::EndProgress() {
  const std::lock_guard<std::mutex> lock(mu_);
  ClearLocked();
  last_line_.clear();
  std::fflush(stderr);
}

std::string FormatBytes(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < std::size(kUnits)) {
    bytes /= 1024;
    ++unit;
  }
  return (unit == 0 ? std::to_string(static_cast<int64_t>(bytes)) : FormatNumber(bytes)) + " " +
         kUnits[unit];
}

std::string FormatNumber(double value) {
  const double size = std::abs(value);
  return Fixed(value, size >= 100 || value == 0 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

std::string Fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string Counted(uint64_t count, std::string_view what) {
  return std::to_string(count) + " " + std::string(what) + (count == 1 ? "" : "s");
}

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  std::vector<bool> right;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t c = 0; c < rows[r].size(); ++c) {
      if (widths.size() <= c) widths.resize(c + 1, 0), right.resize(c + 1, true);
      widths[c] = std::max(widths[c], Width(rows[r][c]));
      if (r > 0 && !LooksNumeric(rows[r][c])) right[c] = false;
    }
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string pad(widths[c] - Width(row[c]), ' ');
      if (c > 0) line += "  ";
      line += right[c] ? pad + row[c] : row[c] + pad;
    }
    while (line.ends_with(' ')) line.pop_back();
    text += line + "\n";
  }
  return text;
}

}  // namespace strait::cli
