"""Fixtures for every test: silence, two threads, blank pictures, and tiny model directories made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from firefly.console import quiet

    quiet()


PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than tiny runs do, so a picture is a white dot except in tests marked `pictures`."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, place, **__: place.write(PICTURE))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("bloom")`: a model directory with random weights; tests must not change it."""
    from tiny import save_model_dir

    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = save_model_dir(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return model


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no development data at {folder}")
    return folder
