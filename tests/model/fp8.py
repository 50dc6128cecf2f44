#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint with its linear layers in fp8, as DeepSeek-V3 publishes them.

  fp8.py --model DIR --out DIR

e4m3 codes with a fp32 scale per 128 x 128 block beside each (`…weight_scale_inv`); embedding, head, norms and the
router stay as they are. What fp8 costs in quality is then what `strait eval` finds of the one and of the other. Reads
bf16 and fp32 tensors of one or several files. Needs numpy.
"""
import argparse
import json
import pathlib
import shutil
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "golden"))
from generate import FP8_BLOCK, from_bf16, quantize_fp8, write_safetensors  # noqa: E402

BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def tensors(path):
    """Yields (name, dtype, array as stored: bf16 as uint16) of a safetensors file."""
    data = path.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for name, t in json.loads(data[8:begin]).items():
        if name == "__metadata__":
            continue
        types = {"BF16": np.uint16, "F32": np.float32}
        if t["dtype"] not in types:
            raise SystemExit(f"{path}: {name} is {t['dtype']}, not one of {', '.join(types)}")
        first, end = t["data_offsets"]
        yield name, t["dtype"], np.frombuffer(data[begin + first:begin + end], types[t["dtype"]]).reshape(t["shape"])


def is_linear(name):
    """Whether published V3 checkpoints have this tensor in fp8."""
    return ".layers." in name and name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    if "quantization_config" in config:
        raise SystemExit(f"{args.model} is quantized already")
    stored, quantized = {}, []
    for path in sorted(args.model.glob("*.safetensors")):
        for name, dtype, array in tensors(path):
            if not is_linear(name):
                stored[name] = (dtype, array)
                continue
            values = from_bf16(array) if dtype == "BF16" else array
            codes, scales = quantize_fp8(values)
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("F32", scales)
            quantized.append(name)
    if not quantized:
        raise SystemExit(f"{args.model} has no linear layer in safetensors")
    args.out.mkdir(parents=True, exist_ok=True)
    config["quantization_config"] = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                                         weight_block_size=[FP8_BLOCK, FP8_BLOCK])
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Widest elements first: no tensor is then unaligned.
    width = {"F32": 0, "BF16": 1, "F8_E4M3": 2}
    write_safetensors(args.out / "model.safetensors",
                      {n: stored[n] for n in sorted(stored, key=lambda n: width[stored[n][0]])})
    for name in BESIDE:
        if (args.model / name).exists():
            shutil.copy(args.model / name, args.out / name)
    print(f"{len(quantized)} of {len(stored) - len(quantized)} tensors in fp8 in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
