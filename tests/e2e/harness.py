# SPDX-License-Identifier: Apache-2.0
"""Real processes for end-to-end tests.

    with Cluster(model, workers=2) as cluster:          # `strait up` on free ports of 127.0.0.1
        cluster.post("/v1/completions", {...})
    with Daemons(model, pipelines=2, stages=1) as d:    # coordinator and workers, each started by hand:
        d.kill_worker(0)                                # nobody replaces what dies

Both wait until the cluster serves, always end every process that they started, and put the daemons' logs into the
assertion when something goes wrong. Programs come from STRAIT_BIN (set by ctest), else build/release/bin. With
STRAIT_TEST_BACKEND=cuda every cluster's workers compute on the GPU, with STRAIT_TEST_CACHE_FORMAT=fp8 on fp8 cache rows;
with STRAIT_TEST_ROW_TRANSPORT=grpc rows between workers go by gRPC.
"""
import atexit
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import httpx

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("STRAIT_BIN", ROOT / "build/release/bin"))
BACKEND = os.environ.get("STRAIT_TEST_BACKEND", "cpu")
CACHE_FORMAT = os.environ.get("STRAIT_TEST_CACHE_FORMAT", "")  # of `strait up`; empty: the backend's own
ROW_TRANSPORT = os.environ.get("STRAIT_TEST_ROW_TRANSPORT", "auto")  # --row-transport of every worker
TINY = ROOT / "deploy/models/tiny-random"
START_TIMEOUT_S = 120  # generous: sanitizers, two busy cores
REQUEST_TIMEOUT_S = 120


def program(name):
    path = BIN / name
    assert path.exists(), f"{path} is missing: build it, or set STRAIT_BIN to the folder of the programs"
    return str(path)


_reserved = []  # sockets that hold this process's ports against other test processes


def free_port():
    """A port for a program that starts soon, below those that the kernel hands out: workers listen on any port, and
    one that starts first must not get the coordinator's."""
    end = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, end if end > 20_000 else 65_536)
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0strait-test-port-{port}")
            with socket.socket() as s:
                s.bind(("127.0.0.1", port))
        except OSError:
            name.close()
            continue
        _reserved.append(name)
        return port


def wait_until(condition, timeout_s=START_TIMEOUT_S, what="condition"):
    """Polls until condition() is truthy and returns that value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def expect_rows_went(stats, before, what):
    """That rows between workers went through shared memory and no other way; with STRAIT_TEST_ROW_TRANSPORT=grpc never so.
    `what`: "migrated" or "replicated"."""
    rows, shared = (stats[f"{what}_{kind}"] - before[f"{what}_{kind}"] for kind in ("bytes", "shared_bytes"))
    assert rows > 0 and shared == (rows if ROW_TRANSPORT == "auto" else 0), (rows, shared)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid):
    try:
        return [int(c) for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except FileNotFoundError:
        return ""


RUNTIME_DIR = tempfile.mkdtemp(prefix="strait-e2e-runtime-")  # where `strait up` puts its operator keys
atexit.register(shutil.rmtree, RUNTIME_DIR, ignore_errors=True)


def clean_env(**more):
    """The environment without STRAIT_… settings of whoever runs the tests."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("STRAIT_") and "proxy" not in k.lower()}
    return {**env, "XDG_RUNTIME_DIR": RUNTIME_DIR, "STRAIT_ROW_TRANSPORT": ROW_TRANSPORT, **more}


