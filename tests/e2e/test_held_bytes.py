# SPDX-License-Identifier: Apache-2.0
"""What a sequence holds is what proto/model/reservation.h says: in every layer of every stage ceil(rows / 64) blocks, to the
byte, at any length, and nothing when it is gone.

The second of two workers is stopped for a moment, so that rows are planned and stay as they are while status is read. That
workers hold the same is asserted by the coordinator at every step: a sequence that ends well says so.
"""
import contextlib
import json
import os
import signal
import threading
import time

import pytest
from harness import BACKEND, TINY, Daemons, wait_until

BLOCK_ROWS = 64
CONFIG = json.loads((TINY / "config.json").read_text())
LAYERS = CONFIG["num_hidden_layers"]
# A whole prompt is one step, so that it is planned at once. A worker that is stopped for a moment is not lost.
STEP = ["--max-step-tokens", "8192", "--prefill-chunk", "8192", "--heartbeat-timeout", "60", "--prefix-cache", "off"]


def tokens(count):
    return [(i * 7 + 3) % 500 for i in range(count)]


def stages(cluster):
    """Of the one pipeline, by index."""
    found = {s["stage_index"]: s for w in cluster.status()["workers"] for s in w["stages"]}
    return [found[i] for i in sorted(found)]


def blocks_by_layer(cluster):
    """Blocks that each layer of the model holds; checks that status agrees with itself."""
    held = {}
    for stage in stages(cluster):
        layers = stage["cache_bytes_by_layer"]
        assert [one["layer"] for one in layers] == list(range(stage["layer_begin"], stage["layer_end"]))
        assert sum(one["cache_bytes"] for one in layers) == stage["cache_bytes_used"]
        assert stage["cache_bytes_used"] <= stage["cache_bytes_reserved"] <= stage["cache_bytes_total"]
        for one in layers:
            assert one["cache_bytes"] % stage["block_bytes"] == 0
            held[one["layer"]] = one["cache_bytes"] // stage["block_bytes"]
    assert sorted(held) == list(range(LAYERS))
    return [held[layer] for layer in range(LAYERS)]


def blocks_of(rows):
    return [(rows + BLOCK_ROWS - 1) // BLOCK_ROWS] * LAYERS


@contextlib.contextmanager
def stopped(worker):
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def cluster():
    with Daemons(TINY, stages=2, coordinator_args=STEP, memory="2GiB" if BACKEND != "cpu" else "1GiB") as daemons:
        yield daemons


@pytest.fixture(scope="module")
def last(cluster):
    """The process of the last stage."""
    name = next(w["name"] for w in cluster.status()["workers"] if w["stages"][0]["stage_index"] == 1)
    return cluster.workers[int(name.rsplit("-", 1)[1])]


class Stream:
    def __init__(self, cluster, prompt, max_tokens):
        self.received = 0
        self.errors = []
        self.finish_reason = None

        def read():
            try:
                for event in cluster.stream(model=cluster.model_name(), prompt=prompt, max_tokens=max_tokens, temperature=0,
                                            ignore_eos=True, return_token_ids=True):
                    for choice in event.get("choices", []):
                        self.received += len(choice.get("token_ids") or [])
                        self.finish_reason = choice.get("finish_reason") or self.finish_reason
            except Exception as e:  # told by whoever joins
                self.errors.append(repr(e))

        self.thread = threading.Thread(target=read)
        self.thread.start()

    def join(self):
        self.thread.join(180)
        assert not self.thread.is_alive() and not self.errors, self.errors
        assert self.finish_reason == "length"


def settle(read, times=5):
    """What read() says when it says the same several times."""
    seen = []

    def same():
        seen.append(read())
        time.sleep(0.02)
        return len(seen) >= times and all(one == seen[-1] for one in seen[-times:])

    wait_until(same, what="a state that stays")
    return seen[-1]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 8000])
def test_a_prompt_holds_what_its_rows_cost(cluster, last, rows):
    assert blocks_by_layer(cluster) == blocks_of(0)
    with stopped(last):
        stream = Stream(cluster, tokens(rows), max_tokens=1)
        wait_until(lambda: blocks_by_layer(cluster) != blocks_of(0) or stream.errors, what="the prompt's step")
        assert settle(lambda: blocks_by_layer(cluster)) == blocks_of(rows)
    stream.join()
    wait_until(lambda: blocks_by_layer(cluster) == blocks_of(0), what="that nothing is held any more")


def test_two_sequences_hold_what_both_cost(cluster, last):
    with stopped(last):
        streams = [Stream(cluster, tokens(rows), max_tokens=1) for rows in (65, 300)]
        both = [a + b for a, b in zip(blocks_of(65), blocks_of(300))]
        wait_until(lambda: blocks_by_layer(cluster) == both, what="both prompts' steps")
    for stream in streams:
        stream.join()
    wait_until(lambda: blocks_by_layer(cluster) == blocks_of(0), what="that nothing is held any more")


def test_a_sequence_that_grows_holds_what_its_rows_cost(cluster, last):
    prompt = 50
    stream = Stream(cluster, tokens(prompt), max_tokens=1500)
    seen = set()
    for count in (1, 10, 20, 70, 130, 200):
        wait_until(lambda: stream.received >= count or stream.errors, what=f"{count} tokens")
        with stopped(last):
            blocks, received = settle(lambda: (blocks_by_layer(cluster), stream.received))
        # The last token received is a row if it was planned, and so may be those that are granted behind it.
        least = prompt + received - 1
        assert blocks in [blocks_of(least + more) for more in range(4)], (blocks, received)
        seen.add(blocks[0])
    stream.join()
    assert len(seen) >= 3, seen
    wait_until(lambda: blocks_by_layer(cluster) == blocks_of(0), what="that nothing is held any more")
