"""Sequences in which a compiled model was once wrong or crashed: the smallest ones that show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.machine.structures import Side
from tests.machine.world import Options, World


@dataclass(frozen=True)
class Sequence:
    """Some calls on a structure.

    Attributes:
        name: what was wrong.
        structure: which decoder.
        run: the calls, on a world and its last compiled model.
        captures: whether they need graphs that nothing else in `make test` does.
    """

    name: str
    structure: str
    run: Callable[[World, Side], None]
    captures: bool = False

    def __str__(self) -> str:
        return f"{self.structure}: {self.name}"


def _edited(edit: str, structure: str = "llama", captures: bool = True) -> Sequence:
    """A prompt after an edit of the compiled model, and one after it was taken back."""

    def run(world: World, side: Side) -> None:
        made = world.pair.edits[edit]
        world.begin(side, 9)
        world.edit(side, made)
        world.begin(side, 9)
        world.decode(world.requests[0], 1)
        world.take_back(side, made)
        world.begin(side, 9)

    return Sequence(f"{edit} on the compiled model", structure, run, captures)


def _edited_original(edit: str, structure: str = "llama") -> Sequence:
    """A prompt after an edit of the original, and one after it was taken back."""

    def run(world: World, side: Side) -> None:
        made = world.pair.edits[edit]
        world.edit(None, made)
        world.begin(side, 40)
        world.take_back(None, made)
        world.begin(side, 9)

    return Sequence(f"{edit} on the original", structure, run)


def _crop(count: int) -> Sequence:
    def run(world: World, side: Side) -> None:
        world.begin(side, 5)
        world.crop(world.requests[0], count)
        world.decode(world.requests[0], 1)

    return Sequence(f"crop({count})", "llama", run)


def _shallow(world: World, side: Side) -> None:
    """The first cache is let go, and the next request is given its buffers."""
    world.generate(side, (5,), 0, Options())
    world.shallow(world.requests[0])
    world.generate(side, (5,), 1, Options())
    world.turn(world.requests[0], 2, 2, Options())


def _inference_copy(world: World, side: Side) -> None:
    world.begin(side, 5, surroundings="inference mode")
    world.copied(world.requests[0], "inference mode")
    world.decode(world.requests[1], 1)
    world.decode(world.requests[0], 1)


def _mixed(world: World, side: Side) -> None:
    """A state that was seen before, at another batch size that was not."""
    world.begin(side, 5)
    world.edit(side, world.pair.edits["hook that halves"])
    world.begin(side, 5, rows=2)
    world.begin(side, 5)


def _further(world: World, side: Side) -> None:
    """A further prompt after a change is refused, and goes on when that is taken back."""
    halves = world.pair.edits["hook that halves"]
    world.begin(side, 5)
    world.decode(world.requests[0], 1)
    world.further(world.requests[0], 3, 1)
    world.edit(side, halves)
    world.further(world.requests[0], 3, 1)
    world.decode(world.requests[0], 1)
    world.take_back(side, halves)
    world.further(world.requests[0], 3, 1)


def _both(world: World, side: Side) -> None:
    """The same change on both is no difference between them."""
    halves = world.pair.edits["hook that halves"]
    world.edit(side, halves)
    world.edit(None, halves)
    world.begin(side, 5)
    world.take_back(side, halves)
    world.take_back(None, halves)
    world.begin(side, 5)


def _again(world: World, side: Side) -> None:
    """A further prompt where it was taken off and put on meanwhile."""
    halves = world.pair.edits["hook that halves"]
    world.edit(side, halves)
    world.begin(side, 5)
    world.take_back(side, halves)
    world.edit(side, halves)
    world.further(world.requests[0], 3, 1)


def _alike(world: World, side: Side) -> None:
    """Both are left with the same adapter in use."""
    world.edit(None, world.pair.edits["set_adapter('b')"])
    world.edit(side, world.pair.edits["delete_adapter('a')"])
    world.begin(side, 5)


def _merged(world: World, side: Side) -> None:
    """Weights are written; decode steps, which do not look at much, would add adapters again."""
    merging = world.pair.edits["merge_adapter()"]
    world.begin(side, 5)
    world.decode(world.requests[0], 1)
    world.edit(None, merging)
    world.decode(world.requests[0], 1)
    world.take_back(None, merging)
    world.decode(world.requests[0], 1)


def _packed(world: World, side: Side) -> None:
    """It is refused today; the next prompt is answered."""
    world.packed(side, 3, 4, 0)
    world.begin(side, 5)


def _one_token_more(world: World, side: Side) -> None:
    """It is a prompt: what decoding skips runs."""
    world.begin(side, 5)
    world.turn(world.requests[0], 1, 1, Options())


def _last_piece(world: World, side: Side) -> None:
    world.generate(side, (4,), 0, Options(chunk=3))


def _default_device(world: World, side: Side) -> None:
    world.generate(side, (5,), 0, Options(), "meta")


def _default_device_first(world: World, side: Side) -> None:
    world.begin(side, 5, rows=3, surroundings="meta")


def _autocast(world: World, side: Side) -> None:
    """The branches are added to each other in half precision, to the stream in full."""
    world.begin(side, 9, surroundings="autocast")


def _turn(world: World, side: Side) -> None:
    """Only what is new is given to it, with a mask of that alone."""
    world.generate(side, (5,), 0, Options())
    world.turn(world.requests[0], 2, 1, Options())


SEQUENCES = (
    _edited("hook that halves", captures=False),
    _edited("pre-hook that doubles"),
    _edited("hook that fills a list"),
    _edited("hook that fills a global", captures=False),
    _edited("model.norm.variance_epsilon = 1.0"),
    _edited("model.layers.1.self_attn.scaling = 0.01"),
    _edited("model.layers.1.mlp.act_fn = ReLU"),
    _edited("branch of the same class"),
    _edited("branch of another class"),
    _edited("last layer deleted"),
    _edited("parameter replaced", captures=False),
    _edited("load_state_dict(assign=True)", captures=False),
    _edited("buffer replaced", captures=False),
    _edited("config.use_cache = False", captures=False),
    _edited("config.output_hidden_states = True", captures=False),
    _edited("config.output_router_logits = True", "mixtral", captures=False),
    _edited("config.return_dict = False", "mamba", captures=False),
    _edited("config.final_logit_softcapping = 3.0", "gemma2", captures=False),
    _edited("config.logits_scaling = 2.0", "granite", captures=False),
    _edited("set_adapter('b')", "llama, adapters", captures=False),
    _edited("disable_adapters()", "llama, adapters"),
    _edited("scaling['a'] = 9", "llama, adapters"),
    _edited("delete_adapter('a')", "llama, adapters"),
    _edited("add_adapter('c')", "llama, adapters"),
    _edited_original("set_adapter('b')", "llama, adapters"),
    _edited_original("disable_adapters()", "llama, adapters"),
    _edited_original("merge_adapter()", "llama, adapters"),
    _edited_original("hook that halves"),
    _edited_original("branch of the same class"),
    _edited_original("parameter replaced"),
    _edited_original("load_state_dict(assign=True)"),
    _edited_original("buffer replaced"),
    _edited_original("to(bfloat16) and back"),
    _edited_original("weight parametrized"),
    _edited_original("weight pruned"),
    _edited_original("other output embeddings"),
    _crop(0),
    _crop(-2),
    _crop(-100),
    _crop(3),
    Sequence("one token of prompt after a prefix", "qwen3, decode plan", _one_token_more),
    Sequence("a last piece of one token", "qwen3, decode plan", _last_piece),
    Sequence("copy.copy(cache)", "tied llama", _shallow),
    Sequence("a copy made in inference mode", "llama", _inference_copy),
    Sequence("a copy made in inference mode", "hybrid", _inference_copy),
    Sequence("two texts in one row", "llama", _packed),
    Sequence("generate on a default device", "llama", _default_device),
    Sequence("a first capture on a default device", "llama", _default_device_first, captures=True),
    Sequence("a hook is seen at one batch size only", "llama", _mixed, captures=True),
    Sequence("a change in the middle of a request", "llama", _further),
    Sequence("parallel branches in autocast", "gpt_neox", _autocast, captures=True),
    Sequence("a turn without attention", "mamba", _turn),
    Sequence("the same change on both", "llama", _both),
    Sequence("a hook that is registered again", "llama", _again),
    Sequence("adapters merged in the middle of a request", "llama, adapters", _merged),
    Sequence("one adapter set, the other deleted", "llama, adapters", _alike, captures=True),
)
