// SPDX-License-Identifier: Apache-2.0
//
// RowsRequest and RowsReply on the wire, written and read without copying rows through a message object.
//
// Thread:  pure functions.
// Errors:  Parse: InvalidArgument: not such a message as this project writes it (fields in rising order, each at
//          most once, nothing else). Open: DataLoss: headers, sizes or checksums are wrong;
//          FailedPrecondition: headers of another version.
// Limits:  kTransferFrameBytes of rows.
// Why:     as for hidden states (worker/transport/hidden_frame.h): a sender lends gRPC its own memory, a
//          receiver copies once.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "strait/v1/transfer.pb.h"
#include "worker/transfer/row_buffers.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/shared_rows.h"

namespace strait {

v1::RowsRequest ToWire(uint64_t request_id, const RowsAsk& ask, const SharedPlace& place = {});
// One that asks for nothing.
v1::RowsRequest LinkRequest(uint64_t request_id, const std::string& nccl_id);
absl::StatusOr<v1::RowsRequest> ParseRequest(const grpc::ByteBuffer& message);
// REQUIRES: ParseRequest took it.
RowsAsk FromWire(const v1::RowsRequest& request);
// As it was told: whoever uses it checks it.
SharedPlace PlaceOf(const v1::RowsRequest& request);

// Fills in the pieces' checksums. REQUIRES: the rows are in host memory.
void SealFrame(RowsFrame* frame);
struct ReplyWay {
  uint64_t place_ticket =
      0;  // not 0: rows are where the peer offered it, and the frame lets go of that
  uint64_t link_number = 0;  // not 0: rows were sent over the link
  bool wants_link = false;
};
// InvalidArgument: no frame that a peer would take. REQUIRES: it is sealed. `buffers` get the rows' memory when
// gRPC has written them.
absl::StatusOr<grpc::ByteBuffer> EncodeFrame(uint64_t request_id, RowsFrame frame,
                                             std::shared_ptr<RowBuffers> buffers,
                                             ReplyWay way = {});
grpc::ByteBuffer EncodeError(uint64_t request_id, const absl::Status& why);

class RowsReply {
 public:
  static absl::StatusOr<RowsReply> Parse(const grpc::ByteBuffer& message);

  uint64_t request_id() const { return request_id_; }
  // 0: the rows do not come over the link.
  uint64_t link_number() const { return link_number_; }
  bool wants_link() const { return wants_link_; }
  // Of rows that come over the link: the frame without them, and their size.
  absl::StatusOr<RowsFrame> OpenHead(uint64_t* rows_bytes) const;
  // The frame, looked at, and copied out of the message or taken from what the request had offered, or the peer's
  // error. `offer` may be null.
  absl::StatusOr<RowsFrame> Open(RowBuffers* buffers, SharedRegion::Offer* offer = nullptr) const;

 private:
  absl::Status FindRows(uint64_t rows_bytes, RowBuffers* buffers, SharedRegion::Offer* offer,
                        RowsFrame* frame) const;

  uint64_t request_id_ = 0;
  absl::Status error_;
  absl::Status damage_;  // of what follows the request's id
  std::string head_;
  uint64_t place_ticket_ = 0;
  uint64_t link_number_ = 0;
  bool wants_link_ = false;
  std::vector<grpc::Slice> slices_;  // of the whole message
  uint64_t rows_bytes_ = 0;
  size_t rows_slice_ = 0;  // where the rows begin
  size_t rows_offset_ = 0;
};

}  // namespace strait
