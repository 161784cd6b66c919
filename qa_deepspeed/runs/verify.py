"""Reload check: the saved model, loaded again, has every weight and gives the logits of the trained model."""

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

REFERENCE_FILE = "probe.safetensors"
"""File of a checkpoint that holds its `ReferenceOutputs`."""

REFERENCE_ROWS = 4
"""Rows whose logits are compared."""

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3, "torch_autocast": 5e-2}
"""Largest allowed difference of a logit, by the engine's precision; relative to the largest logit if that exceeds 1."""

MERGED_TOLERANCE = 1e-4
"""Smallest tolerance for a model with merged adapters: its sums are computed in another order."""

OTHER_DEVICE = 10
"""Factor of the tolerance where the model was trained on a GPU: the reload check runs on the CPU."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """A few rows and the trained model's outputs for them, to compare the saved model with."""

    inputs: dict[str, torch.Tensor]
    """The model's inputs by name, each `[rows, length]`."""
    outputs: dict[str, torch.Tensor]
    """Its floating-point outputs by name, float32."""
    precision: str
    """The engine's precision, a key of `TOLERANCES`."""
    device: str
    """The engine's device type."""


def reference_outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> ReferenceOutputs:
    """Run the engine (or any EvalModel) on these inputs. Collective under ZeRO-3."""
    with model.evaluating():
        outputs = named_outputs(model.eval_forward({name: value.to(model.device) for name, value in inputs.items()}))
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    return ReferenceOutputs(on_cpu, outputs, model.precision, model.device.type)


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """A model's floating-point outputs, by name, in float32 on the CPU."""
    return {
        name: value.detach().float().cpu().clone()
        for name, value in outputs.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }


def save_reference_outputs(folder: Path, reference: ReferenceOutputs) -> None:
    """Write `REFERENCE_FILE` into a checkpoint."""
    tensors = {f"inputs.{name}": value.contiguous() for name, value in reference.inputs.items()}
    tensors |= {f"outputs.{name}": value.contiguous() for name, value in reference.outputs.items()}
    save_file(tensors, folder / REFERENCE_FILE)
    apply_umask(folder / REFERENCE_FILE)


def load_reference_outputs(folder: Path, precision: str, device: str) -> ReferenceOutputs:
    """Read `REFERENCE_FILE` of a checkpoint; precision and device are those of its loop state."""
    tensors = load_file(folder / REFERENCE_FILE)
    parts = {
        part: {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("inputs.", "outputs.")
    }
    return ReferenceOutputs(parts["inputs."], parts["outputs."], precision, device)


def verify_saved_model(
    folder: Path, state: Mapping[str, torch.Tensor], reference: ReferenceOutputs, merged: bool = False
) -> dict[str, Any]:
    """Reload the model in `folder` (an adapter by peft) and compare it with the trained one; returns the record.

    Every tensor must equal the one of `state`. Logits are compared where the model is saved in float32 or in the
    precision of its training.

    Args:
        state: the trained weights, as saved.
        reference: the trained model's outputs.
        merged: whether adapters were merged into the weights.
    Raises:
        UserError: tensors or logits differ.
    """
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    kind = getattr(transformers, AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0])
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
    if dtype not in (torch.float32, weight_dtype(reference.precision)):
        return record
    difference = largest_difference(model, reference)
    tolerance = max(TOLERANCES[reference.precision], MERGED_TOLERANCE if merged else 0.0)
    tolerance *= 1 if reference.device == "cpu" else OTHER_DEVICE
    if not difference <= tolerance:
        raise UserError(
            f"{folder} gives other answers than the model that was trained: logits differ by {difference:.2e}, "
            f"{tolerance:.0e} is allowed; it must not be used"
        )
    rows = len(next(iter(reference.inputs.values())))
    return {**record, "rows": rows, "largest_difference": difference, "tolerance": tolerance}


def _differing(state: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors of `state` that `loaded` lacks or holds with other values."""
    wrong = []
    with ProgressBar("comparing weights", len(state), "tensor") as bar:
        for name, value in state.items():
            if name not in loaded or not torch.equal(loaded[name], value):
                wrong.append(name)
            bar.advance()
    return wrong


@contextmanager
def _forward_progress(model: torch.nn.Module) -> Iterator[None]:
    """Show the progress of a forward pass: the modules with weights that it has passed."""
    modules = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    seen: set[int] = set()  # some models run a layer several times
    with ProgressBar("comparing logits", len(modules), "module") as bar:

        def count(module: torch.nn.Module, *_: Any) -> None:
            seen.add(id(module))
            bar.reach(len(seen))

        hooks = [module.register_forward_hook(count) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def largest_difference(model: torch.nn.Module, reference: ReferenceOutputs) -> float:
    """Largest difference of the model's logits from the reference, in its precision; relative if logits exceed 1."""
    model = model.to(weight_dtype(reference.precision))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=reference.precision == "torch_autocast")
    with torch.inference_mode(), autocast, _forward_progress(model):
        found = named_outputs(model(**reference.inputs))
    differences = [0.0]
    real = reference.inputs["attention_mask"].bool()
    for name, expected in reference.outputs.items():
        finite = expected.isfinite() & (expected > -1e30)  # masked positions hold the lowest number
        if expected.shape == real.shape:
            finite &= real  # logits of padding depend on the attention kernel and are unused
        if finite.any():
            scale = max(1.0, float(expected[finite].abs().max()))
            differences.append(float((found[name] - expected)[finite].abs().max()) / scale)
    return float(torch.tensor(differences).max())  # NaN propagates
