// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/bus_error.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>

#include "proto/base/limits.h"

namespace strait {
namespace {

struct Slot {
  std::atomic<bool> taken = false;
  std::atomic<const std::byte*> data = nullptr;  // null: the other fields are not valid
  std::atomic<uint64_t> bytes = 0;
  std::atomic<const char*> path = nullptr;
};
std::array<Slot, limits::kMaxShards> slots;

// A line put together without memory from the heap.
class Line {
 public:
  Line& Add(const char* text) {
    for (; *text != '\0' && size_ < sizeof(text_) - 1; ++text) text_[size_++] = *text;
    return *this;
  }
  Line& Add(uint64_t number) {
    char digits[20];
    size_t begin = sizeof(digits);
    do {
      digits[--begin] = static_cast<char>('0' + number % 10);
      number /= 10;
    } while (number > 0);
    for (; begin < sizeof(digits) && size_ < sizeof(text_) - 1; ++begin) {
      text_[size_++] = digits[begin];
    }
    return *this;
  }
  void Write() {
    text_[size_++] = '\n';
    for (size_t done = 0; done < size_;) {
      const ssize_t n = write(STDERR_FILENO, text_ + done, size_ - done);
      if (n <= 0) return;
      done += static_cast<size_t>(n);
    }
  }

 private:
  char text_[1024];
  size_t size_ = 0;
};

void OnBusError(int, siginfo_t* info, void*) {
  const auto* at = static_cast<const std::byte*>(info->si_addr);
  for (const Slot& slot : slots) {
    const std::byte* data = slot.data;
    if (data == nullptr || at < data || at >= data + slot.bytes) continue;
    Line()
        .Add("strait-worker: the checkpoint file ")
        .Add(slot.path)
        .Add(" cannot be read at byte ")
        .Add(static_cast<uint64_t>(at - data))
        .Add(" of the ")
        .Add(slot.bytes)
        .Add(
            " that it had when it was opened: it was cut or overwritten while it was served, or "
            "its disk failed. Put the whole file back and start this worker again")
        .Write();
    _exit(kExitMappedFileFailed);
  }
  Line().Add("strait-worker: bus error in memory that maps no checkpoint file").Write();
  // The handler was for once: what faulted runs again, and ends the process by the signal.
}

}  // namespace

void InstallBusErrorHandler() {
  struct sigaction action = {};
  action.sa_sigaction = &OnBusError;
  action.sa_flags = SA_SIGINFO | SA_RESETHAND;
  sigaction(SIGBUS, &action, nullptr);
}

WatchedMapping::WatchedMapping(const std::byte* data, uint64_t bytes, const char* path) {
  for (slot_ = 0; slot_ < slots.size(); ++slot_) {
    Slot& slot = slots[slot_];
    if (slot.taken.exchange(true)) continue;
    slot.bytes = bytes;
    slot.path = path;
    slot.data = data;  // last: from here on the slot is read
    return;
  }
}

WatchedMapping::~WatchedMapping() {
  if (slot_ == slots.size()) return;
  slots[slot_].data = nullptr;
  slots[slot_].taken = false;
}

}  // namespace strait
