// SPDX-License-Identifier: Apache-2.0
//
// The functions of kernels/cuda/device/ptx.cuh, done by the emulator.
//
// Shapes:  operands of warpgroup products lie as the PTX manual's 128-byte swizzle and the
//          descriptors say; results are spread over the threads as it says.
#pragma once

#include "tests/emulator/emulator.h"
#include "tests/emulator/products.h"
#include "tests/emulator/tensor_map.h"

namespace strait::cuda {

inline void WaitForEarlier() {}
inline void StartNext() {}

template <class T>
T* DynamicShared() {
  return reinterpret_cast<T*>(emulator::DynamicSharedMemory());
}

inline uint32_t SharedAddress(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address >> 32 != 0) emulator::Fail("an address that is not of shared memory");
  return static_cast<uint32_t>(address);
}

}  // namespace strait::cuda

namespace strait::emulator {

inline unsigned char* At(uint32_t shared_address) {
  return reinterpret_cast<unsigned char*>(static_cast<uintptr_t>(shared_address));
}

inline float Bf16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
inline float LowBf16(uint32_t pair) { return Bf16ToFloat(static_cast<uint16_t>(pair & 0xffff)); }
inline float HighBf16(uint32_t pair) { return Bf16ToFloat(static_cast<uint16_t>(pair >> 16)); }

inline float HalfToFloat(uint16_t bits) { return __half2float(std::bit_cast<__half>(bits)); }
inline float LowHalf(uint32_t pair) { return HalfToFloat(static_cast<uint16_t>(pair & 0xffff)); }
inline float HighHalf(uint32_t pair) { return HalfToFloat(static_cast<uint16_t>(pair >> 16)); }

// ---- mma.sync.m16n8k16 ----
struct MmaLane {
  float* d;
  uint32_t a[4];
  uint32_t b[2];
};

template <float (*kLow)(uint32_t), float (*kHigh)(uint32_t)>
void MmaWarp(void* const* slots, uint32_t mask) {
  if (mask != 0xffffffffu) Fail("a product without all lanes of the warp");
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& one = *static_cast<const MmaLane*>(slots[lane]);
    const int row = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8;
      const int k = pair + i / 2 * 8;
      a[r][k] = kLow(one.a[i]);
      a[r][k + 1] = kHigh(one.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][row] = kLow(one.b[i]);
      b[pair + i * 8 + 1][row] = kHigh(one.b[i]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& one = *static_cast<const MmaLane*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) one.d[i] = std::fma(a[row][k], b[k][column], one.d[i]);
    }
  }
}

// ---- ldmatrix ----
struct MatrixLane {
  uint32_t* r;
  uint32_t from;
};

template <bool kTransposed>
void LoadMatricesWarp(void* const* slots, uint32_t mask) {
  if (mask != 0xffffffffu) Fail("ldmatrix without all lanes of the warp");
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t from = static_cast<const MatrixLane*>(slots[matrix * 8 + row])->from;
      if (from % 16 != 0) Fail("ldmatrix from an address that is not a multiple of 16");
      std::memcpy(m[row], At(from), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4;
      const int column = lane % 4 * 2;
      const uint32_t low = kTransposed ? m[column][row] : m[row][column];
      const uint32_t high = kTransposed ? m[column + 1][row] : m[row][column + 1];
      static_cast<const MatrixLane*>(slots[lane])->r[matrix] = low | high << 16;
    }
  }
}

// ---- stmatrix ----
struct StoredLane {
  const uint32_t* r;
  uint32_t to;
};

template <bool kTransposed>
void StoreMatricesWarp(void* const* slots, uint32_t mask) {
  if (mask != 0xffffffffu) Fail("stmatrix without all lanes of the warp");
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      const uint32_t to = static_cast<const StoredLane*>(slots[matrix * 8 + row])->to;
      if (to % 16 != 0) Fail("stmatrix to an address that is not a multiple of 16");
      for (int column = 0; column < 8; ++column) {
        const int lane = kTransposed ? column * 4 + row / 2 : row * 4 + column / 2;
        const uint32_t word = static_cast<const StoredLane*>(slots[lane])->r[matrix];
        const auto bits =
            static_cast<uint16_t>(word >> ((kTransposed ? row : column) % 2 == 0 ? 0 : 16));
        std::memcpy(At(to) + column * 2, &bits, sizeof(bits));
      }
    }
  }
}

