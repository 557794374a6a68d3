"""DSEMonitor: what it measures, when it warns, which files it keeps."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from pathlib import Path

import features
import pytest
import torch
from torch import Tensor, nn

import dse_ext
from dse_ext.monitor import DenseDegradationWarning, DSEMonitor, Evaluation

PROBE = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 2, 2)


class Scripted(nn.Module):
    """Gives the features of a script: one cloud per call, whatever the images.

    Five kinds of positions; the lower the quality, the more a common direction swallows them.
    """

    def __init__(self, qualities: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.qualities = qualities
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        quality = self.qualities[min(self.calls, len(self.qualities) - 1)]
        self.calls += 1
        cloud = quality * features.clustered(16, 9, 12) + 2 * features.normal(12, seed=9)
        return cloud[images[:, 0, 0, 0].long()].float()


def monitor(qualities: list[float], **options: object) -> DSEMonitor:
    model = Scripted(qualities)
    options = {"every": 1, "batch_size": 16, "global_clusters": 6, **options}
    return DSEMonitor(model, PROBE, extract=model, **options)


def run(watch: DSEMonitor, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DenseDegradationWarning)
        for step in range(1, steps + 1):
            watch.step(step)
    return [str(w.message) for w in caught if issubclass(w.category, DenseDegradationWarning)]


RISE_AND_FALL = [0.2, 0.4, 1.2, 0.15, 0.1, 0.08, 0.06, 0.05]


def test_the_score_is_dse_of_the_probe_batch() -> None:
    watch = monitor([1.0])
    evaluation = watch.evaluate(10)
    z = Scripted([1.0])(PROBE)
    expected = dse_ext.dse_components(
        z, "evaluation", global_clusters=6, generator=torch.Generator().manual_seed(0)
    )
    assert evaluation.step == 10
    assert evaluation.score == pytest.approx(float(expected.score()), rel=1e-6)
    for name in ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm"):
        assert getattr(evaluation, name) == float(getattr(expected, name))


def test_a_hooked_layer_and_a_function_give_the_same() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).train()
    images = features.normal(8, 3, 32, 32).float()
    by_layer = DSEMonitor(model, images, batch_size=4)
    by_function = DSEMonitor(model, images, extract=lambda x: model.forward_features(x)[:, 1:])
    a, b = by_layer.evaluate(1), by_function.evaluate(1)
    assert a.score == pytest.approx(b.score, rel=1e-4)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_training_is_not_disturbed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
    model[1].eval()  # frozen by its owner
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(5)
    watch = DSEMonitor(model, torch.rand(8, 1, 4, 4), layer="2")
    watch.evaluate(1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(8, 1, 4, 4)
    assert torch.equal(drawn, torch.rand(3))
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_every() -> None:
    watch = monitor([1.0], every=3)
    assert [step for step in range(1, 10) if watch.step(step) is not None] == [3, 6, 9]
    with pytest.raises(ValueError, match="above that of the last evaluation, 9, got 9"):
        watch.evaluate(9)


def test_it_warns_once_after_patience_evaluations() -> None:
    watch = monitor(RISE_AND_FALL, patience=3, early_stop=True)
    assert run(watch, 5) == []
    assert not watch.should_stop
    watch_on = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6, 9):
            watch.step(step)
            watch_on.append(watch.should_stop)
    assert watch_on == [True] * 3
    assert [e.fallen for e in watch.history] == [0, 0, 0, 1, 2, 3, 4, 5]
    (warning,) = caught
    assert warning.category is DenseDegradationWarning
    assert "at step 6" in str(warning.message)
    assert "peak at step 3, for 3 evaluations in a row" in str(warning.message)
    assert watch.best is not None
    assert watch.best.step == 3
    assert watch.history[2].drop == 0
    assert watch.history[7].drop > 2 * watch.history[7].noise > 0


def test_without_early_stop_it_only_warns() -> None:
    watch = monitor(RISE_AND_FALL)
    assert len(run(watch, 8)) == 1
    assert watch.degraded
    assert not watch.should_stop


def test_a_fall_within_the_noise_is_none() -> None:
    watch = monitor([1.0, 0.999, 0.998, 0.999, 0.9985, 0.999])
    assert run(watch, 6) == []
    assert not watch.degraded


def test_the_first_steps_need_not_count(tmp_path: Path) -> None:
    watch = monitor([1.2, 0.1, 0.1, 0.1, 0.11], start=2, folder=tmp_path)
    assert run(watch, 5) == []
    assert [e.fallen for e in watch.history] == [0] * 5
    assert watch.best is not None
    assert watch.best.step > 1
    assert watch.history[0].score > watch.best.score
    assert not (tmp_path / "dse-step-00000001.pt").exists()


def test_recovery_resets_the_count() -> None:
    watch = monitor([1.2, 0.1, 0.1, 1.1, 0.1, 0.1])
    assert run(watch, 6) == []
    assert [e.fallen for e in watch.history] == [0, 1, 2, 0, 1, 2]


def test_noise_is_the_standard_error_of_the_difference() -> None:
    """Two steps with the same distribution of features: drops are as large as the noise says."""
    ratios = []
    for seed in range(24):
        clouds = [features.clustered(32, 9, 12, seed=100 * seed)]
        # Per image noise of its own at each step; no real difference.
        kinds = features.normal(32, 1, 12, seed=100 * seed + 7)
        clouds = [
            clouds[0] + 0.5 * kinds * features.normal(32, 1, 1, seed=100 * seed + 11 + step)
            for step in range(2)
        ]
        calls = iter(clouds)
        watch = DSEMonitor(
            nn.Linear(1, 1), torch.zeros(32, 1, 1, 1), extract=lambda x, c=calls: next(c),
            replicates=16, global_clusters=6, seed=seed,
        )  # fmt: skip
        a, b = watch.evaluate(1), watch.evaluate(2)
        if b.drop > 0:
            ratios.append(b.drop / b.noise)
        else:  # the second is the peak: the same comparison the other way round
            differences = [
                (x + y) - (u + v) for (x, y), (u, v) in zip(a.replicates, b.replicates, strict=True)
            ]
            noise = torch.tensor(differences).std().item()
            ratios.append((b.score - a.score) / noise)
    rms = math.sqrt(sum(r * r for r in ratios) / len(ratios))
    assert 0.5 < rms < 2.0, f"drops are {rms:.2f} standard errors"


def test_files_of_the_best_are_kept(tmp_path: Path) -> None:
    watch = monitor(RISE_AND_FALL, folder=tmp_path, keep=2)
    run(watch, 8)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    ranked = sorted(watch.history, key=lambda e: -e.score)[:2]
    assert names == sorted(f"dse-step-{e.step:08d}.pt" for e in ranked)
    assert {e.checkpoint for e in watch.history if e.checkpoint} == set(names)
    state = torch.load(tmp_path / names[0], weights_only=True)
    assert state.keys() == {"weight"}

    rows = list(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[2]["score"]) == watch.history[2].score
    content = json.loads((tmp_path / "history.json").read_text())
    assert content["best_step"] == 3
    assert content["evaluations"][2]["checkpoint"] == "dse-step-00000003.pt"


def test_an_own_way_to_save(tmp_path: Path) -> None:
    saved = []

    def save(path: Path) -> None:
        saved.append(path.name)
        path.write_text("mine")

    watch = monitor([1.0, 2.0, 0.5], folder=tmp_path, keep=1, save=save)
    run(watch, 3)
    assert saved == ["dse-step-00000001.pt", "dse-step-00000002.pt"]
    assert [p.read_text() for p in tmp_path.glob("*.pt")] == ["mine"]


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    straight = monitor(RISE_AND_FALL, folder=tmp_path / "a", keep=2)
    run(straight, 8)

    first = monitor(RISE_AND_FALL, folder=tmp_path / "b", keep=2)
    run(first, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    run_on = first.step(5)  # lost, as after a crash
    assert run_on is not None
    second = monitor(RISE_AND_FALL[4:], folder=tmp_path / "b", keep=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.warns(DenseDegradationWarning, match="at step 6"):
        [second.evaluate(step) for step in range(5, 9)]
    assert second.csv() == straight.csv()
    names = [sorted(p.name for p in (tmp_path / run).glob("*.pt")) for run in "ab"]
    assert names[0] == names[1]


def test_lambda_over_the_run() -> None:
    watch = monitor(RISE_AND_FALL, dim_weight="std")
    run(watch, 2)
    assert watch.current_dim_weight == 1.0
    watch.evaluate(3)
    watch.evaluate(4)
    h = watch.history
    weight = dse_ext.dse_lambda([e.class_relevance for e in h], [e.m_dim for e in h])
    assert watch.current_dim_weight == weight
    assert h[0].score == h[0].class_relevance + weight * h[0].m_dim


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    watch = monitor([1.0, math.nan, math.nan, math.nan], folder=tmp_path, keep=3)
    messages = run(watch, 4)
    assert messages == ["the dense features of the probe batch are not finite at step 4."]
    assert [e.checkpoint is not None for e in watch.history] == [True, False, False, False]
    assert json.loads(watch.json())["evaluations"][1]["score"] is None
    assert watch.best is not None
    assert watch.best.step == 1


def test_plot() -> None:
    watch = monitor(RISE_AND_FALL)
    with pytest.raises(ValueError, match="nothing to plot"):
        watch.plot()
    run(watch, 8)
    axes = watch.plot()
    assert axes.get_xlabel() == "step"
    drawn = axes.containers[0].lines[0].get_ydata()
    assert list(drawn) == [e.score for e in watch.history]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"keep": 0}, "keep must be >= 1, got 0"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"replicates": 2}, "replicates must be >= 3, got 2"),
        ({"noise_factor": -1.0}, "noise_factor must be >= 0"),
        ({"dim_weight": "sd"}, "dim_weight must be a number or 'std', got 'sd'"),
        ({"variant": "eq5"}, "variant must be one of"),
        ({"global_clusters": 0}, "global_clusters must be >= 1"),
        ({"layer": "weight"}, "give layer or extract, not both"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor([1.0], **options)


def test_bad_probe_and_layer() -> None:
    with pytest.raises(ValueError, match=r"probe must be images .* got \(3, 8\)"):
        DSEMonitor(nn.Linear(8, 8), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="layer must be the name of a module"):
        DSEMonitor(nn.Sequential(nn.Conv2d(1, 2, 1)), PROBE, layer="conv")


def test_class_relevance() -> None:
    e = Evaluation(1, 0.5, 0.2, 0.4, 0.1, 1.0)
    assert e.class_relevance == pytest.approx(0.2)
