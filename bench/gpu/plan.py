"""The day's plan: every case in the order in which it is run, what matters most first.

A: what machine this is, dense ceilings, everything compiled, small layers and the headline's own tiles checked.
B: the headline: layer and operations. C: its tiles, tuned and measured again. D: its peers, with their memory; a model
in training; experts in host memory and in files; few tokens; what one card shows of many ranks. E: the kernels' tests
on the GPU, which compile a lot. F: other numbers of tokens, other layers, other tests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.gpu.compilation import CHECKED_TILES, headline_candidates
from bench.gpu.operations import OPERATIONS
from bench.gpu.programs import TESTS_LIMIT_S
from bench.gpu.setting import HEADLINE, Setting
from tritonmoe.runtime.files import Json

__all__ = ["Case", "cases"]

PASSES = {"forward": False, "forward+backward": True}
FEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One line of results."""

    name: str
    """It begins with the letter of its stage."""
    measure: str
    """The function that measures it, see worker.py."""
    arguments: Json = field(default_factory=dict)
    limit_s: float = 120.0
    usual_s: float = 30.0
    """It is begun only where so much is left of the budget, until one that measures the same has said how long that
    takes: what a call's end cuts is lost."""
    needs_tuned: bool = False
    """Whether it is given the tiles that stage C found, as `entries`."""


def cases(setting: Setting, target_name: str) -> list[Case]:
    """Return the whole plan but what is compiled; names differ."""
    return [
        *_machine_and_checks(setting),
        *_headline(setting),
        *_tiles(setting, target_name),
        *_peers(setting),
        *_tests("E", setting.kernel_tests),
        *_other_layers(setting),
    ]


def _layer(stage: str, shape: str, num_tokens: int, routing: str, **arguments: bool) -> Iterator[Case]:
    tuned = arguments.pop("tuned", False)
    layer: Json = {"shape": shape, "num_tokens": num_tokens, "routing": routing, "entries": {}}
    for name, backward in PASSES.items():
        yield Case(
            f"{stage} layer {shape} T={num_tokens} {routing} {name}{' tuned' if tuned else ''}",
            "measure_layer",
            layer | {"backward": backward, **arguments},
            usual_s=30.0 if arguments["others"] else 10.0,
            needs_tuned=tuned,
        )


def _machine_and_checks(setting: Setting) -> Iterator[Case]:
    yield Case("A machine", "describe_machine", usual_s=10.0)
    for size in (64,) if setting.is_rehearsal else (8192, 4096):
        yield Case(f"A dense {size}", "measure_dense", {"size": size}, usual_s=5.0)
    yield Case("A check small layers", "check_small_layers", limit_s=300.0, usual_s=60.0)
    layer = {"shape": HEADLINE, "num_tokens": setting.headline_tokens}
    for routing in ("uniform", "hot"):  # a hot expert's weight gradients are cut into spans
        for tiles in CHECKED_TILES if routing == "uniform" else CHECKED_TILES[:1]:
            name = f"A check {HEADLINE} T={setting.headline_tokens} {routing} {tiles}"
            arguments = {**layer, "routing": routing, "tiles": tiles}
            yield Case(name, "check_samples", arguments, limit_s=180.0, usual_s=25.0)
    for tiles in (CHECKED_TILES[0], CHECKED_TILES[-1]):
        name = f"A reruns {HEADLINE} T={setting.headline_tokens} {tiles}"
        yield Case(name, "rerun", {**layer, "routing": "zipf", "tiles": tiles}, limit_s=180.0, usual_s=25.0)


def _headline(setting: Setting) -> Iterator[Case]:
    num_tokens = setting.headline_tokens
    yield from _layer("B", HEADLINE, num_tokens, "uniform", others=False)
    layer = {"shape": HEADLINE, "num_tokens": num_tokens}
    for operation in OPERATIONS:
        yield Case(f"B operation {operation}", "measure_operation", {**layer, "operation": operation}, usual_s=8.0)
    yield Case("B router", "measure_router", layer, usual_s=15.0)
    yield Case("B memory", "measure_memory", {**layer, "routing": "uniform", "with_peers": False})
    for operation in OPERATIONS:
        few = {"operation": operation, "num_tokens": FEW_TOKENS}
        yield Case(f"B host time of {operation}", "measure_host", few, usual_s=5.0)
    yield Case("B kernels of a step", "profile_step", {**layer, "entries": {}})


