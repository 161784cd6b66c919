"""Swap files of a run on NVMe: a folder of its own, fresh at the start, gone at the end; their size; their reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.checkpoints.shards import Shards
from qa_deepspeed.engine.deepspeed_compat import model_file
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.nvme.nvme_compat import partitions_readable, state_readable
from qa_deepspeed.engine.nvme.swap_files import nvme_folders, own_swap_folder, swap_bytes
from qa_deepspeed.utils.errors import UserError

NUMBERS = torch.arange(1000.0)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder for `nvme_path` in which another program has a file."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/others").touch()
    return tmp_path / "disk"


def resolved(name: str, disk: Path | None = None) -> ResolvedConfig:
    options = RunOptions(deepspeed_config=name, nvme_path=str(disk) if disk else None, given=frozenset({"nvme_path"}))
    return ds_config.resolve(options, 2, "cpu")


def entries(disk: Path) -> set[str]:
    return {path.name for path in disk.iterdir()}


def test_each_run_has_a_folder_until_it_ends(disk: Path) -> None:
    """Two runs and an evaluation at once; both sections of the config name it."""
    config = resolved("zero3_nvme", disk)
    with own_swap_folder(config, disk / "a") as one, own_swap_folder(config, disk / "b") as two:
        with own_swap_folder(config, disk / "a", "evaluate") as three:
            folders = [set(nvme_folders(each.config).values()) for each in (one, two, three)]
            assert all(len(found) == 1 and Path(*found).is_dir() for found in folders)
            assert len(set.union(*folders)) == 3
        assert not Path(*folders[2]).exists() and Path(*folders[0]).exists()
    assert entries(disk) == {"others"}
    assert set(nvme_folders(config.config).values()) == {str(disk)}


def test_without_nvme_nothing_is_made(disk: Path) -> None:
    config = resolved("zero3_offload", disk)
    with own_swap_folder(config, disk / "a") as same:
        assert same is config and entries(disk) == {"others"}


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_no_swap_files(disk: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), own_swap_folder(resolved("zero3_nvme", disk), disk / "a") as config:
        (Path(nvme_folders(config.config)["offload_param"]) / "swapped").touch()
        raise error
    assert entries(disk) == {"others"}


def test_the_next_start_removes_what_a_killed_run_left(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all its ranks; not what other runs have there."""
    config = resolved("zero3_nvme", disk)
    with own_swap_folder(config, disk / "a") as killed, own_swap_folder(config, disk / "b") as other:
        left = Path(nvme_folders(killed.config)["offload_param"])
        (left.with_name("rank7") / "zero_stage_3").mkdir(parents=True)
        (left.with_name("rank7") / "zero_stage_3/swapped").write_bytes(bytes(2**20))
        with own_swap_folder(config, disk / "a"):
            assert [path.name for path in left.parent.iterdir()] == ["rank0"] and not list(left.iterdir())
        assert Path(nvme_folders(other.config)["offload_param"]).exists()
    assert f"removed swap files of an interrupted run: {left.parent}, 0.00 GiB" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(disk: Path) -> None:
    with own_swap_folder(resolved("zero3_nvme", disk), disk / "a") as config:
        name = Path(nvme_folders(config.config)["offload_param"]).parent.name
    (disk / name).touch()
    for path, words in (
        (disk, "cannot create .* for swap files"),
        (disk / "others", "folder there that can be written"),
    ):
        with pytest.raises(UserError, match=words), own_swap_folder(resolved("zero3_nvme", path), disk / "a"):
            pass


def function_of(module: str, message: str = "") -> Callable[[], None]:
    """A function of a module of this name whose assertion fails."""
    names: dict[str, Any] = {"__name__": module}
    exec(f"def fail():\n    raise AssertionError({message!r})", names)
    made: Callable[[], None] = names["fail"]
    return made


def test_a_buffer_that_is_too_small_is_one_line(disk: Path) -> None:
    words = "zero3_nvme: More elements .* than buffer size 3 .buffer_size and buffer_count of the config"
    with pytest.raises(UserError, match=words), own_swap_folder(resolved("zero3_nvme", disk), disk / "a"):
        function_of("deepspeed.runtime.swap_tensor.partitioned_param_swapper", "More elements 5 than buffer size 3")()
    with pytest.raises(AssertionError), own_swap_folder(resolved("zero3_nvme", disk), disk / "a"):
        function_of("deepspeed.runtime.engine")()
    assert entries(disk) == {"others"}


