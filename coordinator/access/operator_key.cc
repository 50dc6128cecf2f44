// SPDX-License-Identifier: Apache-2.0
#include "coordinator/access/operator_key.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "proto/base/text.h"

namespace strait {
namespace {

namespace fs = std::filesystem;

constexpr int kRandomWords = 8;  // of 32 bits

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

std::string RandomKey() {
  constexpr char kHex[] = "0123456789abcdef";
  std::random_device device;
  std::string key;
  for (int word = 0; word < kRandomWords; ++word) {
    uint32_t bits = device();
    for (int i = 0; i < 8; ++i, bits >>= 4) key += kHex[bits & 15];
  }
  return key;
}

}  // namespace

absl::StatusOr<std::string> ReadOperatorKey(const std::string& path, std::string_view what) {
  const std::string name = absl::StrCat(ToAbsl(what), " ", path);
  // Not to hang at a pipe that nobody writes to.
  const File file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.fd() < 0) {
    const int error = errno;
    const std::string text = absl::StrCat(name, ": ", strerror(error));
    return error == ENOENT ? absl::NotFoundError(text) : absl::UnavailableError(text);
  }
  struct stat status = {};
  if (fstat(file.fd(), &status) != 0) {
    return absl::UnavailableError(absl::StrCat(name, ": ", strerror(errno)));
  }
  if (!S_ISREG(status.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat(name, " is no plain file"));
  }
  // Of what was opened, not of what may have taken its place.
  if ((status.st_mode & 077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(name, " may be read or changed by other users; do: chmod 600 ", path,
                     " (and make a new key if others had the time to read it)"));
  }
  std::string text(kMaxOperatorKeyBytes + 3, '\0');
  const ssize_t size = read(file.fd(), text.data(), text.size());
  if (size < 0) return absl::UnavailableError(absl::StrCat(name, ": ", strerror(errno)));
  text.resize(static_cast<size_t>(size));
  absl::StripTrailingAsciiWhitespace(&text);
  const bool plain =
      std::all_of(text.begin(), text.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (!plain || text.size() < kMinOperatorKeyBytes || text.size() > kMaxOperatorKeyBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": a key is one line of ", kMinOperatorKeyBytes, " to ", kMaxOperatorKeyBytes,
        " printable characters without spaces; make one with: head -c 32 /dev/urandom | base64"));
  }
  return text;
}

std::vector<std::string> OperatorKeyPaths(uint16_t port) {
  return OperatorKeyPaths(port, [](const char* name) -> const char* { return getenv(name); });
}

std::vector<std::string> OperatorKeyPaths(uint16_t port, const Environment& environment) {
  std::vector<std::string> paths;
  for (const auto& [variable, below] :
       {std::pair("XDG_RUNTIME_DIR", ""), std::pair("XDG_STATE_HOME", ""),
        std::pair("HOME", "/.local/state")}) {
    const char* const root = environment(variable);
    // Relative ones do not count, as the XDG specification says.
    if (root == nullptr || root[0] != '/') continue;
    paths.push_back(absl::StrCat(root, below, "/strait/operator-key-", port));
  }
  return paths;
}

absl::Status MakeOperatorKey(const std::string& path) {
  const auto failed = [&](const char* doing, int error) {
    return absl::UnavailableError(
        absl::StrCat("operator key ", path, ": ", doing, ": ", strerror(error)));
  };
  const std::string folder = fs::path(path).parent_path().string();
  std::error_code error;
  fs::create_directories(fs::path(folder).parent_path(), error);
  if (error) return failed("make its folder", error.value());
  if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) return failed("make its folder", errno);
  // Not into what another may have put there, a link or a file that is open elsewhere.
  if (unlink(path.c_str()) != 0 && errno != ENOENT) return failed("remove an old one", errno);
  const File file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (file.fd() < 0) return failed("make", errno);
  const std::string key = RandomKey() + "\n";
  const ssize_t written = write(file.fd(), key.data(), key.size());
  if (written != static_cast<ssize_t>(key.size()))
    return failed("write", written < 0 ? errno : EIO);
  return absl::OkStatus();
}

}  // namespace strait
