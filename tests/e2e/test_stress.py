# SPDX-License-Identifier: Apache-2.0
"""`strait stress` counts what it did to a cluster, finds nothing where tokens are what they should be, and says so and
fails where they are not. GPU workers with STRAIT_TEST_BACKEND=cuda.
"""
import json
import signal
import subprocess

from harness import BACKEND, TINY, Cluster, Daemons, alive, clean_env, free_port, program, strait, wait_until

FIXED = ["--backend", BACKEND] + ([] if BACKEND == "cpu" else ["--deterministic"])
MEMORY = "256MiB" if BACKEND == "cpu" else "1GiB"
LOAD = ["--clients", 3, "--requests", 6, "--max-rows", 600, "--output-tokens", 200]


def own(*args, **kw):
    return strait("stress", "--model", TINY, "--random-weights", 1, "--threads", 1, "--memory", MEMORY, "--http",
                  f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}", *FIXED, *LOAD, *args, **kw)


def test_deaths_stops_and_reshapes_of_its_own_cluster(tmp_path):
    path = tmp_path / "report.json"
    done = own("--pipelines", 2, "--stages", 1, "--seconds", 12, "--movers", 0, "--kill-every", 4, "--stop-every", 2,
               "--reshape-every", 2, "--drain-every", 3, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["violations"] == 0 and report["violation_texts"] == []
    assert report["sequences"] >= report["streams"] > 0
    assert report["worker_deaths"] > 0 and report["worker_stops"] > 0
    assert report["workers_lost"] >= report["worker_deaths"]
    assert report["reshapes"] + sum(report["failed_reshapes"].values()) > 0
    assert report["recomputed_tokens"] > 0
    assert report["drains"] + sum(report["failed_drains"].values()) > 0
    assert report["migrations"] == 0 and "migration" in report["skipped_faults"]
    assert {"partition", "join", "leave", "bandwidth limit", "coordinator stop"} <= set(report["skipped_faults"])
    assert set(report["pause_ms"]) >= {"p50", "p99", "max"}
    assert "violations" in done.stdout and "not done: migration" in done.stdout


def test_links_that_part_and_slow_and_workers_that_come_and_go(tmp_path):
    path = tmp_path / "report.json"
    done = own("--pipelines", 2, "--stages", 1, "--spares", 1, "--replica-memory", "64MiB", "--seconds", 12, "--move-every", 0.1,
               "--partition-every", 2, "--slow-every", 2, "--slow-rate", 200_000, "--join-every", 2, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["violations"] == 0, report["violation_texts"]
    for kind in ("partitions", "bandwidth_limits", "joins", "leaves", "migrations"):
        assert report[kind] > 0, (kind, report)
    assert report["skipped_faults"] == ["death", "stop", "coordinator stop", "reshape", "drain"]
    # Rows went by gRPC, through links, and by shared memory, where both workers have it.
    assert 0 < report["moved_bytes"] and report["migrated_shared_bytes"] < report["moved_bytes"]
    assert sum(bar["count"] for bar in report["move_rows_histogram"]) == report["migrations"] == len(report["moves"])
    assert sum(report["timeline"]["join"]) == report["joins"]
    assert 0 < report["protected_share"] <= 1


def test_an_acceptance_run_that_is_too_short_fails_and_says_what_it_lacks(tmp_path):
    path = tmp_path / "report.json"
    done = own("--pipelines", 2, "--stages", 1, "--acceptance", "--seconds", 2, "--json", path)
    assert done.returncode == 1
    report = json.loads(path.read_text())
    assert report["violations"] == 0, report["violation_texts"]
    for text in ("seconds: ", "migrations: ", "worker_deaths: ", "reshapes: ", "skipped: coordinator stop"):
        assert any(missed.startswith(text) for missed in report["missed"]), (text, report["missed"])
        assert f"acceptance: {text}" in done.stderr


def test_moves_of_its_own_cluster(tmp_path):
    path = tmp_path / "report.json"
    done = own("--pipelines", 2, "--stages", 2, "--migrations", 10, "--seconds", 60, "--move-every", 0.05, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["migrations"] >= 10 and report["violations"] == 0, report
    assert report["replaying_migrations"] == 0 and report["recomputed_tokens"] == 0, report
    assert report["moved_bytes"] > 0 and report["pause_ms"]["count"] > 0
    assert "migration" not in report["skipped_faults"]


def test_a_cluster_that_breaks_streams_fails():
    with Daemons(TINY, pipelines=1, stages=1, memory=MEMORY, coordinator_args=["--no-pipeline-grace", "0.2"]) as daemons:
        stress = subprocess.Popen([program("strait"), "stress", "--url", daemons.base_url, "--movers", "0", "--seconds", "8",
                                   *map(str, LOAD), "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  stdin=subprocess.DEVNULL, env=clean_env())
        wait_until(lambda: daemons.status()["stats"]["sequences_ended"]["length"] > 8, what="more than the references")
        daemons.kill_worker(0)
        out, err = stress.communicate(timeout=120)
    assert stress.returncode == 1, err
    report = json.loads(out)
    assert report["violations"] > 0 and "violation: " in err
    assert len(report["violation_texts"]) <= 20 and any("HTTP 503" in t or "broken" in t for t in report["violation_texts"])


def test_what_makes_no_sense_is_told_before_anything_is_disturbed(tmp_path):
    for args, says in ((["--kill-every", 1], "--kill-every is for a cluster of its own"),
                       (["--partition-every", 1], "--partition-every is for a cluster of its own"),
                       (["--acceptance"], "--acceptance needs a cluster of its own"),
                       (["--model", "/none"], "is no folder"),
                       (["--model", TINY, "--workers", 3, "--stages", 2], "leave --workers out")):
        done = strait("stress", *args)
        assert done.returncode == 1 and says in done.stderr, done.stderr
    nobody = strait("stress", "--url", f"127.0.0.1:{free_port()}")
    assert nobody.returncode == 1 and "No server at" in nobody.stderr
    with Cluster(workers=2, pipelines=2, memory=MEMORY) as cluster:
        for args, says in ((["--max-rows", 10_000_000], "the model's context"), (["--min-rows", 99, "--max-rows", 98], "--min-rows 99")):
            done = strait("stress", "--url", cluster.base_url, *args)
            assert done.returncode == 1 and says in done.stderr, done.stderr
        done = strait("stress", "--url", cluster.base_url, env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)})
        assert done.returncode == 1 and "needs the operator key" in done.stderr, done.stderr
        assert cluster.status()["stats"]["requests_refused"] == 0


def test_interrupted_stress_leaves_no_process():
    stress = subprocess.Popen([program("strait"), "stress", "--model", str(TINY), "--random-weights", "1", "--threads", "1",
                               "--memory", MEMORY, "--http", f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}",
                               *FIXED, *map(str, LOAD), "--stop-every", "0.5"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env=clean_env())
    children = f"/proc/{stress.pid}/task/{stress.pid}/children"
    pids = wait_until(lambda: (lambda found: len(found) == 5 and found)(open(children).read().split()), what="the daemons")
    lines = []
    for line in stress.stderr:
        lines.append(line)
        if "streams" in line:
            break
    stress.send_signal(signal.SIGINT)
    stress.communicate(timeout=60)
    assert stress.returncode == 130, lines
    assert not any(alive(int(pid)) for pid in pids)