def test_sizes_by_folder() -> None:
    """Value, two moments and gradient of what is trained; parameters in the type of the training."""
    model: Any = SimpleNamespace(parameters=1000, trained=100)
    both = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/a"}}
    both["offload_param"] = {"device": "nvme", "nvme_path": "/a"}
    assert swap_bytes({"zero_optimization": both}, model, 2) == {"/a": 3600}
    both["offload_param"] = {"device": "nvme", "nvme_path": "/b"}
    assert swap_bytes({"zero_optimization": both}, model, 4) == {"/a": 1600, "/b": 4000}
    both["offload_optimizer"] = {"device": "cpu"}
    assert swap_bytes({"zero_optimization": both}, model, 4) == {"/b": 4000}
    assert swap_bytes({}, model, 4) == {}


def swapped_parameter(folder: Path) -> Any:
    """A parameter whose partition is on the disk, as DeepSpeed leaves it."""
    NUMBERS.numpy().tofile(folder / "parameter")
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.zeros(1, dtype=torch.float16)
    parameter.ds_tensor.ds_numel, parameter.ds_tensor.status = 1000, PartitionedParamStatus.NOT_AVAILABLE
    parameter.nvme_swapper = SimpleNamespace(
        dtype=torch.float32,
        get_path=lambda one, must_exist: str(folder / "parameter"),
        invalid_buffer=torch.zeros(1, dtype=torch.float16),
    )
    return parameter


def test_partitions_on_the_disk_can_be_read(tmp_path: Path) -> None:
    parameter, plain = swapped_parameter(tmp_path), torch.nn.Parameter(torch.ones(3))
    with partitions_readable([plain, parameter]):
        assert torch.equal(parameter.ds_tensor, NUMBERS)
    assert parameter.ds_tensor.numel() == 1 and plain.numel() == 3


def test_optimizer_state_on_the_disk_can_be_saved(tmp_path: Path) -> None:
    """Its tensors have their values inside, and none of the memory afterwards."""
    tensors = []
    for number, name in enumerate(("weight", "exp_avg")):
        (NUMBERS + number).numpy().tofile(tmp_path / name)
        tensors.append(SimpleNamespace(compute_tensor=torch.empty(0), swap_path=str(tmp_path / name)))
    group = SimpleNamespace(tensors=tensors, numel=lambda: 1000, dtype=lambda: torch.float32)
    optimizer = SimpleNamespace(
        swap_optimizer=True,
        checkpoint_event_prologue=lambda: None,
        optimizer_swapper=SimpleNamespace(swap_params_info={"0_1": group}),
    )
    parameter = swapped_parameter(tmp_path)
    engine: Any = SimpleNamespace(optimizer=optimizer, module=SimpleNamespace(parameters=lambda: [parameter]))
    with state_readable(engine):
        torch.save([one.compute_tensor for one in tensors] + [parameter.ds_tensor.detach()], tmp_path / "shard.pt")
    assert [one.compute_tensor.numel() for one in tensors] == [0, 0]
    saved = torch.load(tmp_path / "shard.pt")
    assert torch.equal(saved[0], NUMBERS) and torch.equal(saved[1], NUMBERS + 1) and torch.equal(saved[2], NUMBERS)


def test_a_checkpoint_with_copies_of_swap_files_is_one_line(tmp_path: Path) -> None:
    """Of earlier versions: its shards have empty tensors where state was on NVMe."""
    common = {"module": {}, "shared_params": {}, "global_steps": 1, "global_samples": 1, "skipped_steps": 0}
    common |= {"lr_scheduler": None, "param_shapes": [{"weight": torch.Size([4])}], "frozen_param_shapes": None}
    torch.save(common, tmp_path / model_file(3))
    inner = {"fp32_flat_groups": [torch.empty(0)], "optimizer_state_dict": {"state": {0: {}}}}
    torch.save({"optimizer_state_dict": inner}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match=r"copies of swap files \(offloaded_tensors\).* or train again"):
        Shards(tmp_path, 3, 1, ["weight"])
