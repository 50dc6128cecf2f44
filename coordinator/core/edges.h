// SPDX-License-Identifier: Apache-2.0
//
// EdgeChooser says which transport the edge between two workers uses: NCCL where both can, gRPC
// otherwise, with the reason. NumberedEdge says which edge it is.
//
// Thread:  loop thread only.
// Limits:  it remembers pairs of workers that are attached.
// Why:     whether two hosts can really join shows only when they try. A pair whose NCCL edge
//          failed uses gRPC for kNcclRetryAfterUs, so that a pipeline always comes up.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

inline constexpr uint64_t kNcclRetryAfterUs = 600'000'000;

// What a worker said of NCCL in its Hello.
struct NcclSupport {
  uint32_t version = 0;  // 0: none
  std::string problem;   // then
};
NcclSupport NcclSupportOf(const v1::Hello& hello);

struct EdgeEnd {
  WorkerId worker;
  const std::string* name;
  const NcclSupport* nccl;
};

struct EdgeChoice {
  bool over_nccl = false;
  std::string why;  // for people
};

// An edge that two stages were told of. Its id, and the nonce made from that, outlive epochs: while the
// same two stages are its ends, and it is gRPC, there is no need to open it anew. NCCL's must be: an
// operation whose match is lost with an epoch cannot be taken back.
struct NumberedEdge {
  uint64_t id = 0;  // 0: none yet; never reused
  uint64_t from_stage_id = 0;
  uint64_t to_stage_id = 0;
  bool over_nccl = false;
  friend bool operator==(const NumberedEdge&, const NumberedEdge&) = default;
};
// Of the next epoch: the same, or one with the id ++*last_id.
NumberedEdge NextEdge(const NumberedEdge& edge, uint64_t from_stage_id, uint64_t to_stage_id,
                      bool over_nccl, uint64_t* last_id);
// What the sender must show. Never 0.
uint64_t EdgeNonce(uint64_t secret, uint64_t edge_id);

class EdgeChooser {
 public:
  EdgeChoice Choose(const EdgeEnd& from, const EdgeEnd& to, uint64_t now_us) const;
  // The NCCL edge between them failed.
  void Avoid(WorkerId from, WorkerId to, std::string why, uint64_t now_us);
  // A worker is gone; ids are not reused.
  void Forget(WorkerId worker);

 private:
  struct Failure {
    uint64_t until_us = 0;
    std::string why;
  };
  std::map<std::pair<WorkerId, WorkerId>, Failure> failures_;
};

}  // namespace strait
