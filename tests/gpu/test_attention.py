"""Attention's kernels against attention key by key in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adaskip_passes.attention.ops import attend_causal, causal
from adaskip_passes.decode.latent_ops import attend_latent, store_and_attend_latent
from adaskip_passes.decode.ops import EVERY, Bounds, attend, store_and_attend
from tests.support import attention_oracle as oracle
from tests.support import latent_oracle
from tests.support.eager_reference import relative_error

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", oracle.CASES)
def test_what_is_seen(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {**oracle.CASES[name], "dtype": dtype, "device": "cuda"}
    for seed in range(3 if dtype == torch.float32 else 1):
        case = oracle.make(seed, **options)
        got = attend(*case.arguments())
        assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", oracle.CASES)
def test_own_tokens_are_stored_and_seen(name: str, rotary: bool, dtype: torch.dtype) -> None:
    case = oracle.make(4, **{**oracle.CASES[name], "dtype": dtype, "device": "cuda"})
    step = oracle.step(case, rotary, by_row=name == "ragged")
    got: Any = store_and_attend(*step.arguments())
    assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]
    for buffer, stored in zip((step.keys, step.values), step.stored(), strict=True):
        assert relative_error(buffer.nan_to_num().double(), stored.double()) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 0), (64, 32), (80, 32), (96, 24), (80, 72)])
def test_kinds_of_rotation(
    dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    """Of the first numbers of a head, and of neighbours; angles are of numbers or of pairs."""
    for name in ("ragged", "several queries"):
        options: dict[str, Any] = {**oracle.CASES[name], "dim": dim}
        case = oracle.make(6, **options, dtype=dtype, device="cuda")
        whole = oracle.step(case, True, name == "ragged", rotary_dim, interleaved)
        half = oracle.of_pairs(oracle.step(case, True, name == "ragged", rotary_dim, interleaved))
        for step in (whole, half):
            got: Any = store_and_attend(*step.arguments())
            assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]
            keys, _ = step.stored()
            assert relative_error(step.keys.nan_to_num().double(), keys.double()) < DTYPES[dtype]
        other: Any = store_and_attend(*whole.arguments()[:-1], not interleaved)
        assert relative_error(other.double().cpu(), oracle.expected(case)) > DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("dim", "offset"), [(16, 1.0), (64, 0.0), (256, 1.0)])
def test_heads_are_normalized(dim: int, offset: float, rotary: bool, dtype: torch.dtype) -> None:
    """As the operator in plain torch does it, in float64 on the CPU."""
    for name in ("ragged", "several queries"):
        options: dict[str, Any] = {**oracle.CASES[name], "dim": dim}
        case = oracle.make(7, **options, dtype=dtype, device="cuda")
        arguments: Any = oracle.step(case, rotary, name == "ragged").arguments()
        norms = *(torch.randn(2, dim, device="cuda") / 4 + 1 - offset).to(dtype), 1e-5, offset
        wide = [_wide(value) for value in (*_filled(arguments), *norms)]
        got, expected = store_and_attend(*_filled(arguments), *norms), store_and_attend(*wide)
        assert relative_error(got.double().cpu(), expected) < DTYPES[dtype]
        assert (
            relative_error(arguments[1].nan_to_num().double().cpu(), wide[1].nan_to_num())
            < (DTYPES[dtype])
        )
        other = store_and_attend(*_filled(arguments), *norms[1::-1], *norms[2:])
        assert relative_error(other.double().cpu(), expected) > DTYPES[dtype]


def _filled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*arguments, 0, False)[:13]


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [False, True])
def test_padding_that_reaches_into_a_step_is_not_seen(rotary: bool, dtype: torch.dtype) -> None:
    step = oracle.padded_into(rotary, dtype, "cuda")
    got: Any = store_and_attend(*step.arguments())
    assert relative_error(got.double().cpu(), oracle.expected(step.case)) < DTYPES[dtype]
    assert (got[:, :2] == 0).all(), "nothing is seen by padding"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 17, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(8, 4, 256), (16, 2, 256), (32, 8, 128), (4, 2, 192), (8, 8, 96), (4, 1, 80)],
)
def test_wide_heads_fit(
    heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """Into shared memory, with new tokens besides."""
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "lengths": (70,)}
    case = oracle.make(1, tokens=tokens, **shape, dtype=dtype, device="cuda")
    step = oracle.step(case, rotary=True)
    for given in (step, oracle.of_pairs(oracle.step(case, rotary=True))):
        got: Any = store_and_attend(*given.arguments())
        assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(24, 8), (512, 64), (256, 32)])
@pytest.mark.parametrize("name", latent_oracle.LATENT_CASES)
def test_latents(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    case = latent_oracle.latent(1, name, sizes, dtype=dtype, device="cuda")
    got = attend_latent(*latent_oracle.latent_arguments(case))
    assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]
    arguments = latent_oracle.latent_step_arguments(oracle.step(case, rotary=False))
    got = store_and_attend_latent(*arguments)
    assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]
    stored = torch.cat(arguments[1:3], -1).nan_to_num()
    assert torch.equal(stored, case.keys.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(24, 8), (512, 64)])
@pytest.mark.parametrize("angles", ["numbers", "pairs", "complex"])
@pytest.mark.parametrize("kind", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["ragged", "several queries"])
def test_rests_of_latent_keys_are_rotated(
    name: str, kind: tuple[bool, bool], angles: str, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    case = latent_oracle.latent(1, name, sizes, dtype=dtype, device="cuda")
    step = oracle.step(case, rotary=False)
    arguments = latent_oracle.rotating_step_arguments(step, angles, name == "ragged", *kind)
    got = store_and_attend_latent(*arguments)
    assert relative_error(got.double().cpu(), oracle.expected(case)) < DTYPES[dtype]
    stored = torch.cat(arguments[1:3], -1).nan_to_num()
    assert relative_error(stored.double(), case.keys.nan_to_num().double()) < DTYPES[dtype]
    wrong = store_and_attend_latent(*arguments[:-2], not kind[0], False)
    assert relative_error(wrong.double().cpu(), oracle.expected(case)) > DTYPES[dtype]


@pytest.mark.breaks
@pytest.mark.parametrize(
    ("column", "change"), [("FIRST", 1), ("SINKS", 3), ("WINDOW", -2), ("END", -1), ("BASE", 1)]
)
def test_each_column_matters(column: str, change: int) -> None:
    """The companion."""
    case = oracle.make(3, windows=(12,), sinks=(4,), lengths=(60,), device="cuda")
    expected = oracle.expected(case)
    case.keys.nan_to_num_(0.5)
    case.values.nan_to_num_(0.5)
    bounds = case.bounds
    bounds[..., Bounds[column]] += change
    query, keys, values, _, *rest = case.arguments()
    wrong: Any = attend(query, keys, values, bounds, *rest)
    assert relative_error(wrong.double().cpu(), expected) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim"),
    [(1, 32, 8, 128), (1, 9, 3, 64), (2, 4, 1, 20), (8, 32, 8, 128), (1, 71, 1, 64)],
)
@pytest.mark.parametrize("tokens", [1, 8])
def test_long_rows(
    dtype: torch.dtype, batch: int, heads: int, kv_heads: int, dim: int, tokens: int
) -> None:
    """Of every length around the kernel's blocks, each row of another one."""
    torch.manual_seed(dim)
    room, margin = 9000, DTYPES[dtype]
    query = torch.randn(batch, heads, tokens, dim, device="cuda").to(dtype)
    shape = (room, batch, kv_heads, dim)
    keys, values = (
        torch.randn(shape, device="cuda").to(dtype).permute(1, 2, 0, 3) for _ in range(2)
    )
    for length in (1, 63, 64, 129, 1024, 8900):
        ends = [max(1, length - 40 * row) for row in range(batch)]
        table = [[(0, 0, EVERY, end, 0)] for end in ends]
        bounds = torch.tensor(table, device="cuda").unsqueeze(2)
        got = attend(query, keys, values, bounds, dim**-0.5, 0.0, None)
        for row, end in enumerate(ends):
            last = end + tokens - 1
            seen = torch.ones(tokens, last, dtype=torch.bool, device="cuda").tril(last - tokens)
            one, k, v = (t[row : row + 1].double() for t in (query, keys, values))
            k, v = k[:, :, :last], v[:, :, :last]
            want = scaled_dot_product_attention(one, k, v, attn_mask=seen, enable_gqa=True)
            assert relative_error(got[row : row + 1].double(), want.transpose(1, 2)) < margin


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "stored"), [(2, 900), (300, 1000), (129, 130), (700, 1500), (600, 600)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 64), (2, 1, 20), (2, 2, 256)]
)
def test_the_last_queries_are_causal(
    dtype: torch.dtype,
    tokens: int,
    stored: int,
    heads: int,
    kv_heads: int,
    dim: int,
    planned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On flash attention, and on cuDNN where it is there and has its plans."""
    monkeypatch.setattr("adaskip_passes.attention.cudnn_plans._PLAN", 0.0 if planned else 1e30)
    torch.manual_seed(tokens)
    query = torch.randn(2, heads, tokens, dim, device="cuda").to(dtype)
    shape = (stored + 9, 2, kv_heads, dim)
    key, value = (
        torch.randn(shape, device="cuda").to(dtype).permute(1, 2, 0, 3)[:, :, :stored]
        for _ in range(2)
    )
    got = attend_causal(query, key, value, dim**-0.5)
    want = causal(query.double(), key.double(), value.double(), dim**-0.5)
    assert relative_error(got.double(), want) < DTYPES[dtype]
    wrong = attend_causal(query, key.flip(2), value, dim**-0.5)
    assert relative_error(wrong.double(), want) > DTYPES[dtype]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "stored"), [(2, 900), (300, 1000), (600, 600)])
def test_values_may_be_narrower_than_keys(
    dtype: torch.dtype,
    tokens: int,
    stored: int,
    planned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As DeepSeek's are, which are a part of a larger tensor."""
    monkeypatch.setattr("adaskip_passes.attention.cudnn_plans._PLAN", 0.0 if planned else 1e30)
    torch.manual_seed(tokens)
    query = torch.randn(1, 4, tokens, 192, device="cuda").to(dtype)
    key = torch.randn(1, 4, stored, 192, device="cuda").to(dtype)
    value = torch.randn(1, 4, stored, 256, device="cuda").to(dtype)[..., 128:]
    got = attend_causal(query, key, value, 0.07)
    want = causal(query.double(), key.double(), value.double(), 0.07)
    assert got.is_contiguous()
    assert relative_error(got.double(), want) < DTYPES[dtype]
    wrong = attend_causal(query, key, value.flip(-1), 0.07)
    assert relative_error(wrong.double(), want) > DTYPES[dtype]
