#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face transformers says of the reference model, for the tests and for `strait eval`.

  reference.py --model DIR --heldout heldout.jsonl.xz --out DIR

Writes DIR/golden.json (the form of tests/golden: log-probabilities of some prompts, up to 8,192 tokens, each with a
greedy continuation) and DIR/transformers.json (summed log-loss of every held-out document by position bucket). Both
are of float32 with eager attention; a float64 pass tells how far rounding moves them: a trained router has near ties,
and where two experts are closer than rounding, float32 and float64 may choose differently. Prompts for golden.json are
those where they agree. Needs transformers 5.17 or newer, a GPU or patience.
"""
import argparse
import json
import lzma
import pathlib

import numpy as np
import torch
import transformers

BUCKETS = (0, 1024, 4096, 8192)
GREEDY_TOKENS = 24
AGREE = 1e-4


@torch.inference_mode()
def log_probabilities(model, ids):
    """[n, vocab] float64, on the device."""
    x = torch.tensor([ids], device=model.device)
    return torch.log_softmax(model(input_ids=x, use_cache=False).logits[0].double(), -1)


def picked(rows, ids):
    """Log-probability of each token but the first, given those before it."""
    return rows[:-1].gather(1, torch.tensor(ids[1:], device=rows.device)[:, None])[:, 0]


def greedy(model, ids, count):
    """Continues ids; re-computed whole each time, so that nothing depends on a cache."""
    out, rows = list(ids), None
    for _ in range(count):
        rows = log_probabilities(model, out)
        out.append(int(rows[-1].argmax()))
    return out


def shorten(x):
    return float(f"{float(x):.9g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--heldout", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (5, 17):
        raise SystemExit(f"transformers {transformers.__version__} is too old: 5.17 or newer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(
        str(args.model), dtype=dtype, attn_implementation="eager",
        experts_implementation="eager", local_files_only=True).to(device).eval()
    single, double = load(torch.float32), load(torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(args.model))
    with lzma.open(args.heldout, "rt") as f:
        documents = [tokenizer(json.loads(line)["text"])["input_ids"] for line in f]
    documents = [d[:BUCKETS[-1] + 1] for d in documents if len(d) > BUCKETS[-1]]

    losses, moved, agreeing = [], [], []
    for index, ids in enumerate(documents):
        a, b = picked(log_probabilities(single, ids), ids), picked(log_probabilities(double, ids), ids)
        losses.append([-float(a[i:j].sum()) for i, j in zip(BUCKETS, BUCKETS[1:])])
        moved.append(float((a - b).abs().max()))
        if moved[-1] < AGREE:
            agreeing.append(index)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, eager"
    total = np.array(losses)
    print(f"{len(documents)} documents; float32 moves a log-probability by at most {max(moved):.1e}, median document "
          f"{np.median(moved):.1e}, {len(agreeing)} documents stay within {AGREE}")
    print("perplexity", {f"{i}-{j}": round(float(np.exp(total[:, k].sum() / len(documents) / (j - i))), 4)
                         for k, (i, j) in enumerate(zip(BUCKETS, BUCKETS[1:]))},
          float(np.exp(total.sum() / len(documents) / BUCKETS[-1])))
    (args.out / "transformers.json").write_text(json.dumps(dict(
        reference=name, buckets=BUCKETS, documents=len(documents), float32_moves_at_most=moved,
        log_loss=[[shorten(x) for x in row] for row in losses])) + "\n")

    # Prompts: the head of one document by length, and one whole window.
    best = sorted(range(len(documents)), key=lambda i: moved[i])
    prompts, worst = [], 0.0
    for k, length in enumerate((1, 64, 600, 4096, 8192)):
        for index in best[k:]:  # the next document whose head, with its continuation, rounding leaves alone
            ids = greedy(single, documents[index][:length], GREEDY_TOKENS)
            rows = log_probabilities(single, ids)
            a, b = picked(rows, ids), picked(log_probabilities(double, ids), ids)
            if float((a - b).abs().max()) < AGREE:
                break
        else:
            raise SystemExit(f"no prompt of {length} tokens is free of near ties")
        worst = max(worst, float((a - b).abs().max()))
        top = rows.topk(2, -1).values
        gap = (top[:, 0] - top[:, 1])[length - 1:-1]
        a = [shorten(x) for x in a.tolist()]
        prompts.append(dict(tokens=ids[:length], logprobs=[None] + a[:length - 1], greedy=dict(
            tokens=ids[length:], logprobs=a[length - 1:], gap=[shorten(x) for x in gap.tolist()])))
        print(f"prompt of {length}: document {index}")
    (args.out / "golden.json").write_text(json.dumps(dict(
        shape="reference", reference=name, seed=0, vocab_size=single.config.vocab_size, reference_error_max=worst,
        prompts=prompts), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
