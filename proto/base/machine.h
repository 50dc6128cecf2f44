// SPDX-License-Identifier: Apache-2.0
//
// What this process may take of the machine: the least of what is there and of what the control
// groups around it allow (version 2, and version 1 where it is still mounted).
//
// Thread:  any; reads /proc and /sys anew each time.
// Errors:  what cannot be read limits nothing.
// Why:     in a container /proc/meminfo and the number of processors are the host's: who trusts them
//          is killed for memory, or computes with more threads than it has time for.
#pragma once

#include <cstdint>
#include <string>

namespace strait {

// Bytes that can still be taken. Page cache of a group that the kernel would give up first counts
// as free. `root` stands before every path, for tests.
uint64_t AvailableMemoryBytes(const std::string& root = "");

// Whole processors, at least 1: of those that the process may run on, as many as its quota pays for.
uint32_t AvailableCores(const std::string& root = "");

// Which running system this is, in 16 hexadecimal digits: equal in all containers of one kernel, another one after a
// reboot. Made from the kernel's boot id, which is not handed out itself; empty where that cannot be read.
// Why not /etc/machine-id: images of machines are copied with it.
std::string HostIdentity(const std::string& root = "");

}  // namespace strait
