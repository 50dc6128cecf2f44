// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "tests/emulator/products.h"
#include "tests/emulator/stream.h"

// Saves the callee's registers on the stack, whose pointer goes to *from, and continues at `to`.
extern "C" void StraitSwitchStack(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl StraitSwitchStack
.type StraitSwitchStack, @function
StraitSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size StraitSwitchStack, .-StraitSwitchStack
)");

namespace strait::emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedWindow = 256 << 10;  // aligned to itself: descriptors hold 18 address bits
constexpr int kDefaultSharedLimit = 48 << 10;
constexpr int kMostShared = 227 << 10;
constexpr int kNamedBarriers = 16;
constexpr size_t kMostClusterBlocks = 2;
constexpr int kIdleRounds = 64;  // of nobody going on, with nothing deferred: a deadlock

struct Pending {
  std::function<void()> work;
  uint64_t group = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 thread_index = {};
  int linear = 0;
  bool done = false;
  std::deque<Pending> copies;
  uint64_t copy_group = 0;
  ProductState products;
};

struct Meeting {
  void* slots[kWarpgroupThreads] = {};
  Combine combine = nullptr;
  uint32_t mask = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  uint64_t generation = 0;
};

struct Block {
  uint3 index = {};
  uint32_t rank = 0;  // in the cluster
  std::vector<Fiber> fibers;
  int live = 0;
  std::vector<Meeting> warps;
  std::vector<Meeting> warpgroups;
  Barrier barriers[kNamedBarriers];
};

// A copy that is on its way.
struct Deferred {
  std::function<void()> work;
  uint32_t rounds = 0;  // until it is there
};

// What runs at the same time: most often one block.
struct Cluster {
  dim3 grid;
  dim3 size;  // of a block
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;
  Barrier barrier;
  std::vector<Deferred> deferred;
  uint64_t progress = 0;

  int live() const {
    int threads = 0;
    for (const Block& one : blocks) threads += one.live;
    return threads;
  }
};

Cluster* cluster = nullptr;
Block* block = nullptr;  // of the thread that runs
Fiber* self = nullptr;
void* scheduler_stack = nullptr;

unsigned char* SharedWindow(uint32_t rank) {
  static unsigned char* const window = [] {
    const size_t bytes = (kMostClusterBlocks + 1) * kSharedWindow;
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (memory == MAP_FAILED) Fail("no memory below 4 GiB for shared memory");
    const auto address = reinterpret_cast<uintptr_t>(memory);
    return reinterpret_cast<unsigned char*>((address + kSharedWindow - 1) / kSharedWindow *
                                            kSharedWindow);
  }();
  return window + rank * kSharedWindow;
}

char* Stack(size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) Fail("no memory for a thread's stack");
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

void ReleaseBarrier(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  ++cluster->progress;
}

// A barrier of all threads that `live` counts.
template <class Live>
void MeetAt(Barrier& barrier, const Live& live) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived >= live()) {
    ReleaseBarrier(barrier);
    return;
  }
  while (barrier.generation == generation) Yield();
}

void RunFiber() {
  (*cluster->body)();
  if (!self->copies.empty()) Fail("a thread ended with copies that it did not wait for");
  if (!self->products.products.empty())
    Fail("a thread ended with products that it did not wait for");
  self->done = true;
  --block->live;
  ++cluster->progress;
  // Threads that ended are not waited for.
  Barrier& all = block->barriers[0];
  if (all.arrived > 0 && all.arrived >= block->live) ReleaseBarrier(all);
  Barrier& blocks = cluster->barrier;
  if (blocks.arrived > 0 && blocks.arrived >= cluster->live()) ReleaseBarrier(blocks);
  void* unused = nullptr;
  StraitSwitchStack(&unused, scheduler_stack);
  Fail("a thread that ended went on");
}

