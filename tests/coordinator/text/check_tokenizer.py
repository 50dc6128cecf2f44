#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares Strait's tokenizer with Hugging Face's on one tokenizer.json.

    check_tokenizer.py --program build/release/tests/tokenizer_check --tokenizer FILE

Needs the Python package `tokenizers`. Exit status: 0 all equal, 1 a difference, 2 could not run.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "golden" / "tokenizer"))
import hard_strings  # noqa: E402


def shorten(text, limit=120):
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[:limit] + "…"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="the tokenizer_check program")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--fuzz", type=int, default=20000, help="random strings on top of the fixed ones")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        import tokenizers
    except ImportError:
        print("check_tokenizer: pip install tokenizers", file=sys.stderr)
        return 2

    reference = tokenizers.Tokenizer.from_file(args.tokenizer)
    reference.no_truncation()
    reference.no_padding()
    added = [t["content"] for t in json.load(open(args.tokenizer, encoding="utf-8")).get("added_tokens") or []]
    # Every added token counts; of hundreds of place holders a few will do.
    sample = added[:8] + added[8:-24:97] + added[-24:]
    strings = [hard_strings.expand(e) for e in hard_strings.all_strings(list(dict.fromkeys(sample)))]
    strings += [t + "x" for t in added]
    strings += hard_strings.fuzz(args.seed, args.fuzz // 2, sample[:12]) + hard_strings.wild(args.seed, args.fuzz // 2)

    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(strings, file)
        file.flush()
        run = subprocess.run([args.program, args.tokenizer, file.name], capture_output=True)
    if run.returncode != 0:
        print(run.stderr.decode(errors="replace"), file=sys.stderr)
        return 2
    lines = run.stdout.decode("utf-8").split("\n")[:-1]
    if len(lines) != len(strings):
        print(f"check_tokenizer: {len(lines)} answers to {len(strings)} strings", file=sys.stderr)
        return 2

    failures = 0
    round_trips = 0
    for text, line in zip(strings, lines):
        ours = json.loads(line)
        ids = reference.encode(text, add_special_tokens=True).ids
        expected = {
            "ids": ids,
            "text": reference.decode(ids, skip_special_tokens=False),
            "plain": reference.decode(ids, skip_special_tokens=True),
        }
        expected["streamed"] = expected["text"]
        round_trips += ours["text"] == text
        for key, value in expected.items():
            if ours[key] == value:
                continue
            failures += 1
            if failures <= 20:
                print(f"differs in {key} on {shorten(text)}:\n  Hugging Face {shorten(value)}\n  Strait       {shorten(ours[key])}")
            break
    print(f"tokenizer check: {len(strings)} strings, {round_trips} decode to themselves, "
          f"{failures} differ from tokenizers {tokenizers.__version__}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
