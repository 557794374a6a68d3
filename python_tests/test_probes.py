"""Probes beyond the square grid in memory: streams, ignored pixels, k-NN, and whole networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torchmetrics.classification import MulticlassJaccardIndex

from dse_ext.probes import (
    KNNProbe,
    LinearProbe,
    PatchBatch,
    ProbeScore,
    ProbeSettings,
    ScoreAccumulator,
    SegmentationData,
    measure,
    patch_targets,
)
from dse_ext.probes.datasets import IGNORE
from dse_ext.probes.measure import FeaturesNotFiniteError
from dse_ext.probes.results import ProbeResults
from dse_ext.probes.store import PatchStore

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def scene(images=6, grid=(3, 5), pixels=(4, 2), classes=3, dim=8, noise=0.3, seed=0):
    """Noisy features on a grid that is not square, and the labels of their pixels."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(classes, (images, *grid), generator=generator)
    labels = patches.repeat_interleave(pixels[0], 1).repeat_interleave(pixels[1], 2)
    directions = torch.linalg.qr(
        torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    ).Q[:classes]
    features = directions[patches.flatten(1)]
    return features + noise * torch.randn(features.shape, generator=generator), labels


# ------------------------------------------------------------------ targets


def test_targets_are_the_shares_of_the_pixels_of_each_patch():
    labels = torch.tensor([[[0, 0, 1, 2], [0, 2, -1, 1], [2, 2, -1, -1], [2, 2, -1, -1]]])
    targets = patch_targets(labels, (2, 2), 3, ignore_index=-1)
    expected = torch.tensor([[0.75, 0, 0.25], [0, 0.5, 0.25], [0, 0, 1], [0, 0, 0]])
    assert torch.equal(targets.dense(3), expected)
    assert torch.equal(targets.weight(), expected.sum(dim=1))
    assert torch.equal(targets.rows(1, 3).dense(3), expected[1:3])


def test_targets_where_the_grid_does_not_divide_the_pixels():
    _, labels = scene(images=2)
    targets = patch_targets(labels[:, :11, :7], (3, 2), 3)
    assert targets.patches == 12
    torch.testing.assert_close(targets.weight(), torch.ones(12))


def test_labels_that_are_coarser_than_the_grid_are_repeated():
    labels = torch.tensor([[[0, 1], [2, 2]]])
    targets = patch_targets(labels, (4, 4), 3)
    assert targets.dense(3).argmax(dim=1).view(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 2, 2],
        [2, 2, 2, 2],
    ]


# ------------------------------------------------------------------ linear


def test_linear_probe_is_logistic_regression_of_scikit_learn():
    features, labels = scene(pixels=(1, 1), noise=0.6)
    l2 = 1e-2
    probe = LinearProbe(3, l2=l2, max_iter=500).fit(features, labels, (3, 5))
    x = features.flatten(0, 1).double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    # Its penalty is 1/(2C) on the sum of the losses, ours l2/2 on their mean.
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=2000)
    reference.fit(x, labels.flatten().numpy())
    ours = probe.patch_logits(features).flatten(0, 1).softmax(dim=1)
    np.testing.assert_allclose(ours.numpy(), reference.predict_proba(x), atol=2e-3)


def test_batches_give_what_one_tensor_gives():
    features, labels = scene(noise=0.6)
    labels[0, :6] = 255
    whole = LinearProbe(3, ignore_index=255).fit(features, labels, (3, 5))
    batches = []
    for part in ([0, 1, 2], [3], [4, 5]):
        targets = patch_targets(labels[part], (3, 5), 3, 255)
        batches.append(PatchBatch(features[part].flatten(0, 1).double(), targets))
    parts = LinearProbe(3, ignore_index=255).fit_batches(batches)
    torch.testing.assert_close(parts._mean, whole._mean)
    torch.testing.assert_close(parts._scale, whole._scale)
    one, other = (p.logits(features, (12, 10), (3, 5)).softmax(1) for p in (whole, parts))
    torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_store_gives_back_what_was_added(tmp_path, monkeypatch, memory_limit):
    monkeypatch.setattr("dse_ext.probes.store._ROWS", 7)
    features, labels = scene()
    store = PatchStore(90, 8, tmp_path, memory_limit=memory_limit)
    for part in ([0, 1], [2, 3, 4, 5]):
        targets = patch_targets(labels[part], (3, 5), 3)
        store.add(features[part].flatten(0, 1), targets)
    assert len(store) == 13
    assert isinstance(store._features, np.memmap) == (memory_limit == 0)
    assert list(tmp_path.iterdir()) == []  # a file without a name
    torch.testing.assert_close(torch.cat([b.features for b in store]), features.flatten(0, 1))
    expected = patch_targets(labels, (3, 5), 3).dense(3)
    assert torch.equal(torch.cat([b.targets.dense(3) for b in store]), expected)
    assert [b.features.shape[0] for b in store[-2:]] == [7, 6]
    with pytest.raises(IndexError):
        store[13]
    with pytest.raises(ValueError, match="room for 90 patches, got 91"):
        store.add(features[0, :1], patch_targets(labels[:1, :1, :1], (1, 1), 3))


