// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/linked_rows.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status Check(EdgeDevice* device, const RowsFrame& head, const HiddenBuffer& data) {
  std::vector<uint64_t> sums;
  STRAIT_RETURN_IF_ERROR(SumOnDevice(device, head.pieces, {data.data(), data.size()}, &sums));
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] == head.pieces[i].row_checksum) continue;
    return absl::DataLossError(absl::StrCat("rows of layer ", head.pieces[i].layer,
                                            " from position ", head.pieces[i].first_position,
                                            " have another checksum than their header"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SumOnDevice(EdgeDevice* device, absl::Span<const BlockHeader> pieces,
                         absl::Span<const std::byte> rows, std::vector<uint64_t>* sums) {
  std::vector<uint32_t> bytes;
  uint64_t all = 0;
  bytes.reserve(pieces.size());
  for (const BlockHeader& piece : pieces) {
    bytes.push_back(piece.payload_bytes);
    all += piece.payload_bytes;
  }
  if (all != rows.size()) {
    return absl::DataLossError(absl::StrCat("pieces of ", all, " bytes in ", rows.size()));
  }
  sums->resize(pieces.size());
  return device->Checksums(rows.data(), bytes, absl::MakeSpan(*sums));
}

std::string LinkedRows::TakeHello() {
  std::lock_guard lock(mu_);
  if (has_begun_) return {};
  is_told_ = true;
  return links_->hello();
}

void LinkedRows::Begin() {
  std::lock_guard lock(mu_);
  if (!is_told_ || std::exchange(has_begun_, true)) return;
  const std::weak_ptr<LinkedRows> weak = weak_from_this();
  RowLinkEvents events;
  events.on_id = [weak](std::string id) {
    const auto self = weak.lock();
    if (self == nullptr) return;
    std::lock_guard id_lock(self->mu_);
    self->nccl_id_ = std::move(id);
  };
  events.on_message = [weak](uint64_t number, HiddenBuffer data) {
    if (const auto self = weak.lock()) self->OnMessage(number, std::move(data));
  };
  events.on_down = [weak](const absl::Status& why) {
    if (const auto self = weak.lock()) self->Break(why);
  };
  link_ = links_->Expect(std::move(events));
}

std::string LinkedRows::TakeId() {
  std::lock_guard lock(mu_);
  return std::exchange(nccl_id_, {});
}

bool LinkedRows::is_used() {
  std::lock_guard lock(mu_);
  return is_used_ && link_ != nullptr;
}

bool LinkedRows::has_link() {
  std::lock_guard lock(mu_);
  return link_ != nullptr;
}

void LinkedRows::Expect(const RowsReply& reply, std::optional<AskId> id) {
  uint64_t bytes = 0;
  absl::StatusOr<RowsFrame> head = reply.OpenHead(&bytes);
  absl::Status due;
  if (!head.ok()) {
    due = head.status();  // and the size is not known: nothing can follow it
  } else {
    std::lock_guard lock(mu_);
    if (link_ == nullptr) {
      due = absl::UnavailableError("there is no link");
    } else if (reply.link_number() != last_number_ + 1) {
      due = absl::DataLossError(
          absl::StrCat("message ", reply.link_number(), " of the link after ", last_number_));
    } else if (coming_.size() >= kMaxComing) {
      due = absl::DataLossError(absl::StrCat(coming_.size(), " messages of the link are to come"));
    } else {
      ++last_number_;
      if (!id) head->pieces.clear();
      coming_.emplace(last_number_, Coming{id, *std::move(head)});
      due = link_->Due(last_number_, bytes);
      if (due.ok()) return;
      coming_.erase(last_number_);
    }
  }
  if (!absl::IsUnavailable(due)) Break(due);
  if (id) {
    events_->on_rows(*id,
                     absl::IsDataLoss(due) ? due : absl::ResourceExhaustedError(due.message()));
  }
}

void LinkedRows::OnMessage(uint64_t number, HiddenBuffer data) {
  Coming coming;
  {
    std::lock_guard lock(mu_);
    const auto it = coming_.find(number);
    if (it == coming_.end()) return;
    coming = std::move(it->second);
    coming_.erase(it);
    is_used_ = true;
  }
  if (!coming.id) return;
  if (absl::Status checked = Check(&links_->device(), coming.head, data); !checked.ok()) {
    return events_->on_rows(*coming.id, std::move(checked));
  }
  count_(data.size());
  auto keeper = std::make_shared<HiddenBuffer>(std::move(data));
  coming.head.lent = {
      .memory = {keeper->data(), keeper->size()}, .keeper = keeper, .on_device = true};
  events_->on_rows(*coming.id, std::move(coming.head));
}

LinkedRows::Left LinkedRows::TakeAll() {
  Left left;
  std::lock_guard lock(mu_);
  left.link = std::move(link_);
  left.coming.swap(coming_);
  nccl_id_.clear();
  return left;
}

void LinkedRows::TellLost(const Left& left, const absl::Status& why) const {
  for (const auto& [number, coming] : left.coming) {
    if (coming.id) events_->on_rows(*coming.id, why);
  }
}

void LinkedRows::Break(const absl::Status& why) {
  const Left left = TakeAll();
  if (left.link == nullptr) return;
  Log(LogLevel::kInfo, "a link for rows broke, they come another way",
      {{"why", why}, {"asked", left.coming.size()}});
  TellLost(left, absl::ResourceExhaustedError(absl::StrCat("the link broke: ", why.message())));
}

void LinkedRows::End(const absl::Status& why) {
  {
    std::lock_guard lock(mu_);
    has_begun_ = true;  // and no other begins
  }
  TellLost(TakeAll(), why);
}

}  // namespace strait
