// SPDX-License-Identifier: Apache-2.0
//
// The operator key opens what changes a running cluster (migrate, scale). It lies in a file that
// nobody but its owner reads: whose file it is may change the cluster.
//
// Thread:  any.
// Errors:  NotFound (no such file), InvalidArgument (no such key in it), FailedPrecondition (others
//          may read it, or it is no plain file; the message has the fix), Unavailable (the file
//          system).
// Limits:  kMinOperatorKeyBytes to kMaxOperatorKeyBytes printable characters, one line.
// Why:     a file named by the HTTP port, so that on one machine `strait up` and the other verbs
//          meet without a flag.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait {

inline constexpr size_t kMinOperatorKeyBytes = 16;
inline constexpr size_t kMaxOperatorKeyBytes = 256;

// The key in a file; white space at its end does not count. `what` names the file in errors, as the flag does.
absl::StatusOr<std::string> ReadOperatorKey(const std::string& path, std::string_view what);

// Where the key of a coordinator of this user and machine lies that serves HTTP at `port`: strait/operator-key-PORT in
// XDG_RUNTIME_DIR, in XDG_STATE_HOME, in ~/.local/state, as far as these are set. It is written to the first; who
// looks for it was perhaps started with other variables, and tries all.
std::vector<std::string> OperatorKeyPaths(uint16_t port);
// The same of another environment.
using Environment = std::function<const char*(const char* name)>;
std::vector<std::string> OperatorKeyPaths(uint16_t port, const Environment& environment);

// Writes a new random key to `path`, for the owner alone, in place of what is there.
absl::Status MakeOperatorKey(const std::string& path);

}  // namespace strait
