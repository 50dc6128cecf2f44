// SPDX-License-Identifier: Apache-2.0
//
// CUDA's device language for the emulator: included before a kernel source that is compiled as C++.
// What only exists in device code and the kernels use is defined here, on top of CUDA's own headers.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "tests/emulator/emulator.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#undef __shared__
#define __shared__ static  // blocks run one after the other
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define threadIdx (::strait::emulator::ThreadIndex())
#define blockIdx (::strait::emulator::BlockIndex())

using std::isinf;
using std::isnan;
using std::max;
using std::min;

namespace strait::emulator {

template <class... Params, class... Args>
cudaError_t LaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                           Args&&... args) {
  std::tuple<std::remove_cv_t<Params>...> values(static_cast<Params>(args)...);
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config->attrs[i].val.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  return Launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, cluster,
                config->dynamicSmemBytes, config->stream,
                [kernel, values] { std::apply(kernel, values); });
}

// A number of the thread that runs, read when it is used.
template <unsigned (*kGet)()>
struct Special {
  operator unsigned() const { return kGet(); }  // NOLINT: stands for a plain number
};

}  // namespace strait::emulator

#define cudaLaunchKernelEx ::strait::emulator::LaunchKernelEx

// No macros: cudaLaunchConfig_t has members of these names.
inline constexpr struct {
  strait::emulator::Special<[] { return strait::emulator::BlockSize().x; }> x;
  strait::emulator::Special<[] { return strait::emulator::BlockSize().y; }> y;
  strait::emulator::Special<[] { return strait::emulator::BlockSize().z; }> z;
} blockDim;
inline constexpr struct {
  strait::emulator::Special<[] { return strait::emulator::GridSize().x; }> x;
  strait::emulator::Special<[] { return strait::emulator::GridSize().y; }> y;
  strait::emulator::Special<[] { return strait::emulator::GridSize().z; }> z;
} gridDim;

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline void __syncthreads() { strait::emulator::SyncThreads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  strait::emulator::MeetWarp(mask, nullptr, [](void* const*, uint32_t) {});
}

namespace strait::emulator {

template <class T>
struct Shuffled {
  T value;
  int source;
  T result;
};

template <class T>
T Shuffle(unsigned mask, T value, int source) {
  Shuffled<T> mine = {value, source & 31, value};
  MeetWarp(mask, &mine, [](void* const* slots, uint32_t lanes) {
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      auto* const one = static_cast<Shuffled<T>*>(slots[lane]);
      if ((lanes >> one->source & 1) == 0) Fail("a shuffle from a lane that does not take part");
      one->result = static_cast<Shuffled<T>*>(slots[one->source])->value;
    }
  });
  return mine.result;
}

inline unsigned Ballot(unsigned mask, bool vote) {
  struct Voter {
    bool vote;
    unsigned result;
  } mine = {vote, 0};
  MeetWarp(mask, &mine, [](void* const* slots, uint32_t lanes) {
    unsigned all = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) != 0 && static_cast<Voter*>(slots[lane])->vote) all |= 1u << lane;
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) != 0) static_cast<Voter*>(slots[lane])->result = all;
    }
  });
  return mine.result;
}

inline unsigned Reduce(unsigned mask, unsigned value, bool max) {
  struct One {
    unsigned value;
    bool max;
    unsigned result;
  } mine = {value, max, value};
  MeetWarp(mask, &mine, [](void* const* slots, uint32_t lanes) {
    bool any = false;
    unsigned all = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      const auto& one = *static_cast<One*>(slots[lane]);
      if (!any || (one.max ? one.value > all : one.value < all)) all = one.value;
      any = true;
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) != 0) static_cast<One*>(slots[lane])->result = all;
    }
  });
  return mine.result;
}

inline int Lane() { return static_cast<int>(ThreadIndex().x % kWarpLanes); }

}  // namespace strait::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return strait::emulator::Shuffle(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return strait::emulator::Shuffle(mask, value, strait::emulator::Lane() ^ flip);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int lane = strait::emulator::Lane();
  return strait::emulator::Shuffle(mask, value, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int lane = strait::emulator::Lane();
  return strait::emulator::Shuffle(mask, value, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return strait::emulator::Ballot(mask, vote);
}
inline int __all_sync(unsigned mask, bool vote) {
  return strait::emulator::Ballot(mask, vote) == mask;
}
inline int __any_sync(unsigned mask, bool vote) {
  return strait::emulator::Ballot(mask, vote) != 0;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return strait::emulator::Reduce(mask, value, true);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return strait::emulator::Reduce(mask, value, false);
}
inline void __threadfence() {}

template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T, class V>
T atomicAdd(T* to, V value) {
  const T before = *to;
  *to = static_cast<T>(before + value);
  return before;
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // never part of a fused multiply-add
  return product;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline unsigned long long __float2ull_rn(float value) {
  return static_cast<unsigned long long>(std::nearbyint(value));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = select >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7)) & 0xff);
    if ((pick & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
