// SPDX-License-Identifier: Apache-2.0
//
// Epochs to their wire form and back.
//
// Thread:  pure functions.
#pragma once

#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

inline PipelineEpoch FromWire(const v1::PipelineEpoch& wire) {
  return {wire.term(), wire.counter()};
}

inline PlacementEpoch FromWire(const v1::PlacementEpoch& wire) {
  return {wire.term(), wire.counter()};
}

inline void ToWire(PlacementEpoch epoch, v1::PlacementEpoch* wire) {
  wire->set_term(epoch.term);
  wire->set_counter(epoch.counter);
}

inline void ToWire(PipelineEpoch epoch, v1::PipelineEpoch* wire) {
  wire->set_term(epoch.term);
  wire->set_counter(epoch.counter);
}

}  // namespace strait
