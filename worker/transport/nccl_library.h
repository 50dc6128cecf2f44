// SPDX-License-Identifier: Apache-2.0
//
// LoadNccl finds libnccl.so.2 while the program runs, so that it starts where there is none.
//
// Thread:  any.
// Errors:  NotFound: no such library; FailedPrecondition: one that is too old or lacks a function.
//          Both say what would help.
// Limits:  kNcclVersionMin.
// Why:     NCCL's own monitor (RAS) opens one more network of sockets: it is off unless the user
//          set NCCL_RAS_ENABLE.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/transport/nccl_api.h"

namespace strait {

inline constexpr uint32_t kNcclVersionMin = 21800;  // communicators by config that may fail alone

// `path` empty: the loader's own search.
absl::StatusOr<std::shared_ptr<NcclApi>> LoadNccl(const std::string& path);

}  // namespace strait
