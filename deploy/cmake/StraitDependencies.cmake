# SPDX-License-Identifier: Apache-2.0
# Every outside library, found once. Versions are lower bounds: those of Debian 12, or the first that has
# what is used. Targets below are the names that the folders link.

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(Protobuf 3.21 REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED COMPONENTS core)
# Boost.JSON came with 1.75. Only headers are used: no Boost component is linked.
find_package(Boost 1.75 REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8>=10.40)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
find_package(OpenSSL 3.0 REQUIRED COMPONENTS Crypto)

if(STRAIT_TESTS)
  find_package(GTest REQUIRED)
  find_package(benchmark REQUIRED)
endif()
if(STRAIT_CUDA)
  find_package(CUDAToolkit 12.4 REQUIRED)
  if(NOT CMAKE_CUDA_COMPILER)  # a toolkit need not be on PATH
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${STRAIT_CUDA_ARCHITECTURES})
  enable_language(CUDA)
endif()
