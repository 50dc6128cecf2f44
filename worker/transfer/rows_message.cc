// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/rows_message.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/content_key.h"
#include "proto/rpc/byte_cursor.h"
#include "proto/rpc/status.h"
#include "proto/wire/block_codec.h"

namespace strait {
namespace {

constexpr size_t kMaxRequestBytes = 4096;

// Rows that gRPC has yet to write.
struct Lent {
  std::string rows;
  std::shared_ptr<RowBuffers> buffers;
};
void TakeBack(void* lent) {
  const std::unique_ptr<Lent> gone(static_cast<Lent*>(lent));
  gone->buffers->Give(std::move(gone->rows));
}

absl::Span<const std::byte> Bytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

absl::Status Malformed(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("malformed rows message: ", what));
}

}  // namespace

// ---------------------------------------------------------------- requests

v1::RowsRequest ToWire(uint64_t request_id, const RowsAsk& ask, const SharedPlace& place) {
  v1::RowsRequest request;
  request.set_request_id(request_id);
  request.set_stage_id(ask.stage_id);
  request.set_epoch_term(ask.epoch.term);
  request.set_epoch_counter(ask.epoch.counter);
  request.set_sequence_id(ask.sequence.value);
  request.set_placement_term(ask.placement.term);
  request.set_placement_counter(ask.placement.counter);
  request.set_secret(ask.secret);
  request.set_layer_begin(ask.layers.begin);
  request.set_layer_end(ask.layers.end);
  request.set_first_row(ask.first_row);
  request.set_num_rows(ask.num_rows);
  request.set_keys(Pack(ask.keys));
  request.set_on_device(ask.on_device);
  if (!place.any()) return request;
  v1::SharedPlace& told = *request.mutable_place();
  told.set_nonce_low(place.nonce_low);
  told.set_nonce_high(place.nonce_high);
  told.set_process_id(place.process_id);
  told.set_file(place.file);
  told.set_index(place.index);
  told.set_ticket(place.ticket);
  told.set_offset(place.offset);
  told.set_bytes(place.bytes);
  return request;
}

v1::RowsRequest LinkRequest(uint64_t request_id, const std::string& nccl_id) {
  v1::RowsRequest request;
  request.set_request_id(request_id);
  request.set_nccl_id(nccl_id);
  return request;
}

SharedPlace PlaceOf(const v1::RowsRequest& request) {
  const v1::SharedPlace& told = request.place();
  return {.nonce_low = told.nonce_low(),
          .nonce_high = told.nonce_high(),
          .process_id = told.process_id(),
          .file = told.file(),
          .index = told.index(),
          .ticket = told.ticket(),
          .offset = told.offset(),
          .bytes = told.bytes()};
}

absl::StatusOr<v1::RowsRequest> ParseRequest(const grpc::ByteBuffer& message) {
  if (!message.Valid() || message.Length() > kMaxRequestBytes)
    return Malformed("a request that long");
  std::vector<grpc::Slice> slices;
  if (!message.Dump(&slices).ok()) return Malformed("unreadable");
  rpc::ByteCursor cursor(slices);
  std::string bytes;
  cursor.Read(cursor.remaining(), &bytes);
  v1::RowsRequest request;
  if (!request.ParseFromString(bytes)) return Malformed("unreadable request");
  if (!ParseContentKeys(request.keys()).ok()) return Malformed("its keys");
  return request;
}

RowsAsk FromWire(const v1::RowsRequest& request) {
  const auto keys = ParseContentKeys(request.keys());
  STRAIT_CHECK(keys.ok(), "ParseRequest looked at them");
  return {.stage_id = request.stage_id(),
          .epoch = {request.epoch_term(), request.epoch_counter()},
          .sequence = SequenceId{request.sequence_id()},
          .placement = {request.placement_term(), request.placement_counter()},
          .secret = request.secret(),
          .layers = {request.layer_begin(), request.layer_end()},
          .first_row = request.first_row(),
          .num_rows = request.num_rows(),
          .keys = *keys,
          .bytes = 0,
          .on_device = request.on_device()};
}

