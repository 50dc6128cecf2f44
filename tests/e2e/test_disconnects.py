# SPDX-License-Identifier: Apache-2.0
"""Clients that come and go: 64 streams at once, many of which break off at a random moment, in random ways.

Defends: every accepted request is completed by the server or cancelled by its client, nothing else; afterwards no
sequence runs or waits, every latent block is free, the coordinator's books say the same as the clients', the GPU (if
there is one) has as much free memory as before, and the server serves on.

STRAIT_DISCONNECT_SECONDS: how long (default 10). STRAIT_DISCONNECT_SEED: what a failure printed.
"""
import json
import os
import random
import socket
import struct
import subprocess
import threading
import time

from harness import BACKEND, Cluster, wait_until

SECONDS = float(os.environ.get("STRAIT_DISCONNECT_SECONDS", "10"))
SEED = int(os.environ.get("STRAIT_DISCONNECT_SEED") or random.SystemRandom().randrange(1 << 32))
CLIENTS = 64
STATUS_AGE_S = 1.5  # more than the coordinator leaves its status as it is
GRAPHS_MIB = 2 * (1 + 3 * 3)  # of two stages of three layers (worker/model/cuda/stage_layout.h)
PREFIX = list(range(10, 90))  # common to many prompts


class Outcome:
    """What one request came to, as its client saw it."""

    def __init__(self, kind, sequences=0, detail=""):
        self.kind, self.sequences, self.detail = kind, sequences, detail


def request_of(rng):
    prompt = PREFIX[: rng.randrange(0, 80)] + [rng.randrange(3, 600) for _ in range(rng.randrange(1, 120))]
    return {
        "prompt": prompt, "stream": True, "ignore_eos": True, "n": rng.choice([1, 1, 1, 1, 2, 3]),
        "max_tokens": rng.choice([1, 2, 5, 20, 60, 120]), "temperature": rng.choice([0, 0.8, 1.3]),
        "seed": rng.randrange(1 << 31), "logprobs": rng.choice([0, 0, 2]),
    }


def run_request(cluster, rng):
    """One request on a connection of its own, read to its end or broken off."""
    body = request_of(rng)
    data = json.dumps(body).encode()
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n").encode()
    # None: to the end. Else so many bytes of the answer are read first; 0: none at all.
    most = body["max_tokens"] * body["n"] * 150
    leaves_after = rng.choice([None, None, 0, rng.randrange(1, 300), rng.randrange(1, max(2, most))])
    half_sent = rng.random() < 0.05
    connection = cluster.socket()
    try:
        if half_sent:  # gone before the request is whole: never accepted
            connection.sendall((head + data)[: rng.randrange(1, len(head) + len(data))])
            return Outcome("unsent")
        connection.sendall(head + data)
        if leaves_after == 0:
            time.sleep(rng.random() * 0.05)
            return Outcome("left", body["n"])
        got = b""
        while b"data: [DONE]" not in got:
            chunk = connection.recv(4096)
            if not chunk:
                return Outcome("broken", body["n"], f"the server hung up after {got[-300:]!r}")
            got += chunk
            if leaves_after is not None and len(got) >= leaves_after:
                return Outcome("left", body["n"])
        if not got.startswith(b"HTTP/1.1 200"):
            return Outcome("broken", 0, got[:300].decode(errors="replace"))
        finishes = got.count(b'"finish_reason":"length"')
        if finishes != body["n"] or b'"error"' in got:
            return Outcome("broken", body["n"], f"{finishes} of {body['n']} choices ended by length: {got[-400:]!r}")
        return Outcome("completed", body["n"])
    except socket.timeout:
        return Outcome("broken", body["n"], "nothing came for the socket's timeout")
    finally:
        if rng.random() < 0.5:  # a reset rather than a farewell
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def gpu_used_mib():
    """Of GPU 0, by all processes; None without a GPU."""
    if BACKEND != "cuda":
        return None
    out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"],
                         capture_output=True, text=True, check=True).stdout
    return int(out.split()[0])


def settled(cluster):
    """The stats, once nothing runs. The status is made anew only so often: two a while apart must agree."""
    last = None

    def idle():
        nonlocal last
        stats = cluster.status()["stats"]
        same, last = stats == last, stats
        if stats["running"] == 0 and stats["waiting"] == 0 and stats["cache_bytes_used"] == 0 and same:
            return stats
        time.sleep(STATUS_AGE_S)

    try:
        return wait_until(idle, timeout_s=60, what="no sequence, and every latent block free")
    except AssertionError as e:
        raise AssertionError(f"{e}; seed {SEED}; {json.dumps(cluster.status()['stats'])}\n{cluster.logs()}") from None


