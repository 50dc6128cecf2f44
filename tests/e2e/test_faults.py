# SPDX-License-Identifier: Apache-2.0
"""Faults that say little of who is at fault, and what clients feel of them.

A worker that advertises a port which nobody listens to: its neighbours are not blamed, a spare takes its place. A path
between two workers that drops every packet: the same. A worker dies under ten short streams and two of 8,000 tokens: the
short ones do not wait until the long ones are computed again. The figures are printed; what is asserted is the order.
"""
import os
import subprocess
import threading
import time

import pytest
from harness import TINY, Daemons, free_port, wait_until

SERVICE_S = 15
LONG, SHORT = 8000, 100


class Cluster(Daemons):
    """Workers by index may have arguments of their own, or a command that they run under."""

    def __init__(self, own_args=None, under=None, **more):
        super().__init__(wait=False, **more)
        self.own_args, self.under = own_args or {}, under or {}

    def spawn(self, name, argv, env=None):
        index = int(name.rsplit("-", 1)[1]) if name.startswith("worker-") else None
        return super().spawn(name, self.under.get(index, []) + argv, env)

    def start_worker(self, *args):
        return super().start_worker(*args, *self.own_args.get(len(self.workers), []))

    def wait_workers(self, count):
        wait_until(lambda: self.answers() and len(self.status()["workers"]) == count, what=f"{count} workers")

    def answers(self):
        try:
            return self.status()
        except Exception:
            return None

    def worker(self, index):
        return next(w for w in self.status()["workers"] if w["name"] == f"worker-{index}")

    def places(self):
        return {w["name"] for w in self.status()["workers"] if w["stages"]}

    def complete(self, tokens=8):
        reply = self.post("/v1/completions", dict(model=TINY.name, prompt=[5, 6, 7], max_tokens=tokens, ignore_eos=True,
                                                  temperature=0, return_token_ids=True))
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["token_ids"]


def dead_address():
    return ["--advertise", f"127.0.0.1:{free_port()}"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_worker_with_a_dead_data_address(bad):
    with Cluster(own_args={bad: dead_address()}) as cluster:
        cluster.wait_workers(2)
        wait_until(lambda: "failed_links" in cluster.worker(bad), what="the failed link")
        assert cluster.active_pipelines() == 0
        begin = time.monotonic()
        cluster.start_worker()  # a spare
        wait_until(lambda: cluster.active_pipelines() == 1, timeout_s=SERVICE_S, what="service by the spare")
        print(f"\nworker {bad} of 2 with a dead data address: service {time.monotonic() - begin:.2f} s after the spare's start")
        assert len(cluster.complete()) == 8
        check_blame(cluster, bad=bad, good=[1 - bad, 2])


def test_a_spare_with_a_dead_data_address_is_tried_first():
    with Cluster(own_args={2: dead_address()}) as cluster:
        cluster.wait_pipelines(1)
        tokens = cluster.complete()
        cluster.start_worker()  # the bad one, which is older
        cluster.wait_workers(3)
        cluster.start_worker()
        cluster.wait_workers(4)
        begin = time.monotonic()
        cluster.kill_worker(1)
        assert cluster.complete() == tokens
        took = time.monotonic() - begin
        print(f"\na worker dies, one of two spares has a dead data address: a request takes {took:.2f} s")
        assert took < SERVICE_S
        check_blame(cluster, bad=2, good=[0, 3])


def check_blame(cluster, bad, good):
    wait_until(lambda: cluster.places() == {f"worker-{i}" for i in good}, timeout_s=SERVICE_S, what="the good ones' places")
    wait_until(lambda: cluster.worker(bad)["standing"] != "good", what="the bad one's standing")
    for i in good:
        assert cluster.worker(i)["standing"] == "good", cluster.worker(i)
    assert "worker-%d" % bad in str(cluster.worker(bad)["failed_links"])
    # Nobody was evicted for it.
    assert cluster.status()["stats"]["workers_lost"] == (1 if bad == 2 else 0)


class Stream:
    """A stream that is read by a thread of its own, with the time of each token."""

    def __init__(self, cluster, prompt_tokens, tokens, seed):
        self.times, self.tokens, self.error = [], [], None
        prompt = [3 + (seed * 7 + i * i) % 600 for i in range(prompt_tokens)]
        body = dict(model=TINY.name, prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True,
                    return_token_ids=True)

        def read():
            try:
                for event in cluster.stream(**body):
                    for choice in event.get("choices", []):
                        for token in choice.get("token_ids") or []:
                            self.tokens.append(token)
                            self.times.append(time.monotonic())
            except Exception as e:  # told by whoever joins
                self.error = repr(e)

        self.thread = threading.Thread(target=read)
        self.thread.start()

    def resumed(self, after):
        """When its first token after that time came, but for those that were on the way."""
        gaps = [(b - a, b) for a, b in zip(self.times, self.times[1:]) if b > after]
        assert gaps, f"no token after the death; {len(self.tokens)} tokens, {self.error}"
        return max(gaps)


def test_short_streams_do_not_wait_for_the_replays_of_long_ones():
    with Cluster(stages=2, coordinator_args=["--request-timeout", "900"]) as cluster:
        cluster.wait_pipelines(1)
        cluster.start_worker()
        cluster.wait_workers(3)
        long = [Stream(cluster, LONG, 200, i) for i in range(2)]
        wait_until(lambda: all(s.times or s.error for s in long), timeout_s=400, what="long prompts")
        short = [Stream(cluster, SHORT, 600, 10 + i) for i in range(10)]
        wait_until(lambda: all(len(s.times) >= 5 or s.error for s in short), what="short streams")
        died = time.monotonic()
        cluster.kill_worker(1)
        for s in long + short:
            s.thread.join(600)
            assert s.error is None, s.error
        for s in long:
            assert len(s.tokens) == 200
        for s in short:
            assert len(s.tokens) == 600
        pauses = {"short": [s.resumed(died) for s in short], "long": [s.resumed(died) for s in long]}
        for kind, gaps in pauses.items():
            print(f"\npause of {kind} streams: " + ", ".join(f"{gap:.2f}" for gap, _ in sorted(gaps)) + " s", end="")
        print()
        assert max(at for _, at in pauses["short"]) < min(at for _, at in pauses["long"])


# ---------------------------------------------------------------- a path that drops every packet


def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True)


