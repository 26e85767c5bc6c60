"""`export_checkpoint`: from a model and a plan to a folder that `from_pretrained` loads."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaskip_passes import UnsupportedError

from ..api import build
from ..capture.check_graph import relative_error
from ..model.check_model import check_model
from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.windows import Window
from ..utils.parallel_internals import is_sharded
from ..utils.transformers_internals import attention_name
from .configuration import cut_configuration
from .foldable import Foldable, check_scales, foldable
from .layout import Layout, layout_of
from .packing import PackedLayer, check_sublayers, pack
from .weights import packed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16  # of the text that logits are compared on, beyond a window
_PROMPTS = 3  # that are tried, of which one has to agree
#: How far logits may be off, in units of the largest: other kernels run, and norms of many models
#: compute in float32 whatever the dtype is.
_SAME = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}
_SAME_IN_HALF = 8e-2
_FOLDED = 1e-2  # where scales are folded


@dataclass(frozen=True)
class ExportedCheckpoint:
    """What was written.

    Attributes:
        folder: Where it is.
        layers: How many decoder layers it has.
        layers_before: How many the model has.
        zeros: The skipped sublayers that are still there, with zeros where they end: they add
            nothing, but cost time and memory as before.
        windows: By attention sublayer of the model, what it sees.
        scales: The factors that were folded into the weights.
        error: The largest difference of its logits from those of the compiled model, in units of
            the largest logit.
    """

    folder: Path
    layers: int
    layers_before: int
    zeros: tuple[Sublayer, ...]
    windows: Mapping[Sublayer, Window]
    scales: Mapping[Sublayer, float]
    error: float

    def __str__(self) -> str:
        """Return a line for each thing that was done to the model."""
        lines = [
            f"{self.folder}: {self.layers} decoder layers of {self.layers_before}; its logits "
            f"differ from the compiled model's by {self.error:.1e} of the largest"
        ]
        if self.zeros:
            names = ", ".join(map(str, self.zeros))
            lines.append(f"zeros, which save no time and no memory: {names}")
        if self.windows:
            names = ", ".join(f"{s} {w.tokens}" for s, w in self.windows.items())
            lines.append(f"sliding windows: {names}")
        if self.scales:
            lines.append(f"scales folded into weights: {', '.join(map(str, self.scales))}")
        return "\n".join(lines)


@torch.no_grad()
def export_checkpoint(
    model: PreTrainedModel,
    plan: SkipPlan,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    fold_scales: bool = False,
    per_layer_config: bool = False,
) -> ExportedCheckpoint:
    """Write a model with a plan to a folder that needs adaskip_fx no more.

    Layers of which nothing runs are left out, and what is left of two neighbours becomes one layer
    where it is attention, then an FFN. Any other skipped sublayer ends in zeros. Windows of whole
    layers become the architecture's sliding window. The folder is loaded again and its logits
    compared with those of the compiled model before it gets its name.

    Args:
        model: A transformers decoder whose layers are attention and an FFN, as
            :func:`adaskip_fx.compile` takes it; it is left as it is.
        plan: What is left out, the same in both phases; skipped without surrogates, or with scales
            where `fold_scales` is set.
        folder: A new or an empty one. It holds weights, configuration and generation configuration.
        tokenizer: Written to the folder as well, if it is given.
        fold_scales: Fold scales into the weights of what follows. That is exact but for the epsilon
            of norms, so logits may be off by up to a hundredth of the largest; `error` says by how
            much. (A plan of AdaSkip's has scales.)
        per_layer_config: Name the sublayers with zeros in the configuration, as
            ``per_layer_config`` with ``"skip"``. Code that knows it need not run them; transformers
            up to 5.24 does not know it.

    Returns:
        What was written.

    Raises:
        TypeError, ValueError: The model cannot be used, or the folder is not empty.
        PlanError: The plan differs by phase, or is of another model.
        UnsupportedError: Names what of the plan or the model a plain checkpoint cannot say.
    """
    target = Path(folder)
    _check_folder(target)
    said = foldable(plan, fold_scales)
    _check_plain(model)
    layout = layout_of(model)
    check_sublayers(plan.sublayers, model.config.num_hidden_layers)
    check_scales(said.divisors, layout)
    packed = pack(said.runs, may_share=not layout.parallel)
    config = cut_configuration(model.config, packed, said.windows, per_layer_config)
    new = _assembled(model, config, layout, packed, said)
    with _written(target) as temporary:
        new.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        error = _compared(model, plan, temporary, said)
    return _report(target, plan, packed, said, error)


def _report(
    folder: Path, plan: SkipPlan, packed: list[PackedLayer], said: Foldable, error: float
) -> ExportedCheckpoint:
    """Return what was done, in words of the model's own sublayers."""
    held = {Sublayer(layer.template(k), k) for layer in packed for k in ("attention", "ffn")}
    left = [s for s in plan.sublayers if s in plan.prefill]
    factors = {s: plan.surrogates.factor(s) for s in left}
    return ExportedCheckpoint(
        folder,
        len(packed),
        len({s.layer for s in plan.sublayers}),
        tuple(s for s in left if s in held),
        {Sublayer(layer, "attention"): window for layer, window in said.windows.items()},
        {s: f for s, f in factors.items() if f is not None and f != 1.0},
        error,
    )


def _assembled(
    model: Any, config: Any, layout: Layout, packed: list[PackedLayer], said: Foldable
) -> Any:
    """Return the new model, which shares the weights that are as they were."""
    weights = packed_weights(model.state_dict(), layout, packed, said.divisors)
    try:
        with torch.device("meta"):
            new = type(model)(config)
        missing, unexpected = new.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise _not_cut(config, str(error).splitlines()[-1].strip()) from error
    if missing or unexpected:
        raise _not_cut(config, f"its layers are of other kinds: {(missing + unexpected)[0]}")
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.eval()


def _not_cut(config: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"a {type(config).__name__} of {config.num_hidden_layers} layers does not say what the "
        f"plan's are ({reason}); run the plan with adaskip_fx.compile"
    )


# What is refused -------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and not an empty folder; name a new one")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{folder}: the folder above it does not exist; make it, or name another")


def _check_plain(model: Any) -> None:
    """Refuse a model whose weights are not plain tensors of one part."""
    decoder = check_model(model)
    if decoder is not model or hasattr(model, "peft_config"):
        raise TypeError("the model has adapters, which a plain checkpoint has not: merge them")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedError(
            "the model's weights are quantized: load it without quantization, export, and quantize "
            "what was exported"
        )
    if getattr(model.config, "is_heterogeneous", False):
        raise UnsupportedError(
            "the model's layers differ by a per_layer_config already, which is not cut: run the "
            "plan with adaskip_fx.compile"
        )
    if any(is_sharded(weight) for weight in model.parameters()):
        raise UnsupportedError("the model is on several ranks: load it on one device to export it")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise UnsupportedError(
            f"{type(model).__name__} is a decoder and more (images, or audio): export the model "
            "inside that reads text, or run the plan with adaskip_fx.compile"
        )


# Written, and believed when it was loaded again -------------------------------------------------


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Give a folder to write to, which gets its name when the block ends well."""
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=".tmp", dir=target.absolute().parent
    ) as parent:
        temporary = Path(parent) / target.name
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rmdir()
        shutil.move(temporary, target)


def _compared(model: Any, plan: SkipPlan, folder: Path, said: Foldable) -> float:
    """Return how far the logits of what was written are from the compiled model's.

    Raises:
        UnsupportedError: Too far.
    """
    compiled = build(model, plan, backend="eager")
    options = {"dtype": model.dtype, "attn_implementation": attention_name(model)}
    written = type(model).from_pretrained(folder, **options).to(model.device).eval()
    same = _SAME.get(model.dtype, _SAME_IN_HALF)
    allowed = max(same, _FOLDED) if said.divisors else same
    errors: list[float] = []
    while len(errors) < _PROMPTS:
        ids = _prompt(model, said, seed=len(errors))
        got, want = (_logits(run, model, ids) for run in (written, compiled))
        errors.append(relative_error(got, want))
        if errors[-1] <= allowed:  # (a router's choice may flip in one of them)
            return errors[-1]
    raise UnsupportedError(
        f"the checkpoint gives other logits than the plan: they differ by {min(errors):.1e} of the "
        f"largest, allowed {allowed:.0e}; nothing was written. The architecture does not fold; run "
        "the plan with adaskip_fx.compile"
    )


def _prompt(model: Any, said: Foldable, seed: int) -> torch.Tensor:
    """Return random ids [1, tokens], more of them than any window shows."""
    longest = max((w.tokens for w in said.windows.values()), default=0)
    most = getattr(model.config, "max_position_embeddings", None) or longest + _TOKENS
    size = (1, min(longest + _TOKENS, most))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = torch.randint(0, vocabulary, size, generator=generator, device="cpu")
    return ids.to(model.device)


def _logits(run: Any, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits [1, 1, vocabulary] of the last token."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits: torch.Tensor = run(
        input_ids=ids, use_cache=False, **({"logits_to_keep": 1} if takes else {})
    ).logits
    return logits[:, -1:]
