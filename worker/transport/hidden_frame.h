// SPDX-License-Identifier: Apache-2.0
//
// One HiddenMessage on the wire, written and read without copying its payload through a message
// object.
//
// Thread:  plain functions and values.
// Errors:  InvalidArgument: not a HiddenMessage as this project writes it (fields in rising order,
//          each at most once, nothing else); DataLoss: the payload does not match its checksum.
// Limits:  the payload is at most kHiddenChunkBytes.
// Why:     a prefill step is tens of megabytes. The generated classes copy a payload twice on
//          either side; here a sender lends its own memory and a receiver copies once, into the
//          step that it assembles. The bytes are plain protobuf all the same (tests compare with
//          the generated classes).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "strait/v1/transfer.pb.h"
#include "worker/hidden_step.h"

namespace strait {

struct HiddenChunkHeader {
  PipelineEpoch epoch;
  uint64_t step_id = 0;
  uint32_t num_tokens = 0;
  uint64_t offset_bytes = 0;
  uint64_t checksum = 0;
  uint32_t payload_bytes = 0;
};

grpc::ByteBuffer EncodeOpen(const v1::HiddenOpen& open);
grpc::ByteBuffer EncodeReply(const v1::HiddenReply& reply);

// Bytes [offset, offset + payload_bytes) of `step`, lent until gRPC has written them.
// REQUIRES: they lie within the step and are at most kHiddenChunkBytes.
grpc::ByteBuffer EncodeChunk(const std::shared_ptr<const HiddenStep>& step, uint64_t offset,
                             uint32_t payload_bytes);

class HiddenFrame {
 public:
  static absl::StatusOr<HiddenFrame> Parse(const grpc::ByteBuffer& message);

  bool is_open() const { return is_open_; }
  const v1::HiddenOpen& open() const { return open_; }       // when is_open()
  const HiddenChunkHeader& chunk() const { return chunk_; }  // otherwise

  // Appends the payload and compares its checksum. REQUIRES: !is_open(), called once. On DataLoss
  // the appended bytes stay: drop the step.
  absl::Status AppendPayload(std::vector<std::byte>* data) const;

 private:
  HiddenFrame() = default;
  bool is_open_ = false;
  v1::HiddenOpen open_;
  HiddenChunkHeader chunk_;
  std::vector<grpc::Slice> slices_;  // of the whole message
  size_t payload_slice_ = 0;         // where the payload begins
  size_t payload_offset_ = 0;
};

}  // namespace strait
