# SPDX-License-Identifier: Apache-2.0
"""A worker dies, and its sequences go on from copies of their rows that other workers keep: the same tokens and
log-probabilities, to the last bit, and at most 127 rows of a sequence computed again, whichever stage died and whether
prefix blocks are shared. Without memory for copies all rows are replayed. Prints what each death cost.
"""
import json
import pathlib
import re
import time

import pytest
from harness import BACKEND, ROOT, ROW_TRANSPORT, Daemons, expect_rows_went, wait_until

SHAPE = "v2-lite"
MODEL = ROOT / "tests/golden" / SHAPE
GPU = BACKEND != "cpu"
MOST_ROWS = 127  # a tail, and a block whose copy was on its way
PROMPTS = sorted((p["tokens"] for p in json.loads((MODEL / "golden.json").read_text())["prompts"]), key=len)[-3:]


class Copied(Daemons):
    """One pipeline of two stages and a spare; each worker keeps copies of others' rows."""

    def __init__(self, memory="64MiB", prefix_cache="on"):
        args = ["--replica-memory", memory] + (["--deterministic"] if GPU else [])
        super().__init__(MODEL, stages=2, random_weights=None, memory="1GiB" if GPU else "256MiB", worker_args=args,
                         coordinator_args=["--prefix-cache", prefix_cache] + (["--cache-format", "bf16"] if GPU else []))

    def __enter__(self):
        super().__enter__()
        self.start_worker()
        wait_until(lambda: len(self.status()["workers"]) == 3, what="the spare")
        return self

    def stage_of(self, index):
        """Where in the pipeline the worker with this index of start is; None: it is the spare."""
        name = f"worker-{index}"
        worker = next(w for w in self.status()["workers"] if w["name"] == name)
        return worker["stages"][0]["stage_index"] if worker["stages"] else None


def body(prompt, tokens=1000 if not GPU else 1800):
    return dict(prompt=prompt, max_tokens=tokens, temperature=0.9, seed=5, logprobs=1, ignore_eos=True, return_token_ids=True)


class Streams:
    """One for each prompt, read side by side."""

    def __init__(self, cluster, tokens=1000 if not GPU else 1800):
        import threading
        self.out = [([], [], []) for _ in PROMPTS]
        self.errors = []

        def read(i, prompt):
            try:
                for event in cluster.stream(**body(prompt, tokens)):
                    for choice in event.get("choices", []):
                        ids = choice.get("token_ids") or []
                        self.out[i][0].extend(ids)
                        self.out[i][1].extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
                        self.out[i][2].extend([time.monotonic()] * len(ids))
            except Exception as e:  # told by whoever joins
                self.errors.append(repr(e))

        self.threads = [threading.Thread(target=read, args=(i, p)) for i, p in enumerate(PROMPTS)]
        for t in self.threads:
            t.start()

    def wait_for(self, count):
        wait_until(lambda: min(len(ids) for ids, _, _ in self.out) >= count or self.errors, what=f"{count} tokens of each")

    def join(self):
        for t in self.threads:
            t.join(180)
        assert not self.errors, self.errors
        return [(ids, logprobs) for ids, logprobs, _ in self.out]

    def longest_gap(self):
        return max(b - a for _, _, times in self.out for a, b in zip(times, times[1:]))


@pytest.fixture(scope="module")
def undisturbed():
    with Daemons(MODEL, stages=2, random_weights=None, memory="1GiB" if GPU else "256MiB",
                 worker_args=["--deterministic"] if GPU else [],
                 coordinator_args=["--cache-format", "bf16"] if GPU else []) as d:
        return Streams(d).join()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("prefix_cache", ["on", "off"])
def test_a_death_costs_a_tail_and_a_block(undisturbed, victim, prefix_cache):
    with Copied(prefix_cache=prefix_cache) as d:
        streams = Streams(d)
        streams.wait_for(100)
        wait_until(lambda: all(not s["unprotected"] for s in d.status()["sequences"]), what="copies of all rows")
        before = d.fresh_status()["stats"]
        d.kill_worker(next(i for i in (0, 1) if d.stage_of(i) == victim))
        assert streams.join() == undisturbed
        after = d.fresh_status()["stats"]
        stages = 2
        computed = after["recomputed_rows"] - before["recomputed_rows"]
        restored = after["restored_rows"] - before["restored_rows"]
        print(f"\nstage {victim} died: {restored} rows restored, {computed} computed again (each for every stage), "
              f"longest gap {streams.longest_gap():.2f} s")
        assert after["workers_lost"] == before["workers_lost"] + 1 and after["recoveries"] == before["recoveries"] + 1
        assert computed <= MOST_ROWS * stages * len(PROMPTS)
        assert restored >= sum(len(p) for p in PROMPTS) - 64 * len(PROMPTS)
        expect_rows_went(before, dict.fromkeys(before, 0), "replicated")
        # What the spare began with came the same way.
        log = (pathlib.Path(d.log_dir) / "worker-2.log").read_text()
        fetched, shared = map(int, re.findall(r"rows restored .*fetched_bytes=(\d+) shared_bytes=(\d+)", log)[-1])
        assert fetched > 0 and shared == (fetched if ROW_TRANSPORT == "auto" else 0), log
        assert after["protected_us"] > 0.8 * after["decoding_us"] > 0


def test_without_memory_for_copies_all_is_replayed(undisturbed):
    with Copied(memory="0") as d:
        streams = Streams(d)
        streams.wait_for(100)
        assert all(s["unprotected"] for s in d.status()["sequences"])
        d.kill_worker(0)
        assert streams.join() == undisturbed
        stats = d.fresh_status()["stats"]
        assert stats["restored_rows"] == 0 and stats["recomputed_rows"] > MOST_ROWS * len(PROMPTS)


def test_little_memory_protects_what_it_can(undisturbed):
    # Room for a few blocks of each stage.
    with Copied(memory="192KiB") as d:
        streams = Streams(d)
        streams.wait_for(100)
        wait_until(lambda: d.status()["stats"]["replicas_refused"] > 0, what="memory for copies to be full")
        d.kill_worker(1)
        assert streams.join() == undisturbed
