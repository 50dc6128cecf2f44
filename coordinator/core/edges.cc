// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/edges.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/text.h"

namespace strait {
namespace {

std::string VersionText(uint32_t version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace

NcclSupport NcclSupportOf(const v1::Hello& hello) {
  NcclSupport support;
  support.version = hello.nccl_version();
  if (support.version > 0) return support;
  support.problem = PrintableText(hello.nccl_problem(), limits::kMaxErrorMessageBytes);
  if (support.problem.empty()) support.problem = absl::StrCat("backend ", hello.backend());
  return support;
}

NumberedEdge NextEdge(const NumberedEdge& edge, uint64_t from_stage_id, uint64_t to_stage_id,
                      bool over_nccl, uint64_t* last_id) {
  const NumberedEdge same{edge.id, from_stage_id, to_stage_id, false};
  if (edge.id != 0 && edge == same && !over_nccl) return edge;
  return {++*last_id, from_stage_id, to_stage_id, over_nccl};
}

uint64_t EdgeNonce(uint64_t secret, uint64_t edge_id) {
  const uint64_t words[] = {secret, edge_id};
  return XXH3_64bits_withSeed(words, sizeof(words), secret) | 1;
}

EdgeChoice EdgeChooser::Choose(const EdgeEnd& from, const EdgeEnd& to, uint64_t now_us) const {
  // Two ranks of one device are no communicator.
  if (from.worker == to.worker) return {false, absl::StrCat("both stages are on ", *from.name)};
  for (const EdgeEnd* end : {&from, &to}) {
    if (end->nccl->version == 0) {
      return {false, absl::StrCat(*end->name, " offers no NCCL: ", end->nccl->problem)};
    }
  }
  if (from.nccl->version != to.nccl->version) {
    return {false, absl::StrCat("NCCL versions differ: ", *from.name, " has ",
                                VersionText(from.nccl->version), ", ", *to.name, " has ",
                                VersionText(to.nccl->version))};
  }
  const auto it = failures_.find({from.worker, to.worker});
  if (it != failures_.end() && now_us < it->second.until_us) {
    return {false,
            absl::StrCat("NCCL failed between ", *from.name, " and ", *to.name,
                         ", it is tried again when the pipeline starts anew after ",
                         (it->second.until_us - now_us) / 1'000'000, " s: ", it->second.why)};
  }
  return {true, absl::StrCat("both have NCCL ", VersionText(to.nccl->version))};
}

void EdgeChooser::Avoid(WorkerId from, WorkerId to, std::string why, uint64_t now_us) {
  failures_[{from, to}] = {now_us + kNcclRetryAfterUs, std::move(why)};
}

void EdgeChooser::Forget(WorkerId worker) {
  std::erase_if(failures_, [&](const auto& entry) {
    return entry.first.first == worker || entry.first.second == worker;
  });
}

}  // namespace strait
