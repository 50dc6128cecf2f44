# SPDX-License-Identifier: Apache-2.0
"""A worker dies and no spare comes: after --spare-wait the one that is left has both stages, with rows from copies where it
has them, and the client gets the same tokens. Copies are kept on another host where a worker tells one. Options out of bounds
are refused by name.
"""
import subprocess

import pytest
from harness import TINY, Daemons, clean_env, program, wait_until
from test_replicas import GPU, MODEL, Streams, undisturbed  # noqa: F401: a fixture


def daemons(*coordinator_args, memory="1GiB" if GPU else "256MiB"):
    return Daemons(MODEL, stages=2, random_weights=None, memory=memory,
                   worker_args=["--replica-memory", "64MiB"] + (["--deterministic"] if GPU else []),
                   coordinator_args=[*coordinator_args] + (["--cache-format", "bf16"] if GPU else []))


@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_takes_the_stage(undisturbed, victim):  # noqa: F811
    with daemons("--spare-wait", "1") as d:
        streams = Streams(d)
        streams.wait_for(100)
        wait_until(lambda: all(not s["unprotected"] for s in d.status()["sequences"]), what="copies of all rows")
        d.kill_worker(victim)
        assert streams.join() == undisturbed
        status = d.fresh_status()
        assert [len(w["stages"]) for w in status["workers"]] == [2]
        assert status["stats"]["restored_rows"] > 0


def test_copies_go_to_another_host(undisturbed):  # noqa: F811
    def buddies(d):
        return [s.get("buddy_on_other_host") for w in d.status()["workers"] for s in w["stages"]]

    with daemons() as d:
        streams = Streams(d)
        wait_until(lambda: buddies(d) == [False, False], what="buddies on the one host that there is")
        d.start_worker("--host-id", "elsewhere")
        wait_until(lambda: buddies(d) == [True, True], what="buddies elsewhere")
        assert sorted(w["host_id"] == "elsewhere" for w in d.status()["workers"]) == [False, False, True]
        assert streams.join() == undisturbed


@pytest.mark.parametrize("flag,value", [("--restore-timeout", "0"), ("--restore-timeout", "soon"), ("--replicate-rate", "-1"),
                                        ("--spare-wait", "-1"), ("--warm-spares", "-1"), ("--warm-spares", "many")])
def test_bad_values_are_refused_by_name(flag, value):
    run = subprocess.run([program("strait-coordinator"), "--model", str(TINY), f"{flag}={value}"], env=clean_env(),
                         capture_output=True, text=True, timeout=30)
    assert run.returncode != 0 and flag in run.stderr, run.stderr


def test_a_host_id_that_is_too_long_is_refused():
    run = subprocess.run([program("strait-worker"), "--model", str(TINY), "--coordinator", "127.0.0.1:1", "--host-id", "x" * 65],
                         env=clean_env(), capture_output=True, text=True, timeout=30)
    assert run.returncode != 0 and "--host-id" in run.stderr, run.stderr
