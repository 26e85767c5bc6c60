"""Pictures: what is drawn is what the data says; bad data is refused in words."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from adaskip_fx.plans.skip_plan import Action, SkipPlan, Sublayer
from adaskip_fx.profiles.profile import Fingerprint, Profile
from benchmarks.__main__ import app
from benchmarks.plots import KINDS, PlotError, plot
from benchmarks.plots.head_map import shades
from benchmarks.plots.pareto import front
from benchmarks.plots.plan_map import fate
from benchmarks.plots.source import load
from benchmarks.plots.style import LOOKS
from benchmarks.studies import choices

NAMES = [f"{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")]
SUBLAYERS = tuple(map(Sublayer.parse, NAMES))
SIMILARITY = [0.9, 0.5, 0.99, 0.8, 0.97, 0.6]
ROW = {
    "name": "book",
    "sublayers": NAMES,
    "mean": SIMILARITY,
    "low": [v - 0.05 for v in SIMILARITY],
    "high": [v + 0.005 for v in SIMILARITY],
}
POINTS = [
    {"policy": "A", "skipped": 8, "speedup": {"prefill": 1.1, "decode": 1.2}, "quality": 1.2},
    {
        "policy": "A",
        "compensation": "scale",
        "skipped": 15,
        "speedup": {"prefill": 1.3, "decode": 1.4},
        "quality": {"prefill": 1.7, "decode": 1.9},
    },
    {"policy": "B", "alpha": 1.25, "speedup": {"prefill": 1.2}, "quality": 3.0},
]
GROWTH = [
    {"compensation": c, "skipped": k, "error": f * k, "error_sum": f * k * 2}
    | {"kl": f * k * k, "kl_sum": f * k}
    for c, f in (("none", 0.1), ("scale", 0.05))
    for k in (2, 1, 3)
]
MATRIX = {
    "value_name": "hit rate",
    "panels": [
        {"title": t, "rows": ["a", "b"], "columns": ["a", "b", "c"], "values": v}
        for t, v in (("one", [[1, 0.5, 0.25], [0.75, 1, 0]]), ("two", [[1, 1, 1], [0, 0, 0]]))
    ],
}
WINDOW = [
    {"text": t, "window": w, "hit_rate": 0.5, "precision": None, "recall": 1 - 1 / w}
    for t in ("a", "b")
    for w in (20, 5)
]
PLANS = [
    {
        "name": "mine",
        "sublayers": NAMES,
        "prefill": {"0.attention": "skip", "1.ffn": "skip"},
        "decode": {"0.attention": "skip", "1.ffn": "skip", "2.ffn": "skip"},
    }
]
MAPS = [
    {
        "name": "heads",
        "heads": {"0.attention": 2, "2.attention": 3},
        "order": [["2.attention", [1]], ["0.attention", [0, 1]]],
    }
]
SHARES = {
    "full": {"tasks": {"passkey": {"mean": 0.9}}},
    "rows": [
        {
            "way": way,
            "share": share,
            "texts": {"a": {"kl": loss * share}, "b": {"kl": 3 * loss * share}},
            "tasks": {"passkey": {"mean": 0.5, "standard_error": 0.1}},
        }
        for way, loss in (("heads", 0.01), ("layers", 0.02))
        for share in (0.7, 0.4)
    ],
}
DATA: dict[str, Any] = {
    "similarity": {"rows": [ROW]},
    "pareto": POINTS,
    "plans": {"plans": PLANS},
    "growth": {"rows": GROWTH},
    "matrix": MATRIX,
    "window": {"rows": WINDOW},
    "heads": {"maps": MAPS},
    "shares": SHARES,
}


def written(folder: Path, data: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def drawn(kind: str, tmp_path: Path, data: Any = None) -> Figure:
    """The figure itself, laid out, which `plot` would save."""
    document = load(written(tmp_path, DATA[kind] if data is None else data))
    module = importlib.import_module(f"benchmarks.plots.{KINDS[kind]}")
    figure: Figure = module.figure([document], Figure)
    figure.draw_without_rendering()
    return figure


def lines(axes: Any) -> Iterator[tuple[str, list[float], list[float]]]:
    """Label, x and y of every line."""
    for line in axes.lines:
        yield line.get_label(), list(line.get_xdata()), list(line.get_ydata())


# All kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [k if k in ("matrix", "plans") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_both_files_are_written_and_are_the_same_again(kind: str, tmp_path: Path) -> None:
    source = written(tmp_path, DATA[kind])
    first, second = (plot(kind, [source], tmp_path / name) for name in ("one", "two"))
    assert [p.name for p in first] == [f"{kind}.svg", f"{kind}.png"]
    for a, b in zip(first, second, strict=True):
        assert a.stat().st_size > 5000
        assert a.read_bytes() == b.read_bytes()
    assert b"<dc:date>" not in first[0].read_bytes()


def test_a_picture_follows_its_data(tmp_path: Path) -> None:
    """The companion of the test above: other data gives other bytes."""
    changed = [{**POINTS[0], "quality": 1.3}, *POINTS[1:]]
    a = plot("pareto", [written(tmp_path, POINTS, "a.json")], tmp_path / "a")
    b = plot("pareto", [written(tmp_path, changed, "b.json")], tmp_path / "b")
    assert a[0].read_bytes() != b[0].read_bytes()


def test_series_differ_without_their_colour() -> None:
    assert len({(marker, str(line)) for marker, line, _ in LOOKS}) == len(LOOKS)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_missing_is_named(kind: str, tmp_path: Path) -> None:
    nothing = written(tmp_path, {"other": 1}, "nothing.json")
    with pytest.raises(PlotError, match=r"nothing\.json: no '\w+' to draw; a .* is drawn from"):
        plot(kind, [nothing], tmp_path)
    data = DATA[kind]
    key = "points" if isinstance(data, list) else next(k for k in data if isinstance(data[k], list))
    entries = data if isinstance(data, list) else data[key]
    optional = ("alpha", "skipped", "compensation") if kind == "pareto" else ()
    first = next(k for k in sorted(entries[0]) if k not in optional)
    damaged = [entries[0], {k: v for k, v in entries[0].items() if k != first}]
    with pytest.raises(PlotError, match=f"entry 1 of '{key}' has no '{first}'"):
        plot(kind, [written(tmp_path, {key: damaged})], tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"gone\.json: no such file; check the path"):
        plot("pareto", [tmp_path / "gone.json"], tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(PlotError, match=r"bad\.json: cannot be read as JSON"):
        plot("pareto", [bad], tmp_path)
    with pytest.raises(PlotError, match="holds neither an object nor a list"):
        plot("pareto", [written(tmp_path, 3)], tmp_path)
    with pytest.raises(PlotError, match=f"unknown picture 'map'; there are {', '.join(KINDS)}"):
        plot("map", [bad], tmp_path)
    with pytest.raises(PlotError, match=r"no profile\.json|no such file"):
        plot("similarity", [tmp_path], tmp_path)


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"Run: pip install 'adaskip-fx\[plot\]'"):
        plot("pareto", [written(tmp_path, POINTS)], tmp_path)


def test_the_command(tmp_path: Path) -> None:
    source = written(tmp_path, POINTS)
    result = CliRunner().invoke(app, ["plot", "pareto", str(source), "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        f"wrote {tmp_path / 'o' / name}" for name in ("pareto.svg", "pareto.png")
    ]
    result = CliRunner().invoke(app, ["plot", "plans", str(source), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {source}: no 'plans' to draw; a plan map is drawn")


# Each kind -------------------------------------------------------------------------------------


def test_similarity_shows_every_sublayer(tmp_path: Path) -> None:
    heat, chart, *_ = drawn("similarity", tmp_path).axes
    (image,) = heat.images
    np.testing.assert_allclose(image.get_array(), [SIMILARITY[::2], SIMILARITY[1::2]])
    labels = [tick.get_text() for tick in heat.get_yticklabels()]
    assert labels == ["attention, book", "ffn, book"]
    numbers = [text.get_text() for text in heat.texts]
    assert numbers == [f"{100 * v:.1f}" for v in (*SIMILARITY[::2], *SIMILARITY[1::2])]
    points = next(y for _, _, y in lines(chart) if len(y) == 3)
    np.testing.assert_allclose(points, 1 - np.array(SIMILARITY[::2]))


def test_families_have_a_heat_map_each(tmp_path: Path) -> None:
    mixers = {"sublayers": ["0.mixer", "1.mixer"], "family": "mamba", "name": "book"}
    mixers |= {key: [0.5, 0.9] for key in ("mean", "low", "high")}
    figure = drawn("similarity", tmp_path, {"rows": [{**ROW, "family": "neox"}, mixers]})
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["neox", "mamba"]
    np.testing.assert_allclose(maps[1].images[0].get_array(), [[0.5, 0.9]])


def test_similarity_of_a_saved_profile(tmp_path: Path) -> None:
    samples = [[(v + d, 1.0, 1.0, 1.0, 1.0) for v in SIMILARITY] for d in (-0.01, 0.01)]
    about = (Fingerprint("0" * 16, "toy", 1, "0" * 16), {}, {})
    Profile(SUBLAYERS, np.array(samples), *about).save(tmp_path / "toy.adaskip")
    (row,) = load(tmp_path / "toy.adaskip")["rows"]
    assert (row["name"], row["sublayers"]) == ("toy", NAMES)
    np.testing.assert_allclose(row["mean"], SIMILARITY)
    np.testing.assert_allclose(row["low"], np.array(SIMILARITY) - 0.008)
    assert plot("similarity", [tmp_path / "toy.adaskip"], tmp_path)


def test_pareto_places_every_point_in_its_phase(tmp_path: Path) -> None:
    prefill, decode = drawn("pareto", tmp_path).axes
    found = {(label, x[0], y[0]) for label, x, y in lines(prefill) if label != "best of all"}
    assert found == {("A", 1.1, 1.2), ("A + scale", 1.3, 1.7), ("B", 1.2, 3.0)}
    found = {(label, x[0], y[0]) for label, x, y in lines(decode) if label != "best of all"}
    assert found == {("A", 1.2, 1.2), ("A + scale", 1.4, 1.9)}
    assert prefill.get_xlabel() == "prefill speed-up over the full model (measured, times)"
    best = {label: (x, y) for label, x, y in lines(prefill)}["best of all"]
    assert best == ([1.1, 1.3], [1.2, 1.7])
    assert {t.get_text() for t in prefill.texts} == {"8", "15", "1.25"}
    fills = {line.get_label(): line.get_fillstyle() for line in prefill.lines}
    assert (fills["A"], fills["A + scale"]) == ("none", "full")


def test_a_level_to_compare_with(tmp_path: Path) -> None:
    levels = {"by chance": 1.5, "unknown": None}
    for axes in drawn("pareto", tmp_path, {"points": POINTS, "levels": levels}).axes:
        assert {label: y[0] for label, _, y in lines(axes)}["by chance"] == 1.5
        assert "unknown" not in {label for label, _, _ in lines(axes)}


def test_the_legend_says_what_markers_and_letters_mean(tmp_path: Path) -> None:
    points = [*POINTS, {**POINTS[1], "policy": "B", "variant": "protected", "quality": 2.4}]
    figure = drawn("pareto", tmp_path, points)
    (legend,) = figure.legends
    said = [t.get_text() for t in legend.get_texts()]
    assert said == ["A", "B", "no compensation", "scale", "p: protected", "best of all"]
    assert "15p" in {t.get_text() for t in figure.axes[0].texts}
    assert "B, protected + scale" in {label for label, _, _ in lines(figure.axes[0])}
    marks = {(line.get_marker(), line.get_fillstyle()) for line in figure.axes[0].lines}
    assert {("o", "none"), ("o", "full"), ("s", "none"), ("s", "full")} <= marks


def test_no_number_is_written_over_another(tmp_path: Path) -> None:
    beside = {**POINTS[0], "skipped": 9, "quality": 1.2001}  # behind the front, in the same place
    (axes, _) = drawn("pareto", tmp_path, [beside, *POINTS]).axes
    assert {t.get_text() for t in axes.texts} == {"8", "15", "1.25"}
    (axes, _) = drawn("pareto", tmp_path, [{**beside, "quality": 2.4}, *POINTS]).axes
    assert "9" in {t.get_text() for t in axes.texts}


def test_room_is_what_there_is_on_the_picture(tmp_path: Path) -> None:
    """Speeds and qualities that hardly differ fill a panel all the same."""
    points = [
        {"policy": "A", "skipped": n, "speedup": {"prefill": 1 + n / 1e4}, "quality": 1 + n / 1e4}
        for n in range(1, 6)
    ]
    (axes,) = drawn("pareto", tmp_path, points).axes
    assert {t.get_text() for t in axes.texts} == {"1", "2", "3", "4", "5"}


def test_each_policy_and_saved_plans_have_a_look_of_their_own() -> None:
    assert len(choices.POLICIES) < len(LOOKS)


def test_hopeless_points_are_named_and_not_shown(tmp_path: Path) -> None:
    hopeless = {**POINTS[0], "policy": "Exit", "quality": 1e6}
    (axes, _) = drawn("pareto", tmp_path, [*POINTS, hopeless]).axes
    assert "off the scale (points):\nExit (1)" in [t.get_text() for t in axes.texts]
    assert axes.get_ylim()[1] < 1000


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    st.booleans(),
)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]], lower: bool) -> None:
    def better(a: tuple[int, int], b: tuple[int, int]) -> bool:
        quality = a[1] <= b[1] if lower else a[1] >= b[1]
        return a[0] >= b[0] and quality and a != b

    kept = front(points, lower)
    expected = {p for p in points if not any(better(q, p) for q in points)}
    assert {points[i] for i in kept} == expected
    assert [points[i][0] for i in kept] == sorted(p[0] for p in expected)


def test_the_front_of_four_points() -> None:
    points = [(1.0, 1.0), (1.2, 1.5), (1.1, 2.0), (1.3, 1.4)]
    assert front(points, lower_is_better=True) == [0, 3]
    assert front(points, lower_is_better=False) == [2, 1, 3]


def test_plan_map_cells(tmp_path: Path) -> None:
    (axes,) = drawn("plans", tmp_path).axes
    cells = {(round(p.get_x() + 0.5), round(p.get_y() + 0.42)): p for p in axes.patches}
    assert len(cells) == 6
    dark = {place for place, p in cells.items() if p.get_facecolor()[0] < 0.5}
    hatched = {place for place, p in cells.items() if p.get_hatch()}
    assert (dark, hatched) == ({(0, 0), (1, 1)}, {(2, 1)})
    assert [t.get_text() for t in axes.get_yticklabels()] == ["mine   attention", "ffn"]


def test_plan_map_of_a_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    SkipPlan.of(SUBLAYERS, ["0.attention"], decode_extra=["2.ffn"]).save(path)
    (plan,) = load(path)["plans"]
    assert plan["name"] == "mine"
    shown = {name: fate(plan, name) for name in NAMES}
    assert shown.pop("0.attention") == "skipped"
    assert shown.pop("2.ffn") == "skipped in decode"
    assert set(shown.values()) == {"runs"}
    kept = SkipPlan(SUBLAYERS, {SUBLAYERS[0]: Action.KV_ONLY}, {SUBLAYERS[0]: Action.RUN})
    assert fate(kept.to_json(), "0.attention") == "writes K/V only"


def test_head_map(tmp_path: Path) -> None:
    """Layer 1 has no such head; head 1 of layer 2 got its window first."""
    crossed = float("nan")
    assert str(shades(MAPS[0])) == str(
        [[0.6, crossed, 0.0], [0.6, crossed, 1.0], [crossed, crossed, 0.0]]
    )
    axes, _ = drawn("heads", tmp_path).axes
    assert axes.get_title() == "heads: dark got a window early, white sees everything"


def test_losses_by_share(tmp_path: Path) -> None:
    """A way is one line, by growing share; its loss is the mean over the texts."""
    losses, answers = drawn("shares", tmp_path).axes
    found = {label: (x, y) for label, x, y in lines(losses)}
    assert found["heads"] == ([40, 70], pytest.approx([0.008, 0.014]))
    assert found["layers"][1] == pytest.approx([0.016, 0.028])
    found = {label: y for label, _, y in lines(answers)}
    assert found["full model"] == [0.9, 0.9]
    (bars,) = answers.containers[0].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.304, 0.696])


def test_growth_lines(tmp_path: Path) -> None:
    stream, kl = drawn("growth", tmp_path).axes
    found = {label: (x, y) for label, x, y in lines(stream)}
    assert found["none: measured"] == ([1, 2, 3], pytest.approx([0.1, 0.2, 0.3]))
    assert found["scale: sum of single errors"][1] == pytest.approx([0.1, 0.2, 0.3])
    found = {label: (x, y) for label, x, y in lines(kl)}
    assert found["none: measured"][1] == pytest.approx([0.1, 0.4, 0.9])
    (legend,) = stream.figure.legends
    said = [t.get_text() for t in legend.get_texts()]
    assert said[:2] == ["no compensation", "scale"]
    assert "root" not in " ".join(label for label, _, _ in lines(stream))
    rooted = {"rows": [{**row, "error_root": 0.5} for row in GROWTH]}
    stream, _ = drawn("growth", tmp_path, rooted).axes
    found = {label: y for label, _, y in lines(stream)}
    assert found["none: root of the sum of squares"] == [0.5, 0.5, 0.5]
    assert kl.get_ylabel() == "KL to the full model, nats a token"


def test_matrix_values_are_in_their_cells(tmp_path: Path) -> None:
    first, second, *_ = drawn("matrix", tmp_path).axes
    np.testing.assert_allclose(first.images[0].get_array(), MATRIX["panels"][0]["values"])  # type: ignore[index]
    assert [t.get_text() for t in first.texts] == ["1.00", "0.50", "0.25", "0.75", "1.00", "0.00"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)
    crooked = {"panels": [{**MATRIX["panels"][0], "columns": ["a", "b"]}]}  # type: ignore[dict-item]
    with pytest.raises(PlotError, match=r"panel 'one' has \[2, 3\] values for \[2, 2\] rows"):
        drawn("matrix", tmp_path, crooked)


def test_window_shares(tmp_path: Path) -> None:
    hits, precision, recall = drawn("window", tmp_path).axes
    assert [y for _, _, y in lines(hits)] == [[0.5, 0.5], [0.5, 0.5]]
    assert all(np.isnan(y).all() for _, _, y in lines(precision))
    label, x, y = next(lines(recall))
    assert (label, x, y) == ("a", [5, 20], pytest.approx([0.8, 0.95]))
