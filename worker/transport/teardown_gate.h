// SPDX-License-Identifier: Apache-2.0
//
// TeardownGate orders how the NCCL edges of one process leave the device and come onto it: those that
// end leave together, and one that is new waits until they are gone.
//
// Borrows: a Place its gate.
// Thread:  any, synchronized inside; it calls nobody.
// Why:     NCCL frees device memory in ncclCommAbort and ncclCommDestroy, and nothing of ours can change
//          that. A free waits for every kernel of the process and keeps other threads out of CUDA
//          meanwhile. Were a receive of another edge posted then, it might wait for hidden states that
//          come only after this worker's own next send, which cannot be launched: nothing would ever
//          go on. So who frees lets all others leave the device first, or be about to: an abort stops
//          its own kernels before it calls into CUDA. Meanwhile none enters it. New edges wait for their
//          own process alone: no worker's end waits for another worker's beginning.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace strait {

class TeardownGate {
 public:
  // One edge's.
  class Place {
   public:
    explicit Place(TeardownGate* gate);
    // Gone, if it was not.
    ~Place();
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

    // Before an operation. False: not now, for others end; at most for `patience_us`, lest edges of
    // several workers that are in each other's way wait for ever. The edge's thread only.
    bool Enter(uint64_t patience_us);
    // All its operations are done. The edge's thread only.
    void Leave();
    // It will be torn down: from now on no new edge begins. May be called again.
    void End();
    // It calls nothing more of NCCL or the device but to be torn down.
    void Stop();
    // Torn down. May be called again.
    void Gone();

    // No other has had an operation on the device for so long; or others end, and all leave together.
    bool IsLeftAlone(uint64_t idle_us) const;
    // How many others end and are not gone.
    size_t others_ending() const;
    // Of a new one: until no other ends, or this one does. False: not until `until_us`.
    bool AwaitTurn(uint64_t until_us);
    // Of one that stopped: until no other has an operation on the device but those that stopped, too.
    // False: not within `patience_us`.
    bool AwaitOthers(uint64_t patience_us);

   private:
    friend class TeardownGate;
    TeardownGate* const gate_;
    // The edge's thread only:
    bool entered_ = false;        // spares Leave the lock
    uint64_t held_since_us_ = 0;  // 0: it is not
    // Guarded by mu_ of the gate:
    bool on_device_ = false;
    bool ending_ = false;
    bool stopped_ = false;
  };

 private:
  // REQUIRES: mu_ held.
  size_t OthersEnding(const Place* place) const;
  bool OthersOnDevice(const Place* place) const;

  mutable std::mutex mu_;
  std::condition_variable changed_;
  std::vector<Place*> places_;  // guarded by mu_: of all edges that are not gone
  uint64_t used_us_ = 0;        // guarded by mu_: when an edge last left the device
};

}  // namespace strait