void Prepare(Fiber& fiber, size_t index) {
  char* const stack = Stack(index);
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // where RunFiber would return to
  *--top = reinterpret_cast<void*>(&RunFiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // registers
  fiber.stack_pointer = top;
}

std::mt19937& Random() {
  static std::mt19937 random = [] {
    const char* const seed = std::getenv("STRAIT_EMULATOR_SEED");
    return std::mt19937(seed == nullptr ? 1 : static_cast<uint32_t>(std::atoi(seed)));
  }();
  return random;
}

// Most copies come within a few rounds, an eighth after as long as a kernel takes for several steps:
// copies overtake each other by far, as memory lets them.
uint32_t Delay() {
  const uint32_t bits = Random()();
  return bits % 8 == 0 ? bits / 8 % 2048 : static_cast<uint32_t>(std::countr_zero(bits / 8 | 256));
}

// If the threads are stuck, time passes until the next copy comes.
void RunDeferred(bool stuck) {
  uint32_t passed = 1;
  if (stuck) {
    passed = UINT32_MAX;
    for (const Deferred& one : cluster->deferred) passed = std::min(passed, one.rounds);
  }
  std::vector<Deferred> later;
  std::vector<Deferred> now;
  for (Deferred& one : cluster->deferred) {
    one.rounds -= std::min(one.rounds, passed);
    (one.rounds == 0 ? now : later).push_back(std::move(one));
  }
  cluster->deferred = std::move(later);
  for (Deferred& one : now) {
    one.work();
    ++cluster->progress;
  }
}

void RunCluster() {
  const size_t each = cluster->blocks[0].fibers.size();
  const size_t threads = each * cluster->blocks.size();
  int idle = 0;
  while (cluster->live() > 0) {
    const uint64_t before = cluster->progress;
    // Warps in a new order each round, now and then the threads of a warp backwards.
    const size_t shift = Random()() % threads;
    const bool backwards = Random()() % 4 == 0;
    for (size_t i = 0; i < threads; ++i) {
      const size_t at = (i + shift) % threads;
      const size_t thread = backwards ? threads - 1 - at : at;
      Block& of = cluster->blocks[thread / each];
      Fiber& fiber = of.fibers[thread % each];
      if (fiber.done) continue;
      block = &of;
      self = &fiber;
      StraitSwitchStack(&scheduler_stack, fiber.stack_pointer);
    }
    self = nullptr;
    block = nullptr;
    const bool stuck = cluster->progress == before;
    if (!cluster->deferred.empty()) RunDeferred(stuck);
    idle = cluster->progress == before ? idle + 1 : 0;
    if (idle > kIdleRounds) Fail("a deadlock: no thread of the block can go on");
  }
  if (!cluster->deferred.empty()) Fail("copies were outstanding when their block ended");
}

void MakeBlock(Block& made, uint64_t index, size_t threads) {
  const dim3& grid = cluster->grid;
  const dim3& size = cluster->size;
  made.index = {static_cast<unsigned>(index % grid.x),
                static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
  made.fibers.resize(threads);
  made.live = static_cast<int>(threads);
  made.warps.resize((threads + kWarpLanes - 1) / kWarpLanes);
  made.warpgroups.resize((threads + kWarpgroupThreads - 1) / kWarpgroupThreads);
  for (size_t t = 0; t < threads; ++t) {
    Fiber& fiber = made.fibers[t];
    fiber.linear = static_cast<int>(t);
    fiber.thread_index = {static_cast<unsigned>(t % size.x),
                          static_cast<unsigned>(t / size.x % size.y),
                          static_cast<unsigned>(t / size.x / size.y)};
    Prepare(fiber, made.rank * threads + t);
  }
  std::memset(SharedWindow(made.rank), 0xff, kSharedWindow);
}

std::map<const void*, int>& SharedLimits() {
  static std::map<const void*, int> limits;
  return limits;
}

std::mutex& LaunchMutex() {
  static std::mutex mutex;
  return mutex;
}

void Meet(Meeting& meeting, int slot, uint32_t mask, int count, void* mine, Combine combine) {
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.combine = combine;
  } else if (meeting.mask != mask || meeting.combine != combine) {
    Fail("threads that must do one operation together met in different ones");
  }
  meeting.slots[slot] = mine;
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    combine(meeting.slots, mask);
    meeting.arrived = 0;
    ++meeting.generation;
    ++cluster->progress;
    return;
  }
  while (meeting.generation == generation) Yield();
}

}  // namespace

void Fail(const char* what) {
  std::fprintf(stderr, "emulator: %s", what);
  if (self != nullptr && block != nullptr) {
    std::fprintf(stderr, " (block %u %u %u, thread %d)", block->index.x, block->index.y,
                 block->index.z, self->linear);
  }
  std::fprintf(stderr, "\n");
  std::abort();
}