// ---------------------------------------------------------------- replies

void SealFrame(RowsFrame* frame) {
  const absl::Span<const std::byte> rows = frame->bytes();
  size_t at = 0;
  for (BlockHeader& piece : frame->pieces) {
    SealBlockHeader(rows.subspan(at, piece.payload_bytes), &piece);
    at += piece.payload_bytes;
  }
}

absl::StatusOr<grpc::ByteBuffer> EncodeFrame(uint64_t request_id, RowsFrame frame,
                                             std::shared_ptr<RowBuffers> buffers, ReplyWay way) {
  std::string head(TransferHeadBytes(static_cast<uint32_t>(frame.pieces.size())), '\0');
  TransferHeader header;
  header.sequence_id = frame.sequence.value;
  header.placement_term = frame.placement.term;
  header.placement_counter = frame.placement.counter;
  STRAIT_RETURN_IF_ERROR(
      EncodeTransferHead(header, frame.pieces,
                         absl::MakeSpan(reinterpret_cast<std::byte*>(head.data()), head.size())));
  std::string fields;
  rpc::AppendField(&fields, 1, request_id);
  rpc::AppendVarint(&fields, rpc::BytesTag(4));
  rpc::AppendVarint(&fields, head.size());
  fields += head;
  if (way.place_ticket != 0) rpc::AppendField(&fields, 5, way.place_ticket);
  if (way.link_number != 0) rpc::AppendField(&fields, 6, way.link_number);
  if (way.wants_link) rpc::AppendField(&fields, 7, 1);
  if (way.place_ticket != 0 || way.link_number != 0) {
    const grpc::Slice slice(fields);
    return grpc::ByteBuffer(&slice, 1);
  }
  rpc::AppendVarint(&fields, rpc::BytesTag(8));
  rpc::AppendVarint(&fields, frame.rows.size());
  auto* lent = new Lent{std::move(frame.rows), std::move(buffers)};
  const grpc::Slice slices[2] = {
      grpc::Slice(fields), grpc::Slice(lent->rows.data(), lent->rows.size(), &TakeBack, lent)};
  return grpc::ByteBuffer(slices, 2);
}

