"""Reference training loops: self-supervised methods with the DSE regularizer at every step.

from dse_ext.ssl import PRESETS, TrainConfig, train

result = train(TrainConfig(**PRESETS["demo"]), "runs/demo")
"""

from dse_ext.ssl.config import PRESETS, ConfigError, TrainConfig
from dse_ext.ssl.run import RunResult, train
from dse_ext.ssl.scoring import CheckpointScore, Selection
from dse_ext.ssl.trainer import Interrupted, Trainer, TrainingDiverged

__all__ = [
    "PRESETS",
    "CheckpointScore",
    "ConfigError",
    "Interrupted",
    "RunResult",
    "Selection",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "train",
]
