"""The scaling model for the article's shapes: the best layout of 1 to 512 GPUs, and where more of them stop paying.

    python bench/scaling.py [--quick] [--gpu H100] [--interconnect NDR] [--gpus-per-node 8]

Nothing is run but the model of firefly.train.scaling, so the same command always gives the same table. It writes
bench/results/scaling.csv and docs/scaling.png. Batches are of lengths like the article's; either each rank has the
recipe's batch, or all share 1,024 samples a step. `simulated_ms` is the same step event by event. --quick takes the
smallest shape alone and writes nothing.
"""

from __future__ import annotations

import argparse
import csv
import io
from typing import Any

import rows
from firefly.files import write_atomic
from firefly.plots import BLUE, GREY, ORANGE, panels
from firefly.recipe import Recipe
from firefly.train.gpus import find_gpu
from firefly.train.plan import assumed_workload, batch_of, load_of
from firefly.train.scaling import Batch, Cluster, Rank, Scaling, scale, step_of
from firefly.train.simulate import simulated_s

SHAPES = {"1.4B": (2048, 24, 16, 16), "2.6B": (2560, 30, 32, 8), "7.1B": (4096, 30, 32, 8)}
"""The article's name → hidden size, layers, heads, samples a batch."""
SHARED_SAMPLES = 1024


def config_of(shape: str) -> dict[str, Any]:
    """A pruned BLOOM's config.json."""
    hidden, layers, heads, _ = SHAPES[shape]
    sizes = {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 46_145}
    return {"model_type": "bloom", **sizes}


def scalings(shape: str, cluster: Cluster) -> dict[int | None, Scaling]:
    """By samples a step that all share; None: the recipe's batch on each rank."""
    recipe = Recipe.from_table(
        {
            "name": shape,
            "output_dir": "out",
            "model": {"base": shape},
            "data": {"sources": [{"path": "none"}]},
            "train": {"per_device_train_batch_size": SHAPES[shape][3]},
        }
    )
    workload = assumed_workload(recipe)
    load, batch = (
        load_of(recipe, config_of(shape), workload, cluster.device),
        batch_of(recipe.train, workload),
    )

    def simulated(rank: Rank, samples: int | None) -> float:
        part = batch.shared(SHAPES[shape][3], samples, rank.layout.dp)
        assert isinstance(part, Batch)
        return simulated_s(step_of(load, rank.layout, part, cluster))

    made = {samples: scale(load, batch, cluster, 8, samples) for samples in (None, SHARED_SAMPLES)}
    for samples, scaling in made.items():
        for rank in scaling.curve:
            TABLE.append(row(shape, samples, rank, scaling, simulated(rank, samples)))
    return made


TABLE: list[dict[str, object]] = []


def row(shape: str, samples: int | None, rank: Rank, scaling: Scaling, simulated: float) -> dict[str, object]:
    """One line of the table."""
    layout = rank.layout
    per_gpu = rank.tokens_per_s / layout.num_ranks
    return {
        "shape": shape,
        "samples_per_step": samples or SHAPES[shape][3] * layout.dp,
        "batch": "shared" if samples else "each",
        "gpus": layout.num_ranks,
        "zero": layout.zero,
        "tp": layout.tp,
        "dp": layout.dp,
        "hsdp": layout.hsdp,
        "offload": layout.offload,
        "accumulation": rank.accumulation,
        "rank_gib": round(rank.memory_bytes / 2**30, 1),
        "step_ms": round(rank.step_s * 1e3, 1),
        "simulated_ms": round(simulated * 1e3, 1),
        "waiting": round(rank.waiting_s / rank.step_s, 3),
        "tokens_per_s": round(rank.tokens_per_s),
        "efficiency": round(per_gpu / alone_tokens_per_s(scaling), 3),
        "pays": layout.num_ranks <= scaling.worth_gpus,
    }


def alone_tokens_per_s(scaling: Scaling) -> float:
    """Of one GPU, where fewest of them hold everything: what perfect scaling multiplies."""
    first = next(one for one in scaling.curve if one.layout.offload == "none")
    return first.tokens_per_s / first.layout.num_ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--interconnect", default="NDR")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    options = parser.parse_args()
    cluster = Cluster.of(find_gpu(options.gpu), options.gpus_per_node, options.interconnect)
    made = {shape: scalings(shape, cluster) for shape in (["1.4B"] if options.quick else SHAPES)}

    text = io.StringIO()
    writer = csv.DictWriter(text, list(TABLE[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(TABLE)
    print(text.getvalue())
    if not options.quick:
        write_atomic(rows.ROOT / "bench" / "results" / "scaling.csv", text.getvalue())
        draw(made, cluster)
    rows.finish(
        {
            f"worth_gpus_{shape}_{'shared' if samples else 'each'}": float(scaling.worth_gpus)
            for shape, both in made.items()
            for samples, scaling in both.items()
        }
    )


def draw(made: dict[str, dict[int | None, Scaling]], cluster: Cluster) -> None:
    """Tokens a second by GPUs; a dot where more stop paying; dashed, what perfect scaling would be."""
    with panels(rows.ROOT / "docs" / "scaling.png", 1, 2, 9, 4.8) as both_panels:
        for panel, samples in zip(both_panels, (None, SHARED_SAMPLES), strict=True):
            for (shape, both), colour in zip(made.items(), (BLUE, ORANGE, GREY), strict=False):
                curve = both[samples].curve
                numbers = [one.layout.num_ranks for one in curve]
                speeds = [one.tokens_per_s for one in curve]
                panel.plot(numbers, speeds, color=colour, label=shape)
                alone = alone_tokens_per_s(both[samples])
                panel.plot(numbers, [alone * number for number in numbers], "--", color=colour, linewidth=0.7)
                worth = numbers.index(both[samples].worth_gpus)
                panel.plot(numbers[worth], speeds[worth], "o", color=colour)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(numbers, [str(number) for number in numbers])
            panel.set_xlabel(f"{cluster.device.name}, {cluster.gpus_per_node} a node, {cluster.network}")
            panel.set_title(
                f"{samples:,} samples a step, shared" if samples else "the recipe's batch on each GPU"
            )
            panel.set_ylim(5e2, 5e7)
        both_panels[0].set_ylabel("tokens/s")
        both_panels[0].legend()


if __name__ == "__main__":
    main()
