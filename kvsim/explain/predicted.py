"""What the simulator says of prompts and decode steps that a runtime has done on a known GPU."""

from collections.abc import Mapping
from typing import Any

from kvsim.explain.costs import Explainer
from kvsim.hardware.calibration.calibrate import catalogued
from kvsim.hardware.catalogue import Gpu, load_gpu, load_host
from kvsim.scenario.scenario_file import default_host
from policies import ModelShape, Policy


class Predictor:
    """Times of a model on a GPU and a host by name, or on what a driver calls `device`; of an unknown GPU nothing.

    `note` says for what they are. Raises ValueError for a name that the catalogue has not.
    """

    def __init__(self, model: ModelShape, gpu: str, host: str, device: str) -> None:
        self.model, self.gpu = model, load_gpu(gpu) if gpu else _this_gpu(device)
        self.note = "no prediction: this machine's GPU is not in the catalogue; name one with --gpu"
        if self.gpu is not None:
            self.host = load_host(host or default_host(self.gpu.name))
            self.floor = load_gpu(f"{self.gpu.name}@datasheet")
            self.note = f"predicted for {self.gpu.name}@{self.gpu.parameter_set} on {self.host.name}"

    def of(
        self, policy: Policy | None, prompt_tokens: int, tokens: int, batch: int, counts: Mapping[str, float]
    ) -> dict[str, Any]:
        """Seconds of the prompts, and of a decode step after which each of `batch` sequences holds `tokens`.

        `predicted_` are at the GPU's own parameters, `floor_` at its datasheet's rates.
        """
        if self.gpu is None or policy is None:
            return {}
        found: dict[str, Any] = {}
        for name, gpu in (("predicted", self.gpu), ("floor", self.floor)):
            explainer = Explainer(policy, self.model, gpu, self.host, shares=counts, utilization=1.0)
            found[f"{name}_ttft_s"] = explainer.prompts_s(prompt_tokens, batch)
            found[f"{name}_tpot_s"] = explainer.step_s(tokens, batch)
        return found


def _this_gpu(device: str) -> Gpu | None:
    """The catalogue's GPU of what its driver calls `device`, as it was measured where it was; None for another."""
    try:
        name = catalogued(device)
    except ValueError:
        return None
    try:
        return load_gpu(f"{name}@measured")
    except ValueError:
        return load_gpu(name)
