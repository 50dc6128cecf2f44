// SPDX-License-Identifier: Apache-2.0
//
// What only PTX can say: the one header of the kernels with inline assembly. wgmma: sm_90a only.
//
// Why:     tests/emulator has a second implementation of these functions, and of nothing else, so
//          that the kernels run, thread by thread, on machines without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace strait::cuda {

// Waits until the kernels before this one in the stream have ended and their writes are seen. A kernel
// that LaunchChained starts calls it in every block that touches what another kernel reads or writes,
// before it does, and in any case in one block: or it might end before those before it. Before it may
// be read: weights, what the last copy before the step's first kernel found or left (tables, plans),
// cache rows of steps before.
__device__ __forceinline__ void WaitForEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin, up to its WaitForEarlier, when all blocks said so. Safe at
// a kernel's very start: the next one's wait ends only when this one has ended, and so all before it.
__device__ __forceinline__ void StartNext() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The block's dynamic shared memory, 1,024-byte aligned if the launch's other shared memory is.
template <class T>
__device__ __forceinline__ T* DynamicShared() {
  extern __shared__ __align__(1024) unsigned char strait_dynamic_shared[];
  return reinterpret_cast<T*>(strait_dynamic_shared);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d += a * b: 16 x 8 += (16 x 16) * (16 x 8).
__device__ __forceinline__ void MmaBf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of halves. Without side effects: the compiler may move it.
__device__ __forceinline__ void MmaF16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16 bit; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The reverse of LoadMatrices, sm_90.
__device__ __forceinline__ void StoreMatrices(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// The reverse of LoadMatricesTransposed, sm_90.
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Copies 16 bytes to shared memory, of which `valid` are read and the others zero. Lines of L2 are
// filled by whole 128 bytes: a warp's copies that touch 64 of each otherwise read memory at three
// quarters of its rate.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(valid)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopyGroups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// `threads` threads of the block meet at barrier `id`, 1 to 15.
__device__ __forceinline__ void SyncSome(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as one of the `threads` that meet at barrier `id` without waiting for them.
__device__ __forceinline__ void ArriveSome(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Asks for these bytes to be brought into L2; 16-byte aligned. Before sm_90 nothing.
__device__ __forceinline__ void PrefetchToL2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// 2^x, to two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 890
// Two e4m3 codes, lower byte first, as two halves.
__device__ __forceinline__ uint32_t E4m3PairToHalves(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}
// Four of them: low has the two lower ones. The conversion reads either half of a register as it is.
__device__ __forceinline__ void E4m3QuadToHalves(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 a, b;\n"
      "mov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\n"
      "cvt.rn.f16x2.e4m3x2 %1, b;\n}\n"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
#endif

#if __CUDA_ARCH__ >= 890
// Two floats as e4m3 codes, the first in the lower byte; what is too large becomes the largest.
__device__ __forceinline__ uint32_t FloatsToE4m3Pair(float first, float second) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
}
#endif

__device__ __forceinline__ void Trap() { asm volatile("trap;"); }

namespace wgmma {

__device__ __forceinline__ void Begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void Commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void Wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators across a wait.
template <int kCount>
__device__ __forceinline__ void Pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The accumulators of a product: their names in the instruction, and as operands.
#define STRAIT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define STRAIT_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define STRAIT_NAMES_64                                                              \
  STRAIT_NAMES_32                                                                    \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define STRAIT_NAMES_128                                                                       \
  STRAIT_NAMES_64                                                                              \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, "                                                                                     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define STRAIT_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STRAIT_SUMS_8(d, i) STRAIT_SUMS_4(d, i), STRAIT_SUMS_4(d, i + 4)
#define STRAIT_SUMS_16(d, i) STRAIT_SUMS_8(d, i), STRAIT_SUMS_8(d, i + 8)
#define STRAIT_SUMS_32(d, i) STRAIT_SUMS_16(d, i), STRAIT_SUMS_16(d, i + 16)
#define STRAIT_SUMS_64(d, i) STRAIT_SUMS_32(d, i), STRAIT_SUMS_32(d, i + 32)
#define STRAIT_SUMS_128(d, i) STRAIT_SUMS_64(d, i), STRAIT_SUMS_64(d, i + 64)

// Products of a warpgroup, A 64 rows, B the columns of d. d[4i + e] of thread t: row t / 32 * 16 +
// t % 32 / 4 + e / 2 * 8 of A, column 8i + t % 4 * 2 + e % 2.
// d[64, 64] (+)= A[64, 16] B[64, 16]^T, both Rows.
__device__ __forceinline__ void MultiplyRows(float (&d)[32], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" STRAIT_NAMES_32
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
      : STRAIT_SUMS_32(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, 128] (+)= A[64, 16] B[128, 16]^T, both Rows.
__device__ __forceinline__ void MultiplyRows(float (&d)[64], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" STRAIT_NAMES_64
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : STRAIT_SUMS_64(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, 256] (+)= A[64, 16] B[256, 16]^T, both Rows.
__device__ __forceinline__ void MultiplyRows(float (&d)[128], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" STRAIT_NAMES_128
      "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
      : STRAIT_SUMS_128(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, 128] (+)= A[64, 32] B[128, 32]^T of e4m3 codes, both Rows: 32 codes are the 32 bytes that a
// step of Rows is for 16 bf16. Sums keep about 14 bits of the largest term, not the 24 of fp32.
__device__ __forceinline__ void MultiplyCodes(float (&d)[64], uint64_t a, uint64_t b,
                                              int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" STRAIT_NAMES_64
      "}, %64, %65, p, 1, 1;\n}\n"
      : STRAIT_SUMS_64(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, 256] (+)= A[64, 16] B[16, 256]: A Rows, B Columns.
__device__ __forceinline__ void MultiplyColumns(float (&d)[128], uint64_t a, uint64_t b,
                                                int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" STRAIT_NAMES_128
      "}, %128, %129, p, 1, 1, 0, 1;\n}\n"
      : STRAIT_SUMS_128(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void BarrierInit(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void BarrierExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Ordinary writes to shared memory before it are seen by products and copies after it.
__device__ __forceinline__ void FenceProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kId, int kThreads>
__device__ __forceinline__ void NamedSync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
template <int kId, int kThreads>
__device__ __forceinline__ void NamedArrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Copies bytes as they lie, 16-byte aligned both sides, a multiple of 16; counted at the barrier.
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// A box of a tensor map of three dimensions, innermost first.
__device__ __forceinline__ void LoadBox(uint32_t to, const void* map, int x, int y, int z,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void CopyPiece(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void WaitCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void StorePiece(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 LoadPiece(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ bool BarrierTest(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Initialized barriers are seen by copies.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A warpgroup gives registers up, or takes what others gave up.
template <int kRegisters>
__device__ __forceinline__ void FewerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void MoreRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// d[64, 128] (+)= A[64, 16] B[16, 128]: B Columns, A in registers, bf16 pairs, lower one first. a[i]
// of thread t: row t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k t % 4 * 2 + i / 2 * 8 and the next. They
// may not change before the product is waited for.
__device__ __forceinline__ void MultiplyColumns(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" STRAIT_NAMES_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : STRAIT_SUMS_64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// d[64, 256] (+)= A[64, 16] B[16, 256], as the one before.
__device__ __forceinline__ void MultiplyColumns(float (&d)[128], const uint32_t (&a)[4], uint64_t b,
                                                int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" STRAIT_NAMES_128
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}\n"
      : STRAIT_SUMS_128(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// d[64, 32] (+)= A[64, 16] B[32, 16]^T: B Rows, A in registers as the ones before, in bf16.
__device__ __forceinline__ void MultiplyRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" STRAIT_NAMES_16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
      : STRAIT_SUMS_16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
// The same of halves.
__device__ __forceinline__ void MultiplyHalfRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b,
                                                 int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" STRAIT_NAMES_16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
      : STRAIT_SUMS_16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// d[64, 32] (+)= A[64, 32] B[32, 32]^T of e4m3 codes: B Rows, A in registers, four codes each. a[i] of
// thread t: row t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k t % 4 * 4 + i / 2 * 16 and the next three. Sums
// as MultiplyCodes says.
__device__ __forceinline__ void MultiplyCodeRows(float (&d)[16], const uint32_t (&a)[4], uint64_t b,
                                                 int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" STRAIT_NAMES_16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1;\n}\n"
      : STRAIT_SUMS_16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// Pin for registers that products read: not changed before, not kept elsewhere after.
template <int kRows, int kCount>
__device__ __forceinline__ void Pin(uint32_t (&a)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) asm volatile("" : "+r"(a[i][k])::"memory");
  }
}

#undef STRAIT_NAMES_16
#undef STRAIT_NAMES_32
#undef STRAIT_NAMES_64
#undef STRAIT_NAMES_128
#undef STRAIT_SUMS_4
#undef STRAIT_SUMS_8
#undef STRAIT_SUMS_16
#undef STRAIT_SUMS_32
#undef STRAIT_SUMS_64
#undef STRAIT_SUMS_128

}  // namespace wgmma

// Clusters: blocks of one launch that run at the same time and reach each other's shared memory. What
// is at an address of a block's own shared memory lies at the same place in the others'.
namespace cluster {

__device__ __forceinline__ uint32_t Rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster's blocks meet; what they wrote to shared memory before is seen after it.
__device__ __forceinline__ void Sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
}
// Arrives at this barrier's counterpart in block `rank`, which may be the own one. It says that
// copies and products before it have ended, as a wait for them showed; ordinary writes before it are
// not for the other block: release.cluster would be a fence of the whole device, acquire.cluster
// empty the L1, at every step.
__device__ __forceinline__ void BarrierArrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// The box of a tensor map of three dimensions at (column, row, group), to `to` and with its bytes
// counted at `barrier` in every block whose bit is set in `blocks`.
__device__ __forceinline__ void LoadBox(uint32_t to, const void* map, int column, int row,
                                        int group, uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(group), "r"(barrier), "h"(blocks)
      : "memory");
}
// Fetches a tensor map that a LoadBox will use.
__device__ __forceinline__ void PrefetchMap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace cluster

}  // namespace strait::cuda
