# SPDX-License-Identifier: Apache-2.0
"""Pipelines over NCCL, all ranks on one GPU or one each on several: only by tests/gpu.sh, part nccl.

One, two and four ranks give the same tokens. A rank that is stopped in mid-step, or killed, costs the client a pause:
its stream goes on to the end with every token once, the survivors and a spare serve again within the deadline, and so
does a second request. On one GPU, stopping needs MPS (ranks run at the same time), killing needs its absence (under MPS
a death takes the others along): STRAIT_TEST_MPS says which of the two there is. STRAIT_TEST_GPUS: several, as 0,1.
"""
import json
import os
import signal
import threading
import time

import pytest
from harness import BACKEND, ROOT, Cluster, Daemons, strait, wait_until

pytestmark = pytest.mark.skipif(BACKEND != "cuda" or "STRAIT_TEST_MPS" not in os.environ,
                                reason="NOT RUN: needs a GPU and tests/gpu.sh --only nccl")
MPS = os.environ.get("STRAIT_TEST_MPS") == "1"
GPUS = os.environ.get("STRAIT_TEST_GPUS", "0").split(",")
TOGETHER = MPS or len(GPUS) > 1  # ranks run at the same time
MODEL = ROOT / "deploy/models/reference"  # 12 layers
MEMORY = "2GiB"
TOKENS = 600
# From the fault to the first token after it: the coordinator's heartbeat timeout of 5 s, a load, NCCL's set-up.
SERVES_AGAIN_S = 60


def deterministic():
    """A replayed token is promised to be the same only where workers can be told so."""
    return ["--deterministic"] if "--deterministic" in strait("up", "--help").stdout else []


def gpus_of_up(ranks):
    return ["--gpu", ",".join(GPUS[:ranks])] if len(GPUS) > 1 else []


def place(rank):
    """A worker's GPU, and what `strait up` gives to workers that share one: a spare, or all."""
    env = {"STRAIT_GPU": GPUS[rank % len(GPUS)]}
    if len(GPUS) == 1 or rank >= len(GPUS):
        env["NCCL_HOSTID"] = f"strait-test-{os.getpid()}-{rank}"
    if len(GPUS) == 1:
        env["NCCL_IB_DISABLE"] = "1"
    return dict(env, NCCL_SOCKET_IFNAME="lo")


def edges(cluster):
    return [s["edge"] for p in cluster.status()["pipelines"] for s in p["stages"] if "edge" in s]


def prompts():
    return [[(7 * i + 13 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((1, 40, 64, 200, 700))]


def body(prompt, **more):
    return dict(prompt=prompt, temperature=0, ignore_eos=True, return_token_ids=True, logprobs=1, **more)


@pytest.mark.skipif(not TOGETHER, reason="ranks that take turns only make it slow: run with MPS")
def test_the_same_tokens_on_1_2_and_4_ranks():
    outcomes = {}
    for ranks in (1, 2, 4):
        with Cluster(MODEL, workers=ranks, random_weights=None, memory=MEMORY, args=deterministic() + gpus_of_up(ranks)) as cluster:
            outcomes[ranks] = []
            for prompt in prompts():
                choice = cluster.complete(**body(prompt, max_tokens=50))["choices"][0]
                outcomes[ranks].append((choice["token_ids"], choice["logprobs"]["token_logprobs"]))
            assert [e["transport"] for e in edges(cluster)] == ["nccl"] * (ranks - 1), edges(cluster)
    for ranks in (2, 4):
        for i, (one, many) in enumerate(zip(outcomes[1], outcomes[ranks])):
            assert one[0] == many[0], f"{ranks} ranks, prompt {i}: tokens differ"
            assert one[1] == many[1], f"{ranks} ranks, prompt {i}: log-probabilities differ"


@pytest.mark.skipif(not TOGETHER, reason="ranks that take turns only make it slow: run with MPS")
def test_an_edge_by_grpc_gives_the_same_tokens():
    outcomes = []
    for transport in ("auto", "grpc"):
        with Cluster(MODEL, workers=2, random_weights=None, memory=MEMORY, args=deterministic() + gpus_of_up(2),
                     env={"STRAIT_TRANSPORT": transport}) as cluster:
            outcomes.append([cluster.complete(**body(p, max_tokens=30))["choices"][0]["token_ids"] for p in prompts()])
            assert [e["transport"] for e in edges(cluster)] == ["nccl" if transport == "auto" else "grpc"]
    assert outcomes[0] == outcomes[1]


class Fault:
    """Two ranks and a spare; a client streams while `strike` is done to rank 1."""

    def run(self, strike, mend=lambda worker: None):
        model_args = ["--cache-format", "bf16"]
        with Daemons(MODEL, stages=2, random_weights=None, memory=MEMORY, coordinator_args=model_args,
                     worker_args=deterministic(), wait=False, worker_env=place) as cluster:
            cluster.wait_pipelines(1)
            cluster.start_worker()
            wait_until(lambda: len(cluster.status()["workers"]) == 3, what="the spare")
            assert [e["transport"] for e in edges(cluster)] == ["nccl"], edges(cluster)
            calm = cluster.complete(**body(prompts()[2], max_tokens=TOKENS))["choices"][0]["token_ids"]
            arrived, ids, errors = [], [], []

            def read():
                try:
                    for event in cluster.stream(**body(prompts()[2], max_tokens=TOKENS)):
                        assert "error" not in event, event
                        for choice in event.get("choices", []):
                            ids.extend(choice.get("token_ids") or [])
                            arrived.append(time.monotonic())
                except BaseException as e:  # told by the test's own thread
                    errors.append(e)

            client = threading.Thread(target=read)
            client.start()
            wait_until(lambda: len(ids) >= 50 or errors, what="a stream under way")
            assert not errors, errors
            # Rank 1 of the pipeline, whichever worker that is.
            stage = next(p for p in cluster.status()["pipelines"][0]["stages"] if p["stage_index"] == 1)
            name = next(w["name"] for w in cluster.status()["workers"] if w["id"] == stage["worker_id"])
            victim = cluster.workers[int(name.split("-")[1])]
            struck = time.monotonic()
            strike(victim)
            try:
                client.join(300)
                assert not client.is_alive(), cluster.logs()
                assert not errors, errors
                assert len(ids) == TOKENS, f"{len(ids)} tokens of {TOKENS}"
                if deterministic():
                    assert ids == calm, "the tokens changed"
                after = [t for t in arrived if t > struck]
                pause = max(b - a for a, b in zip([struck] + after, after))
                print(f"pause {pause:.2f} s")
                assert pause < SERVES_AGAIN_S, f"a pause of {pause:.1f} s"
                assert len(cluster.complete(**body(prompts()[1], max_tokens=20))["choices"][0]["token_ids"]) == 20
                status = cluster.status()
                assert status["stats"]["recoveries"] >= 1, json.dumps(status["stats"])
                # The survivor is the process that it was.
                assert all(w.poll() is None for w in cluster.workers if w is not victim), cluster.logs()
            finally:
                mend(victim)


@pytest.mark.skipif(not TOGETHER, reason="needs MPS: a stopped rank would keep its time slice")
def test_a_rank_that_is_stopped_costs_a_pause():
    Fault().run(lambda worker: worker.send_signal(signal.SIGSTOP), lambda worker: worker.send_signal(signal.SIGCONT))


@pytest.mark.skipif(MPS, reason="needs the absence of MPS: there a death takes the others along")
def test_a_rank_that_is_killed_costs_a_pause():
    Fault().run(lambda worker: worker.kill())
