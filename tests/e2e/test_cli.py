# SPDX-License-Identifier: Apache-2.0
"""Defends: each verb of `strait` does what its --help says, on real processes; nothing survives `strait up`."""
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

from harness import BIN, TINY, Cluster, Daemons, alive, clean_env, free_port, listening, program, strait, wait_until


@pytest.fixture(scope="module")
def cluster():
    with Cluster(workers=2) as c:
        yield c


# ---------------------------------------------------------------- up


def test_ready_line_is_one_and_tells_the_urls(cluster):
    lines = cluster.stdout().splitlines()
    assert len(lines) == 1, lines
    assert re.match(r"ready: http://127\.0\.0\.1:\d+ ", lines[0])
    assert cluster.ready()
    assert len(cluster.workers()) == 2


def test_workers_not_divisible_by_pipelines_is_refused_with_the_fix():
    done = strait("up", "--model", TINY, "--workers", 3, "--pipelines", 2)
    assert done.returncode == 1
    assert "--workers 3" in done.stderr and "--workers 2 or 4" in done.stderr


def test_fp8_cache_rows_without_a_gpu_are_refused_with_the_fix():
    """By strait up, before it starts anything; by a worker that was started by hand."""
    for args, env in ((["--cache-format", "fp8"], {}), ([], {"STRAIT_CACHE_FORMAT": "fp8"})):
        done = strait("up", "--model", TINY, "--random-weights", 1, *args, env=env)
        assert done.returncode == 1
        assert "--cache-format fp8 needs --backend cuda" in done.stderr and "bf16" in done.stderr
    worker = subprocess.run([program("strait-worker"), "--model", str(TINY), "--random-weights", "1", "--cache-format",
                             "fp8"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=clean_env())
    assert worker.returncode == 1
    assert "--cache-format fp8 needs --backend cuda" in worker.stdout + worker.stderr


def test_a_cpu_worker_of_a_cluster_with_fp8_rows_is_refused_with_the_fix():
    with Daemons(TINY, stages=1, coordinator_args=["--cache-format", "fp8"], worker_args=["--cache-format", "bf16"],
                 wait=False) as daemons:
        told = wait_until(lambda: re.search(r"stores cache rows of.*", daemons.logs()), what="the refusal")
        assert "--cache-format (fp8 is for GPU workers alone)" in told.group(0), told.group(0)
        assert daemons.active_pipelines() == 0


def test_bad_model_folder_is_refused_by_name(tmp_path):
    done = strait("up", "--model", tmp_path)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "config.json" in done.stderr


def test_broken_config_ends_with_the_daemons_last_words(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = strait("up", "--model", tmp_path, "--http", f"127.0.0.1:{free_port()}", "--grpc",
                  f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "llama" in done.stderr or "architectures" in done.stderr, done.stderr
    assert "ready" not in done.stdout


def test_missing_weights_stop_the_crash_loop_with_the_log(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    done = strait("up", "--model", tmp_path, "--http", f"127.0.0.1:{free_port()}", "--grpc",
                  f"127.0.0.1:{free_port()}")  # no --random-weights and no safetensors
    assert done.returncode == 1
    assert "safetensors" in done.stderr, done.stderr


def test_port_given_and_taken_is_an_error_not_a_move():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = strait("up", "--model", TINY, "--random-weights", 1, "--http", f"127.0.0.1:{s.getsockname()[1]}")
    assert done.returncode == 1
    assert "cannot be listened on" in done.stderr


def test_default_ports_taken_move_and_are_printed():
    taken = []
    try:
        for port in (7000, 8000):
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
                s.listen()
            except OSError:
                s.close()  # somebody else has it already: just as good
                continue
            taken.append(s)
        with Cluster(workers=1, http="", grpc="") as c:
            assert not c.base_url.endswith(":8000")
            assert "Port 8000 is taken" in c.stderr() and "Port 7000 is taken" in c.stderr()
            assert c.ready()
    finally:
        for s in taken:
            s.close()


def test_api_keys_are_not_seen_in_a_daemons_command_line():
    # Regression: they were handed on as flags, which every user of the machine can list.
    with Cluster(workers=1, args=["--api-key", "sesame", "--api-key", "mustard"]) as c:
        for pid in c.daemons():
            argv = open(f"/proc/{pid}/cmdline", "rb").read()
            assert b"sesame" not in argv and b"mustard" not in argv, argv
        for key, good in (("sesame", True), ("mustard", True), ("pepper", False)):
            done = strait("generate", "x", "--url", c.base_url, "--max-tokens", 1, env={"STRAIT_API_KEY": key})
            assert (done.returncode == 0) == good, done.stderr


def test_the_operator_key_is_its_owners_alone_is_told_to_nobody_and_goes_with_up():
    with Cluster(workers=1) as c:
        path = c.key_file()
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
        key = path.read_text().strip()
        assert len(key) == 64
        for pid in c.daemons() + [c.process.pid]:
            for file in ("cmdline", "environ"):
                assert key.encode() not in pathlib.Path(f"/proc/{pid}/{file}").read_bytes()
        assert key not in c.stdout() + c.stderr() + c.logs(10_000)
        for headers, status in (({}, 403), ({"Authorization": "Bearer " + key[:-1] + "x"}, 401), (c.as_operator(), 400)):
            reply = c.post("/strait/migrate", {"sequence": "1"}, headers=headers)  # to nowhere
            assert reply.status_code == status, reply.text
        c.interrupt()
        assert not path.exists()


def test_an_operator_key_of_ones_own(tmp_path):
    path = tmp_path / "key"
    path.write_text("a-key-of-my-own-choice\n")
    path.chmod(0o640)
    refused = strait("scale", "--stages", 1, "--operator-key-file", path)
    assert refused.returncode == 1 and f"chmod 600 {path}" in refused.stderr, refused.stderr
    up = strait("up", "--model", TINY, "--random-weights", 1, "--workers", 1, "--operator-key-file", path, "--http",
                f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}")
    assert up.returncode == 1 and f"chmod 600 {path}" in up.stdout + up.stderr, up.stderr
    path.chmod(0o600)
    with Cluster(workers=1, args=["--operator-key-file", path]) as c:
        assert not c.key_file().exists()
        for args, good in ((["--operator-key-file", path], True), ([], False)):
            done = strait("scale", "--stages", 1, "--url", c.base_url, *args)
            assert ("needs the operator key" in done.stderr) != good, done.stderr
    assert path.exists()
    same = Cluster(workers=1, args=["--operator-key-file", path, "--api-key", "a-key-of-my-own-choice"]).start()
    try:
        assert same.process.wait(60) == 1
        assert "is an --api-key, too" in same.stderr() + same.logs()
    finally:
        same.stop()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_leaves_no_process_and_exits_0(sig):
    with Cluster(workers=2) as c:
        code, pids = c.interrupt(sig)
        assert code == 0, c.stderr()
        assert len(pids) == 3
        assert not any(alive(p) for p in pids)


def test_killed_up_leaves_no_process():
    with Cluster(workers=2) as c:
        pids = c.daemons()
        assert len(pids) == 3
        c.process.kill()
        c.process.wait()
        wait_until(lambda: not any(alive(p) for p in pids), what="the daemons' end")


def test_interrupt_while_loading_stops_too():
    c = Cluster(workers=2)
    try:
        c.start()
        wait_until(lambda: c.daemons(), what="first daemon")
        code, pids = c.interrupt(signal.SIGINT)
        assert code == 0, c.stderr()
        assert not any(alive(p) for p in pids)
        assert c.stdout() == ""
    finally:
        c.stop()


def test_coordinator_death_stops_everything_with_an_error():
    with Cluster(workers=2) as c:
        pids = c.daemons()
        os.kill(c.coordinator(), signal.SIGKILL)
        assert c.process.wait(60) == 1
        assert "coordinator ended with signal 9" in c.stderr()
        assert not any(alive(p) for p in pids)


def test_killed_worker_is_restarted_and_a_running_stream_goes_on():
    prompt = list(range(10, 40))
    with Cluster(workers=2) as c:
        whole = c.complete(prompt=prompt, max_tokens=200, temperature=0, ignore_eos=True, return_token_ids=True)
        expected = whole["choices"][0]["token_ids"]
        assert len(expected) == 200
        before = c.workers()
        got = []
        for event in c.stream(prompt=prompt, max_tokens=200, temperature=0, ignore_eos=True,
                              return_token_ids=True):
            if event["choices"]:
                got += event["choices"][0].get("token_ids") or []
            if len(got) >= 20 and before:
                os.kill(before.pop(), signal.SIGKILL)
                before = []
        assert got == expected, "tokens changed, were lost or doubled over a worker's death"
        assert re.search(r"worker-\d ended \(signal 9", c.stderr())
        assert re.search(r"worker-\d restarted", c.stderr())
        wait_until(lambda: "Serving again." in c.stderr(), what="Serving again.")
        assert c.ready()
        assert len(c.stdout().splitlines()) == 1


# ---------------------------------------------------------------- generate


def test_generate_streams_text_and_figures(cluster):
    done = strait("generate", "The strait between", "--url", cluster.base_url, "--max-tokens", 12,
                  "--temperature", 1, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"\[\d+ tokens, first after .* tokens/s; prompt \d+; ended by (length|stop)\]", done.stderr)
    again = strait("generate", "The strait between", "--url", cluster.base_url, "--max-tokens", 12,
                   "--temperature", 1, "--seed", 3, "-q")
    assert again.stdout == done.stdout
    assert again.stderr == ""


def test_generate_chat_and_environment(cluster):
    done = strait("generate", "Hello", "--chat", "--system", "Be brief.", "--max-tokens", 5, "--seed", 1,
                  env={"STRAIT_URL": cluster.base_url})
    assert done.returncode == 0, done.stderr


def test_generate_passes_a_server_error_on(cluster):
    done = strait("generate", "x", "--url", cluster.base_url, "--max-tokens", 10_000_000)
    assert done.returncode == 1
    assert "HTTP 400" in done.stderr and "context" in done.stderr


def test_unreachable_server_says_what_to_start():
    done = strait("generate", "x", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "strait up --model" in done.stderr


def test_grpc_port_is_recognized(cluster):
    grpc = re.search(r"workers join at (\S+);", cluster.stdout()).group(1)
    done = strait("status", "--coordinator", grpc)
    assert done.returncode == 1
    assert "gRPC port" in done.stderr


def test_interrupted_generate_cancels_the_request(cluster):
    p = subprocess.Popen([program("strait"), "generate", "long", "--url", cluster.base_url, "--max-tokens", "15000",
                          "--temperature", "1", "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env())
    wait_until(lambda: cluster.status()["running"] > 0, what="the request to run")
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130, err
    wait_until(lambda: cluster.status()["running"] == 0, timeout_s=30, what="the request's end at the server")


# ---------------------------------------------------------------- status


def test_status_table_and_json(cluster):
    done = strait("status", "--url", cluster.base_url)
    assert done.returncode == 0, done.stderr
    assert "worker-1" in done.stdout and "worker-2" in done.stdout
    layers = json.loads((TINY / "config.json").read_text())["num_hidden_layers"]
    assert re.search(rf"\b\d+-{layers - 1}\b", done.stdout), done.stdout
    assert "active" in done.stdout
    status = json.loads(strait("status", "--json", "--url", cluster.base_url).stdout)
    assert status["ready"] is True
    assert {w["name"] for w in status["workers"]} == {"worker-1", "worker-2"}
    ranges = sorted((s["layer_begin"], s["layer_end"]) for w in status["workers"] for s in w["stages"])
    assert ranges[0][0] == 0 and ranges[-1][1] == layers and ranges[0][1] == ranges[1][0]
    for worker in status["workers"]:  # all that a stage takes, within what the worker has
        parts = [worker["stages"][0][part] for part in ("weight_bytes", "cache_bytes_total", "workspace_bytes")]
        assert min(parts) > 0 and sum(parts) <= worker["memory_bytes"], worker
        assert worker["stages"][0]["edge_bytes"] == 0, "edges of CPU workers take none of it"


def test_status_watch_ends_on_interrupt(cluster):
    p = subprocess.Popen([program("strait"), "status", "--watch", "--interval", "0.2", "--url", cluster.base_url],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env())
    assert p.stdout.readline()
    time.sleep(0.5)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=30)
    assert p.returncode == 0
    assert out.count("sequences:") >= 1


# ---------------------------------------------------------------- migrate, scale


def test_interrupted_migrate_detaches_and_says_so():
    with listening() as port:
        p = subprocess.Popen([program("strait"), "migrate", "1", "--to", "2", "--url", f"127.0.0.1:{port}"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env())
        time.sleep(0.5)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=30)
        assert p.returncode == 130 and out == "", err
        assert "detached" in err and "goes on" in err


def test_verbs_say_what_they_need(cluster):
    for args, says in ((["migrate"], "sequence is required"), (["migrate", "1"], "--to is required"),
                       (["migrate", "1", "--to", "0"], "--to"), (["scale"], "--stages is required")):
        done = strait(*args)
        assert done.returncode not in (0, 1, 130) and says in done.stderr, done.stderr
    none = strait("migrate", 1, "--to", 2, "--url", f"127.0.0.1:{free_port()}")
    assert none.returncode == 1 and "strait up --model" in none.stderr
    grpc = re.search(r"workers join at (\S+);", cluster.stdout()).group(1)
    for verb in (["migrate", 1, "--to", 2], ["scale", "--stages", 2]):
        done = strait(*verb, "--coordinator", grpc)
        assert done.returncode == 1 and "gRPC port" in done.stderr, done.stderr


# ---------------------------------------------------------------- bench


def test_bench_against_a_server(cluster, tmp_path):
    path = tmp_path / "bench.json"
    done = strait("bench", "--url", cluster.base_url, "--concurrency", "1,3", "--prompt-tokens", 20,
                  "--output-tokens", 8, "--requests", 6, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["prompt"] == "token ids"
    assert [r["concurrency"] for r in report["runs"]] == [1, 3]
    for run in report["runs"]:
        assert run["succeeded"] == 6 and run["failed"] == 0 and run["errors"] == {}
        assert run["prompt_tokens"] == 6 * 20 and run["output_tokens"] == 6 * 8
        assert run["short_outputs"] == 0
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p90"] <= run["ttft_ms"]["p99"] <= run["ttft_ms"]["max"]
        assert run["tpot_ms"]["p50"] > 0
    assert len(done.stdout.splitlines()) == 3


def test_bench_starts_and_stops_its_own_cluster(tmp_path):
    done = strait("bench", "--model", TINY, "--random-weights", 1, "--workers", 1, "--memory", "1GiB", "--http",
                  f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}", "--prompt-tokens", 16,
                  "--output-tokens", 4, "--requests", 4, "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["runs"][0]["succeeded"] == 4
    assert report["cluster"]["workers"] == 1
    left = subprocess.run(["pgrep", "-f", f"{BIN}/strait-(coordinator|worker).*{report['url'][7:]}"],
                          capture_output=True, text=True)
    assert left.stdout == ""


def test_bench_counts_and_shows_errors(cluster):
    # Longer than the context: every request is refused, and nothing pretends otherwise.
    done = strait("bench", "--url", cluster.base_url, "--prompt-tokens", 100_000, "--requests", 2)
    assert done.returncode == 1
    assert "context" in done.stderr


def test_bench_of_nothing_says_so():
    done = strait("bench", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "strait up" in done.stderr


def test_help_and_version():
    assert strait("--version").returncode == 0
    out = strait("--help")
    assert out.returncode == 0
    for verb in ("up", "generate", "status", "migrate", "scale", "bench", "eval"):
        assert verb in out.stdout
        assert strait(verb, "--help").returncode == 0
    assert strait("bogus").returncode != 0


def test_a_gpu_that_is_not_there_is_told_in_a_sentence():
    """Whatever this build and this machine lack first: CUDA in the build, a driver, a GPU, a hundredth one."""
    reply = strait("up", "--model", TINY, "--random-weights", 1, "--workers", 1, "--backend", "cuda", "--gpu", 99,
                   "--http", f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}")
    assert reply.returncode not in (0, None)
    text = reply.stdout + reply.stderr
    assert "--backend cuda: " in text, text
    assert any(why in text for why in ("has no CUDA backend", "no NVIDIA driver", "no NVIDIA GPU", "no GPU 99")), text


@pytest.mark.parametrize("gpus, workers, dealt, shares", [
    ("0,1", 2, ["0", "1"], [0.9, 0.9]),  # one each: NCCL finds its own way between them
    ("2,0", 3, ["2", "0", "2"], [0.45, 0.9, 0.45]),
    (None, 2, ["0", "0"], [0.45, 0.45]),
    ("0,1", None, ["0", "1"], [0.9, 0.9]),  # as many workers as GPUs
    (None, None, ["0"], [0.9]),
])
def test_up_deals_workers_over_the_gpus_named(tmp_path, gpus, workers, dealt, shares):
    """With a stand-in for the worker, which writes down how it was called and ends."""
    for name in ("strait", "strait-coordinator"):
        shutil.copy(BIN / name, tmp_path)
    stand_in = tmp_path / "strait-worker"
    stand_in.write_text(f"#!/bin/bash\nprintf '%s ' \"$@\" \"${{NCCL_HOSTID-}}\" >{tmp_path}/half.$$\nmv {tmp_path}/half.$$ {tmp_path}/called.$$\nexit 3\n")
    stand_in.chmod(0o755)
    args = (["--gpu", gpus] if gpus else []) + (["--workers", str(workers)] if workers else [])
    reply = subprocess.run([tmp_path / "strait", "up", "--model", TINY, "--random-weights", "1", "--backend", "cuda",
                            *args, "--http", f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}"],
                           capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert reply.returncode == 1, reply.stderr
    calls = {}
    for file in tmp_path.glob("called.*"):
        words = file.read_text().split(" ")
        flag = lambda name: words[words.index(name) + 1]
        calls[flag("--name")] = (flag("--gpu"), float(flag("--gpu-memory-share")), "strait-" in file.read_text().split("--gpu-memory-share")[1])
    shared = len(dealt) > (len(gpus.split(",")) if gpus else 1)
    assert calls == {f"worker-{i + 1}": (gpu, shares[i], shared) for i, gpu in enumerate(dealt)}


@pytest.mark.parametrize("args, says", [
    (("--backend", "cuda", "--gpu", "1,0,1"), "--gpu names GPU 1 twice"),
    (("--gpu", "0"), "needs --backend cuda"),
    (("--backend", "cuda", "--gpu", "0,1,2", "--workers", 2), "--gpu names 3 GPUs, --workers is 2"),
])
def test_gpus_that_make_no_sense_are_told_in_a_sentence(args, says):
    reply = strait("up", "--model", TINY, "--random-weights", 1, *args)
    assert reply.returncode == 1
    assert says in reply.stderr, reply.stderr


def test_a_worker_with_a_gpu_and_without_cuda_is_refused_with_the_fix():
    worker = subprocess.run([program("strait-worker"), "--model", str(TINY), "--random-weights", "1", "--gpu", "0"],
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=clean_env())
    assert worker.returncode == 1
    assert "--gpu (STRAIT_GPU) needs --backend cuda" in worker.stdout + worker.stderr


def test_fp8_activations_without_a_gpu_are_told_in_a_sentence():
    reply = strait("up", "--model", TINY, "--random-weights", 1, "--workers", 1, "--fp8-activations",
                   "--http", f"127.0.0.1:{free_port()}", "--grpc", f"127.0.0.1:{free_port()}")
    assert reply.returncode not in (0, None)
    assert "--fp8-activations needs --backend cuda" in reply.stdout + reply.stderr, reply.stderr
