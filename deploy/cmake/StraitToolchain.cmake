# SPDX-License-Identifier: Apache-2.0
# One interface target, strait_options, carries the language level, the warnings and the sanitizers.
# Every target of the project links it; nothing is set globally.

find_program(STRAIT_CCACHE ccache)
if(STRAIT_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER ${STRAIT_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${STRAIT_CCACHE})
endif()

add_library(strait_options INTERFACE)
target_compile_features(strait_options INTERFACE cxx_std_20)
target_include_directories(strait_options INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(strait_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wno-missing-field-initializers
    -ffp-contract=off -fno-fast-math -fno-math-errno>)

# gcc 12 and lld or mold: several times faster than bfd on programs that link gRPC.
if(NOT STRAIT_LINKER)
  find_program(STRAIT_LLD ld.lld)
  find_program(STRAIT_MOLD mold)
  if(STRAIT_MOLD)
    set(STRAIT_LINKER mold)
  elseif(STRAIT_LLD)
    set(STRAIT_LINKER lld)
  endif()
endif()
if(STRAIT_LINKER)
  target_link_options(strait_options INTERFACE $<$<LINK_LANGUAGE:CXX>:-fuse-ld=${STRAIT_LINKER}>)
endif()

if(STRAIT_SANITIZE)
  target_compile_options(strait_options INTERFACE
    -fsanitize=${STRAIT_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(strait_options INTERFACE -fsanitize=${STRAIT_SANITIZE})
  # Boost.Asio has fences, of which gcc's ThreadSanitizer warns that it does not know them.
  target_compile_options(strait_options INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
endif()
