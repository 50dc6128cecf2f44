# SPDX-License-Identifier: Apache-2.0
"""A worker dies and a spare that holds its weights ready takes its place: it is told to load nothing, as its log shows, and the
client gets the same tokens. Its rows come from copies. The next spare is warmed in its stead. Without --warm-spares it loads.
"""
import pathlib
import re

import pytest
from harness import wait_until
from test_replicas import GPU, Copied, Streams, undisturbed  # noqa: F401: a fixture


class Warm(Copied):
    """One pipeline of two stages and two spares."""

    def __init__(self, warm):
        super().__init__()
        self.coordinator_args += ["--warm-spares", str(warm)]

    def __enter__(self):
        super().__enter__()
        self.start_worker()
        wait_until(lambda: len(self.status()["workers"]) == 4, what="the second spare")
        return self

    def loads(self, index):
        """Layer ranges that it was told to load, in order."""
        log = pathlib.Path(f"{self.dir}/worker-{index}.log").read_text()
        return [(int(a), int(b)) for a, b in re.findall(r"loading stage.*?layer_begin\D+(\d+).*?layer_end\D+(\d+)", log)]

    def warm(self):
        """By index of start: the ranges that are ready."""
        return {int(w["name"].split("-")[1]): sorted((r["layer_begin"], r["layer_end"]) for r in w["warm"] if r["state"] == "warm")
                for w in self.status()["workers"] if w.get("warm")}

    def index_of(self, stage):
        return next(i for i in range(4) if self.workers[i].poll() is None and self.stage_of(i) == stage)

    def ranges(self):
        return sorted((s["layer_begin"], s["layer_end"]) for s in self.status()["pipelines"][0]["stages"])


@pytest.mark.parametrize("stage", [0, 1])
def test_the_successor_reads_no_weights(undisturbed, stage):  # noqa: F811
    with Warm(1) as d:
        ranges = d.ranges()
        wait_until(lambda: list(d.warm().values()) == [ranges], what="a warm spare")
        spare = next(iter(d.warm()))
        streams = Streams(d)
        streams.wait_for(100)
        wait_until(lambda: all(not s["unprotected"] for s in d.status()["sequences"]), what="copies of all rows")
        loaded = d.loads(spare)
        assert sorted(loaded) == ranges
        d.kill_worker(d.index_of(stage))
        assert streams.join() == undisturbed
        assert d.index_of(stage) == spare and d.loads(spare) == loaded, "it was told to load again"
        stats = d.fresh_status()["stats"]
        assert stats["warm_stages_taken"] == 1 and stats["recoveries"] == 1
        assert stats["restored_rows"] > 0
        # The other spare takes over that duty, and the next death is as cheap.
        wait_until(lambda: list(d.warm().values()) == [ranges], what="the next warm spare")
        assert next(iter(d.warm())) != spare
        d.kill_worker(spare)
        wait_until(lambda: d.fresh_status()["stats"]["warm_stages_taken"] == 2, what="the second successor")
        assert Streams(d).join() == undisturbed


def test_without_warm_spares_it_loads(undisturbed):  # noqa: F811
    with Warm(0) as d:
        streams = Streams(d)
        streams.wait_for(100)
        assert d.warm() == {}
        d.kill_worker(d.index_of(0))
        assert streams.join() == undisturbed
        assert d.fresh_status()["stats"]["warm_stages_taken"] == 0
        assert len(d.loads(d.index_of(0))) == 1
