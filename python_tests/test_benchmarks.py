"""The benchmark suite itself: cases, memory measurement, report."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import cases, report  # noqa: E402
from dse_ext.bench.case import Case  # noqa: E402
from dse_ext.bench.memory import extra_peak_bytes  # noqa: E402
from dse_ext.bench.registry import OPERATIONS  # noqa: E402
from dse_ext.bench.share import BACKBONES  # noqa: E402


def entry(
    key: str,
    seconds: list[float],
    mode: str = "training",
    case: Case | None = None,
    difference: float = 1e-5,
    **info: object,
) -> dict:
    own = case or Case("dse_components", (64, 196, 384), mode, threads=2)
    agreement = {"quantity": "loss", "difference": difference, "tolerance": 1e-4}
    facts = {
        "implementation": key,
        "case": own.to_dict(),
        "agreements": [] if key == "dse_ext" else [agreement],
    }
    return {"extra_info": facts | info, "stats": {"data": seconds}}


@pytest.fixture
def measured() -> dict:
    """A report as pytest-benchmark writes it: two turns of each of three implementations."""
    return {
        "machine_info": {"dse": {"cpu": "Test CPU", "threads": 2, "torch": "2.15", "lightly": "1"}},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [
            entry("dse_ext", [0.100, 0.102], extra_peak_bytes=30 * 2**20),
            entry("batched", [0.5], extra_peak_bytes=90 * 2**20),
            entry("lightly", [1.2], extra_peak_bytes=60 * 2**20),
            entry("lightly", [1.0]),
            entry("batched", [0.7]),
            entry("dse_ext", [0.098, 0.1]),
            entry("dse_ext", [0.05], mode="forward"),
            entry("lightly", [0.9], mode="forward"),
            {"extra_info": {}, "stats": {"data": [1.0]}},  # another suite's
        ],
    }


def test_summary_pools_the_turns_and_compares_medians(measured):
    summary = report.summarize(measured)
    training, forward = summary["rows"]
    assert training["median_ms"] == {"dse_ext": 100, "batched": 600, "lightly": 1100}
    assert training["rounds"] == {"dse_ext": 4, "batched": 2, "lightly": 2}
    assert training["ratio"] == {"batched": 6, "lightly": 11}
    assert training["extra_peak_bytes"]["dse_ext"] == 30 * 2**20
    assert forward["ratio"] == {"lightly": 18}
    assert forward["extra_peak_bytes"] == {}
    assert summary["machine"]["cpu"] == "Test CPU"


def test_a_peer_that_computes_something_else_has_no_time(measured):
    measured["benchmarks"].append(entry("batched", [0.01], difference=0.1))
    row = report.summarize(measured)["rows"][0]
    assert "batched" not in row["median_ms"]
    assert row["ratio"] == {"lightly": 11}
    assert row["agreement"]["batched"][0]["difference"] == 0.1


def test_the_first_table_has_every_case_under_the_name_of_the_machine(measured):
    facts, _, title, _, header, rule, *rest = report.render(report.summarize(measured)).splitlines()
    lines = rest[: rest.index("")]
    assert "Test CPU, 2 threads, torch 2.15, lightly 1" in facts
    assert title == "### dse_components (float32, cpu, threads: 2)"
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    training = dict(zip(cells[0], cells[1], strict=True))
    assert training["step"] == "training"
    assert training["(B, N, d)"] == "(64, 196, 384)"
    assert training["dse-ext, ms"] == "100.0"
    assert training["× lightly"] == "11.0"
    assert training["× batched PyTorch"] == "6.0"
    assert training["memory dse-ext, MiB"] == "30"
    assert dict(zip(cells[0], cells[2], strict=True))["batched PyTorch, ms"] == "–"


def test_the_other_parts_have_tables_of_their_own(measured):
    more = [
        entry(
            "dse_ext", [0.1 * count], case=Case("dse_components", (count, 9, 8), part="scaling B")
        )
        for count in (1, 2, 4)
    ]
    for threads, seconds in ((1, 0.3), (2, 0.2)):
        case = Case("kmeans", (2, 50, 8), "forward", part="threads", threads=threads)
        more.append(entry("dse_ext", [seconds], case=case))
    share = {
        "model": "ViT-S/16", "images": 32, "shape": [32, 196, 384], "backbone_ms": 900.0,
        "dse_ms": 100.0, "share": 0.1, "step": "forward and backward",
    }  # fmt: skip
    measured["benchmarks"] += [*more, {"extra_info": {"share": share}, "stats": {"data": [3.0]}}]
    summary = report.summarize(measured)
    assert summary["scaling"][0]["exponent"] == 1
    assert summary["threads"][0]["speedup"] == 1.5
    assert summary["shares"] == [share]
    text = report.render(summary)
    assert "1.00 ± 0.00" in text
    assert re.search(r"\(32, 196, 384\) +\| +900 +\| +100.0 +\| +10.0", text)
    assert "- forward and backward" in text


@pytest.mark.parametrize(
    ("ratio", "memory_ratio", "failures"),
    [
        (None, None, []),
        (11, 0.5, []),
        (11.5, None, [r"training mixture (64, 196, 384): 11.00× faster than lightly"]),
        (None, 0.4, [r"0.50× the extra peak memory of lightly, allowed 0.4×"]),
        (12, 0.1, ["faster than lightly, required 12×", "allowed 0.1×"]),
    ],
)
def test_requirements(measured, ratio, memory_ratio, failures):
    found = report.unmet(report.summarize(measured), "lightly", ratio, memory_ratio)
    assert len(found) == len(failures)
    for expected, line in zip(failures, found, strict=True):
        assert expected in line


def test_requirements_fail_where_nothing_was_measured(measured):
    kept = [b for b in measured["benchmarks"] if b["extra_info"].get("implementation") == "dse_ext"]
    summary = report.summarize(measured | {"benchmarks": kept})
    assert report.unmet(summary, "lightly", None, None) == []
    assert report.unmet(summary, "lightly", 1, 1) == [
        "no ratio against lightly was measured",
        "no memory against lightly was measured",
    ]


def test_main_prints_writes_and_gates(measured, tmp_path, monkeypatch, capsys):
    path = tmp_path / "latest.json"
    path.write_text(json.dumps(measured))
    assert report.main([str(path)]) == 0
    assert "× lightly" in capsys.readouterr().out
    summary = json.loads((tmp_path / "latest-summary.json").read_text())
    assert summary == report.summarize(copy.deepcopy(measured))

    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.main([str(path), "--save", "two-cores"]) == 0
    assert json.loads((tmp_path / "results" / "two-cores.json").read_text()) == summary
    assert report.main([str(path), "--require", "10", "--require-memory", "1"]) == 0
    assert report.main([str(path), "--require", "20"]) == 1
    assert "Requirement not met" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("not json", "Expecting value"),
        ('{"benchmarks": []}', "has no benchmark of this suite"),
        (json.dumps({"benchmarks": [entry("lightly", [1.0])]}), "was not measured for dse_ext"),
    ],
)
def test_main_says_what_is_wrong_with_a_report(content, message, tmp_path, capsys):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixture", "random"])
def test_features_come_from_the_seed(kind):
    z = cases.make_features(kind, (3, 5, 7))
    assert z.shape == (3, 5, 7)
    assert z.dtype == torch.float32
    assert torch.equal(z, cases.make_features(kind, (3, 5, 7)))
    assert not torch.equal(z, cases.make_features(kind, (3, 5, 7), seed=1))
    with pytest.raises(ValueError, match="kind must be 'mixture' or 'random', got 'gauss'"):
        cases.make_features("gauss", (3, 5, 7))


def test_mixture_is_clustered_and_random_is_not():
    import dse_ext

    shape = (8, 40, 32)
    spread = {}
    for kind in ("mixture", "random"):
        c = dse_ext.dse_components(cases.make_features(kind, shape))
        spread[kind] = c.m_intra_batch.item() / c.m_inter.item()
    assert spread["mixture"] < 0.8 * spread["random"]


@pytest.mark.parametrize("key", list(cases.IMPLEMENTATIONS))
@pytest.mark.parametrize("mode", cases.MODES)
def test_every_regularizer_runs_both_steps(key, mode):
    if key == "lightly":
        pytest.importorskip("lightly")
    z = cases.make_features("mixture", (9, 12, 8)).requires_grad_(mode == "training")
    loss = cases.run(cases.IMPLEMENTATIONS[key].build(), z, mode)
    assert loss.isfinite()
    assert loss.requires_grad == (mode == "training")
    assert (z.grad is not None) == (mode == "training")


def test_cases_include_every_shape_in_both_modes():
    mixture = {(c.shape, c.mode) for c in cases.REGULARIZER_CASES if c.kind == "mixture"}
    assert mixture == {(shape, mode) for shape in cases.SHAPES for mode in cases.MODES}
    operations = {case.operation for case in cases.OPERATION_CASES}
    assert operations == OPERATIONS.keys() - {"dse_components"}
    everything = [
        *cases.REGULARIZER_CASES, *cases.OPERATION_CASES, *cases.SCALING_CASES,
        *cases.THREADS_CASES, *cases.COMPILED_CASES,
    ]  # fmt: skip
    # One point may belong to several axes; a benchmark has a name of its own all the same.
    assert len({(case.part, case.name) for case in everything}) == len(everything)
    case = Case("kmeans", (8, 1568, 384), "forward", threads=2)
    assert case.name == "kmeans-forward-mixture-8x1568x384-k24-float32-cpu-t2"


def test_implementations_take_turns_in_opposite_orders():
    pytest.importorskip("pytest_benchmark")
    from benchmarks.turns import turns

    def order(**options):
        params = turns([one, other], lambda case: ["a", "b"], **options)
        return ["".join(map(str, (p.values[0], p.values[1].shape[0], p.values[2]))) for p in params]

    one, other = Case("effective_rank", (1, 8)), Case("effective_rank", (2, 8))
    assert order() == ["01a", "01b", "02a", "02b", "11b", "11a", "12b", "12a"]
    assert order(case_by_case=True) == ["01a", "01b", "11b", "11a", "02a", "02b", "12b", "12a"]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
def test_memory_of_a_step_is_measured_in_its_own_process():
    own = [Case("dse_components", shape) for shape in ((8, 128, 256), (32, 128, 256))]
    extra = extra_peak_bytes("dse_ext", own)
    for case in own:
        if extra[case] is None:
            pytest.skip("this kernel does not let a process reset its high-water mark")
        size = 4 * torch.Size(case.shape).numel()
        # The gradient, as large as the input, and a few temporaries of that size.
        assert 0.9 * size < extra[case] < 30 * size


@LINUX
def test_memory_of_what_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"measuring the memory of dse_ext failed: .*status 1"):
        extra_peak_bytes("dse_ext", [Case("dse_components", (0, 16, 8))])


KNOWN_ALLOCATIONS = """
import torch
from dse_ext.bench import memory
from dse_ext.bench.case import Case
from dse_ext.bench.operation import Contestant, Implementation
from dse_ext.bench.registry import OPERATIONS

