"""Where the host's part of a call goes: what a function takes itself, and in its launches, by what it takes in all."""

from bench.launch_parts import NOTHING, Part, add_up


def part(what: str, *inner: Part) -> Part:
    return Part(what, lambda: None, inner=list(inner))


def test_a_call_s_cost_is_added_up_by_function() -> None:
    """An empty call takes 1, which every count has too; a launch and its key belong to the operation that launches."""
    launch = part("launch", part("key of a launch"))
    top = part("layer", part("checks"), part("up", launch), part("weight_grad", part("weight_grad", launch)))
    costs = {
        "/layer": 101.0,
        "/layer.0/checks": 11.0,
        "/layer.1/up": 31.0,
        "/layer.1/up.0/launch": 21.0,
        "/layer.1/up.0/launch.0/key of a launch": 6.0,
        "/layer.2/weight_grad": 41.0,
        "/layer.2/weight_grad.0/weight_grad": 26.0,
        "/layer.2/weight_grad.0/weight_grad.0/launch": 16.0,
        "/layer.2/weight_grad.0/weight_grad.0/launch.0/key of a launch": 3.0,
        NOTHING: 1.0,
    }
    assert dict(top.walk()).keys() == costs.keys() - {NOTHING}
    assert add_up(top, costs) == [
        {"what": "checks", "calls": 1, "own": 10.0, "launches": 0.0},
        {"what": "up", "calls": 1, "own": 10.0, "launches": 20.0},
        {"what": "weight_grad", "calls": 1, "own": 25.0, "launches": 15.0},
        {"what": "autograd and the rest", "calls": 0, "own": 20.0, "launches": 0.0},
    ]
