// SPDX-License-Identifier: Apache-2.0
//
// Sampled ids as rows of four bytes, so that they cross their edge as hidden states do: the same
// frames, checks, deadlines and bounds.
//
// Thread:  pure functions.
#pragma once

#include <cstdint>

#include "proto/base/ids.h"
#include "worker/hidden_step.h"

namespace strait {

inline constexpr uint32_t kSampledRowBytes = sizeof(TokenId);

HiddenStep ToRows(const SampledStep& sampled);
// REQUIRES: rows of kSampledRowBytes, whole, as a receiver hands them on.
SampledStep FromRows(const HiddenStep& rows);

}  // namespace strait