class Http:
    """What both kinds of cluster offer; needs base_url."""

    base_url = None

    def client(self, **kw):
        kw.setdefault("timeout", REQUEST_TIMEOUT_S)
        return httpx.Client(base_url=self.base_url, trust_env=False, **kw)

    def get(self, path, **kw):
        with self.client() as c:
            return c.get(path, **kw)

    def post(self, path, body, **kw):
        with self.client() as c:
            if isinstance(body, (bytes, str)):
                return c.post(path, content=body, **kw)
            return c.post(path, json=body, **kw)

    def complete(self, **body):
        """A completion that must succeed, as a dict."""
        reply = self.post("/v1/completions", body)
        assert reply.status_code == 200, f"{reply.status_code}: {reply.text}\n{self.logs()}"
        return reply.json()

    def stream(self, path="/v1/completions", **body):
        """Yields the events of a stream as dicts; asserts that it ends with [DONE]."""
        done = False
        with self.client() as c, c.stream("POST", path, json={**body, "stream": True}) as reply:
            if reply.status_code != 200:
                reply.read()
                raise AssertionError(f"{reply.status_code}: {reply.text}")
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    if line == "data: [DONE]":
                        done = True
                    else:
                        yield json.loads(line[6:])
        assert done, "the stream ended without [DONE]"

    def status(self):
        reply = self.get("/strait/status")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def fresh_status(self):
        """What status tells is of a moment ago, longer if nobody has asked."""
        self.status()
        time.sleep(0.3)
        return self.status()

    def bytes_in_use(self):
        """Of the caches, without prefix blocks that no sequence has now."""
        stats = self.status()["stats"]
        return stats["cache_bytes_used"] - stats["cache_bytes_free_prefixes"]

    def key_file(self):
        """Where `strait up` has put the operator key."""
        return pathlib.Path(RUNTIME_DIR, "strait", "operator-key-" + self.base_url.rsplit(":", 1)[1])

    def as_operator(self):
        """Headers."""
        return {"Authorization": "Bearer " + self.key_file().read_text().strip()}

    def model_name(self):
        return self.get("/v1/models").json()["data"][0]["id"]

    def ready(self):
        try:
            return self.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def socket(self):
        """A raw connection to the HTTP port."""
        host, port = re.match(r"http://(.*):(\d+)", self.base_url).groups()
        return socket.create_connection((host, int(port)), timeout=60)

    def worker_pids(self):
        """Process ids of the registered workers, by worker name."""
        return {w["name"]: int(w["process_id"]) for w in self.status()["workers"]}

    def logs(self, lines=40):
        text = ""
        for path in sorted(pathlib.Path(self.log_dir).glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            text += f"--- {path.name}\n" + "\n".join(tail) + "\n"
        return text


class Cluster(Http):
    """`strait up`."""

    def __init__(self, model=TINY, workers=2, pipelines=1, random_weights=1, threads=1, args=(), http=None,
                 grpc=None, memory="1GiB", env=None):
        self.dir = tempfile.mkdtemp(prefix="strait-e2e-")
        self.log_dir = self.dir + "/logs"
        # Free ports of our own choice by default: several clusters may run at once.
        http = f"127.0.0.1:{free_port()}" if http is None else http
        grpc = f"127.0.0.1:{free_port()}" if grpc is None else grpc
        self.argv = [program("strait"), "up", "--model", str(model), "--workers", str(workers), "--pipelines",
                     str(pipelines), "--threads", str(threads), "--log-dir", self.log_dir]
        if http:
            self.argv += ["--http", http]
        if grpc:
            self.argv += ["--grpc", grpc]
        if memory:
            self.argv += ["--memory", memory]
        if random_weights is not None:
            self.argv += ["--random-weights", str(random_weights)]
        if BACKEND != "cpu":
            self.argv += ["--backend", BACKEND]
        if CACHE_FORMAT:
            self.argv += ["--cache-format", CACHE_FORMAT]
        self.argv += list(args)
        self.env = env or {}
        self.process = None

    def start(self):
        """Starts without waiting."""
        self.out = open(self.dir + "/stdout", "w+")
        self.err = open(self.dir + "/stderr", "w+")
        self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err,
                                        env=clean_env(**self.env))
        return self

    def wait_ready(self):
        def line():
            assert self.process.poll() is None, (
                f"strait up ended with {self.process.returncode}\n{self.stderr()}\n{self.logs()}")
            match = re.search(r"^ready: (\S+)", self.stdout(), re.M)
            return match and match.group(1)

        try:
            self.base_url = wait_until(line, what="the ready line of strait up")
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.stderr()}\n{self.logs()}") from None
        return self

    def stdout(self):
        return pathlib.Path(self.dir, "stdout").read_text()

    def stderr(self):
        return pathlib.Path(self.dir, "stderr").read_text()

    def daemons(self):
        """Process ids of the daemons that run now, as strait up's children."""
        return children(self.process.pid)

    def workers(self):
        return [p for p in self.daemons() if command_of(p).endswith("strait-worker")]

    def coordinator(self):
        return next(p for p in self.daemons() if command_of(p).endswith("strait-coordinator"))

    def interrupt(self, sig=signal.SIGINT, timeout_s=30):
        """Signals strait up; returns its exit code and the daemons that were running."""
        pids = self.daemons()
        self.process.send_signal(sig)
        return self.process.wait(timeout_s), pids

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for f in (getattr(self, "out", None), getattr(self, "err", None)):
            if f:
                f.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self):
        try:
            return self.start().wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind, value, trace):
        if kind is not None:
            print(self.stderr(), self.logs())
        self.stop()