class Namespaces:
    """Networks of their own for workers, joined by a bridge to this one's."""

    def __init__(self, count):
        tag = os.getpid() % 10_000
        self.net = f"10.{200 + tag % 50}.{tag // 50 % 250}"
        self.bridge = f"stb{tag}"
        self.names = [f"strait-{tag}-{i}" for i in range(count)]
        self.tag = tag

    def __enter__(self):
        try:
            self.must("ip", "link", "add", self.bridge, "type", "bridge")
            self.must("ip", "addr", "add", f"{self.net}.1/24", "dev", self.bridge)
            self.must("ip", "link", "set", self.bridge, "up")
            for i, name in enumerate(self.names):
                out, inside = f"sto{self.tag}-{i}", f"sti{self.tag}-{i}"
                self.must("ip", "netns", "add", name)
                self.must("ip", "link", "add", out, "type", "veth", "peer", "name", inside)
                self.must("ip", "link", "set", inside, "netns", name)
                self.must("ip", "link", "set", out, "master", self.bridge)
                self.must("ip", "link", "set", out, "up")
                self.must("ip", "-n", name, "link", "set", "lo", "up")
                self.must("ip", "-n", name, "addr", "add", f"{self.address(i)}/24", "dev", inside)
                self.must("ip", "-n", name, "link", "set", inside, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            run("ip", "netns", "del", name)
        run("ip", "link", "del", self.bridge)

    @staticmethod
    def must(*argv):
        done = run(*argv)
        if done.returncode != 0:
            pytest.skip(f"no network namespaces here: {' '.join(argv)}: {done.stderr.strip()}")

    def address(self, index):
        return f"{self.net}.{2 + index}"

    def drop(self, a, b):
        """Nothing passes between a and b any more, and nobody is told: their packets go to a link address that is no one's."""
        for at, to in ((a, b), (b, a)):
            self.must("ip", "-n", self.names[at], "neigh", "replace", self.address(to), "lladdr", "02:00:00:00:00:99",
                      "dev", f"sti{self.tag}-{at}", "nud", "permanent")

    def args(self, index):
        return ["--listen", f"{self.address(index)}:0", "--insecure"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_path_that_drops_every_packet(when):
    with Namespaces(3) as nets:
        grpc = f"{nets.net}.1:{free_port()}"
        if when == "before":
            nets.drop(0, 1)
        with Cluster(grpc=grpc, own_args={i: nets.args(i) for i in range(3)},
                     under={i: ["ip", "netns", "exec", nets.names[i]] for i in range(3)},
                     coordinator_args=["--insecure"]) as cluster:
            if when == "before":
                begin = time.monotonic()
                cluster.wait_workers(2)
                assert cluster.active_pipelines() == 0
                cluster.start_worker()
                wait_until(lambda: cluster.active_pipelines() == 1, timeout_s=SERVICE_S, what="service without that path")
                print(f"\na path drops every packet: service {time.monotonic() - begin:.2f} s after the start")
            else:
                cluster.wait_pipelines(1)
                cluster.start_worker()
                cluster.wait_workers(3)
                cluster.complete()
                stream = Stream(cluster, SHORT, 3000, 1)
                wait_until(lambda: len(stream.times) > 20 or stream.error, what="tokens")
                cut = time.monotonic()
                nets.drop(0, 1)
                stream.thread.join(300)
                assert stream.error is None, stream.error
                assert len(stream.tokens) == 3000
                print(f"\na path drops every packet from some moment on: a pause of {stream.resumed(cut)[0]:.2f} s")
            assert len(cluster.complete()) == 8
            # Two who do not reach each other are not neighbours.
            wait_until(lambda: cluster.places() in ({"worker-0", "worker-2"}, {"worker-1", "worker-2"}), what="another neighbour")
            assert "failed_links" in cluster.worker(0) and "failed_links" in cluster.worker(1)
            assert cluster.status()["stats"]["workers_lost"] == 0


def test_a_worker_of_another_machine_that_advertises_loopback():
    with Namespaces(1) as nets:
        grpc = f"{nets.net}.1:{free_port()}"
        with Cluster(grpc=grpc, stages=1, under={0: ["ip", "netns", "exec", nets.names[0]]},
                     coordinator_args=["--insecure"]) as cluster:
            def told():
                return "--advertise" in open(f"{cluster.log_dir}/coordinator.log").read()
            wait_until(told, timeout_s=30, what="the refusal")
            assert cluster.status()["workers"] == []
