// SPDX-License-Identifier: Apache-2.0
#include "proto/base/machine.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

namespace strait {
namespace {

// The first number of a file, or the one that follows `key` on its line; none for "max" and "-1".
std::optional<uint64_t> ReadNumber(const std::string& path, std::string_view key = "") {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    if (!(words >> word)) continue;
    if (!key.empty() && (word != key || !(words >> word))) continue;
    if (word.find_first_not_of("0123456789") != std::string::npos || word.size() > 19) return {};
    return std::stoull(word);
  }
  return {};
}

// The folders of this process's group under `controller`, from its own to the outermost; with an
// empty controller those of version 2.
std::vector<std::string> GroupFolders(const std::string& root, std::string_view controller) {
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {  // "4:cpu,cpuacct:/path", or "0::/path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::istringstream names(line.substr(first + 1, second - first - 1));
    bool listed = controller.empty() && second == first + 1;
    for (std::string name; std::getline(names, name, ',');) listed |= name == controller;
    if (!listed) continue;
    std::string base = root + "/sys/fs/cgroup";
    if (!controller.empty()) base += "/" + std::string(controller);
    std::vector<std::string> folders;
    for (std::string path = line.substr(second + 1); path.size() > 1;
         path = path.substr(0, path.rfind('/'))) {
      folders.push_back(base + path);
    }
    folders.push_back(base);
    return folders;
  }
  return {};
}

struct MemoryFiles {
  const char* limit;
  const char* used;
  const char* cache_key;  // in memory.stat: page cache that was not used lately
};
constexpr MemoryFiles kMemory2 = {"/memory.max", "/memory.current", "inactive_file"};
constexpr MemoryFiles kMemory1 = {"/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                  "total_inactive_file"};

uint64_t LeftInGroups(const std::vector<std::string>& folders, const MemoryFiles& files,
                      uint64_t bytes) {
  for (const std::string& folder : folders) {
    const std::optional<uint64_t> limit = ReadNumber(folder + files.limit);
    if (!limit) continue;
    uint64_t used = ReadNumber(folder + files.used).value_or(0);
    used -= std::min(used, ReadNumber(folder + "/memory.stat", files.cache_key).value_or(0));
    bytes = std::min(bytes, *limit - std::min(*limit, used));
  }
  return bytes;
}

uint64_t CoresOfQuota(uint64_t quota_us, uint64_t period_us, uint64_t cores) {
  if (period_us == 0) return cores;
  return std::clamp<uint64_t>(quota_us / period_us, 1, cores);
}

}  // namespace

uint64_t AvailableMemoryBytes(const std::string& root) {
  const uint64_t bytes = ReadNumber(root + "/proc/meminfo", "MemAvailable:").value_or(0) * 1024;
  return LeftInGroups(GroupFolders(root, "memory"), kMemory1,
                      LeftInGroups(GroupFolders(root, ""), kMemory2, bytes));
}

std::string HostIdentity(const std::string& root) {
  std::ifstream file(root + "/proc/sys/kernel/random/boot_id");
  std::string id;
  if (!(file >> id)) return "";
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : id) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  std::ostringstream text;
  text << std::hex << std::setfill('0') << std::setw(16) << hash;
  return text.str();
}

uint32_t AvailableCores(const std::string& root) {
  cpu_set_t allowed;
  uint64_t cores = 1;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    cores = static_cast<uint64_t>(std::max(1, CPU_COUNT(&allowed)));
  }
  for (const std::string& folder : GroupFolders(root, "")) {
    std::ifstream file(folder + "/cpu.max");  // "150000 100000", or "max 100000"
    uint64_t quota_us, period_us;
    if (file >> quota_us >> period_us) cores = CoresOfQuota(quota_us, period_us, cores);
  }
  for (const std::string& folder : GroupFolders(root, "cpu")) {
    const std::optional<uint64_t> quota_us = ReadNumber(folder + "/cpu.cfs_quota_us");
    const std::optional<uint64_t> period_us = ReadNumber(folder + "/cpu.cfs_period_us");
    if (quota_us && period_us) cores = CoresOfQuota(*quota_us, *period_us, cores);
  }
  return static_cast<uint32_t>(cores);
}

}  // namespace strait
