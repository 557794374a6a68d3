"""Fits, rows, tables and the figure of `dse-ext bench`."""

from __future__ import annotations

import json

import pytest

from dse_ext.bench.case import Case, group_shape
from dse_ext.bench.operation import Agreement
from dse_ext.bench.results import exponents, markdown, row_of, speedups, tables
from dse_ext.bench.scaling import AXES, axis_value, fit_exponent, scaling_cases
from dse_ext.bench.timing import Measurement


def test_a_power_law_is_found_exactly():
    sizes = [1, 2, 4, 8]
    fit = fit_exponent(sizes, [3 * size**1.5 for size in sizes])
    assert fit.value == pytest.approx(1.5)
    assert fit.error == pytest.approx(0, abs=1e-12)
    assert (fit.lowest, fit.highest) == (pytest.approx(1.5), pytest.approx(1.5))
    assert str(fit) == "1.50 ± 0.00"


def test_a_bend_shows_in_the_spread():
    fit = fit_exponent([4, 1, 2], [8.0, 1.0, 1.0])  # any order
    assert fit.value == pytest.approx(1.5)
    # Residuals of a line through (0, 0), (1, 0), (2, 3) in powers of two: ½, -1, ½.
    assert fit.error == pytest.approx((1.5 / 1 / 2) ** 0.5)
    assert (fit.lowest, fit.highest) == (pytest.approx(0), pytest.approx(3))


def test_two_points_have_no_error():
    fit = fit_exponent([1, 10], [1.0, 100.0])
    assert fit.value == pytest.approx(2)
    assert fit.error is None
    assert str(fit) == "2.00"


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([1], [1.0], "two sizes"),
        ([1, 2], [1.0], "two sizes"),
        ([1, 1], [1.0, 2.0], "different"),
        ([0, 1], [1.0, 2.0], "positive"),
        ([1, 2], [1.0, 0.0], "positive"),
    ],
)
def test_what_has_no_exponent_is_an_error(sizes, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit_exponent(sizes, seconds)


@pytest.mark.parametrize("quick", [True, False])
def test_an_axis_varies_alone(quick):
    found = scaling_cases(Case("dse_components", (1, 1, 1)), quick=quick)
    assert tuple(found) == AXES
    for axis, cases in found.items():
        values = [axis_value(case) for case in cases]
        assert [name for name, _ in values] == [axis] * len(cases)
        assert len({value for _, value in values}) == len(cases) >= (3 if quick else 4)
        others = {
            (*(size for i, size in enumerate(case.shape) if "BNd"[i] != axis),
             None if axis == "k" else case.clusters)
            for case in cases
        }  # fmt: skip
        assert len(others) == 1


def test_groups_are_of_eight_images():
    assert group_shape((64, 196, 384)) == (8, 1568, 384)
    assert group_shape((6, 16, 8)) == (1, 96, 8)


def test_a_case_survives_json():
    case = Case("kmeans", (2, 50, 8), "forward", threads=2, part="threads")
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def measured(case: Case, **milliseconds: list[float]) -> dict:
    seconds = {key: [value / 1e3 for value in values] for key, values in milliseconds.items()}
    return row_of(Measurement(case, seconds=seconds))


def test_a_row_has_medians_quartiles_and_ratios():
    row = measured(Case("kmeans", (2, 50, 8)), dse_ext=[2, 1, 3, 4, 5], faiss=[6], sklearn=[])
    assert row["median_ms"] == {"dse_ext": 3, "faiss": 6}
    assert row["iqr_ms"] == {"dse_ext": 2, "faiss": 0}
    assert row["rounds"] == {"dse_ext": 5, "faiss": 1}
    assert row["ratio"] == {"faiss": 2}
    assert json.loads(json.dumps(row)) == row


def test_a_row_without_ours_has_no_ratio():
    assert measured(Case("kmeans", (2, 50, 8)), faiss=[6])["ratio"] == {}


@pytest.fixture
def rows() -> list[dict]:
    case = Case("kmeans", (2, 50, 8), "forward")
    found = Measurement(
        case,
        seconds={"dse_ext": [0.002], "sklearn": [0.008]},
        agreements={"sklearn": [Agreement("inertia", 0.01, 0.05)]},
        left_out={"faiss": "it failed"},
        extra_peak_bytes={"dse_ext": 3 << 20},
    )
    scaling = [
        measured(
            Case("dse_components", (8, size, 16), part="scaling N"),
            dse_ext=[float(size)],
            batched=[float(size * size)],
        )
        for size in (2, 4, 8)
    ]
    threads = [
        measured(Case("effective_rank", (90, 8), part="threads", threads=count), dse_ext=[time])
        for count, time in ((1, 3.0), (2, 2.0))
    ]
    return [row_of(found), *scaling, *threads]


SHARE = {
    "model": "ViT-Ti/16", "images": 8, "shape": [8, 196, 192], "step": "what is inside",
    "backbone_ms": 190.0, "dse_ms": 10.0, "share": 0.05,
}  # fmt: skip


def test_exponents_and_speedups_come_from_their_parts(rows):
    fits = {fit["implementation"]: fit for fit in exponents(rows)}
    assert fits["dse_ext"]["exponent"] == 1
    assert fits["batched"]["exponent"] == 2
    assert fits["batched"]["sizes"] == [2, 4, 8]
    (speedup,) = speedups(rows)
    assert speedup["speedup"] == 1.5
    assert exponents(rows[:2]) == []  # one point
    assert speedups(rows[:-1]) == []  # one number of threads


def test_the_long_table_has_a_line_an_implementation(rows):
    table = tables(rows, [SHARE], long=True)[0]
    assert table.title == "kmeans (float32, cpu, threads: 1)"
    assert table.header == ["step", "input", "(G, n, d)", "k", "", "ms", "ratio", "MiB"]
    assert table.lines == [
        ["forward", "mixture", "(2, 50, 8)", "24", "dse-ext", "2.0", "", "3"],
        ["", "", "", "", "scikit-learn", "8.0", "4.0×", "–"],
    ]
    assert table.notes[0].endswith("what is allowed: scikit-learn 1.0e-02 of 5e-02")
    assert table.notes[-1] == "faiss left out at (2, 50, 8) forward: it failed"


def test_every_part_has_a_table(rows):
    found = tables(rows, [SHARE])
    assert [table.title.split(" ")[0] for table in found] == [
        "kmeans", "threads", "scaling", "share",
    ]  # fmt: skip
    for table in found:
        assert all(len(line) == len(table.header) for line in table.lines)
        assert len({len(line) for line in markdown(table).splitlines()}) == 1
    assert found[-1].notes == ["what is inside"]
    assert tables([]) == []


def test_the_figure_has_a_panel_for_each_part(rows):
    pytest.importorskip("matplotlib")
    from dse_ext.bench.figure import bench_figure

    results = {
        "rows": rows,
        "scaling": exponents(rows),
        "shares": [SHARE],
        "titles": {
            "kmeans": {"dse_ext": "dse-ext", "sklearn": "scikit-learn"},
            "dse_components": {"dse_ext": "dse-ext", "batched": "batched PyTorch"},
        },
        "machine": {"cpu": "Test CPU", "threads": 1, "torch": "2.15", "dse_ext": "0.1"},
    }
    figure = bench_figure(results)
    assert len(figure.axes) == 3
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["scikit-learn"]
    assert len(bench_figure({**results, "shares": []}).axes) == 2
    with pytest.raises(ValueError, match="no ratio"):
        bench_figure({**results, "rows": []})
