"""Give the embedded base more layers without changing what it says: every second layer comes twice.

    python tools/deepen_base.py --model out/forms/model --out out/deep

The copies begin with what their originals look at, and with outputs of zero, so the logits stay the same, bit for bit
(which is checked); training then gives them work of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

LAYER = re.compile(r"(transformer\.h\.)(\d+)(\..*)")
# What a layer adds to the stream comes out of these.
OUTPUTS = (".self_attention.dense.", ".mlp.dense_4h_to_h.")


def deepened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BLOOM's tensors with every second layer twice: layers 0 1 2 3 become 0 1 1 2 3 3."""
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = LAYER.fullmatch(name)
        if found is None:
            new[name] = tensor
            continue
        before, number, after = found[1], int(found[2]), found[3]
        at = number + number // 2
        new[f"{before}{at}{after}"] = tensor
        if number % 2:
            silent = any(part in name for part in OUTPUTS)
            new[f"{before}{at + 1}{after}"] = torch.zeros_like(tensor) if silent else tensor.clone()
    return new


@torch.no_grad()
def logits(directory: Path, ids: Tensor) -> Tensor:
    """What the model says to some tokens, through transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    said: Tensor = model(ids).logits
    return said


def main() -> None:
    """Write the deeper model, and prove that it says the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="BLOOM's model directory, one file of weights"
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    options = parser.parse_args()
    shutil.copytree(options.model, options.out, dirs_exist_ok=True)
    tensors = deepened(load_file(options.model / "model.safetensors"))
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    layers = {int(found[2]) for name in tensors if (found := LAYER.fullmatch(name))}
    config["n_layer"] = len(layers)
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ids = torch.randint(config["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(options.model, ids), logits(options.out, ids)), "the logits have changed"
    print(f"{options.out}: {len(layers)} layers, {sum(map(Tensor.numel, tensors.values())):,} parameters")


if __name__ == "__main__":
    main()
