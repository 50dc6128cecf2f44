// SPDX-License-Identifier: Apache-2.0
//
// The driver's virtual memory of the emulator: slabs are parts of a file in memory, so that what is
// mapped at two addresses is one memory, and what is not mapped may not be touched.
#pragma once

#include <cstddef>

namespace strait::emulator {

// The function of that name; null: it is none of these.
void* FindDriverMemory(const char* symbol);
// Whether `at` is mapped.
bool IsMappedSlab(const void* at);
// Of slabs that were created and not released.
size_t SlabBytes();

}  // namespace strait::emulator