def step():
    kept = torch.ones(40 * 2**18)  # 40 MiB
    torch.ones(20 * 2**18)  # 20 MiB, freed at once
    torch.ones(30 * 2**18)  # 30 MiB, for which the 20 MiB are no use
    return kept[0]

known = Implementation("known", lambda case, x: Contestant(lambda seed: None, step))
OPERATIONS["dse_components"].implementations["known"] = known
print(memory._in_a_fork("known", Case("dse_components", (8, 64, 256))))
"""


@LINUX
def test_memory_is_that_of_known_allocations():
    run = [sys.executable, "-c", KNOWN_ALLOCATIONS]
    extra = subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    if extra.strip() == "None":
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert int(extra) / 2**20 == pytest.approx(40 + 30, abs=3)


@pytest.mark.slow
def test_the_suite_runs_from_end_to_end(tmp_path):
    for package in ("pytest_benchmark", "lightly", "sklearn", "faiss", "scipy", "timm"):
        pytest.importorskip(package)
    path = tmp_path / "latest.json"
    run = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:xdist"]
    subprocess.run(
        # Compiling takes minutes; what it is made of is tested in test_bench_timing.py.
        [*run, "-k", "not compiled", f"--benchmark-json={path}"],
        cwd=ROOT,
        # Where several processes share the tests, pytest-benchmark would switch itself off.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        | {"DSE_BENCH_QUICK": "1", "DSE_BENCH_THREADS": "1"},
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(path)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "(6, 16, 8)" in done.stdout
    summary = json.loads((tmp_path / "latest-summary.json").read_text())
    assert summary["machine"]["threads"] == 1
    assert summary["machine"]["torch"] == torch.__version__
    rows = [row for row in summary["rows"] if row["part"] == "operations"]
    assert {row["operation"] for row in rows} == OPERATIONS.keys()
    for row in rows:
        able = {
            key
            for key, implementation in OPERATIONS[row["operation"]].implementations.items()
            if row["mode"] in implementation.modes and not implementation.compiled
        }
        assert row["median_ms"].keys() == able
        assert row["agreement"].keys() == able - {"dse_ext"}
        assert all(value > 0 for value in row["median_ms"].values())
    assert {fit["axis"] for fit in summary["scaling"]} == {"B", "N", "d", "k"}
    assert [share["model"] for share in summary["shares"]] == list(BACKBONES)
    both = [
        row for row in rows if row["kind"] == "mixture" and row["operation"] == "dse_components"
    ]
    assert {row["mode"] for row in both} == set(cases.MODES)
    assert all(
        row["extra_peak_bytes"].keys() == cases.IMPLEMENTATIONS.keys()
        for row in both
        if row["mode"] == "training" and row["extra_peak_bytes"]
    )
