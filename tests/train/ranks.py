"""What each process of the parallel tests runs: several trainings in one process group, so torch is imported once.

    torchrun --nproc-per-node 2 tests/train/ranks.py recipe.toml tokens-directory recipe.toml tokens-directory ...

What a training raises is written beside its recipe, as recipe.error.
"""

from __future__ import annotations

import faulthandler
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from firefly.console import quiet
from firefly.errors import FireflyError
from firefly.recipe import Recipe
from firefly.train.loop import train

faulthandler.enable()  # a rank that a library aborts says where it was
quiet()
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
for name, tokens in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    recipe = Recipe.load(name)
    try:
        train(recipe, Path(recipe.model.base), Path(tokens), recipe.out / "run", recipe.out / "model")
    except FireflyError as error:
        if dist.get_rank() == 0:
            Path(name).with_suffix(".error").write_text(str(error), encoding="utf-8")
    dist.barrier()
dist.destroy_process_group()
