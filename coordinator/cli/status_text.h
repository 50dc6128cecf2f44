// SPDX-License-Identifier: Apache-2.0
//
// DescribeStatus says in tables what GET /strait/status tells in JSON, for people.
//
// Thread:  pure function.
// Errors:  none: what a server does not tell is left out.
#pragma once

#include <string>

#include "proto/base/json.h"

namespace strait::cli {

std::string DescribeStatus(const json::Object& status);

}  // namespace strait::cli
