# SPDX-License-Identifier: Apache-2.0
"""What survives a failure is kept: the rows that other stages have are not computed again without need, and no client
sees a difference.

A worker of three is killed under load, the first, the middle and the last; a worker's link to the coordinator breaks
for three seconds, and for longer than its stages are kept; the coordinator stands still for 20 seconds. Every stream has
the tokens of an undisturbed run. The first test prints, for each stage, the rows that went through its layers and those
that were new to its cache, before the kill and after it.
"""
import json
import os
import pathlib
import re
import signal
import socket
import threading
import time

import pytest
from harness import BACKEND, ROOT, Daemons, free_port, wait_until

SHAPE = "v2-lite"
MODEL = ROOT / "tests/golden" / SHAPE
GPU = BACKEND != "cpu"
FIXED = ["--deterministic"] if GPU else []
LENGTHS = (65, 130, 300)


def prompts():
    golden = json.loads((MODEL / "golden.json").read_text())
    return [p["tokens"] for p in golden["prompts"] if len(p["tokens"]) in LENGTHS]


def body(prompt, tokens=200):
    return dict(model=SHAPE, prompt=prompt, max_tokens=tokens, temperature=0.9, seed=11, logprobs=3, ignore_eos=True,
                return_token_ids=True)


class Streams:
    """One stream for each prompt, read by threads of their own."""

    def __init__(self, cluster, tokens=200):
        self.out = [([], []) for _ in prompts()]
        self.errors = []

        def read(i, prompt):
            try:
                for event in cluster.stream(**body(prompt, tokens)):
                    for choice in event.get("choices", []):
                        self.out[i][0].extend(choice.get("token_ids") or [])
                        self.out[i][1].extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
            except Exception as e:  # told by whoever joins
                self.errors.append(repr(e))

        self.threads = [threading.Thread(target=read, args=(i, p)) for i, p in enumerate(prompts())]
        for t in self.threads:
            t.start()

    def least(self):
        return min(len(ids) for ids, _ in self.out)

    def wait_for(self, count):
        wait_until(lambda: self.least() >= count or self.errors, what=f"{count} tokens of every stream")

    def join(self):
        for t in self.threads:
            t.join(180)
        assert not self.errors, self.errors
        return self.out


