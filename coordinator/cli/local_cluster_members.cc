// SPDX-License-Identifier: Apache-2.0
//
// LocalCluster's workers: what each is told of its links, those that join, those that leave for good.
#include <signal.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/local_cluster.h"
#include "proto/base/status_macros.h"

namespace strait::cli {

std::string LocalCluster::ControlLink(const std::string& worker) {
  return absl::StrCat(worker, " control");
}
std::string LocalCluster::DataLink(const std::string& worker) {
  return absl::StrCat(worker, " data");
}

absl::StatusOr<LocalCluster::Process> LocalCluster::MakeWorker(uint32_t index) {
  Process worker;
  worker.name = WorkerName(index);
  if (!relay_) {
    worker.spec = WorkerSpec(options_, daemons_, index, nullptr);
    return worker;
  }
  const std::string host = "127.0.0.1:";
  STRAIT_ASSIGN_OR_RETURN(const Url grpc, ParseUrl(daemons_.grpc));
  STRAIT_ASSIGN_OR_RETURN(const uint16_t listen, FreePort("127.0.0.1"));
  STRAIT_ASSIGN_OR_RETURN(const uint16_t control, relay_->Add(ControlLink(worker.name), grpc.port));
  STRAIT_ASSIGN_OR_RETURN(const uint16_t data, relay_->Add(DataLink(worker.name), listen));
  const WorkerLinks links = {absl::StrCat(host, control), absl::StrCat(host, listen),
                             absl::StrCat(host, data)};
  worker.spec = WorkerSpec(options_, daemons_, index, &links);
  return worker;
}

std::string LocalCluster::Join() {
  uint32_t index = 0;
  {
    std::lock_guard lock(members_mu_);
    index = num_named_++;
    joining_.push_back(index);
  }
  WakeMembers();
  return WorkerName(index);
}

void LocalCluster::Leave(std::string name, int signal) {
  {
    std::lock_guard lock(members_mu_);
    leaving_.emplace_back(std::move(name), signal);
  }
  WakeMembers();
}

void LocalCluster::WakeMembers() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(members_fd_, &one, sizeof(one));
}

absl::Status LocalCluster::ChangeMembers() {
  uint64_t ignored;
  [[maybe_unused]] const ssize_t n = read(members_fd_, &ignored, sizeof(ignored));
  std::vector<uint32_t> joining;
  std::vector<std::pair<std::string, int>> leaving;
  {
    std::lock_guard lock(members_mu_);
    joining.swap(joining_);
    leaving.swap(leaving_);
  }
  for (const uint32_t index : joining) {
    STRAIT_ASSIGN_OR_RETURN(Process worker, MakeWorker(index));
    STRAIT_RETURN_IF_ERROR(StartProcess(worker));
    terminal_->Say(absl::StrCat(worker.name, " joins, process ", worker.pid));
    workers_.push_back(std::move(worker));
  }
  for (const auto& [name, signal] : leaving) {
    for (Process& worker : workers_) {
      if (worker.name != name) continue;
      worker.leaves = true;
      worker.restart_wanted = false;
      if (worker.pid > 0) kill(worker.pid, signal);
    }
  }
  return absl::OkStatus();
}

void LocalCluster::ForgetLeft() {
  std::erase_if(workers_, [this](const Process& worker) {
    if (!worker.leaves || worker.pid > 0) return false;
    if (relay_) {
      relay_->Remove(ControlLink(worker.name));
      relay_->Remove(DataLink(worker.name));
    }
    return true;
  });
}

}  // namespace strait::cli
