#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The part nccl of tests/gpu.sh: several NCCL ranks on one GPU, without and with MPS. Arguments: the folder of the
# programs, a folder for logs, a Python with pytest and httpx.
#   Without MPS ranks take turns: kills are judged there, by recovery and not by speed. With it they run at the same
#   time: tokens, a rank that is stopped, and the hop's speed. Under MPS one client's death takes the others along.
set -uo pipefail
programs="$1" out="$2" python="$3"
cd "$(dirname "$0")/.." || exit 1
failed=0

part() {  # name, whether MPS runs
  local name="$1" mps="$2"
  echo "--- $name"
  "$programs/tests/cuda_nccl_hop_bench" >"$out/nccl_hop_$name.log" 2>&1
  local rc=$?
  cat "$out/nccl_hop_$name.log"
  [ $rc = 0 ] || { echo "FAILED: hop benchmark, $name (exit code $rc)"; failed=1; }
  STRAIT_TEST_MPS=$mps STRAIT_TEST_BACKEND=cuda STRAIT_BIN="$programs/bin" "$python" -B -m pytest -p no:cacheprovider \
    -q -rP --tb=short tests/e2e/test_nccl_gpu.py </dev/null >"$out/nccl_$name.log" 2>&1 ||
    { echo "FAILED: end to end, $name ($out/nccl_$name.log)"; failed=1; }
  grep -hE "^pause|passed|failed" "$out/nccl_$name.log"
}

part no-mps 0

# The control program may lie beside the driver rather than on PATH.
control="$(command -v nvidia-cuda-mps-control || ls /usr/bin/nvidia-cuda-mps-control \
  /usr/local/nvidia/bin/nvidia-cuda-mps-control 2>/dev/null | head -n 1)"
if [ -z "$control" ]; then
  echo "FAILED: no nvidia-cuda-mps-control here, so nothing ran with MPS"
  exit 1
fi
mps_dir="$(mktemp -d)"
export CUDA_MPS_PIPE_DIRECTORY="$mps_dir/pipe" CUDA_MPS_LOG_DIRECTORY="$mps_dir/log"
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
end_mps() {
  echo quit | "$control" >/dev/null 2>&1
  cp "$CUDA_MPS_LOG_DIRECTORY"/*.log "$out/" 2>/dev/null
  rm -rf "$mps_dir"
}
trap end_mps EXIT
if "$control" -d >"$out/mps.log" 2>&1; then
  part mps 1
else
  echo "FAILED: the MPS daemon does not start ($out/mps.log)"
  failed=1
fi
exit $failed
