# SPDX-License-Identifier: Apache-2.0
"""A worker is drained while clients read, by the verb or by SIGTERM: the same tokens and log-probabilities, to the last
bit, as undisturbed, and no row is computed again where another pipeline takes the sequences. Where none does, a spare
takes the worker's place, from copies of its rows. Runs on GPU workers with STRAIT_TEST_BACKEND=cuda.
"""
import json
import re
import signal
import threading

import pytest
from harness import BACKEND, ROOT, Daemons, strait, wait_until

SHAPE = "v2-lite"
MODEL = ROOT / "tests/golden" / SHAPE
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]
FORMAT = [] if BACKEND == "cpu" else ["--cache-format", "bf16"]
MEMORY = "256MiB" if BACKEND == "cpu" else "1GiB"
KEY = "operator-key-of-the-tests"
TOKENS = 1800  # long enough for what is done meanwhile
PROMPTS = sorted((p["tokens"] for p in json.loads((MODEL / "golden.json").read_text())["prompts"]), key=len)[-4:]


class Drained(Daemons):
    def __init__(self, key_file, pipelines, stages, spares=0, worker_args=()):
        key_file.write_text(KEY + "\n")
        key_file.chmod(0o600)
        self.key, self.spares = key_file, spares
        super().__init__(MODEL, pipelines=pipelines, stages=stages, random_weights=None, memory=MEMORY,
                         worker_args=[*FIXED, *worker_args],
                         coordinator_args=["--operator-key-file", str(key_file), *FORMAT])

    def __enter__(self):
        super().__enter__()
        for _ in range(self.spares):
            self.start_worker()
        wait_until(lambda: len(self.status()["workers"]) == self.pipelines * self.stages + self.spares, what="all workers")
        return self

    def drain(self, worker, *args):
        return strait("drain", worker, "--coordinator", self.base_url, "--operator-key-file", self.key, *args)

    def worker(self, index):
        """What status tells of one, by index of start; None: it is not attached."""
        return next((w for w in self.status()["workers"] if w["name"] == f"worker-{index}"), None)

    def wait_drained(self, index):
        # What status tells is of a moment ago.
        wait_until(lambda: self.worker(index)["state"] == "drained", what="the worker to be drained")
        assert self.worker(index)["stages"] == []

    def busy_worker(self):
        """One with sequences in its pipeline, by index."""
        def find():
            at = {s["pipeline_id"] for s in self.status()["sequences"]}
            return [i for i in range(len(self.workers)) if (w := self.worker(i)) and
                    any(s["pipeline_id"] in at for s in w["stages"])]
        wait_until(find, what="a worker with sequences")
        return find()[0]


class Streams:
    """One for each prompt, read side by side."""

    def __init__(self, cluster):
        self.out, self.errors = [([], []) for _ in PROMPTS], []

        def read(i, prompt):
            try:
                for event in cluster.stream(prompt=prompt, max_tokens=TOKENS, temperature=0.9, seed=5, logprobs=1,
                                            ignore_eos=True, return_token_ids=True):
                    assert "error" not in event, event
                    for choice in event.get("choices", []):
                        self.out[i][0].extend(choice.get("token_ids") or [])
                        self.out[i][1].extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
            except Exception as e:  # told by whoever joins
                self.errors.append(repr(e))

        self.threads = [threading.Thread(target=read, args=(i, p)) for i, p in enumerate(PROMPTS)]
        for t in self.threads:
            t.start()

    def wait_for(self, count):
        wait_until(lambda: min(len(ids) for ids, _ in self.out) >= count or self.errors, what=f"{count} tokens of each")

    def join(self):
        for t in self.threads:
            t.join(300)
        assert not self.errors, self.errors
        return self.out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Drained(tmp_path_factory.mktemp("key") / "key", 1, 1) as d:
        return Streams(d).join()


@pytest.mark.parametrize("stages", [1, 2])
def test_sequences_go_to_the_other_pipeline(tmp_path, undisturbed, stages):
    with Drained(tmp_path / "key", 2, stages) as d:
        streams = Streams(d)
        streams.wait_for(30)
        victim = d.busy_worker()
        name = f"worker-{victim}"
        dry = d.drain(name, "--dry-run")
        assert dry.returncode == 0 and "would move" in dry.stdout, dry.stdout + dry.stderr
        done = d.drain(name)
        assert done.returncode == 0, done.stderr
        told = re.match(rf"worker {name} is drained: (\d+) sequences? moved, \S+ \S*B, longest pause [\d.]+ ms, total [\d.]+ s$",
                        done.stdout)
        assert told and int(told[1]) > 0, done.stdout
        print("\n" + done.stdout)
        d.wait_drained(victim)
        assert streams.join() == undisturbed
        stats = d.fresh_status()["stats"]
        assert stats["recomputed_rows"] == 0 and stats["replayed_tokens"] == 0 and stats["migrations"] >= int(told[1])
        wait_until(lambda: d.active_pipelines() == 1 and not d.status()["drains"], what="one pipeline")
        # Another time it may have stages again.
        assert "may get stages again" in d.drain(d.worker(victim)["id"], "--undo").stdout
        d.wait_pipelines(2)
        wait_until(lambda: d.worker(victim)["state"] == "serving", what="the worker to serve")


def test_sigterm_drains_first(tmp_path, undisturbed):
    with Drained(tmp_path / "key", 2, 1) as d:
        streams = Streams(d)
        streams.wait_for(30)
        victim = d.busy_worker()
        d.workers[victim].send_signal(signal.SIGTERM)
        assert d.workers[victim].wait(60) == 0
        wait_until(lambda: d.worker(victim) is None, what="the worker to be gone")
        assert streams.join() == undisturbed
        stats = d.fresh_status()["stats"]
        assert stats["recomputed_rows"] == 0 and stats["replayed_tokens"] == 0 and stats["migrations"] > 0


def test_sigterm_of_the_only_worker_ends_it(tmp_path):
    with Drained(tmp_path / "key", 1, 1) as d:
        d.workers[0].send_signal(signal.SIGTERM)
        assert d.workers[0].wait(15) == 0


@pytest.mark.parametrize("victim_stage", [0, 1])
def test_a_spare_takes_the_place_and_the_rows(tmp_path, undisturbed, victim_stage):
    with Drained(tmp_path / "key", 1, 2, spares=1) as d:
        streams = Streams(d)
        streams.wait_for(100)
        victim = next(i for i in range(3) if any(s["stage_index"] == victim_stage for s in d.worker(i)["stages"]))
        before = d.status()["stats"]
        done = d.drain(f"worker-{victim}")
        assert done.returncode == 0, done.stderr
        print("\n" + done.stdout)
        assert "has other stages" in done.stdout and "computed again 0" in done.stdout, done.stdout
        d.wait_drained(victim)
        assert streams.join() == undisturbed
        after = d.status()["stats"]
        assert after["recoveries"] == before["recoveries"] and after["workers_lost"] == before["workers_lost"]
        assert after["recomputed_rows"] == before["recomputed_rows"]


def test_what_cannot_be_is_refused_and_all_goes_on(tmp_path, undisturbed):
    with Drained(tmp_path / "key", 1, 1) as d:
        streams = Streams(d)
        streams.wait_for(30)
        for args in ([], ["--dry-run"]):
            refused = d.drain("worker-0", *args)
            assert refused.returncode == 1 and "no other worker" in refused.stderr, refused.stderr
        assert d.drain("worker-7").returncode == 1
        wait_until(lambda: d.worker(0)["state"] == "serving", what="the worker to serve on")
        assert streams.join() == undisturbed
