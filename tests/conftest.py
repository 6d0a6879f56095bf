"""What every test shares: no network, one thread, and the folder of real models where there is one."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DATASETS_VERBOSITY"] = "critical"  # as the command line sets it, before datasets is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny

torch.set_num_threads(1)  # pytest-xdist runs one worker a core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, saying so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts: BITTERN_SHARED, else ../shared beside the repository."""
    folder = Path(os.environ.get("BITTERN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real models and texts are not at hand: no {folder}/data (BITTERN_SHARED names another place)")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random words to calibrate tiny models on."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that fits them."""
    return tiny.make_tokenizer(text)