// ---- mbarrier ----
struct Mbarrier {
  uint16_t pending;
  uint16_t count : 15;
  uint16_t phase : 1;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& MbarrierAt(uint32_t address) {
  if (address % 8 != 0) Fail("a barrier at an address that is not a multiple of 8");
  return *reinterpret_cast<Mbarrier*>(At(address));
}
inline void CompleteIfDue(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.phase = barrier.phase ^ 1u;
}
inline void Arrive(uint32_t address, int32_t bytes) {
  Mbarrier& barrier = MbarrierAt(address);
  if (barrier.pending == 0 || barrier.pending > barrier.count) {
    Fail("more arrivals at a barrier than it was made for");
  }
  barrier.bytes += bytes;
  --barrier.pending;
  CompleteIfDue(barrier);
}
inline void CompleteBytes(uint32_t address, int32_t bytes) {
  Mbarrier& barrier = MbarrierAt(address);
  barrier.bytes -= bytes;
  CompleteIfDue(barrier);
}

// ---- wgmma ----
// Where element (row, k) of an operand lies: `columns` if its rows are contiguous in memory instead
// of k.
inline const unsigned char* ElementAt(uint64_t descriptor, bool columns, int row, int k,
                                      uint32_t bytes) {
  if (descriptor >> 62 != 1) Fail("a product's operand without 128-byte swizzle");
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const auto r = static_cast<uint32_t>(row);
  const auto c = static_cast<uint32_t>(k);
  uint32_t offset = columns ? start + r / 64 * leading + c / 8 * stride + c % 8 * 128 + r % 64 * 2
                            : start + r / 8 * stride + r % 8 * 128 + c * bytes;
  offset ^= (offset >> 7 & 7) << 4;
  return DynamicSharedMemory() + offset;
}
inline float Element(uint64_t descriptor, bool columns, bool half, int row, int k) {
  uint16_t bits;
  std::memcpy(&bits, ElementAt(descriptor, columns, row, k, sizeof(bits)), sizeof(bits));
  return half ? HalfToFloat(bits) : Bf16ToFloat(bits);
}
inline float Code(uint64_t descriptor, int row, int k) {
  __nv_fp8_e4m3 code;
  code.__x = *ElementAt(descriptor, false, row, k, 1);
  return static_cast<float>(code);
}

}  // namespace strait::emulator

namespace strait::cuda {

inline void MmaBf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  emulator::MmaLane lane = {d, {a0, a1, a2, a3}, {b0, b1}};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::MmaWarp<emulator::LowBf16, emulator::HighBf16>);
}
inline void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::MmaLane lane = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::MmaWarp<emulator::LowHalf, emulator::HighHalf>);
}
inline void LoadMatrices(uint32_t (&r)[4], uint32_t from) {
  emulator::MatrixLane lane = {r, from};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::LoadMatricesWarp<false>);
}
inline void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t from) {
  emulator::MatrixLane lane = {r, from};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::LoadMatricesWarp<true>);
}

inline void StoreMatrices(uint32_t to, const uint32_t (&r)[4]) {
  emulator::StoredLane lane = {r, to};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::StoreMatricesWarp<false>);
}
inline void StoreMatricesTransposed(uint32_t to, const uint32_t (&r)[4]) {
  emulator::StoredLane lane = {r, to};
  emulator::MeetWarp(0xffffffffu, &lane, emulator::StoreMatricesWarp<true>);
}

inline void CopyAsync(uint32_t to, const void* from, int valid) {
  emulator::AddCopy([=] {
    std::memset(emulator::At(to), 0, 16);
    std::memcpy(emulator::At(to), from, static_cast<size_t>(valid));
  });
}
inline void CommitCopies() { emulator::CommitCopyGroup(); }
template <int kPending>
void WaitCopyGroups() {
  if (kPending == 0) {
    // Copies that are not committed are not waited for; no kernel leaves any.
    emulator::CommitCopyGroup();
    emulator::FinishCopies(0);
  } else {
    emulator::FinishCopies(kPending);
  }
}

inline void SyncSome(int id, int threads) { emulator::NamedBarrier(id, threads, true); }
inline void ArriveSome(int id, int threads) { emulator::NamedBarrier(id, threads, false); }

inline void PrefetchToL2(const void*, uint32_t bytes) {
  if (bytes % 16 != 0) emulator::Fail("a prefetch of bytes that are not a multiple of 16");
}
inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline uint32_t E4m3PairToHalves(uint16_t codes) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
  return static_cast<uint32_t>(halves.y) << 16 | halves.x;
}
inline void E4m3QuadToHalves(uint32_t codes, uint32_t& low, uint32_t& high) {
  low = E4m3PairToHalves(static_cast<uint16_t>(codes & 0xffffu));
  high = E4m3PairToHalves(static_cast<uint16_t>(codes >> 16));
}
inline uint32_t FloatsToE4m3Pair(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}
[[noreturn]] inline void Trap() { emulator::Fail("a kernel trapped"); }

