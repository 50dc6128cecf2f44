// SPDX-License-Identifier: Apache-2.0
//
// FindOperatorKey is how the verbs that change a cluster come by its operator key.
//
// Thread:  any.
// Errors:  ReadOperatorKey's, of a file that is named or found.
// Why:     a key that was found, not named, is sent to this machine only: another one may serve at
//          the same port number and would read it.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"

namespace strait::cli {

// The key in `file`, which --operator-key-file named; of an empty one: in the file that `strait up` has made, if the
// coordinator is on this machine. Empty: there is none, and the coordinator will say what it needs.
absl::StatusOr<std::string> FindOperatorKey(const Url& url, const std::string& file);

// Whether all addresses of `host` are this machine's.
bool IsThisMachine(const std::string& host);

}  // namespace strait::cli
