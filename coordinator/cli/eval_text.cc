// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_text.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/child.h"
#include "coordinator/text/utf8.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

extern char** environ;

namespace strait::cli {
namespace {

constexpr size_t kReadBytes = 256 << 10;

absl::Status TooLarge(const std::string& path) {
  return absl::ResourceExhaustedError(
      absl::StrCat(path, " has more than ", kMaxTextBytes, " bytes of text; give a part of it"));
}

// To the end of the file, or until it is too large.
absl::StatusOr<std::string> ReadAll(int fd, const std::string& path) {
  std::string bytes;
  for (;;) {
    const size_t before = bytes.size();
    bytes.resize(before + kReadBytes);
    const ssize_t n = read(fd, bytes.data() + before, kReadBytes);
    const int error = errno;
    bytes.resize(before + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    if (n == 0) return bytes;
    if (n < 0 && error != EINTR) {
      return absl::NotFoundError(absl::StrCat("cannot read ", path, ": ", strerror(error)));
    }
    if (bytes.size() > kMaxTextBytes) return TooLarge(path);
  }
}

// What `xz -dc` makes of the open file.
absl::StatusOr<std::string> Decompress(int fd, const std::string& path) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot make a pipe: ", strerror(errno)));
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fd, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  const char* argv[] = {"xz", "-dc", "-qq", nullptr};
  pid_t pid = 0;
  const int failure =
      posix_spawnp(&pid, argv[0], &actions, nullptr, const_cast<char* const*>(argv), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (failure != 0) {
    close(ends[0]);
    return absl::UnavailableError(absl::StrCat("cannot run xz for ", path, ": ", strerror(failure),
                                               ". Install xz-utils, or decompress the file first"));
  }
  absl::StatusOr<std::string> bytes = ReadAll(ends[0], path);
  close(ends[0]);  // an xz that still writes ends by this
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (bytes.ok() && status != 0) {
    return absl::DataLossError(absl::StrCat(path, ": xz cannot decompress it (",
                                            DescribeExit(status), "). Is it whole, and xz?"));
  }
  return bytes;
}

absl::Status ParseLines(std::string_view bytes, TextFile* file) {
  size_t number = 0;
  while (!bytes.empty()) {
    ++number;
    const size_t end = std::min(bytes.find('\n'), bytes.size());
    std::string_view line = bytes.substr(0, end);
    bytes.remove_prefix(std::min(end + 1, bytes.size()));
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = absl::StrCat(file->path, " line ", number);
    const auto wrong = [&](const absl::Status& status) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(status.message()), "; each line must be {\"text\": \"…\"}"));
    };
    const absl::StatusOr<json::Value> value = json::Parse(line, place);
    if (!value.ok()) return wrong(value.status());
    const absl::StatusOr<const json::Object*> object = json::AsObject(*value, place);
    if (!object.ok()) return wrong(object.status());
    absl::StatusOr<std::string> text = json::GetString(**object, "text", place);
    if (!text.ok()) return wrong(text.status());
    if (text->empty()) continue;
    file->num_bytes += text->size();
    file->documents.push_back(*std::move(text));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TextFile> ParseText(const std::string& path, bool is_lines, std::string bytes) {
  TextFile file;
  file.path = path;
  file.is_lines = is_lines;
  if (const std::optional<size_t> at = FindInvalidUtf8(bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is not UTF-8 at byte ", *at, "; convert it (iconv -t utf-8)"));
  }
  if (is_lines) {
    STRAIT_RETURN_IF_ERROR(ParseLines(bytes, &file));
  } else if (!bytes.empty()) {
    file.num_bytes = bytes.size();
    file.documents.push_back(std::move(bytes));
  }
  if (file.documents.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is empty: there is no text to score. Give --text a file with text"));
  }
  return file;
}

absl::StatusOr<TextFile> ReadText(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return absl::NotFoundError(absl::StrCat("cannot open --text ", path, ": ", strerror(errno)));
  }
  std::string_view name = path;
  const bool is_xz = name.ends_with(".xz");
  if (is_xz) name.remove_suffix(3);
  absl::StatusOr<std::string> bytes = is_xz ? Decompress(fd, path) : ReadAll(fd, path);
  close(fd);
  STRAIT_RETURN_IF_ERROR(bytes.status());
  return ParseText(path, name.ends_with(".jsonl"), *std::move(bytes));
}

}  // namespace strait::cli