class Daemons(Http):
    """A coordinator and workers, each started by hand."""

    def __init__(self, model=TINY, pipelines=1, stages=2, random_weights=1, threads=1, memory="1GiB",
                 coordinator_args=(), worker_args=(), wait=True, worker_env=lambda index: {}, grpc=None,
                 coordinator_of=None):
        self.dir = tempfile.mkdtemp(prefix="strait-e2e-")
        self.log_dir = self.dir
        self.model, self.pipelines, self.stages = str(model), pipelines, stages
        self.random_weights, self.threads, self.memory = random_weights, threads, memory
        self.coordinator_args, self.worker_args = list(coordinator_args), list(worker_args)
        self.wait, self.worker_env = wait, worker_env
        self.grpc = grpc or f"127.0.0.1:{free_port()}"
        # Where each worker, by index, finds the coordinator.
        self.coordinator_of = coordinator_of or (lambda index: self.grpc)
        self.coordinator = None
        self.workers = []

    def spawn(self, name, argv, env=None):
        with open(f"{self.dir}/{name}.log", "a") as log:
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean_env(**(env or {})))

    def start_worker(self, *args):
        name = f"worker-{len(self.workers)}"
        argv = [program("strait-worker"), "--coordinator", self.coordinator_of(len(self.workers)), "--model", self.model, "--name", name,
                "--threads", str(self.threads), "--memory", self.memory]
        if self.random_weights is not None:
            argv += ["--random-weights", str(self.random_weights)]
        if BACKEND != "cpu":
            argv += ["--backend", BACKEND]
        worker = self.spawn(name, argv + self.worker_args + list(args), self.worker_env(len(self.workers)))
        self.workers.append(worker)
        return worker

    def kill_worker(self, index):
        """Kills by index of start; nobody restarts it."""
        self.workers[index].kill()
        self.workers[index].wait()

    def __enter__(self):
        try:
            http = f"127.0.0.1:{free_port()}"
            self.base_url = "http://" + http
            self.coordinator = self.spawn("coordinator", [
                program("strait-coordinator"), "--model", self.model, "--grpc", self.grpc, "--http", http,
                "--pipelines", str(self.pipelines), "--stages", str(self.stages)] + self.coordinator_args)
            for _ in range(self.pipelines * self.stages):
                self.start_worker()
            if self.wait:
                self.wait_pipelines(self.pipelines)
            return self
        except BaseException:
            print(self.logs())
            self.stop()
            raise

    def active_pipelines(self):
        try:
            return sum(p["state"] == "active" for p in self.status()["pipelines"])
        except httpx.HTTPError:
            assert self.coordinator.poll() is None, f"the coordinator ended\n{self.logs()}"
            return 0

    def wait_pipelines(self, count):
        wait_until(lambda: self.active_pipelines() == count and (count == 0 or self.ready()),
                   what=f"{count} active pipelines")

    def stop(self):
        for p in [*self.workers, self.coordinator]:
            if p and p.poll() is None:
                p.terminate()
        for p in [*self.workers, self.coordinator]:
            if p:
                try:
                    p.wait(15)
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __exit__(self, kind, value, trace):
        if kind is not None:
            print(self.logs())
        self.stop()


def strait(*args, timeout_s=300, env=None, **kw):
    """Runs `strait …` to its end; stdout and stderr as text."""
    return subprocess.run([program("strait"), *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=timeout_s, env=clean_env(**(env or {})), **kw)


@contextlib.contextmanager
def listening():
    """A listener on a free port of 127.0.0.1 that never answers; gives its port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(8)
        yield s.getsockname()[1]