grpc::ByteBuffer EncodeError(uint64_t request_id, const absl::Status& why) {
  v1::RowsReply reply;
  reply.set_request_id(request_id);
  reply.set_error_code(static_cast<uint32_t>(why.code()));
  reply.set_error_message(std::string(rpc::Bounded(why).message()));
  const std::string bytes = reply.SerializeAsString();
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

absl::StatusOr<RowsReply> RowsReply::Parse(const grpc::ByteBuffer& message) {
  RowsReply reply;
  if (!message.Valid() || !message.Dump(&reply.slices_).ok()) return Malformed("unreadable");
  rpc::ByteCursor cursor(reply.slices_);
  uint64_t tag = 0;
  if (!cursor.Varint(&tag) || tag != rpc::VarintTag(1) || !cursor.Varint(&reply.request_id_)) {
    return Malformed("it does not begin with the request's id");
  }
  uint64_t error_code = 0;
  std::string error_message;
  reply.damage_ = [&]() -> absl::Status {
    uint64_t last_tag = tag;
    while (cursor.remaining() > 0) {
      uint64_t value = 0;
      if (!cursor.Varint(&tag) || !cursor.Varint(&value)) return Malformed("it ends in a field");
      if (tag <= last_tag) return Malformed("fields out of order");
      last_tag = tag;
      if (tag == rpc::VarintTag(2)) {
        error_code = value;
        continue;
      }
      if (tag == rpc::VarintTag(5)) {
        reply.place_ticket_ = value;
        continue;
      }
      if (tag == rpc::VarintTag(6)) {
        reply.link_number_ = value;
        continue;
      }
      if (tag == rpc::VarintTag(7)) {
        reply.wants_link_ = value != 0;
        continue;
      }
      if (value > cursor.remaining()) return Malformed("it ends in a field");
      if (tag == rpc::BytesTag(3)) {
        if (value > 2 * limits::kMaxErrorMessageBytes) return Malformed("an error that long");
        cursor.Read(value, &error_message);
      } else if (tag == rpc::BytesTag(4)) {
        if (value > TransferHeadBytes(limits::kMaxTransferBlocks)) return Malformed("its head");
        cursor.Read(value, &reply.head_);
      } else if (tag == rpc::BytesTag(8)) {
        if (value != cursor.remaining()) return Malformed("its rows are not what follows");
        if (value > limits::kTransferFrameBytes) return Malformed("rows of more than a frame");
        reply.rows_bytes_ = value;
        reply.rows_slice_ = cursor.slice();
        reply.rows_offset_ = cursor.offset();
        return absl::OkStatus();
      } else {
        return Malformed("unknown field");
      }
    }
    return absl::OkStatus();
  }();
  if (error_code != 0) {
    reply.error_ = rpc::FromWire(static_cast<uint32_t>(error_code), error_message);
  }
  return reply;
}

absl::StatusOr<RowsFrame> RowsReply::OpenHead(uint64_t* rows_bytes) const {
  const auto damaged = [](const absl::Status& why) {
    return absl::IsFailedPrecondition(why) ? why : absl::DataLossError(why.message());
  };
  if (!damage_.ok()) return damaged(damage_);
  if (!error_.ok()) return error_;
  absl::StatusOr<TransferHead> head = DecodeTransferHead(Bytes(head_));
  if (!head.ok()) return damaged(head.status());
  *rows_bytes = head->header.payload_bytes;
  return RowsFrame{.sequence = SequenceId{head->header.sequence_id},
                   .placement = {head->header.placement_term, head->header.placement_counter},
                   .pieces = std::move(head->blocks),
                   .rows = {}};
}

absl::StatusOr<RowsFrame> RowsReply::Open(RowBuffers* buffers, SharedRegion::Offer* offer) const {
  uint64_t rows_bytes = 0;
  STRAIT_ASSIGN_OR_RETURN(RowsFrame frame, OpenHead(&rows_bytes));
  STRAIT_RETURN_IF_ERROR(FindRows(rows_bytes, buffers, offer, &frame));
  const absl::Span<const std::byte> rows = frame.bytes();
  size_t at = 0;
  for (const BlockHeader& piece : frame.pieces) {
    STRAIT_RETURN_IF_ERROR(CheckRows(piece, rows.subspan(at, piece.payload_bytes)));
    at += piece.payload_bytes;
  }
  return frame;
}

absl::Status RowsReply::FindRows(uint64_t rows_bytes, RowBuffers* buffers,
                                 SharedRegion::Offer* offer, RowsFrame* frame) const {
  if (place_ticket_ != 0 && rows_bytes_ == 0) {
    if (offer == nullptr || offer->place().ticket != place_ticket_) {
      return absl::DataLossError("its rows are said to be where nothing was offered");
    }
    STRAIT_ASSIGN_OR_RETURN(frame->lent, offer->Take(rows_bytes));
    return absl::OkStatus();
  }
  if (rows_bytes != rows_bytes_) {
    return absl::DataLossError(
        absl::StrCat(rows_bytes_, " bytes of rows, the headers have ", rows_bytes));
  }
  frame->rows = buffers->TakeEmpty(rows_bytes_);
  size_t offset = rows_offset_;
  for (size_t i = rows_slice_; i < slices_.size(); ++i, offset = 0) {
    frame->rows.append(reinterpret_cast<const char*>(slices_[i].begin()) + offset,
                       slices_[i].size() - offset);
  }
  return absl::OkStatus();
}

}  // namespace strait
