// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/child.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"

namespace strait::cli {
namespace {

constexpr size_t kTailBytes = 16 << 10;

// Between fork and exec: only calls that are safe in a copy of a process with threads.
[[noreturn]] void RunChild(char* const* argv, char* const* environment, int log_fd, int error_fd,
                           pid_t parent) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // it died before the line above
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (null_fd >= 0) dup2(null_fd, STDIN_FILENO);
  dup2(log_fd, STDOUT_FILENO);
  dup2(log_fd, STDERR_FILENO);
  execve(argv[0], argv, environment);
  const int error = errno;
  [[maybe_unused]] const ssize_t n = write(error_fd, &error, sizeof(error));
  _exit(127);
}

constexpr int kUsualLowestHandedOut = 32768;
constexpr int kLowestChosen = 10'000;
constexpr int kPortsEnd = 65536;
constexpr int kPortTries = 64;

absl::StatusOr<int> Bound(const std::string& host, uint16_t port) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("no such host: ", host));
  }
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, found->ai_protocol);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const bool bound =
      fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, 1) == 0;
  const int error = errno;
  freeaddrinfo(found);
  if (bound) return fd;
  if (fd >= 0) close(fd);
  return absl::UnavailableError(absl::StrCat(host, ":", port, ": ", strerror(error)));
}

// Ours with `more`, which wins over a variable of the same name. Borrows both.
std::vector<char*> Environment(const std::vector<std::string>& more) {
  std::vector<char*> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view ours = *entry;
    const bool replaced = std::any_of(more.begin(), more.end(), [&](const std::string& theirs) {
      return ours.starts_with(theirs.substr(0, theirs.find('=') + 1));
    });
    if (!replaced) all.push_back(*entry);
  }
  for (const std::string& entry : more) all.push_back(const_cast<char*>(entry.c_str()));
  all.push_back(nullptr);
  return all;
}

}  // namespace

absl::StatusOr<pid_t> Spawn(const ChildSpec& spec) {
  const std::string& program = spec.argv.front();
  std::vector<char*> argv;
  for (const std::string& arg : spec.argv) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);

  std::vector<char*> environment = Environment(spec.environment);

  const int log_fd = open(spec.log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log_fd < 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot write ", spec.log_path, ": ", strerror(errno)));
  }
  int pipe_fds[2];
  if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
    close(log_fd);
    return absl::UnavailableError(absl::StrCat("pipe: ", strerror(errno)));
  }
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) RunChild(argv.data(), environment.data(), log_fd, pipe_fds[1], parent);
  const int fork_error = errno;
  close(log_fd);
  close(pipe_fds[1]);
  if (pid < 0) {
    close(pipe_fds[0]);
    return absl::UnavailableError(absl::StrCat("fork: ", strerror(fork_error)));
  }
  int error = 0;
  ssize_t n;
  do {
    n = read(pipe_fds[0], &error, sizeof(error));
  } while (n < 0 && errno == EINTR);
  close(pipe_fds[0]);
  if (n == sizeof(error)) {
    waitpid(pid, nullptr, 0);
    return absl::UnavailableError(absl::StrCat("cannot start ", program, ": ", strerror(error)));
  }
  return pid;
}

std::string DescribeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int signal = WTERMSIG(wait_status);
    return absl::StrCat("signal ", signal, " (", strsignal(signal), ")");
  }
  return absl::StrCat("exit code ", WEXITSTATUS(wait_status));
}

std::string TailOf(const std::string& path, size_t num_lines) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return "";
  const size_t size = static_cast<size_t>(std::max<std::streamoff>(file.tellg(), 0));
  const size_t take = std::min(size, kTailBytes);
  std::string text(take, '\0');
  file.seekg(static_cast<std::streamoff>(size - take));
  file.read(text.data(), static_cast<std::streamsize>(take));
  while (text.ends_with('\n')) text.pop_back();
  size_t start = text.size();
  for (size_t line = 0; line < num_lines && start != std::string::npos && start > 0; ++line) {
    start = text.rfind('\n', start - 1);
  }
  return start == std::string::npos || start == 0 ? text : text.substr(start + 1);
}

absl::StatusOr<std::string> ProgramFolder() {
  char path[PATH_MAX];
  const ssize_t n = readlink("/proc/self/exe", path, sizeof(path));
  if (n <= 0) return absl::UnavailableError("cannot read /proc/self/exe: is /proc mounted?");
  const std::string full(path, static_cast<size_t>(n));
  return full.substr(0, full.rfind('/'));
}

bool PortIsFree(const std::string& host, uint16_t port) {
  const absl::StatusOr<int> fd = Bound(host, port);
  if (fd.ok()) close(*fd);
  return fd.ok();
}

absl::StatusOr<uint16_t> FreePort(const std::string& host) {
  // Below what the kernel hands out to who asks for any port: a worker that starts meanwhile asks so.
  int lowest_handed_out = kUsualLowestHandedOut;
  std::ifstream("/proc/sys/net/ipv4/ip_local_port_range") >> lowest_handed_out;
  const int end = lowest_handed_out > 2 * kLowestChosen ? lowest_handed_out : kPortsEnd;
  std::uniform_int_distribution<int> ports(kLowestChosen, end - 1);
  std::random_device random;
  absl::Status last = absl::UnavailableError(absl::StrCat(host, ": no free port found"));
  for (int i = 0; i < kPortTries; ++i) {
    const auto port = static_cast<uint16_t>(ports(random));
    const absl::StatusOr<int> fd = Bound(host, port);
    if (fd.ok()) {
      close(*fd);
      return port;
    }
    last = fd.status();
    if (!absl::IsUnavailable(last)) break;
  }
  return last;
}

absl::StatusOr<Signals> Signals::Create() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) sigaddset(&set, signal);
  if (pthread_sigmask(SIG_BLOCK, &set, nullptr) != 0) {
    return absl::UnavailableError("cannot block signals");
  }
  const int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
  if (fd < 0) return absl::UnavailableError(absl::StrCat("signalfd: ", strerror(errno)));
  return Signals(fd);
}

Signals::~Signals() {
  if (fd_ >= 0) close(fd_);
}

std::optional<int> Signals::Take() {
  signalfd_siginfo info;
  if (read(fd_, &info, sizeof(info)) != sizeof(info)) return std::nullopt;
  return static_cast<int>(info.ssi_signo);
}

}  // namespace strait::cli