namespace wgmma {

inline void Begin() {}
inline void Commit() { ++emulator::Products().group; }
template <int kPending>
void Wait() {
  emulator::ProductState& state = emulator::Products();
  const uint64_t below = state.group > kPending ? state.group - kPending : 0;
  emulator::Waiting waiting = {&state, below};
  emulator::MeetWarpgroup(&waiting, emulator::FinishProducts);
}
template <int kCount>
void Pin(float (&)[kCount]) {}

using Kind = emulator::Product::Kind;

inline void Multiply(float* d, int columns, uint64_t a, uint64_t b, bool b_columns,
                     int accumulate) {
  emulator::ProductState& state = emulator::Products();
  state.products.push_back(
      {d, columns, Kind::kBf16, nullptr, a, b, b_columns, accumulate != 0, state.group});
}
inline void MultiplyCodes(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  emulator::ProductState& state = emulator::Products();
  state.products.push_back(
      {d, 128, Kind::kCodes, nullptr, a, b, false, accumulate != 0, state.group});
}
inline void MultiplyRows(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  Multiply(d, 64, a, b, false, accumulate);
}
inline void MultiplyRows(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  Multiply(d, 128, a, b, false, accumulate);
}
inline void MultiplyRows(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  Multiply(d, 256, a, b, false, accumulate);
}
inline void MultiplyColumns(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  Multiply(d, 256, a, b, true, accumulate);
}

inline void BarrierInit(uint32_t barrier, uint32_t count) {
  emulator::MbarrierAt(barrier) = {static_cast<uint16_t>(count),
                                   static_cast<uint16_t>(count & 0x7fff), 0, 0};
}
inline void BarrierArrive(uint32_t barrier) { emulator::Arrive(barrier, 0); }
inline void BarrierExpect(uint32_t barrier, uint32_t bytes) {
  emulator::Arrive(barrier, static_cast<int32_t>(bytes));
}
inline bool BarrierTest(uint32_t barrier, uint32_t parity) {
  return emulator::MbarrierAt(barrier).phase != parity;
}
inline void BarrierWait(uint32_t barrier, uint32_t parity) {
  emulator::WaitUntil([=] { return BarrierTest(barrier, parity); });
}
inline void FenceProxy() {}
inline void FenceBarrierInit() {}

template <int kId, int kThreads>
void NamedSync() {
  emulator::NamedBarrier(kId, kThreads, true);
}
template <int kId, int kThreads>
void NamedArrive() {
  emulator::NamedBarrier(kId, kThreads, false);
}

inline void CopyBulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    emulator::Fail("a bulk copy that is not of pieces of 16 bytes");
  }
  emulator::Defer([=] {
    std::memcpy(emulator::At(to), from, bytes);
    emulator::CompleteBytes(barrier, static_cast<int32_t>(bytes));
  });
}

inline void LoadBox(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier) {
  emulator::TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  emulator::Defer([=] {
    const uint32_t bytes = emulator::LoadBox(tensor, {x, y, z}, to);
    emulator::CompleteBytes(barrier, static_cast<int32_t>(bytes));
  });
}

inline void CopyPiece(uint32_t to, const void* from) { CopyAsync(to, from, 16); }
inline void WaitCopies() { emulator::FinishCopies(0); }

inline void StorePiece(uint32_t to, uint4 v) { std::memcpy(emulator::At(to), &v, sizeof(v)); }
inline uint4 LoadPiece(uint32_t from) {
  uint4 v;
  std::memcpy(&v, emulator::At(from), sizeof(v));
  return v;
}

template <int kRegisters>
void FewerRegisters() {}
template <int kRegisters>
void MoreRegisters() {}

inline void MultiplyPairs(float* d, int columns, Kind kind, const uint32_t* a, uint64_t b,
                          bool b_columns, int accumulate) {
  emulator::ProductState& state = emulator::Products();
  state.products.push_back({d, columns, kind, a, 0, b, b_columns, accumulate != 0, state.group});
}
inline void MultiplyColumns(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  MultiplyPairs(d, 128, Kind::kBf16, a, b, true, accumulate);
}
inline void MultiplyColumns(float (&d)[128], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  MultiplyPairs(d, 256, Kind::kBf16, a, b, true, accumulate);
}
inline void MultiplyRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  MultiplyPairs(d, 32, Kind::kBf16, a, b, false, accumulate);
}
inline void MultiplyHalfRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  MultiplyPairs(d, 32, Kind::kHalf, a, b, false, accumulate);
}
inline void MultiplyCodeRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  MultiplyPairs(d, 32, Kind::kCodes, a, b, false, accumulate);
}
template <int kRows, int kCount>
void Pin(uint32_t (&)[kRows][kCount]) {}

}  // namespace wgmma

namespace cluster {

inline uint32_t Rank() { return emulator::ClusterRank(); }
inline void Sync() { emulator::SyncCluster(); }
inline void BarrierArrive(uint32_t barrier, uint32_t rank) {
  const uint32_t there = emulator::AddressInBlock(barrier, rank);
  emulator::CheckAlive(there);
  emulator::Arrive(there, 0);
}
// Each block's copy comes at a time of its own.
inline void LoadBox(uint32_t to, const void* map, int column, int row, int group, uint32_t barrier,
                    uint16_t blocks) {
  emulator::TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    const uint32_t there = emulator::AddressInBlock(to, rank);
    const uint32_t barrier_there = emulator::AddressInBlock(barrier, rank);
    emulator::Defer([=] {
      emulator::CheckAlive(there);
      const uint32_t bytes = emulator::LoadBox(tensor, {column, row, group}, there);
      emulator::CompleteBytes(barrier_there, static_cast<int32_t>(bytes));
    });
  }
}
inline void PrefetchMap(const void*) {}

}  // namespace cluster

}  // namespace strait::cuda
