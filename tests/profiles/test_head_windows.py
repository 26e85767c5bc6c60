"""What windows would do to heads, in a profile: averages by hand, files, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_fx.plans.skip_plan import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.profiles.head_windows import HeadWindows
from adaskip_fx.profiles.profile import Profile, ProfileError
from tests.support.profiles import profile

WINDOWS = (Window(6, 2), Window(30, 0))
HEADS = {Sublayer(0, "attention"): 2, Sublayer(2, "attention"): 1}  # layers may differ


def head_windows(samples: int = 1, **changes: Any) -> HeadWindows:
    sums = np.random.default_rng(0).uniform(0.1, 1, (samples, 3, 2, 3))
    sums[..., 2] = 4
    return HeadWindows(**{"windows": WINDOWS, "kv_heads": HEADS, "statistics": sums, **changes})


def with_windows() -> Profile:
    return dataclasses.replace(profile(3), windows=head_windows())


def test_averages_are_over_the_tokens_of_all_samples() -> None:
    """Written out token by token: six tokens in two texts, one of which is short."""
    tokens = np.array([[0.0, 0.2, 0.4, 0.1], [0.0, 0.3, np.nan, np.nan]])
    sums = [[np.nansum(t), np.nansum(t**1.5), np.isfinite(t).sum()] for t in tokens]
    one = {Sublayer(0, "attention"): 1}
    found = HeadWindows(WINDOWS[:1], one, np.array(sums)[:, None, None])
    every = [0.0, 0.2, 0.4, 0.1, 0.0, 0.3]
    (head,) = found.heads
    assert head == (Sublayer(0, "attention"), 0)
    assert found.dissimilarity(WINDOWS[0], "mean")[head] == pytest.approx(np.mean(every))
    power = np.mean([t**1.5 for t in every]) ** (2 / 3)
    assert found.dissimilarity(WINDOWS[0]) == {head: pytest.approx(power)}
    assert np.mean(every) < power < max(every)


def test_heads_are_in_the_order_of_the_sublayers() -> None:
    found = head_windows()
    names = [f"{sublayer} {head}" for sublayer, head in found.dissimilarity(WINDOWS[1])]
    assert names == ["0.attention 0", "0.attention 1", "2.attention 0"]
    means = found.dissimilarity(WINDOWS[1], "mean").values()
    assert list(means) == pytest.approx(found.statistics[0, :, 1, 0] / 4)


def test_profiles_with_windows_are_saved_copied_and_compared(tmp_path: Path) -> None:
    one = with_windows()
    one.save(tmp_path / "p")
    for twin in (Profile.load(tmp_path / "p"), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one
        assert twin.windows is not None
        assert one.windows is not None
        assert twin.windows.windows == WINDOWS
        assert dict(twin.windows.kv_heads) == HEADS
        np.testing.assert_array_equal(twin.windows.statistics, one.windows.statistics)
    changed = head_windows().statistics.copy()
    changed[0, 1, 1, 0] += 1e-9
    for other in (
        profile(3),
        dataclasses.replace(one, windows=head_windows(statistics=changed)),
        dataclasses.replace(one, windows=head_windows(windows=(Window(6, 2), Window(31, 0)))),
    ):
        assert other != one


def test_a_profile_without_windows_is_saved_as_before(tmp_path: Path) -> None:
    profile(3).save(tmp_path / "p")
    assert "windows" not in (tmp_path / "p" / "profile.json").read_text("utf-8")
    assert Profile.load(tmp_path / "p").windows is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["windows"]["windows"][0].update(tokens=7), "edited after it was saved"),
        (lambda d: d["windows"]["windows"][0].update(tokens=0), "not a valid profile .*a window's"),
        (lambda d: d["windows"].pop("kv_heads"), "windows must be an object with windows and kv_h"),
        (lambda d: d["windows"]["kv_heads"].reverse(), "edited after it was saved"),
        (lambda d: d["windows"]["kv_heads"].pop(), "not a valid profile .*windows have shape"),
        (lambda d: d.pop("windows"), "edited after it was saved"),
        (lambda d: d.update(windows=None), "not a valid profile"),
    ],
)
def test_files_that_were_edited(tmp_path: Path, edit: Any, message: str) -> None:
    with_windows().save(tmp_path / "p")
    document = tmp_path / "p" / "profile.json"
    data = json.loads(document.read_text("utf-8"))
    edit(data)
    document.write_text(json.dumps(data), "utf-8")
    with pytest.raises(ProfileError, match=message):
        Profile.load(tmp_path / "p")


def broken(value: float, statistic: int) -> Any:
    sums = head_windows().statistics.copy()
    sums[0, 2, 1, statistic] = value
    return sums


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"statistics": np.ones((1, 3, 2, 2))},
            r"windows have shape \[1, 3, 2, 2\], expected \[samples, 3 K/V heads, 2 windows, 3\]",
        ),
        ({"statistics": np.ones((0, 3, 2, 3))}, r"windows have shape \[0, 3, 2, 3\]"),
        ({"statistics": broken(np.nan, 0)}, "2.attention, K/V head 0: windows have a number that"),
        (
            {"statistics": broken(-1, 1)},
            "2.attention, K/V head 0: .* negative or not finite, or no",
        ),
        ({"statistics": broken(0, 2)}, "2.attention, K/V head 0: .* or no tokens"),
        ({"windows": (WINDOWS[0],) * 2}, "windows that were measured differ, and have no full h"),
        ({"windows": (WINDOWS[0], Window(9, 1, (0,)))}, "differ, and have no full heads"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        head_windows(**changes)


def test_windows_of_another_model_or_other_texts() -> None:
    with pytest.raises(ProfileError, match=r"measured of 2.attention, which is no attention here"):
        dataclasses.replace(profile(2), windows=head_windows())
    ffn = {Sublayer(0, "ffn"): 3}
    with pytest.raises(ProfileError, match=r"measured of 0.ffn, which is no attention here"):
        dataclasses.replace(profile(3), windows=head_windows(kv_heads=ffn))
    with pytest.raises(ProfileError, match="measured on 2 samples, the rest on 1"):
        dataclasses.replace(profile(3), windows=head_windows(samples=2))
