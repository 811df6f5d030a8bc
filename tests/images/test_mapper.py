"""The mapper knows the size of a vision tower."""

from __future__ import annotations

from pathlib import Path

from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.simulate.footprint import trained_parameters
from recipes.mapping_settings import model_spec
from tests.images.plain import load
from workers.config import ModelConfig, TrainConfig, VisionTraining
from workers.role_config import ActorConfig


def test_the_mapper_counts_the_tower(model_path: Path) -> None:
    """As many parameters as the tower has; with a frozen one, as many fewer are trained."""

    counts = []
    for vision in VisionTraining:
        config = ActorConfig(
            model=ModelConfig(path=str(model_path)), train=TrainConfig(vision=vision)
        )
        spec = model_spec("actor", config)
        assert spec is not None
        counts.append(trained_parameters(spec, ModelLayout(p=1, t=1, d=1)))
    tower = load(model_path).model.visual
    expected = sum(parameter.numel() for parameter in tower.parameters())
    assert spec.tower_parameters == expected == counts[0] - counts[1]
