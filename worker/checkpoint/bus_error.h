// SPDX-License-Identifier: Apache-2.0
//
// What a worker says when a mapped checkpoint file fails under it: a file that is cut, or a disk
// that gives an error, while weights are read through the mapping arrives as SIGBUS.
//
// Thread:  any; the handler uses only what is safe in one.
// Limits:  kMaxShards mappings are known by name; a fault in one beyond is told without.
// Why:     the one global of the worker: a signal handler finds nothing else. Weights are not copied
//          out of the mapping, so there is no other place where such a fault could be met.
#pragma once

#include <cstddef>
#include <cstdint>

namespace strait {

// Exit code of a worker that a mapped file failed.
inline constexpr int kExitMappedFileFailed = 74;

// SIGBUS in a watched mapping: one line to stderr that names the file and the remedy, then
// _exit(kExitMappedFileFailed). Elsewhere: a line, then the signal's own end. Call once, in main.
void InstallBusErrorHandler();

// [data, data + bytes) maps the file `path`, which stays valid while this lives.
class WatchedMapping {
 public:
  WatchedMapping(const std::byte* data, uint64_t bytes, const char* path);
  ~WatchedMapping();
  WatchedMapping(const WatchedMapping&) = delete;
  WatchedMapping& operator=(const WatchedMapping&) = delete;

 private:
  size_t slot_;  // past the table: not known by name
};

}  // namespace strait
