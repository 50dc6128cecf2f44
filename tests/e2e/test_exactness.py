# SPDX-License-Identifier: Apache-2.0
"""The API gives the numbers of Hugging Face's own implementation.

For every golden checkpoint (tests/golden, made by generate.py with transformers in fp32) and 1, 2 and 3 stages, and
for the trained reference model with prompts of up to 8,192 tokens (tests/model/reference.py): each prompt token's
log-probability is within 1e-3 of the reference, and a greedy token, given the reference's tokens before it, equals the
reference's wherever its two best tokens are further apart than 2e-3.

On a GPU (STRAIT_TEST_BACKEND=cuda) activations and cache rows are bf16 and the reference is fp32: the bounds of
BF16_ERROR hold, whose origin is told there; with fp8 rows (STRAIT_TEST_CACHE_FORMAT=fp8) those of FP8_ROWS_ERROR.
"""
import json

import pytest
from harness import BACKEND, CACHE_FORMAT, ROOT, Cluster

GOLDEN = ROOT / "tests/golden"
SHAPES = ["v3-yarn", "v3-odd", "v2-lite", "v2", "v3-fp8"]
LOGPROB_TOLERANCE = 1e-3
GREEDY_GAP = 2e-3
LONG = 600  # tokens; prompts beyond take too long to be prefilled again for each token behind them

# |difference| on the GPU, of a float64 model that rounds to bf16 where the CUDA backend does (tests/golden/
# bf16_error.py): median, mean, 99 in 100. Rounding moves a log-probability of these random models by 1e-2. Where two
# experts score nearer than that, the other one may be chosen, and that token moves by tenths or more: few tokens,
# other ones in each implementation, which is why the mean and the tail have wide margins and the worst none. With
# the reference's experts the same model is nowhere off by more than 0.1.
BF16_ERROR = {"v3-yarn": (0.0223, 0.0717, 1.311), "v3-odd": (0.0123, 0.0438, 1.228), "v2-lite": (0.0081, 0.0107, 0.043),
              "v2": (0.0106, 0.0214, 0.172), "v3-fp8": (0.0102, 0.0164, 0.071),
              "reference": (0.0097, 0.0203, 0.163)}
# The same with --rows fp8, and how many of a hundred greedy tokens that lead clearly differ there.
FP8_ROWS_ERROR = {"v3-yarn": (0.0949, 0.2212, 2.170), "v3-odd": (0.0337, 0.1297, 2.128), "v2-lite": (0.0335, 0.0444, 0.180),
                  "v2": (0.0384, 0.0703, 0.571), "v3-fp8": (0.0386, 0.0948, 1.483),
                  "reference": (0.0338, 0.0653, 0.448)}
FP8_ROWS_OTHERS = {"v3-yarn": 7.9, "v3-odd": 4.5, "v2-lite": 0, "v2": 0.7, "v3-fp8": 3.1, "reference": 0}
ERROR = FP8_ROWS_ERROR if CACHE_FORMAT == "fp8" else BF16_ERROR
ERROR_MARGIN = (1.5, 2, 3)
# A greedy token must be the reference's where that leads by more than this, but for one in twenty (other experts), with
# fp8 rows twice as many as are expected.
CUDA_GREEDY_GAP = 0.5


def others_allowed(shape):
    return max(0.05, 2 * FP8_ROWS_OTHERS[shape] / 100 if CACHE_FORMAT == "fp8" else 0)


