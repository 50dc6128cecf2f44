// SPDX-License-Identifier: Apache-2.0
//
// cub::BlockScan for the emulator: the operations that the kernels use, through shared memory.
#pragma once

namespace cub {

template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T value, T& sum) {
    T all;
    ExclusiveSum(value, sum, all);
  }
  void ExclusiveSum(T value, T& sum, T& all) {
    T inclusive;
    Exchange(value, inclusive, all);
    sum = inclusive - value;
  }

 private:
  void Exchange(T value, T& inclusive, T& all) {
    const int me = static_cast<int>(threadIdx.x);
    storage_.values[me] = value;
    __syncthreads();
    T sum = 0;
    for (int i = 0; i < kThreads; ++i) {
      sum += storage_.values[i];
      if (i == me) inclusive = sum;
    }
    all = sum;
    __syncthreads();
  }

  TempStorage& storage_;
};

}  // namespace cub
