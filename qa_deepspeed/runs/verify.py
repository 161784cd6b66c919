"""What is saved is proved: loaded again, it has every weight, and gives the logits that the trained engine gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qa_deepspeed.models.lora import CONFIG_FILE, load_by_peft
from qa_deepspeed.utils.dtypes import weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import apply_umask
from qa_deepspeed.utils.progress import ProgressBar

PROBE_FILE = "probe.safetensors"
REFERENCE_ROWS = 4
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3, "torch_autocast": 5e-2}
"""Largest difference of a logit, relative to the largest logit where that exceeds 1, by the engine's precision."""

MERGED_TOLERANCE = 1e-4
"""The least tolerance for a model whose adapters were merged into its weights: sums in another order."""

OTHER_DEVICE = 10
"""So many times the tolerance where the engine was on another kind of device than the proof is."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """A few rows and what the engine answers to them."""

    inputs: dict[str, torch.Tensor]
    """The model's inputs, `[rows, length]`."""
    outputs: dict[str, torch.Tensor]
    """Its outputs by name, floating-point ones only, float32."""
    precision: str
    device: str


def reference_outputs(reader: Any, inputs: Mapping[str, torch.Tensor]) -> ReferenceOutputs:
    """Ask the engine (or any EvalModel). Collective under ZeRO-3."""
    with reader.evaluating():
        outputs = named_outputs(reader.eval_forward({name: value.to(reader.device) for name, value in inputs.items()}))
    asked = {name: value.cpu() for name, value in inputs.items()}
    return ReferenceOutputs(asked, outputs, reader.precision, reader.device.type)


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """A model's floating-point outputs, by name, in float32 on the CPU."""
    return {
        name: value.detach().float().cpu().clone()
        for name, value in outputs.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }


def save_reference_outputs(folder: Path, probe: ReferenceOutputs) -> None:
    """Write the probe into a checkpoint."""
    tensors = {f"inputs.{name}": value.contiguous() for name, value in probe.inputs.items()}
    tensors |= {f"outputs.{name}": value.contiguous() for name, value in probe.outputs.items()}
    save_file(tensors, folder / PROBE_FILE)
    apply_umask(folder / PROBE_FILE)


def load_reference_outputs(folder: Path, precision: str, device: str) -> ReferenceOutputs:
    """Read the probe of a checkpoint, whose loop state says precision and device."""
    tensors = load_file(folder / PROBE_FILE)
    parts = {
        part: {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("inputs.", "outputs.")
    }
    return ReferenceOutputs(parts["inputs."], parts["outputs."], precision, device)


def verify_saved_model(
    folder: Path, state: Mapping[str, torch.Tensor], probe: ReferenceOutputs, merged: bool = False
) -> dict[str, Any]:
    """Load the model in `folder` again, an adapter by peft; returns what was compared, for the record.

    Every tensor must equal that of `state`, what was saved. Logits are compared where the model is saved in the
    precision that it was trained in or a finer one.

    Raises:
        UserError: it is not the model that was trained.
    """
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    if (folder / CONFIG_FILE).is_file():
        model, loaded = load_by_peft(folder, kind, dtype)
    else:
        model = kind.from_pretrained(folder, dtype=dtype).eval()
        loaded = model.state_dict()
    wrong = _differing(state, loaded) + [name for name in loaded if name not in state]
    if wrong:
        raise UserError(
            f"{folder} is not the model that was trained: {len(wrong)} of {len(loaded)} tensors differ "
            f"({', '.join(wrong[:3])}); it must not be used"
        )
    record: dict[str, Any] = {"tensors": len(loaded), "dtype": str(dtype).removeprefix("torch.")}
    if dtype not in (torch.float32, weight_dtype(probe.precision)):
        return record
    difference = largest_difference(model, probe)
    tolerance = max(TOLERANCES[probe.precision], MERGED_TOLERANCE if merged else 0.0)
    tolerance *= 1 if probe.device == "cpu" else OTHER_DEVICE
    if not difference <= tolerance:
        raise UserError(
            f"{folder} answers other than the model that was trained: logits differ by {difference:.2e}, "
            f"{tolerance:.0e} is allowed; it must not be used"
        )
    rows = len(next(iter(probe.inputs.values())))
    return {**record, "rows": rows, "largest_difference": difference, "tolerance": tolerance}


def _differing(state: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of `state` whose tensors are not in `loaded`, or not the same."""
    wrong = []
    with ProgressBar("comparing weights", len(state), "tensor") as bar:
        for name, value in state.items():
            if name not in loaded or not torch.equal(loaded[name], value):
                wrong.append(name)
            bar.advance()
    return wrong


@contextmanager
def _counting(model: torch.nn.Module) -> Iterator[None]:
    """Tell how far the model's forward pass is, by the modules with weights that it has been through."""
    modules = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    seen: set[int] = set()  # some models pass a layer many times
    with ProgressBar("comparing logits", len(modules), "module") as bar:

        def tell(module: torch.nn.Module, *_: Any) -> None:
            seen.add(id(module))
            bar.reach(len(seen))

        hooks = [module.register_forward_hook(tell) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def largest_difference(model: torch.nn.Module, probe: ReferenceOutputs) -> float:
    """Between the model's answers, in the precision of the probe, and the probe's, relative where logits exceed 1."""
    model = model.to(weight_dtype(probe.precision))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=probe.precision == "torch_autocast")
    with torch.inference_mode(), autocast, _counting(model):
        found = named_outputs(model(**probe.inputs))
    differences = [0.0]
    real = probe.inputs["attention_mask"].bool()
    for name, expected in probe.outputs.items():
        finite = expected.isfinite() & (expected > -1e30)  # masked places hold the lowest number there is
        if expected.shape == real.shape:
            finite &= real  # what stands at padding depends on how attention is computed, and nobody reads it
        if finite.any():
            scale = max(1.0, float(expected[finite].abs().max()))
            differences.append(float((found[name] - expected)[finite].abs().max()) / scale)
    return float(torch.tensor(differences).max())  # not a number wins
