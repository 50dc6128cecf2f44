// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_library.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <climits>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

// What is declared here again must be what NCCL declares, where its header can be read.
#if __has_include(<nccl.h>) && __has_include(<cuda_runtime.h>)
#include <nccl.h>
#define STRAIT_HAS_NCCL_HEADER 1
#endif

namespace strait {
namespace {

// Blocks of an edge's kernels at most: a send holds them beside the layers, a receive that waits beside
// other stages of the GPU.
constexpr int kMaxBlocks = 4;

// ncclConfig_t as of 2.18; later versions take missing members for unset, by `size` and `version`.
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kNcclVersionMin;
  int blocking = 0;
  int cga_cluster_size = INT_MIN;  // INT_MIN: unset
  int min_ctas = INT_MIN;
  int max_ctas = kMaxBlocks;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};
struct UniqueId {
  char bytes[limits::kNcclIdBytes];
};
constexpr int kBytes = 0;  // ncclInt8

#ifdef STRAIT_HAS_NCCL_HEADER
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId));
static_assert(offsetof(Config, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(Config, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(Config, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize));
static_assert(offsetof(Config, min_ctas) == offsetof(ncclConfig_t, minCTAs));
static_assert(offsetof(Config, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(Config, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(Config, split_share) == offsetof(ncclConfig_t, splitShare));
static_assert(sizeof(Config) <= sizeof(ncclConfig_t));
static_assert(NCCL_CONFIG_UNDEF_INT == INT_MIN);
static_assert(kNcclSuccess == ncclSuccess && kNcclInProgress == ncclInProgress &&
              kNcclInvalidUsage == ncclInvalidUsage && kNcclRemoteError == ncclRemoteError);
static_assert(kBytes == ncclInt8 && sizeof(ncclDataType_t) == sizeof(int));
static_assert(sizeof(ncclComm_t) == sizeof(NcclComm*) && sizeof(cudaStream_t) == sizeof(void*));
static_assert(NCCL_VERSION(2, 18, 0) == kNcclVersionMin);
#endif

class Library final : public NcclApi {
 public:
  // Where each function is found; required ones first.
  struct Functions {
    int (*get_version)(int*) = nullptr;
    int (*get_unique_id)(UniqueId*) = nullptr;
    int (*init)(NcclComm**, int, UniqueId, int, Config*) = nullptr;
    int (*async_error)(NcclComm*, int*) = nullptr;
    int (*send)(const void*, size_t, int, int, NcclComm*, void*) = nullptr;
    int (*receive)(void*, size_t, int, int, NcclComm*, void*) = nullptr;
    int (*finalize)(NcclComm*) = nullptr;
    int (*destroy)(NcclComm*) = nullptr;
    int (*abort)(NcclComm*) = nullptr;
    const char* (*text)(int) = nullptr;
    int (*revoke)(NcclComm*, int) = nullptr;  // null before 2.28.9
  };

  Library(const Functions& functions, uint32_t version) : f_(functions), version_(version) {}

  uint32_t version() const override { return version_; }
  NcclCode MakeId(std::string* id) override {
    UniqueId made;
    const NcclCode code = f_.get_unique_id(&made);
    if (code == kNcclSuccess) id->assign(made.bytes, sizeof(made.bytes));
    return code;
  }
  NcclCode Init(NcclComm** comm, const std::string& id, int rank) override {
    STRAIT_CHECK(id.size() == sizeof(UniqueId));
    UniqueId given;
    memcpy(given.bytes, id.data(), sizeof(given.bytes));
    Config config;
    return f_.init(comm, 2, given, rank, &config);
  }
  NcclCode AsyncError(NcclComm* comm, NcclCode* state) override {
    return f_.async_error(comm, state);
  }
  NcclCode Send(NcclComm* comm, const std::byte* data, size_t bytes, void* stream) override {
    return f_.send(data, bytes, kBytes, 1, comm, stream);
  }
  NcclCode Receive(NcclComm* comm, std::byte* data, size_t bytes, void* stream) override {
    return f_.receive(data, bytes, kBytes, 0, comm, stream);
  }
  NcclCode Finalize(NcclComm* comm) override { return f_.finalize(comm); }
  bool can_revoke() const override { return f_.revoke != nullptr; }
  NcclCode Revoke(NcclComm* comm) override { return f_.revoke(comm, 0); }
  NcclCode Destroy(NcclComm* comm) override { return f_.destroy(comm); }
  NcclCode Abort(NcclComm* comm) override { return f_.abort(comm); }
  std::string Text(NcclCode code) const override {
    return absl::StrCat(f_.text(code), " (NCCL error ", code, ")");
  }

 private:
  const Functions f_;
  const uint32_t version_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<NcclApi>> LoadNccl(const std::string& path) {
  const std::string name = path.empty() ? "libnccl.so.2" : path;
  // Before it is loaded: it reads its environment once.
  (void)setenv("NCCL_RAS_ENABLE", "0", /*overwrite=*/0);
  // Never closed: its threads may outlive every communicator.
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return absl::NotFoundError(absl::StrCat("NCCL cannot be loaded (", why != nullptr ? why : name,
                                            "); install it, or say where it is with "
                                            "--nccl-library"));
  }
  Library::Functions f;
  std::string missing;
  const auto find = [&](auto& function, const char* symbol, bool required) {
    void* const found = dlsym(library, symbol);
    memcpy(&function, &found, sizeof(found));
    if (found == nullptr && required) missing = symbol;
  };
  find(f.get_version, "ncclGetVersion", true);
  find(f.get_unique_id, "ncclGetUniqueId", true);
  find(f.init, "ncclCommInitRankConfig", true);
  find(f.async_error, "ncclCommGetAsyncError", true);
  find(f.send, "ncclSend", true);
  find(f.receive, "ncclRecv", true);
  find(f.finalize, "ncclCommFinalize", true);
  find(f.destroy, "ncclCommDestroy", true);
  find(f.abort, "ncclCommAbort", true);
  find(f.text, "ncclGetErrorString", true);
  find(f.revoke, "ncclCommRevoke", false);
  int version = 0;
  if (missing.empty() && f.get_version(&version) != kNcclSuccess) missing = "its version";
  if (!missing.empty() || version < static_cast<int>(kNcclVersionMin)) {
    return absl::FailedPreconditionError(absl::StrCat(
        name,
        missing.empty() ? absl::StrCat(" is NCCL ", NcclVersionText(version), ", too old")
                        : absl::StrCat(" lacks ", missing),
        "; NCCL ", NcclVersionText(kNcclVersionMin), " or newer is needed"));
  }
  return std::make_shared<Library>(f, static_cast<uint32_t>(version));
}

}  // namespace strait