def test_store_says_when_the_disk_is_too_small(tmp_path):
    with pytest.raises(OSError, match=r"training patches take .* GiB left: use fewer"):
        PatchStore(10**12, 10**6, tmp_path)


def test_grid_must_fit():
    features, labels = scene()
    with pytest.raises(ValueError, match=r"N = 5 x 5 = 25 positions as the grid, got 15"):
        LinearProbe(3).fit(features, labels, (5, 5))
    with pytest.raises(ValueError, match="at least one pixel that is not ignored"):
        LinearProbe(3).fit_batches([])


# ------------------------------------------------------------------ k-NN


def test_knn_votes_are_those_of_scikit_learns_neighbours():
    features, labels = scene(pixels=(2, 2), noise=0.8)
    labels[:, ::3] = (labels[:, ::3] + 1) % 3  # mixed patches
    held, _ = scene(seed=1, noise=0.8)
    k, temperature = 4, 0.1
    probe = KNNProbe(3, k=k, temperature=temperature).fit(features, labels, (3, 5))
    bank = F.normalize(features.flatten(0, 1), dim=1).numpy()
    distance, index = (
        NearestNeighbors(n_neighbors=k, metric="cosine")
        .fit(bank)
        .kneighbors(held.flatten(0, 1).numpy())
    )
    weight = np.exp((1 - distance) / temperature)
    weight /= weight.sum(axis=1, keepdims=True)
    shares = patch_targets(labels, (3, 5), 3).dense(3).numpy()
    expected = (weight[:, :, None] * shares[index]).sum(axis=1)
    np.testing.assert_allclose(probe.patch_votes(held).flatten(0, 1).numpy(), expected, atol=1e-4)


def test_knn_finds_separable_classes_and_not_noise():
    features, labels = scene(noise=0.05)
    held, held_labels = scene(seed=1, noise=0.05)
    probe = KNNProbe(3, k=5).fit(features, labels, (3, 5))
    patch_labels = held_labels[:, ::4, ::2]
    assert probe.score(held, patch_labels, grid=(3, 5)).miou == pytest.approx(1)
    noise = torch.randn(40, 15, 8)
    _, labels = scene(images=40)
    blind = KNNProbe(3).fit(noise[:20], labels[:20], (3, 5))
    assert blind.score(noise[20:], labels[20:], grid=(3, 5)).miou < 0.35


def test_knn_ignores_what_is_not_labelled():
    features, labels = scene(noise=0.05)
    spoiled = labels.clone()
    spoiled[:, :4] = 255  # the first row of patches
    probe = KNNProbe(3, ignore_index=255).fit(features, spoiled, (3, 5))
    assert probe._bank.shape[0] == 6 * 10
    with pytest.raises(ValueError, match="at least one pixel that is not ignored"):
        KNNProbe(3, ignore_index=255).fit(features, torch.full_like(labels, 255), (3, 5))


def test_a_bank_smaller_than_k_votes_as_a_whole():
    probe = KNNProbe(2, k=50).fit_bank(torch.eye(3), torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    votes = probe.patch_votes(torch.ones(1, 3))
    torch.testing.assert_close(votes, torch.tensor([[2 / 3, 1 / 3]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"temperature": 0}, "temperature must be > 0, got 0"),
    ],
)
def test_bad_arguments_of_knn_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        KNNProbe(**{"num_classes": 3, **arguments})