def check_complete(cluster):
    reply = cluster.complete(prompt=PREFIX, max_tokens=8, ignore_eos=True, temperature=0, return_token_ids=True)
    return reply["choices"][0]["token_ids"]


def test_64_clients_that_come_and_go():
    print(f"seed {SEED}, {SECONDS} s", flush=True)
    # Little room, so that sequences also wait and give way: a first cluster tells what memory leaves 30 columns.
    memory_bytes = (96 if BACKEND == "cpu" else 160) << 20  # GPU workers may count an NCCL edge: 64 MiB
    args = ["--max-running", "24", "--prefill-chunk", "64", "--prefix-cache", "off"]
    with Cluster(workers=2, memory=str(memory_bytes), args=args) as cluster:
        stages = [w["stages"][0] for w in cluster.status()["workers"]]
    columns = [s["cache_bytes_total"] // s["block_bytes"] // (s["layer_end"] - s["layer_begin"]) for s in stages]
    memory_bytes -= max((c - 30) * (s["cache_bytes_total"] // c) for c, s in zip(columns, stages))
    with Cluster(workers=2, memory=str(memory_bytes), args=args) as cluster:
        blocks = [w["stages"][0]["cache_bytes_total"] // w["stages"][0]["block_bytes"] for w in cluster.status()["workers"]]
        greedy = check_complete(cluster)
        settled(cluster)
        outcomes, lock, memory = [], threading.Lock(), []

        def round_of_clients(seconds, seed):
            until = time.monotonic() + seconds

            def client(number):
                rng = random.Random(f"{seed}/{number}")
                while time.monotonic() < until:
                    outcome = run_request(cluster, rng)
                    with lock:
                        outcomes.append(outcome)

            threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()

        # The first round makes CUDA take what it takes once: graphs of all sizes, for one.
        for number, share in enumerate((0.4, 0.6)):
            before = settled(cluster)
            outcomes.clear()
            round_of_clients(SECONDS * share, f"{SEED}/{number}")
            after = settled(cluster)
            memory.append(gpu_used_mib())

            count = {kind: sum(o.kind == kind for o in outcomes) for kind in ("completed", "left", "unsent", "broken")}
            print(f"round {number}: {len(outcomes)} requests, {count}, blocks {blocks}, "
                  f"{after['preemptions']} times a sequence gave way, GPU {memory[-1]} MiB", flush=True)
            broken = [o.detail for o in outcomes if o.kind == "broken"]
            assert not broken, f"seed {SEED}: {len(broken)} requests neither completed nor cancelled by their clients, " \
                f"such as: {broken[0]}\n{cluster.logs()}"
            assert count["completed"] > 10 and count["left"] > 10, f"seed {SEED}: too few of a kind: {count}"
            # The coordinator's books. Who left may have been served whole, or never been accepted; who stayed was
            # served whole.
            ended = {k: after["sequences_ended"][k] - before["sequences_ended"][k] for k in after["sequences_ended"]}
            served = sum(o.sequences for o in outcomes if o.kind == "completed")
            left = sum(o.sequences for o in outcomes if o.kind == "left")
            assert ended["error"] == 0 and ended["stop"] == 0, f"seed {SEED}: {ended}"
            assert ended["length"] >= served, f"seed {SEED}: {ended}, clients saw {served} end"
            assert ended["length"] + ended["cancelled"] <= served + left, f"seed {SEED}: {ended}, {served} + {left} asked"
            assert ended["cancelled"] > 0, f"seed {SEED}: {ended}"
            assert after["recoveries"] == before["recoveries"] and after["workers_lost"] == before["workers_lost"]
            assert check_complete(cluster) == greedy, f"seed {SEED}: a greedy completion has changed"
        assert settled(cluster)["preemptions"] > 0, f"seed {SEED}: the room was meant to be too little"
        # Graphs of sizes that the first round did not see may come, within their share of the stages' memory.
        if memory[0] is not None:
            assert memory[1] - memory[0] <= GRAPHS_MIB, f"seed {SEED}: GPU memory, MiB, after each round: {memory}"
        assert cluster.process.poll() is None
