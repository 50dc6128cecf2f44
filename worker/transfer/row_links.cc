// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/row_links.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// A message is counted in these, as an edge's steps are in rows.
constexpr uint32_t kUnit = limits::kRowAlign;
static_assert(limits::kTransferFrameBytes % kUnit == 0);

constexpr char kSeparator = ' ';

NcclTransportOptions TransportOptions(const RowLinksOptions& options) {
  NcclTransportOptions made;
  made.hidden_row_bytes = kUnit;
  made.arena_steps = kLinkPlaces;
  made.send_timeout = options.timeout;
  made.receive_timeout = options.timeout;
  made.posts_ahead = true;
  made.init_timeout = options.call_timeout;
  return made;
}

}  // namespace

absl::StatusOr<std::shared_ptr<RowLinks>> RowLinks::Create(RowLinksOptions options,
                                                           const NcclOffer& offer) {
  STRAIT_CHECK(offer.nccl != nullptr && offer.device != nullptr && offer.gate != nullptr);
  STRAIT_RETURN_IF_ERROR(offer.device->Checksums(nullptr, {}, {}));
  return std::shared_ptr<RowLinks>(new RowLinks(std::move(options), offer));
}

RowLinks::RowLinks(RowLinksOptions options, const NcclOffer& offer)
    : options_(std::move(options)),
      offer_(offer),
      hello_(
          absl::StrCat(offer.nccl->version(), std::string(1, kSeparator), offer.device->name())) {
  NcclEvents events;
  events.transport.on_edge_up = [this](const Edge& edge, const HiddenMemory&) {
    if (const auto link = Find(edge.from_stage_id)) link->is_up_ = true;
  };
  events.transport.on_edge_down = [this](const Edge& edge, const absl::Status& why) {
    const auto link = Find(edge.from_stage_id != 0 ? edge.from_stage_id : edge.to_stage_id);
    if (link == nullptr) return;
    link->is_down_ = true;
    link->events_.on_down(why);
  };
  events.transport.on_nccl_id = [this](const Edge& edge, std::string nccl_id) {
    if (const auto link = Find(edge.to_stage_id)) link->events_.on_id(std::move(nccl_id));
  };
  events.transport.on_hidden = [this](uint64_t id, HiddenStep message) {
    const auto link = Find(id);
    if (link != nullptr) link->events_.on_message(message.step.value, std::move(message.data));
  };
  events.on_poisoned = EndPoisonedProcess;
  transport_ =
      std::make_unique<NcclTransport>(TransportOptions(options_), offer_, std::move(events));
}

void RowLinks::Stop() {
  std::unique_ptr<NcclTransport> stopped;
  {
    std::lock_guard lock(mu_);
    stopped = std::move(transport_);
  }
}

bool RowLinks::Wants(const std::string& peers_hello) {
  {
    std::lock_guard lock(mu_);
    if (transport_ == nullptr || links_.size() >= kMaxRowLinks) return false;
  }
  const size_t at = peers_hello.find(kSeparator);
  if (at == std::string::npos || at != hello_.find(kSeparator)) return false;
  if (peers_hello.compare(0, at, hello_, 0, at) != 0) return false;  // another NCCL
  const bool is_known = at + 1 < hello_.size();
  return options_.on_one_device || !is_known || peers_hello != hello_;
}

std::shared_ptr<RowLink> RowLinks::Expect(RowLinkEvents events) {
  return Open(std::move(events), {}, /*gives=*/false);
}
std::shared_ptr<RowLink> RowLinks::Join(std::string nccl_id, RowLinkEvents events) {
  return Open(std::move(events), std::move(nccl_id), /*gives=*/true);
}

std::shared_ptr<RowLink> RowLinks::Open(RowLinkEvents events, std::string nccl_id, bool gives) {
  std::lock_guard lock(mu_);
  if (transport_ == nullptr || links_.size() >= kMaxRowLinks) return nullptr;
  const uint64_t id = ++last_id_;
  auto link = std::make_shared<RowLink>(shared_from_this(), id, gives, std::move(events));
  links_.emplace(id, link);
  Edge edge;
  edge.id = id;
  edge.over_nccl = true;
  edge.nccl_id = std::move(nccl_id);
  edge.max_tokens = limits::kTransferFrameBytes / kUnit;
  (gives ? edge.from_stage_id : edge.to_stage_id) = id;
  if (gives) {
    transport_->Connect(edge);
  } else {
    transport_->Expect(edge);
  }
  return link;
}

std::shared_ptr<RowLink> RowLinks::Find(uint64_t id) {
  std::lock_guard lock(mu_);
  const auto it = links_.find(id);
  return it == links_.end() ? nullptr : it->second.lock();
}

void RowLinks::Close(uint64_t id, bool gives) {
  std::lock_guard lock(mu_);
  links_.erase(id);
  if (transport_ == nullptr) return;
  if (gives) {
    transport_->Disconnect(id);
  } else {
    transport_->Forget(id);
  }
}

RowLink::~RowLink() { links_->Close(id_, gives_); }

std::optional<HiddenBuffer> RowLink::Place(size_t bytes) {
  STRAIT_CHECK(gives_);
  if (is_down_ || bytes > limits::kTransferFrameBytes) return std::nullopt;
  std::lock_guard lock(links_->mu_);
  return links_->transport_ == nullptr ? std::nullopt : links_->transport_->Place(id_, bytes);
}

absl::Status RowLink::Send(uint64_t number, HiddenBuffer data) {
  STRAIT_CHECK(gives_ && data.size() % kUnit == 0);
  const auto units = static_cast<uint32_t>(data.size() / kUnit);
  std::lock_guard lock(links_->mu_);
  if (links_->transport_ == nullptr) return absl::UnavailableError("the worker stops");
  return links_->transport_->Send(id_, {{}, StepId{number}, units, std::move(data)});
}

absl::Status RowLink::Due(uint64_t number, size_t bytes) {
  STRAIT_CHECK(!gives_);
  if (bytes == 0 || bytes % kUnit != 0 || bytes > limits::kTransferFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a message of ", bytes, " bytes"));
  }
  std::lock_guard lock(links_->mu_);
  if (links_->transport_ == nullptr) return absl::UnavailableError("the worker stops");
  links_->transport_->Due(id_, {}, StepId{number}, static_cast<uint32_t>(bytes / kUnit));
  return absl::OkStatus();
}

}  // namespace strait