def test_knn_needs_a_bank():
    with pytest.raises(RuntimeError, match="fit the probe"):
        KNNProbe(3).patch_votes(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"shapes \(M, d\) and \(M, 3\), got \(4, 2\) and \(4, 2"):
        KNNProbe(3).fit_bank(torch.zeros(4, 2), torch.zeros(4, 2))


# ------------------------------------------------------------------ networks


class Scenes:
    """Images of three flat colours with their labels, of differing sizes."""

    def __init__(self, count, seed, spoil=False):
        self.items = []
        rng = np.random.default_rng(seed)
        for i in range(count):
            height, width = (24, 40) if i % 2 else (32, 30)
            labels = np.repeat(np.repeat(rng.integers(0, 3, (2, 2)), height // 2, 0), width // 2, 1)
            pixels = np.eye(3)[labels] * 150 + rng.integers(0, 60, (height, width, 3))
            labels = labels.astype(np.int16)
            labels[:2] = IGNORE
            if spoil:
                pixels[:] = rng.integers(0, 255, pixels.shape)
            self.items.append((Image.fromarray(pixels.astype(np.uint8)), labels))

    def __len__(self):
        return len(self.items)

    def load(self, index):
        return self.items[index]


class Colours:
    """A "network" whose features are the mean colours of 4 x 8 pixels."""

    def __init__(self, scale=1.0):
        self.scale = scale
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        cells = F.avg_pool2d(images, (4, 8)) * self.scale
        dense = cells.flatten(2).transpose(1, 2)
        return dense.mean(dim=1), dense

    def grid(self, height, width):
        return height // 4, width // 8


DATA = SegmentationData("colours", ("red", "green", "blue"), Scenes(12, 0), Scenes(7, 1))
SETTINGS = ProbeSettings(image_size=(32, 48), bank=200)


def test_networks_are_measured_at_the_pixels_own_resolution():
    calls = []
    network = Colours()
    scores = measure(
        network,
        DATA,
        SETTINGS,
        mean=MEAN,
        std=STD,
        batch_size=5,
        progress=lambda *call: calls.append(call),
    )
    assert network.seen == 12 + 7  # both probes see one pass over each split
    assert list(scores) == ["linear", "knn"]
    for score in scores.values():
        # What is missing is lost at the borders, in the interpolation.
        assert 0.75 < score.miou <= 1
    assert calls[0] == ("training images", 0, 12)
    assert calls[-1] == ("validation images", 7, 7)
    again = measure(Colours(), DATA, SETTINGS, mean=MEAN, std=STD, batch_size=5)
    assert again == scores
    spoiled = SegmentationData("noise", DATA.classes, Scenes(12, 0, True), Scenes(7, 1, True))
    for score in measure(Colours(), spoiled, SETTINGS, mean=MEAN, std=STD).values():
        assert score.miou < 0.4


def test_a_file_of_features_changes_nothing(tmp_path):
    options = {"mean": MEAN, "std": STD}
    one = measure(Colours(), DATA, SETTINGS, **options)
    two = measure(Colours(), DATA, SETTINGS, **options, folder=tmp_path, memory_limit=0)
    assert one == two


def test_one_probe_and_fewer_images():
    network = Colours()
    settings = ProbeSettings(("knn",), (32, 48), train_images=6, val_images=3, bank=10)
    scores = measure(network, DATA, settings, mean=MEAN, std=STD)
    assert list(scores) == ["knn"]
    assert network.seen == 9


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(FeaturesNotFiniteError):
        measure(Colours(float("nan")), DATA, SETTINGS, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": ("mlp",)}, "probes must be some of linear, knn, got"),
        ({"probes": ()}, "probes must be some of"),
        ({"train_images": 0}, "train_images must be >= 1, got 0"),
        ({"image_size": (0, 4)}, "image_size must be positive"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**arguments)


def test_scores_are_those_of_torchmetrics():
    guess, labels = torch.randint(4, (2, 3, 8, 8))
    labels[0, :2] = IGNORE
    counts = ScoreAccumulator(4, ignore_index=IGNORE)
    for one, other in zip(guess, labels, strict=True):
        counts.update(one, other)
    metric = MulticlassJaccardIndex(4, ignore_index=IGNORE)
    assert counts.compute().miou == pytest.approx(float(metric(guess, labels)))
    with pytest.raises(ValueError, match="no labelled pixel"):
        ScoreAccumulator(4).compute()


# ------------------------------------------------------------------ results


def score(miou):
    return ProbeScore(miou, (miou, float("nan")), 0.9)


def test_results_are_kept_by_column():
    first = ProbeResults()
    first.begin("voc_linear", {"size": (4, 4)}, ("a", "b"))
    first.add("voc_linear", "r", "c20.pth", 20, score(0.4))
    first.add("voc_linear", "r", "c3.pth", 3, score(0.3))
    assert first.csv() == ("run,checkpoint,epoch,voc_linear\nr,c3.pth,3,0.3\nr,c20.pth,20,0.4\n")
    second = ProbeResults.read(first.csv(), first.json())
    second.begin("voc_linear", {"size": (4, 4)}, ("a", "b"))
    assert second.has("voc_linear", "r", "c3.pth")
    second.begin("ade_knn", {}, ("x", "y"))
    second.add("ade_knn", "r", "c3.pth", 3, score(0.5))
    assert second.csv() == (
        "run,checkpoint,epoch,voc_linear,ade_knn\nr,c3.pth,3,0.3,0.5\nr,c20.pth,20,0.4,\n"
    )
    assert second.miou("ade_knn", "r", "c3.pth") == 0.5
    assert second.miou("ade_knn", "r", "c20.pth") is None
    (entry, _) = json.loads(second.json())["columns"]["voc_linear"]["checkpoints"]
    assert entry["class_iou"] == [0.3, None]


def test_columns_of_others_are_kept_and_a_table_that_lacks_a_score_is_mended():
    results = ProbeResults()
    results.begin("a_knn", {}, ("a", "b"))
    results.add("a_knn", "r", "c.pth", 1, score(0.25))
    table = "run,checkpoint,epoch,mine\nr,c.pth,1,0.7\nr,d.pth,2,0.8\n"
    read = ProbeResults.read(table, results.json())
    assert read.csv() == ("run,checkpoint,epoch,mine,a_knn\nr,c.pth,1,0.7,0.25\nr,d.pth,2,0.8,\n")
    with pytest.raises(ValueError, match="column mine that was not measured by a probe"):
        read.begin("mine", {}, ("a", "b"))


def test_other_settings_are_another_column():
    results = ProbeResults()
    results.begin("a_knn", {"k": 30}, ("a", "b"))
    results.add("a_knn", "r", "c.pth", 1, score(0.25))
    with pytest.raises(ValueError, match=r"other settings \(k 30 then, 20 now\).*--name"):
        results.begin("a_knn", {"k": 20}, ("a", "b"))
    with pytest.raises(ValueError, match="other classes"):
        results.begin("a_knn", {"k": 30}, ("a", "c"))
    results.begin("a_knn", {"k": 20}, ("a", "b"), overwrite=True)
    assert not results.has("a_knn", "r", "c.pth")
    assert results.csv() == "run,checkpoint,epoch,a_knn\nr,c.pth,1,\n"


def test_runs_of_several_methods_share_a_column():
    results = ProbeResults()
    results.begin("a_knn", {"k": 30}, ("a", "b"), {"one": {"method": "dino"}})
    results.add("a_knn", "one", "c.pth", 1, score(0.25))
    results.begin("a_knn", {"k": 30}, ("a", "b"), {"two": {"method": "mae"}})
    results.add("a_knn", "two", "c.pth", 1, score(0.5))
    read = ProbeResults.read(results.csv(), results.json())
    with pytest.raises(ValueError, match=r"settings \(method 'dino' then, 'mae' now\)"):
        read.begin("a_knn", {"k": 30}, ("a", "b"), {"one": {"method": "mae"}})
    read.begin("a_knn", {"k": 30}, ("a", "b"), {"one": {"method": "mae"}}, overwrite=True)
    assert not read.has("a_knn", "one", "c.pth")
    assert read.miou("a_knn", "two", "c.pth") == 0.5
    networks = json.loads(read.json())["columns"]["a_knn"]["networks"]
    assert networks == {"one": {"method": "mae"}, "two": {"method": "mae"}}


@pytest.mark.parametrize(
    ("table", "details", "message"),
    [
        ("run,epoch\n", None, "miou.csv has no column checkpoint"),
        (None, "{", "probe.json is no JSON"),
        (None, '{"format": 2}', "probe.json must be of format 1"),
    ],
)
def test_files_that_are_no_results_are_named(table, details, message):
    with pytest.raises(ValueError, match=message):
        ProbeResults.read(table, details)
