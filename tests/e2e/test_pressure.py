# SPDX-License-Identifier: Apache-2.0
"""Twelve clients on a quarter of the cache that they need: whoever must give way is parked in host memory, or computed again.
All complete, with the tokens of a run without pressure, nobody waits forever, and nothing of them is left.
"""
import concurrent.futures
import re
import subprocess
import time

import pytest
from harness import BACKEND, TINY, Cluster, clean_env, program, wait_until

BLOCK = 64
CLIENTS = 12
# A GPU's workers have memory in slabs, and less beside the cache where that is small: so there the cache is larger.
PROMPT, GENERATED = (400, 560) if BACKEND == "cpu" else (2_000, 1_200)
BLOCKS = (PROMPT + GENERATED) // BLOCK * CLIENTS
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]
HOST = ["--host-cache-bytes", "1GiB"]
ROOMY = "1GiB" if BACKEND == "cpu" else "3GiB"


def tokens(count, seed):
    return [(i * 7 + i // 11 + 3 + 31 * seed) % 500 for i in range(count)]


def bodies():
    return [dict(prompt=tokens(PROMPT, seed=i), max_tokens=GENERATED, temperature=1, seed=i, ignore_eos=True,
                 return_token_ids=True) for i in range(CLIENTS)]


def ids(choice):
    return choice["token_ids"]


def listen(cluster, body):
    """The ids of a stream, and the longest that its client waited for anything."""
    got, longest, last = [], 0, time.monotonic()
    for event in cluster.stream(**body):
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        for choice in event["choices"]:
            got += choice.get("token_ids") or []
    return got, longest


@pytest.fixture(scope="module")
def calm():
    """What each client gets where there is room for all, and a worker's memory by how many blocks of a sequence it holds."""
    with Cluster(workers=2, memory=ROOMY, args=FIXED) as cluster:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda body: ids(cluster.complete(**body)["choices"][0]), bodies()))
        status = cluster.status()
        assert status["stats"]["preemptions"] == 0
    sizes = []
    for worker in status["workers"]:
        stage, = worker["stages"]
        column = (stage["layer_end"] - stage["layer_begin"]) * stage["block_bytes"]
        sizes.append((worker["booked_bytes"] - stage["cache_bytes_total"], column))
    return answers, lambda blocks: str(max(other + blocks * column for other, column in sizes))


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize("preempt", ["park", "replay"])
def test_twelve_clients_on_a_quarter(calm, preempt, share):
    answers, memory = calm
    args = ["--preempt", preempt, "--prefix-cache", share] + HOST + FIXED
    with Cluster(workers=2, memory=memory(BLOCKS // 4), args=args) as cluster:
        assert cluster.status()["pipelines"][0]["tokens_max"] < BLOCKS // (3 if BACKEND == "cpu" else 2) * BLOCK
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            heard = list(pool.map(lambda body: listen(cluster, body), bodies()))
        took = time.monotonic() - begin
        assert [got for got, _ in heard] == answers

        def over():
            status = cluster.status()
            stats = status["stats"]
            return status if stats["sequences_ended"]["length"] == CLIENTS and stats["running"] == 0 else None
        stats = wait_until(over, what="the end of all sequences")["stats"]
        print({"preempt": preempt, "prefix_cache": share, "took_s": round(took, 2),
               "longest_wait_s": round(max(wait for _, wait in heard), 2)} |
              {name: stats[name] for name in ("preemptions", "replayed_tokens", "prefix_blocks_offloaded",
                                              "prefix_blocks_returned", "host_copied_bytes", "host_copying_us")})
        assert stats["preemptions"] > 0 and stats["prefix_blocks_lost"] == 0
        if preempt == "park":
            assert stats["prefix_blocks_offloaded"] > 0 and stats["prefix_blocks_returned"] > 0
        else:
            assert stats["prefix_blocks_offloaded"] == stats["host_bytes_total"] == 0
        if share == "on":
            assert cluster.post("/strait/flush", {}).status_code == 200
        wait_until(lambda: empty(cluster), timeout_s=10, what="nothing left of them")


def empty(cluster):
    stats = cluster.status()["stats"]
    return stats["cache_bytes_used"] == stats["host_bytes_used"] == 0


def test_return_against_replay(calm):
    """A prompt whose rows had to leave the cache comes again: what that takes, by its length."""
    lengths, blocks = [200, 1_000, 3_000, 6_000], 6_400 // BLOCK
    took = {}
    for preempt in ("park", "replay"):
        args = ["--preempt", preempt] + HOST + FIXED
        with Cluster(workers=2, memory=calm[1](blocks), args=args) as cluster:
            for length in lengths:
                body = dict(prompt=tokens(length, seed=length), max_tokens=1, temperature=0, ignore_eos=True,
                            return_token_ids=True)
                first = cluster.complete(**body)
                rows = cluster.status()["pipelines"][0]["tokens_max"]
                cluster.complete(prompt=tokens(rows - 100, seed=length + 1), max_tokens=1)
                begin = time.monotonic()
                again = cluster.complete(**body)
                took[preempt, length] = time.monotonic() - begin
                assert ids(again["choices"][0]) == ids(first["choices"][0])
                cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
                # The first block of a prompt is the last one to go.
                assert cached == (length - 1) // BLOCK * BLOCK if preempt == "park" else cached <= 2 * BLOCK
            pipeline = cluster.status()["pipelines"][0]
            print({name: pipeline[name] for name in ("host_blocks", "copy_block_us", "compute_block_us")})
    for length in lengths:
        print(f"{length} tokens: back in {took['park', length] * 1000:.1f} ms, computed again in "
              f"{took['replay', length] * 1000:.1f} ms")


def test_a_cluster_without_host_memory_parks_nothing(calm):
    answers, memory = calm
    with Cluster(workers=2, memory=memory(BLOCKS // 4), args=["--preempt", "park"] + FIXED) as cluster:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            got = list(pool.map(lambda body: ids(cluster.complete(**body)["choices"][0]), bodies()))
        assert got == answers
        stats = cluster.status()["stats"]
        assert stats["preemptions"] > 0 and stats["prefix_blocks_offloaded"] == stats["host_bytes_total"] == 0


def test_more_host_memory_than_there_is():
    argv = [program("strait-worker"), "--model", str(TINY), "--random-weights", "1", "--host-cache-bytes", "1000TiB"]
    ended = subprocess.run(argv, env=clean_env(), capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert re.search(r"--host-cache-bytes is 1099511627776000.* bytes of memory left", ended.stderr), ended.stderr
