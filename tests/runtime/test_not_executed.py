"""What docs/limits.md says the runtime does not execute or save, refused in words."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from policies import POLICIES, parse_policy
from runtime import offload

PLANNED = ("locret", "lazyllm", "xattention", "hip", "lococo", "landmark")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("policy", PLANNED)
def test_a_policy_that_is_a_plan_alone_is_refused(policy: str) -> None:
    with (
        pytest.raises(ValueError, match=f"the runtime does not execute policy '{policy}' yet; it executes full, "),
        offload(tiny_model("llama"), parse_policy(policy)),
    ):
        pass


def test_all_other_policies_have_a_method() -> None:
    methods = {path.stem.replace("_", "-") for path in (ROOT / "runtime" / "methods").glob("*.py")}
    assert set(POLICIES) - set(PLANNED) == set(POLICIES) & methods


def test_states_of_linear_layers_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model("falcon_h1")
    with offload(model, parse_policy("full"), max_new_tokens=4) as kv, torch.no_grad():
        cache = kv.cache()
        model.generate(torch.arange(1, 9)[None], past_key_values=cache, max_new_tokens=2, do_sample=False)
        with pytest.raises(ValueError, match="keeps a state beside its keys and values, which cannot be saved"):
            kv.save(cache, tmp_path / "x")
    assert not list(tmp_path.iterdir())
