// SPDX-License-Identifier: Apache-2.0
//
// Terminal writes messages and progress to stderr: a bar that redraws itself on a terminal, a
// sparse line elsewhere. Also: how numbers look, and tables.
//
// Thread:  any, synchronized inside.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace strait::cli {

inline constexpr int kSparseLineMs = 2'000;  // between progress lines when there is no terminal

class Terminal {
 public:
  Terminal();
  explicit Terminal(bool is_tty) : is_tty_(is_tty) {}
  ~Terminal();

  void Say(std::string_view line);
  // `fraction` from 0 to 1, or negative when unknown.
  void Progress(std::string_view what, double fraction);
  // Removes the bar.
  void EndProgress();

 private:
  void ClearLocked();

  const bool is_tty_;
  std::mutex mu_;
  bool bar_shown_ = false;
  std::string last_line_;
  std::chrono::steady_clock::time_point last_line_at_;
};

std::string FormatBytes(double bytes);                       // "1.50 GiB"
std::string FormatNumber(double value);                      // three significant digits or more
std::string Fixed(double value, int digits);                 // "1.50": so many behind the point
std::string Counted(uint64_t count, std::string_view what);  // "1 stage", "2 stages"

// Columns padded to their widest cell; the first row is the header. Numbers are set flush right.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace strait::cli