def _tests(stage: str, files: Sequence[str]) -> Iterator[Case]:
    for file in files:
        yield Case(f"{stage} tests {file}", "run_tests", {"file": file}, limit_s=300.0, usual_s=TESTS_LIMIT_S)


def _tiles(setting: Setting, target_name: str) -> Iterator[Case]:
    candidates = headline_candidates(setting, target_name)
    for candidate in candidates:
        arguments = {"key": candidate.key, "fields": candidate.fields, "num_tokens": setting.headline_tokens}
        yield Case(f"C tile {candidate.name}", "try_tile", arguments, usual_s=6.0)
    for key in dict.fromkeys(candidate.key for candidate in candidates):
        again = {"key": key, "entries": {}, "num_tokens": setting.headline_tokens}
        yield Case(f"C again {key}", "remeasure_tile", again, usual_s=12.0, needs_tuned=True)
    yield from _layer("C", HEADLINE, setting.headline_tokens, "uniform", others=False, tuned=True)
    layer = {"shape": HEADLINE, "num_tokens": setting.headline_tokens, "entries": {}}
    yield Case("C kernels of a step tuned", "profile_step", layer, needs_tuned=True)


def _peers(setting: Setting) -> Iterator[Case]:
    for num_tokens in setting.peer_tokens:
        yield from _layer("D", HEADLINE, num_tokens, "uniform", others=True, tuned=True)
    layer = {"shape": HEADLINE, "num_tokens": setting.peer_tokens[0], "routing": "uniform", "with_peers": True}
    yield Case("D memory", "measure_memory", layer, limit_s=180.0, usual_s=45.0)
    training = {"arguments": ["transformers", *setting.training.split()]}
    yield Case("D training", "run_benchmark", training, limit_s=300.0, usual_s=120.0)
    yield _offloaded("D", setting.offloaded_tokens[0], 0.0)
    for num_tokens in setting.few_tokens:
        few = {"shape": HEADLINE, "num_tokens": num_tokens}
        yield Case(f"D few T={num_tokens}", "measure_few", few, usual_s=25.0)
    overlap = {"arguments": ["overlap", *setting.overlap.split()]}
    yield Case("D overlap emulated", "run_benchmark", overlap, limit_s=300.0, usual_s=120.0)
    yield Case("D world of one", "run_alone", limit_s=300.0, usual_s=30.0)
    for num_tokens in setting.peer_tokens[:2]:
        for name, backward in PASSES.items():
            arguments = {"shape": HEADLINE, "num_tokens": num_tokens, "routing": "uniform", "backward": backward}
            case = f"D peers that compile {HEADLINE} T={num_tokens} {name}"
            yield Case(case, "measure_compiling_peers", arguments, limit_s=300.0, usual_s=120.0)


def _offloaded(stage: str, num_tokens: int, share: float) -> Case:
    arguments = {"shape": HEADLINE, "num_tokens": num_tokens, "resident_share": share}
    name = f"{stage} offloaded {HEADLINE} T={num_tokens} resident {share:.0%}"
    return Case(name, "measure_offloaded", arguments, limit_s=180.0, usual_s=25.0)


def _other_layers(setting: Setting) -> Iterator[Case]:
    yield _offloaded("F", setting.offloaded_tokens[0], 0.25)
    for num_tokens in setting.offloaded_tokens[1:]:
        yield _offloaded("F", num_tokens, 0.0)
    for routing in ("uniform", "zipf"):
        for num_tokens in setting.sweep_tokens:
            yield from _layer("F", HEADLINE, num_tokens, routing, others=False)
    for shape in setting.other_shapes:
        layer = {"shape": shape, "num_tokens": setting.shape_tokens[0], "routing": "zipf", "tiles": {}}
        name = f"F check {shape} T={setting.shape_tokens[0]}"
        yield Case(name, "check_samples", layer, limit_s=180.0, usual_s=25.0)
    for num_tokens in setting.shape_tokens:
        for shape in setting.other_shapes:
            yield from _layer("F", shape, num_tokens, "uniform", others=True)
    yield from _tests("F", setting.other_tests)
