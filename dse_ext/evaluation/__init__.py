"""Scores of checkpoint files: DSE and the label-free baselines, without labels.

from dse_ext.evaluation import EvaluateConfig, evaluate

result = evaluate(EvaluateConfig("dino", "runs/dino/*.pth", "images/"), "results")
"""

from dse_ext.evaluation.results import ResultsFolder, SettingsDifferError
from dse_ext.evaluation.scores import Scorer
from dse_ext.evaluation.settings import EvaluateConfig
from dse_ext.evaluation.sweep import SweepResult, evaluate

__all__ = [
    "EvaluateConfig",
    "ResultsFolder",
    "Scorer",
    "SettingsDifferError",
    "SweepResult",
    "evaluate",
]
