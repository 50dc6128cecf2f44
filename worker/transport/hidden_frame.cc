// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/hidden_frame.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/byte_cursor.h"
#include "xxhash.h"

namespace strait {
namespace {

using rpc::AppendField;
using rpc::AppendVarint;
using Cursor = rpc::ByteCursor;

constexpr uint64_t kOpenTag = rpc::BytesTag(1);
constexpr uint64_t kChunkTag = rpc::BytesTag(2);
constexpr uint64_t kPayloadTag = rpc::BytesTag(7);
constexpr size_t kMaxOpenBytes = 4096;

template <class Message>
grpc::ByteBuffer Encode(const Message& message) {
  const std::string bytes = message.SerializeAsString();
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

absl::Status Malformed(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("malformed hidden message: ", what));
}

// Everything of a chunk before its payload.
absl::Status ParseChunk(Cursor& cursor, HiddenChunkHeader* chunk) {
  uint64_t last_tag = 0;
  while (cursor.remaining() > 0) {
    uint64_t tag, value;
    if (!cursor.Varint(&tag) || !cursor.Varint(&value)) return Malformed("it ends inside a field");
    if (tag <= last_tag) return Malformed("fields out of order");
    last_tag = tag;
    switch (tag) {
      case 1 << 3:
        chunk->step_id = value;
        break;
      case 2 << 3:
        if (value > limits::kMaxStepTokens) return Malformed("more tokens than a step may have");
        chunk->num_tokens = static_cast<uint32_t>(value);
        break;
      case 3 << 3:
        chunk->offset_bytes = value;
        break;
      case 4 << 3:
        chunk->checksum = value;
        break;
      case 5 << 3:
        chunk->epoch.term = value;
        break;
      case 6 << 3:
        chunk->epoch.counter = value;
        break;
      case kPayloadTag:
        if (value != cursor.remaining())
          return Malformed("the payload's length is not what follows");
        if (value > limits::kHiddenChunkBytes) return Malformed("the payload is too long");
        chunk->payload_bytes = static_cast<uint32_t>(value);
        return absl::OkStatus();
      default:
        return Malformed("unknown field");
    }
  }
  return Malformed("a chunk without payload");
}

}  // namespace

grpc::ByteBuffer EncodeOpen(const v1::HiddenOpen& open) {
  v1::HiddenMessage message;
  *message.mutable_open() = open;
  return Encode(message);
}

grpc::ByteBuffer EncodeReply(const v1::HiddenReply& reply) { return Encode(reply); }

grpc::ByteBuffer EncodeChunk(const std::shared_ptr<const HiddenStep>& step, uint64_t offset,
                             uint32_t payload_bytes) {
  STRAIT_CHECK(payload_bytes <= limits::kHiddenChunkBytes && offset <= step->data.size() &&
               payload_bytes <= step->data.size() - offset);
  const std::byte* payload = step->data.data() + offset;
  std::string inner;
  AppendField(&inner, 1, step->step.value);
  AppendField(&inner, 2, step->num_tokens);
  AppendField(&inner, 3, offset);
  AppendField(&inner, 4, XXH3_64bits(payload, payload_bytes));
  AppendField(&inner, 5, step->epoch.term);
  AppendField(&inner, 6, step->epoch.counter);
  AppendVarint(&inner, kPayloadTag);
  AppendVarint(&inner, payload_bytes);
  std::string head;
  AppendVarint(&head, kChunkTag);
  AppendVarint(&head, inner.size() + payload_bytes);
  head += inner;
  auto* lent = new std::shared_ptr<const HiddenStep>(step);
  const grpc::Slice slices[2] = {
      grpc::Slice(head),
      grpc::Slice(
          const_cast<std::byte*>(payload), payload_bytes,
          [](void* owner) { delete static_cast<std::shared_ptr<const HiddenStep>*>(owner); },
          lent)};
  return grpc::ByteBuffer(slices, 2);
}

absl::StatusOr<HiddenFrame> HiddenFrame::Parse(const grpc::ByteBuffer& message) {
  HiddenFrame frame;
  if (!message.Valid() || !message.Dump(&frame.slices_).ok()) return Malformed("unreadable");
  Cursor cursor(frame.slices_);
  uint64_t tag, length;
  if (!cursor.Varint(&tag) || !cursor.Varint(&length)) return Malformed("it is empty");
  if (length != cursor.remaining()) return Malformed("its length is not what follows");
  if (tag == kOpenTag) {
    if (length > kMaxOpenBytes) return Malformed("an open that long");
    std::string bytes;
    cursor.Read(length, &bytes);
    if (!frame.open_.ParseFromString(bytes)) return Malformed("unreadable open");
    frame.is_open_ = true;
    return frame;
  }
  if (tag != kChunkTag) return Malformed("neither open nor chunk");
  STRAIT_RETURN_IF_ERROR(ParseChunk(cursor, &frame.chunk_));
  frame.payload_slice_ = cursor.slice();
  frame.payload_offset_ = cursor.offset();
  return frame;
}

absl::Status HiddenFrame::AppendPayload(std::vector<std::byte>* data) const {
  const size_t before = data->size();
  size_t offset = payload_offset_;
  for (size_t i = payload_slice_; i < slices_.size(); ++i, offset = 0) {
    const auto* bytes = reinterpret_cast<const std::byte*>(slices_[i].begin());
    data->insert(data->end(), bytes + offset, bytes + slices_[i].size());
  }
  STRAIT_CHECK(data->size() - before == chunk_.payload_bytes);
  if (XXH3_64bits(data->data() + before, chunk_.payload_bytes) != chunk_.checksum) {
    return absl::DataLossError(absl::StrCat("hidden states of step ", chunk_.step_id, " at byte ",
                                            chunk_.offset_bytes, " do not match their checksum"));
  }
  return absl::OkStatus();
}

}  // namespace strait