def check(shape, differences):
    """differences: (|difference|, where)."""
    worst = max(differences)
    print(f"{shape}: {len(differences)} log-probabilities, largest difference {worst[0]:.2e}")
    if BACKEND == "cpu":
        assert worst[0] <= LOGPROB_TOLERANCE, f"{worst[0]} at {worst[1]}"
        return
    values = sorted(d for d, _ in differences)
    got = values[len(values) // 2], sum(values) / len(values), values[len(values) * 99 // 100]
    print(f"{shape}: median {got[0]:.2e}, mean {got[1]:.2e}, 99 in 100 within {got[2]:.2e}")
    assert all(g <= m * e for g, m, e in zip(got, ERROR_MARGIN, ERROR[shape])), got


@pytest.fixture(scope="module", params=[(s, n) for s in SHAPES for n in (1, 2, 3)] + [("reference", 2)],
                ids=lambda p: f"{p[0]}-{p[1]}")
def served(request):
    shape, stages = request.param
    golden = json.loads((GOLDEN / shape / "golden.json").read_text())
    model = ROOT / "deploy/models/reference" if shape == "reference" else GOLDEN / shape
    with Cluster(model, workers=stages, random_weights=None, memory="256MiB") as cluster:
        assert sorted((s["layer_begin"], s["layer_end"]) for w in cluster.status()["workers"] for s in w["stages"])[0][0] == 0
        assert sum(len(w["stages"]) for w in cluster.status()["workers"]) == stages
        if CACHE_FORMAT:
            assert all(f"/{CACHE_FORMAT}" in w["numerics_id"] for w in cluster.status()["workers"])
        yield cluster, shape, golden


def test_golden_files_are_the_reference_of_the_issue():
    for shape in SHAPES:
        golden = json.loads((GOLDEN / shape / "golden.json").read_text())
        assert golden["reference"].startswith("transformers 5."), shape
        assert golden["reference_error_max"] < LOGPROB_TOLERANCE / 10, shape
        lengths = sorted(len(p["tokens"]) for p in golden["prompts"])
        assert lengths[0] == 1 and lengths[-1] == 600, shape
        size = sum(f.stat().st_size for f in (GOLDEN / shape).iterdir())
        assert size < 1_500_000, f"{shape}: {size} bytes"


def test_every_prompt_token(served):
    cluster, shape, golden = served
    differences = []
    for prompt in golden["prompts"]:
        tokens, expected, greedy = prompt["tokens"], prompt["logprobs"], prompt["greedy"]
        if len(tokens) > LONG:  # the continuation is scored with it: one pass instead of one a token
            tokens, expected = tokens + greedy["tokens"], expected + greedy["logprobs"]
        reply = cluster.complete(model=shape, prompt=tokens, max_tokens=0, echo=True, logprobs=1)
        logprobs = reply["choices"][0]["logprobs"]
        got = logprobs["token_logprobs"]
        assert len(got) == len(tokens) and got[0] is None
        for position in range(len(prompt["tokens"]), len(tokens)):
            if BACKEND == "cpu" and greedy["gap"][position - len(prompt["tokens"])] > GREEDY_GAP:
                best = max(logprobs["top_logprobs"][position].values())
                assert got[position] == best, f"position {position}: the greedy token is not the likeliest"
        for position, (a, b) in enumerate(zip(got[1:], expected[1:]), 1):
            differences.append((abs(a - b), f"{len(got)} tokens, position {position}: {a}, reference {b}"))
    assert len(differences) > 1000
    check(shape, differences)


def test_greedy_teacher_forced(served):
    cluster, shape, golden = served
    compared, others, differences = 0, [], []
    for prompt in golden["prompts"]:
        greedy = prompt["greedy"]
        if len(prompt["tokens"]) > LONG:
            continue  # scored in test_every_prompt_token
        prefixes = [prompt["tokens"] + greedy["tokens"][:i] for i in range(len(greedy["tokens"]))]
        reply = cluster.complete(model=shape, prompt=prefixes, max_tokens=1, temperature=0, logprobs=0, ignore_eos=True,
                                 return_token_ids=True)
        choices = sorted(reply["choices"], key=lambda c: c["index"])
        assert len(choices) == len(prefixes)
        for i, choice in enumerate(choices):
            if greedy["gap"][i] <= (GREEDY_GAP if BACKEND == "cpu" else CUDA_GREEDY_GAP):
                continue
            compared += 1
            where = f"prompt of {len(prompt['tokens'])}, token {i}"
            if choice["token_ids"] != [greedy["tokens"][i]]:
                others.append(where)
                continue
            differences.append((abs(choice["logprobs"]["token_logprobs"][0] - greedy["logprobs"][i]), where))
    if BACKEND == "cpu":
        assert compared > (60 if shape == "reference" else 150) and not others, others
        assert max(differences)[0] <= LOGPROB_TOLERANCE, max(differences)
    else:
        print(f"{shape}: {compared} greedy tokens that lead clearly, {len(others)} differ")
        assert compared > 30 and len(others) <= compared * others_allowed(shape), others
