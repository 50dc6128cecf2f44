// SPDX-License-Identifier: Apache-2.0
//
// MakeHello says what a worker is, but for the stages that it kept (WorkerCore::FillHello).
//
// Thread:  any; it draws the instance.
#pragma once

#include <string>

#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/service/service.h"

namespace strait {

v1::Hello MakeHello(const WorkerOptions& options, const Backend& backend,
                    const std::string& data_address);

}  // namespace strait
