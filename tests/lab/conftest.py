import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from images_at_hand import made_up, write_jpegs
from mars_lab.data.tokens import DataConfig
from mars_lab.models.gpt2 import GPT2Config
from mars_lab.models.images import ImageModelConfig
from mars_lab.tasks.language import LanguageConfig
from mars_lab.tasks.vision import ImageDataConfig, VisionConfig
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig

from .tiny_runs import prose


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Bit-for-bit comparisons need the same number of threads everywhere, subprocesses included."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": prose(150, seed)}) + "\n" for seed in range(40)))
    return path


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> RunConfig:
    """A run that takes less than a second, with everything that can break resuming in it: dropout, accumulation."""
    model = GPT2Config(num_layers=2, num_heads=2, width=16, context_length=16, vocab_size=300, dropout=0.1)
    data = DataConfig(str(corpus), tokenizer_size=300, val_fraction=0.1, cache=str(corpus.parent / "data"))
    return RunConfig(
        LanguageConfig(model, data, eval_sequences=8, sample_tokens=4),
        OptimizerConfig(name="mars-m", lr=0.02),
        TrainConfig(
            num_steps=12,
            batch_size=2,
            num_accumulation_steps=2,
            precision="fp32",
            device="cpu",
            eval_every=4,
            checkpoint_every=5,
        ),
    )


@pytest.fixture
def tiny_vision(tmp_path: Path) -> RunConfig:
    write_jpegs(tmp_path / "images", made_up(200), made_up(50, seed=1))
    task = VisionConfig(
        ImageModelConfig("resnet18", width=4),
        ImageDataConfig("cifar10", str(tmp_path / "images")),
        eval_train_images=20,
        eval_batch_size=16,
    )
    optimizer = OptimizerConfig("mars-m", lr=0.01, weight_decay=5e-4, max_grad_norm=None)
    settings = TrainConfig(num_steps=30, batch_size=20, schedule="multistep", warmup_fraction=0.0, precision="fp32")
    return RunConfig(task, optimizer, dataclasses.replace(settings, eval_every=10, checkpoint_every=10, device="cpu"))
