"""Several machines: the commands of docs/parallel.md, parsed, and run as two nodes on this one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from crew import results, wait_for_step
from torch.distributed.run import get_args_parser

from firefly import api
from firefly.recipe import Recipe
from firefly.train.parallel import require_layout
from tiny import recipe_table, save_model_dir, write_pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallel.md").read_text("utf-8")
SLURM = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[0]
SERVICE, JOB = yaml.safe_load_all(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])


def commands() -> Iterator[list[str]]:
    """Each torchrun of the page as words."""
    for text in re.findall(r"torchrun (--nnodes(?:[^\n]*\\\n)*[^\n&]*)", PAGE):
        given = text.replace("\\\n", " ").replace("$SLURM_NNODES", "4")
        yield shlex.split(given)
    yield pod()["containers"][0]["command"][1:]


def pod() -> dict[str, Any]:
    return JOB["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def test_torchrun_and_the_recipes_take_what_the_page_says() -> None:
    """And the layouts fit the number of processes."""
    found = [get_args_parser().parse_args(words) for words in commands()]
    assert [given.nnodes for given in found] == ["2", "4", "2"]
    for given in found:
        assert given.module and given.training_script == "firefly" and given.rdzv_backend == "c10d"
        verb, path, *overrides = given.training_script_args
        recipe = Recipe.load(
            ROOT / "recipes" / "firefly-2b6.toml" if path.startswith("/") else ROOT / path, overrides
        )
        assert verb == "train" and recipe.parallel.hsdp == int(given.nnodes)
        require_layout(recipe, int(given.nnodes) * int(given.nproc_per_node))


def test_the_pods_find_each_other_and_have_time_to_save() -> None:
    name, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": name} and pod()["subdomain"] == service
    assert SERVICE["spec"]["clusterIP"] == "None" and JOB["spec"]["completionMode"] == "Indexed"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 2
    container = pod()["containers"][0]
    assert f"--rdzv-endpoint={name}-0.{service}.default.svc.cluster.local:29500" in container["command"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}
    assert int(container["env"][0]["value"]) < pod()["terminationGracePeriodSeconds"]


# --- the Slurm script, with stand-ins for Slurm's own commands --------------------------------------------------------

STAND_INS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in 1 2; do "$@" & echo $! >> "$PIDS"; done
        status=0
        for pid in $(jobs -p); do wait "$pid" || status=$?; done
        exit $status""",
    "scancel": """[[ $* == "--signal=TERM 7" ]] && kill -TERM $(cat "$PIDS")""",
    "scontrol": """[[ $1 == show ]] && echo localhost || echo "$*" >> "$REQUEUED" """,
}


@pytest.mark.nightly  # starts four launchers
def test_a_slurm_job_saves_before_its_time_is_over_and_goes_on(tmp_path: Path) -> None:
    """Two nodes of one process each, which meet by torchrun's rendezvous."""
    base, source = save_model_dir(tmp_path / "base", "bloom"), write_pairs(tmp_path / "pairs.jsonl")

    def recipe_of(name: str) -> Path:
        table = recipe_table(
            tmp_path / name,
            base,
            source,
            report_to=[],
            per_device_train_batch_size=2,
            max_steps=200,
            save_steps=1000,
        )
        recipe = Recipe.from_table(table)
        api.data(recipe)
        path = tmp_path / f"{name}.toml"
        path.write_text(recipe.to_toml(), "utf-8")
        return path

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {
        "SLURM_JOB_NODELIST": "both",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
    }
    environment |= {
        "PIDS": str(tmp_path / "pids"),
        "REQUEUED": str(tmp_path / "requeued"),
        "OMP_NUM_THREADS": "1",
    }

    def start(recipe: Path) -> subprocess.Popen[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = SLURM.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("hsdp=4", "hsdp=2")
        script = script.replace(":29500", f":{port}").replace("recipes/bloom-7b1-zh.toml", str(recipe))
        (tmp_path / "pids").write_text("")
        return subprocess.Popen(["bash", "-c", script], env=environment, stderr=subprocess.PIPE, text=True)

    whole, broken = recipe_of("whole"), recipe_of("broken")
    job = start(whole)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    job = start(broken)
    wait_for_step(tmp_path / "broken", 4)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=300)
    assert job.returncode != 0 and (tmp_path / "requeued").read_text() == "requeue 7\n", said
    assert len(list((tmp_path / "broken" / "run").glob("checkpoint-*"))) == 1, said
    job = start(broken)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
