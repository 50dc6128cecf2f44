// SPDX-License-Identifier: Apache-2.0
//
// Every bound on what crosses a wire or comes out of a file. Over a bound is a tested status, not
// growth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace strait::limits {

// ---- Cache ----
inline constexpr uint32_t kBlockTokens = 64;          // rows of a latent block
inline constexpr uint32_t kRowAlign = 16;             // bytes; a cache row is rounded up to this
inline constexpr uint32_t kMaxTransferBlocks = 4096;  // in one message
inline constexpr uint32_t kMaxTransferBytes = 64u << 20;  // of the rows of one message

// ---- One step ----
inline constexpr uint32_t kMaxStepTokens = 8192;  // tokens of all sequences in one StepPlan
inline constexpr uint32_t kGpuStepTokens =
    2048;  // the same with GPU workers, unless told otherwise
inline constexpr uint32_t kMaxStepSequences = 1024;  // sequences in one StepPlan
inline constexpr uint32_t kMaxStepsInFlight = 64;    // accepted, not yet reported, per pipeline
inline constexpr uint32_t kMaxGrantDepth = 16;       // sampling steps of one sequence in flight
inline constexpr uint32_t kMaxCacheOps = 4096;       // in one StepPlan
inline constexpr uint32_t kMaxTopLogprobs = 20;      // alternatives reported per position
// Tokens of prefix blocks that sequences of one StepPlan begin with; of a single one any number.
inline constexpr uint32_t kMaxStepPrefixTokens = 1 << 20;

// ---- One request ----
inline constexpr uint32_t kMaxStopTokens = 64;
inline constexpr uint32_t kMaxLogitBias = 1024;
inline constexpr uint32_t kMaxChoices = 128;  // n, and prompts times n
inline constexpr uint32_t kMaxStopStrings = 16;
inline constexpr size_t kMaxStopStringBytes = 1024;
inline constexpr size_t kMaxCacheSaltBytes = 256;

// ---- Cluster ----
inline constexpr uint32_t kMaxWorkers = 1024;
inline constexpr uint32_t kMaxStagesPerPipeline = 256;
inline constexpr uint32_t kMaxHeldStages = 64;  // that a worker says it kept without a coordinator
inline constexpr uint32_t kMaxSequencesResident = 65536;  // on one stage
inline constexpr size_t kMaxHostIdBytes = 64;  // of Hello.host_id
inline constexpr size_t kMaxErrorMessageBytes = 1024;     // of a peer's words about what went wrong
inline constexpr size_t kNcclIdBytes = 128;               // of an edge's communicator id

// ---- gRPC ----
inline constexpr int kMaxControlMessageBytes = 16 << 20;
// A frame of hidden states: 8,192 tokens x 7,168 x 4 bytes is 235 MB, so one step's hidden states travel
// as chunks of at most this many payload bytes.
inline constexpr int kHiddenChunkBytes = 1 << 20;
inline constexpr int kMaxDataMessageBytes = kHiddenChunkBytes + (64 << 10);
// Rows of one answer between workers, and of all answers that a worker has asked for or makes at a time.
inline constexpr uint32_t kTransferFrameBytes = 4u << 20;
inline constexpr uint64_t kTransferBytesUnderWay = 64u << 20;
inline constexpr int kMaxTransferMessageBytes = kTransferFrameBytes + (1 << 20);
inline constexpr size_t kControlQueueMessages = 4096;  // outgoing, per stream
inline constexpr size_t kDataQueueBytes = 512u << 20;  // outgoing, per edge

// ---- Model files ----
inline constexpr size_t kMaxConfigBytes = 1 << 20;  // config.json, generation_config.json
inline constexpr size_t kMaxIndexBytes = 64 << 20;  // model.safetensors.index.json
inline constexpr size_t kMaxSafetensorsHeaderBytes = 100'000'000;
inline constexpr uint32_t kMaxTensorsPerFile = 1 << 20;
inline constexpr uint32_t kMaxTensorRank = 8;
inline constexpr size_t kMaxTensorNameBytes = 512;
inline constexpr uint32_t kMaxShards = 4096;

// ---- Model ----
inline constexpr uint32_t kMaxVocabSize = 1 << 20;
inline constexpr uint32_t kMaxHiddenSize = 1 << 16;
inline constexpr uint32_t kMaxHiddenLayers = 1024;
inline constexpr uint32_t kMaxAttentionHeads = 1024;
inline constexpr uint32_t kMaxHeadDim = 1024;
inline constexpr uint32_t kMaxLoraRank = 8192;
inline constexpr uint32_t kMaxIntermediateSize = 1 << 20;
inline constexpr uint32_t kMaxRoutedExperts = 4096;
inline constexpr uint32_t kMaxSharedExperts = 64;
inline constexpr uint32_t kMaxPositionEmbeddings = 1 << 22;
inline constexpr uint32_t kMaxEosTokens = 64;

}  // namespace strait::limits