def place(index):
    """GPU workers are ranks that share one: each needs an NCCL_HOSTID of its own."""
    return {"NCCL_HOSTID": f"strait-test-{os.getpid()}-{index}", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"} if GPU else {}


def daemons(worker_args=(), **more):
    return Daemons(MODEL, stages=3, random_weights=None, memory="2GiB" if GPU else "256MiB", worker_env=place,
                   coordinator_args=["--prefix-cache", "off"] + (["--cache-format", "bf16"] if GPU else []), worker_args=FIXED + list(worker_args), **more)


def stages(cluster):
    """Of the one pipeline, by index: its worker's name, and what status says of the stage."""
    found = {}
    for worker in cluster.status()["workers"]:
        for stage in worker["stages"]:
            found[stage["stage_index"]] = (worker["name"], stage)
    return [found[i] for i in sorted(found)]


def index_of(name):
    return int(name.rsplit("-", 1)[1])


@pytest.fixture(scope="module")
def undisturbed():
    with daemons() as cluster:
        return Streams(cluster).join()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_worker_of_three_dies(undisturbed, victim):
    with daemons() as cluster:
        cluster.start_worker()  # a spare
        wait_until(lambda: len(cluster.status()["workers"]) == 4, what="the spare")
        streams = Streams(cluster)
        streams.wait_for(40)
        # A stage's report may come after the last one's, which brings the tokens.
        least = sum(LENGTHS) + 3 * 39
        wait_until(lambda: stages(cluster)[victim][1]["rows_stored"] >= least, what="the victim's reports")
        before = stages(cluster)
        cluster.kill_worker(index_of(before[victim][0]))
        wait_until(lambda: cluster.status()["stats"]["recoveries"] == 1, what="the recovery")
        assert streams.join() == undisturbed
        after = stages(cluster)
        print(f"\nstage {victim} of 3 killed: rows computed / stored")
        extra = []
        for i in range(3):
            b, a = before[i][1], after[i][1]
            new = i == victim
            assert (b["stage_id"] != a["stage_id"]) == new
            computed = a["rows_computed"] - (0 if new else b["rows_computed"])
            stored = a["rows_stored"] - (0 if new else b["rows_stored"])
            extra.append(computed - stored)
            print(f"  stage {i}: before {b['rows_computed']} / {b['rows_stored']}, after {computed} / {stored}")
        lost = before[victim][1]["rows_stored"]
        # Stages before the gap computed what was lost once more, those behind it nothing that they had. A step that was
        # under way adds a row or two of each sequence.
        for i in range(3):
            if i < victim:
                assert extra[i] >= lost - 20, (i, extra)
            else:
                assert extra[i] <= 20, (i, extra)
        assert after[victim][1]["rows_stored"] >= lost


class Proxy:
    """Forwards TCP from a port of its own, until it is cut: then nothing passes, and nobody is let in."""

    def __init__(self, to):
        self.to = (to.rsplit(":", 1)[0], int(to.rsplit(":", 1)[1]))
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = free_port()
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(16)
        self.is_cut = False
        self.pairs = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                inner, _ = self.listener.accept()
            except OSError:
                return
            if self.is_cut:
                inner.close()
                continue
            try:
                outer = socket.create_connection(self.to, timeout=5)
            except OSError:
                inner.close()
                continue
            self.pairs.append((inner, outer))
            for a, b in ((inner, outer), (outer, inner)):
                threading.Thread(target=self.pump, args=(a, b), daemon=True).start()

    @staticmethod
    def pump(a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for s in (a, b):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self):
        self.is_cut = True
        for pair in self.pairs:
            for s in pair:
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self.pairs = []

    def mend(self):
        self.is_cut = False

    def close(self):
        self.cut()
        self.listener.close()


def log_of(cluster, index):
    return pathlib.Path(cluster.log_dir, f"worker-{index}.log").read_text()


@pytest.fixture
def behind_a_proxy():
    """Three workers, whose last reaches the coordinator through a proxy."""
    made = []

    def start(**more):
        grpc = f"127.0.0.1:{free_port()}"
        proxy = Proxy(grpc)
        made.append(proxy)
        return proxy, daemons(grpc=grpc, coordinator_of=lambda i: f"127.0.0.1:{proxy.port}" if i == 2 else grpc, **more)

    yield start
    for proxy in made:
        proxy.close()


def test_a_stream_that_breaks_for_three_seconds(undisturbed, behind_a_proxy):
    proxy, cluster = behind_a_proxy()
    with cluster:
        streams = Streams(cluster)
        streams.wait_for(40)
        before = {name: stage for name, stage in stages(cluster)}
        proxy.cut()
        wait_until(lambda: cluster.active_pipelines() == 0, what="the pipeline's end")
        time.sleep(3)
        proxy.mend()
        assert streams.join() == undisturbed
        after = {name: stage for name, stage in stages(cluster)}
        for name, stage in after.items():
            assert stage["stage_id"] == before[name]["stage_id"], name
            # No prompt was computed again, in any stage.
            again = stage["rows_computed"] - stage["rows_stored"]
            assert again <= 20, (name, again)
        assert log_of(cluster, 2).count("loading stage") == 1
        assert re.search(r"attached to the coordinator.*stages_kept=1", log_of(cluster, 2))


def test_a_worker_that_stays_away_loses_its_stages(undisturbed, behind_a_proxy):
    proxy, cluster = behind_a_proxy(worker_args=["--orphan-timeout", "2"])
    with cluster:
        streams = Streams(cluster)
        streams.wait_for(40)
        proxy.cut()
        wait_until(lambda: "no coordinator came back" in log_of(cluster, 2), what="the orphan's end")
        cluster.start_worker()  # another takes the place
        assert streams.join() == undisturbed
        proxy.mend()
        wait_until(lambda: len(cluster.status()["workers"]) == 4, what="the worker's return, as a spare")


def test_the_coordinator_stands_still_for_20_seconds(undisturbed):
    with daemons() as cluster:
        streams = Streams(cluster)
        streams.wait_for(40)
        before = {name: stage["stage_id"] for name, stage in stages(cluster)}
        os.kill(cluster.coordinator.pid, signal.SIGSTOP)
        time.sleep(20)
        os.kill(cluster.coordinator.pid, signal.SIGCONT)
        assert streams.join() == undisturbed
        wait_until(lambda: cluster.active_pipelines() == 1, what="the pipeline")
        assert {name: stage["stage_id"] for name, stage in stages(cluster)} == before
        for i in range(3):
            assert log_of(cluster, i).count("loading stage") == 1, i