cudaError_t SetSharedLimit(const void* kernel, int bytes) {
  if (bytes > kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard lock(LaunchMutex());
  SharedLimits()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->capturing != nullptr) {
    stream->capturing->work.push_back(std::move(work));
  } else if (stream != nullptr) {
    stream->queue->Add(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

cudaError_t Launch(const void* kernel, dim3 grid, dim3 size, dim3 cluster_size, size_t shared_bytes,
                   cudaStream_t stream, std::function<void()> body) {
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || size_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const size_t together = cluster_size.x;
  if (together == 0 || together > kMostClusterBlocks || cluster_size.y * cluster_size.z != 1) {
    return cudaErrorNotSupported;
  }
  if (grid.x % together != 0) return cudaErrorInvalidConfiguration;
  {
    const std::lock_guard lock(LaunchMutex());
    const auto limit = SharedLimits().find(kernel);
    const int most = limit == SharedLimits().end() ? kDefaultSharedLimit : limit->second;
    if (shared_bytes > static_cast<size_t>(std::max(most, kDefaultSharedLimit))) {
      return cudaErrorInvalidValue;
    }
  }
  return Enqueue(stream, [=, body = std::move(body)] {
    const std::lock_guard lock(LaunchMutex());
    for (uint64_t i = 0; i < uint64_t{grid.x} * grid.y * grid.z; i += together) {
      Cluster running;
      running.grid = grid;
      running.size = size;
      running.body = &body;
      running.blocks.resize(together);
      cluster = &running;
      for (uint32_t rank = 0; rank < together; ++rank) {
        running.blocks[rank].rank = rank;
        MakeBlock(running.blocks[rank], i + rank, threads);
      }
      RunCluster();
      cluster = nullptr;
    }
  });
}

uint3 ThreadIndex() { return self->thread_index; }
uint3 BlockIndex() { return block->index; }
dim3 BlockSize() { return cluster->size; }
dim3 GridSize() { return cluster->grid; }
unsigned char* DynamicSharedMemory() { return SharedWindow(block->rank); }

uint32_t ClusterRank() { return block->rank; }

void SyncCluster() {
  MeetAt(cluster->barrier, [] { return cluster->live(); });
}

uint32_t AddressInBlock(uint32_t shared_address, uint32_t rank) {
  if (rank >= cluster->blocks.size()) Fail("a block that its cluster does not have");
  const auto own = reinterpret_cast<uintptr_t>(SharedWindow(block->rank));
  if (shared_address - own >= kSharedWindow) Fail("an address of another block's shared memory");
  return static_cast<uint32_t>(shared_address - own +
                               reinterpret_cast<uintptr_t>(SharedWindow(rank)));
}

void CheckAlive(uint32_t shared_address) {
  const uintptr_t rank =
      (shared_address - reinterpret_cast<uintptr_t>(SharedWindow(0))) / kSharedWindow;
  if (cluster->blocks[rank].live == 0) Fail("the shared memory of a block that has ended");
}

void Progress() { ++cluster->progress; }

void Yield() {
  Fiber* const me = self;
  StraitSwitchStack(&me->stack_pointer, scheduler_stack);
}

void NamedBarrier(int id, int threads, bool wait) {
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) Fail("a named barrier with two different numbers of threads");
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    ReleaseBarrier(barrier);
    return;
  }
  while (wait && barrier.generation == generation) Yield();
}

void SyncThreads() {
  MeetAt(block->barriers[0], [] { return block->live; });
}

void MeetWarp(uint32_t mask, void* mine, Combine combine) {
  const int lane = self->linear % kWarpLanes;
  if ((mask >> lane & 1) == 0) Fail("a thread outside the mask of its warp's operation");
  Meet(block->warps[static_cast<size_t>(self->linear / kWarpLanes)], lane, mask,
       __builtin_popcount(mask), mine, combine);
}

void MeetWarpgroup(void* mine, Combine combine) {
  Meet(block->warpgroups[static_cast<size_t>(self->linear / kWarpgroupThreads)],
       self->linear % kWarpgroupThreads, 0, kWarpgroupThreads, mine, combine);
}

void Defer(std::function<void()> work) { cluster->deferred.push_back({std::move(work), Delay()}); }

void AddCopy(std::function<void()> work) {
  self->copies.push_back({std::move(work), self->copy_group});
}

void CommitCopyGroup() { ++self->copy_group; }

ProductState& Products() { return self->products; }

void FinishCopies(int groups_left) {
  const bool all = groups_left == 0;
  while (!self->copies.empty()) {
    Pending& first = self->copies.front();
    const bool open = first.group == self->copy_group;
    if (!all && (open || first.group + static_cast<uint64_t>(groups_left) >= self->copy_group)) {
      return;
    }
    first.work();
    self->copies.pop_front();
  }
}

}  // namespace strait::emulator
