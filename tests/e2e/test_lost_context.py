# SPDX-License-Identifier: Apache-2.0
"""A worker whose GPU context is lost ends with a line that says so and is replaced; clients see a pause.

How to lose one without reaching into the process: under MPS, the death of a client in mid-kernel takes the contexts of
the others with it (not always: then only the killed one is replaced, and the rest of this must hold all the same). Needs
STRAIT_TEST_BACKEND=cuda and nvidia-cuda-mps-control; tests/gpu.sh runs it.
"""
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

import pytest
from harness import BACKEND, TINY, Cluster, wait_until

MPS = shutil.which("nvidia-cuda-mps-control") or next(
    (str(p) for p in map(pathlib.Path, ("/usr/bin/nvidia-cuda-mps-control", "/usr/local/nvidia/bin/nvidia-cuda-mps-control"))
     if p.exists()), None)
LINE = "the GPU context is lost"
LOST_EXIT = 70  # kLostContextExit of worker/model/cuda/status.h

pytestmark = [pytest.mark.skipif(BACKEND != "cuda", reason="a CPU worker has no GPU context to lose"),
              pytest.mark.skipif(BACKEND == "cuda" and not MPS, reason="nvidia-cuda-mps-control is not on this machine")]


@pytest.fixture
def mps():
    """The environment of an MPS daemon of our own."""
    folder = tempfile.mkdtemp(prefix="strait-mps-")
    env = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    subprocess.run([MPS, "-d"], env={**os.environ, **env}, check=True)
    yield env
    subprocess.run([MPS], input="quit\n", text=True, env={**os.environ, **env})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_all_that_lost_their_context_are_replaced(mps, victim):
    body = {"prompt": list(range(10, 60)), "max_tokens": 400, "temperature": 0.8, "seed": 5, "ignore_eos": True,
            "return_token_ids": True}
    with Cluster(TINY, workers=2, env=mps, args=["--deterministic"]) as cluster:
        whole = cluster.complete(**body)["choices"][0]["token_ids"]
        ids, killed = [], False
        for event in cluster.stream(**body):
            for choice in event.get("choices", []):
                ids += choice.get("token_ids") or []
            if not killed and len(ids) >= 20:
                os.kill(sorted(cluster.workers())[victim], signal.SIGKILL)
                killed = True
        assert killed and ids == whole, "the stream did not go on as it began"
        wait_until(lambda: cluster.status()["stats"]["pipelines_active"] == 1, what="a pipeline again")
        assert cluster.complete(**body)["choices"][0]["token_ids"] == whole
        # Who was not killed lives, or has said why it ended.
        ended = cluster.stderr().count(f" ended (exit code {LOST_EXIT})")
        lost = sum(path.read_text(errors="replace").count(LINE) for path in pathlib.Path(cluster.log_dir).glob("worker-*"))
        print(f"{lost} workers lost their context with the one that was killed")
        assert ended == lost, f"{cluster.stderr()}\n{cluster.logs()}"
