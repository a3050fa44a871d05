import gzip
import json
import pickle

import pytest
import torch
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.recipe.load import load_recipe
from dash_train.recipe.schema import ProfileConfig
from dash_train.training.profiler import StepProfiler
from dash_train.training.trainer import Trainer


def recorded_steps(trace, operator="aten::mm"):
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert any(event["name"] == operator for event in events)
    return [name for name in names if name.startswith("step ")]


@pytest.mark.parametrize(("steps", "found"), [([2, 3], ["step 2", "step 3"]), ([4, 9], ["step 4"])])
def test_the_steps_of_the_recipe_are_recorded(tmp_path, corpus, steps, found):
    """Also when the run ends before the last of them."""
    options = {"train__steps": 4, "train__validate_every": 0, "tracking": {"profile": {"steps": steps}}}
    Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus, **options))).train()
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == f"steps-{steps[0]}-{steps[1]}.trace.json.gz"
    assert recorded_steps(trace) == found


def test_steps_in_the_wrong_order_are_refused(tmp_path, corpus):
    path = write_recipe(tmp_path / "recipe.yaml", corpus, tracking={"profile": {"steps": [5, 2]}})
    with pytest.raises(UserError, match=r"steps \[5, 2\]: the first is after the last"):
        load_recipe(path)


@pytest.mark.gpu
def test_on_cuda_the_allocations_are_recorded_too(tmp_path):
    profiler = StepProfiler(ProfileConfig(steps=(1, 1)), tmp_path, torch.device("cuda"))
    with profiler.step(1):
        torch.ones(1000, device="cuda").sum().item()
    assert recorded_steps(tmp_path / "profile" / "steps-1-1.trace.json.gz", operator="aten::sum") == ["step 1"]
    snapshot = pickle.loads((tmp_path / "profile" / "steps-1-1.memory.pickle").read_bytes())
    assert any(event["action"] == "alloc" for events in snapshot["device_traces"] for event in events)
