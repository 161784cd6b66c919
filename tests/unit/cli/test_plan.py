"""The plan: its arithmetic against the published figures, sizes that people write, and what it recommends."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig

from qa_deepspeed.cli.training.plan import parse_size, peak_lines, step_work, table
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.config_choice import Machines, estimate_configs, recommend
from qa_deepspeed.engine.memory import ZeroSettings, estimate_cpu_memory, estimate_memory
from qa_deepspeed.models.footprint import Footprint
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

BILLION = Footprint(
    parameters=7_500_000_000,
    trained=7_500_000_000,
    largest_layer=10**8,
    largest_tensor=10**8,
    largest_trained=10**8,
    saved=0,
    attention=0,
    checkpointed=0,
    checkpointed_attention=0,
    adapted=0,
    counted=True,
)


def zero(stage: int, **changes: object) -> ZeroSettings:
    return ZeroSettings(
        **{
            **dict(
                stage=stage,
                offload_optimizer=False,
                offload_parameters=False,
                overlap=False,
                reduce_bucket=0,
                prefetch_bucket=0,
                max_live=0,
            ),
            **changes,
        }
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "published"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, published: float) -> None:
    """Rajbhandari et al. 2020, table 1: 7.5 billion parameters in half precision on 64 devices, in GB.

    The paper leaves out what the step needs for a moment (a float32 copy of the gradients, at stages 1 and 2 a
    flattened one as well) and gathered parameters. Its stage 1 keeps whole gradients, as DeepSpeed does over several
    micro-batches, and to the end of the backward pass where nothing overlaps.
    """
    found = estimate_memory(BILLION, zero(stage), 64, 2, 2)
    if stage == 1:
        assert (
            estimate_memory(BILLION, zero(1, overlap=True), 64, 2, 1).gradients
            == estimate_memory(BILLION, zero(2), 64, 2, 1).gradients
        )
        assert estimate_memory(BILLION, zero(1), 64, 2, 1).gradients == 2 * BILLION.parameters
    copy = (6 if stage < 3 else 4) * BILLION.parameters // 64
    gathered = 2 * BILLION.largest_layer if stage == 3 else 0
    states = found.parameters - gathered + found.gradients - copy + found.optimizer
    assert states / 1e9 == pytest.approx(published, abs=0.06)


def test_traffic_of_the_stages() -> None:
    """Sent by one of N ranks by ring algorithms: 2S(N-1)/N for an all-reduce, half of it for a gather or a scatter."""
    size, ranks, micro = 2 * BILLION.parameters, 8, 3
    once = size * 7 // 8
    sent = {stage: estimate_memory(BILLION, zero(stage), ranks, 2, micro).sent for stage in range(4)}
    assert sent == {0: 2 * once, 1: 3 * once, 2: 2 * once * micro + once, 3: 3 * once * micro}
    assert (
        estimate_memory(BILLION, zero(3, max_live=8 * 10**9, max_reuse=8 * 10**9), ranks, 2, micro).sent
        == 2 * once * micro
    )


def test_traffic_and_memory_of_a_secondary_partition() -> None:
    """Wang et al. 2023 (ZeRO++): a step of one micro-batch sends 2 instead of 3 parts between the hosts."""
    size, on_host = 2 * BILLION.parameters, 8
    plain, secondary = (estimate_memory(BILLION, zero(3, secondary=ranks), 16, 2, 1) for ranks in (1, on_host))
    assert plain.spanning == plain.sent == 3 * (size * 15 // 16)
    assert secondary.spanning == 2 * (size * 15 // 16)
    assert secondary.sent - secondary.spanning == size * 7 // 8
    assert secondary.parameters - plain.parameters == size // on_host
    assert estimate_memory(BILLION, zero(3, secondary=on_host), 16, 2, 3).spanning == 4 * (size * 15 // 16)
    offloaded = [estimate_memory(BILLION, zero(3, secondary=n, offload_parameters=True), 16, 2, 1) for n in (1, 8)]
    assert offloaded[1].host - offloaded[0].host == size // on_host
    assert offloaded[1].parameters == offloaded[0].parameters
    frozen = dataclasses.replace(BILLION, trained=0)
    assert estimate_memory(frozen, zero(3, secondary=on_host), 16, 2, 1).spanning == 0


def test_offload_moves_the_optimizer_to_the_host() -> None:
    on, off = (estimate_memory(BILLION, zero(2, offload_optimizer=value), 8, 2, 1) for value in (False, True))
    share = BILLION.parameters // 8
    assert (on.optimizer, off.optimizer, off.gradients) == (12 * share, 0, 0)
    assert off.host - on.host == (12 + 4 + 2) * share
    assert off.bus == 4 * share and on.bus == 0
    assert off.device() < on.device()


def test_lora_trains_and_sends_its_adapters_only() -> None:
    """Frozen parameters have neither gradients nor optimizer state; only stage 3 moves them, to gather them."""
    adapters = dataclasses.replace(BILLION, trained=10_000_000, largest_trained=10**6)
    for stage in range(4):
        all_of_it, some = (estimate_memory(model, zero(stage), 8, 2, 1) for model in (BILLION, adapters))
        assert some.parameters == all_of_it.parameters
        assert (some.gradients + some.optimizer) * 750 == all_of_it.gradients + all_of_it.optimizer
        gathered = 2 * 2 * BILLION.parameters * 7 // 8 if stage == 3 else 0
        assert (some.sent - gathered) * 750 == all_of_it.sent - gathered
        assert (
            estimate_cpu_memory(adapters, zero(stage), 8, 2, 1).host
            < estimate_cpu_memory(BILLION, zero(stage), 8, 2, 1).host
        )
    off = estimate_memory(adapters, zero(2, offload_optimizer=True), 8, 2, 1)
    assert off.host - estimate_memory(adapters, zero(2), 8, 2, 1).host == (12 + 4 + 2) * 1_250_000


def test_gradients_and_activations_share_their_room() -> None:
    """Except for the gradients that wait for the next micro-batch of the same step."""
    small, large = (dataclasses.replace(BILLION, saved=saved) for saved in (10**9, 10**12))
    few, many = (estimate_memory(small, zero(2), 8, 2, micro) for micro in (1, 4))
    assert few.device() == few.device(checkpointing=True) == many.device()
    share = BILLION.parameters // 8
    single, waiting = (estimate_memory(large, zero(2), 8, 2, micro) for micro in (1, 4))
    assert single.device() - few.device() == 10**12 - single.gradients
    assert waiting.device() - single.device() == waiting.held == 2 * share


def test_a_cpu_rank_has_all_of_it_in_host_memory() -> None:
    for stage in range(4):
        found = estimate_cpu_memory(BILLION, zero(stage), 2, 4, 1)
        assert found.host > found.parameters + found.gradients + found.optimizer + found.activations


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 TiB", 3 * 2**39), ("512mib", 2**29), ("1000", 1000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "gpu_memory") == size


@pytest.mark.parametrize("text", ["", "80 potatoes", "GiB", "-3GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="gpu_memory must be a size like 80GiB"):
        parse_size(text, "gpu_memory")


def test_the_plan_of_a_lora_run() -> None:
    options = RunOptions(lora_rank=4, lora_target_modules="query,value", given=frozenset({"lora_rank"}))
    machines = Machines(1, 4, 80 * 2**30, 2**40)
    model, rows = estimate_configs(options, CONFIG, machines)
    assert model.trained == 2 * 2 * (2 * 4 * 256) + 2 * 256 + 2  # layers x modules x adapter's two matrices, the head
    of = {row.config: row.need for row in rows}
    assert of["zero0"].optimizer == 8 * model.trained and of["zero0"].sent == 2 * 4 * model.trained * 3 // 4
    with pytest.raises(UserError, match="lora_alpha without --lora_rank"):
        estimate_configs(RunOptions(lora_alpha=8, given=frozenset({"lora_alpha"})), CONFIG, machines)


CONFIG = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024)


def planned(gpu_memory: int | None, cpu_memory: int = 2**40) -> list:
    return estimate_configs(RunOptions(), CONFIG, Machines(1, 4, gpu_memory, cpu_memory))[1]


def test_the_first_that_fits_moves_least() -> None:
    best, why = recommend(planned(80 * 2**30))
    assert best is not None and best.config == "zero0" and "take zero0" in why


def test_where_zero0_does_not_fit_a_partitioned_one_is_taken() -> None:
    large = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    best, why = recommend(estimate_configs(RunOptions(bf16=True), large, Machines(1, 4, 9 * 2**30, 2**40))[1])
    assert best is not None and best.config == "zero1" and "zero0 does not fit" in why


def test_nothing_fits_says_what_is_lacking() -> None:
    best, why = recommend(planned(2**30))
    assert best is None and "none fits" in why and "GiB a GPU" in why
    best, why = recommend(planned(None, cpu_memory=2**30))
    assert best is None and "host memory a node" in why


def test_the_command(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "qa_deepspeed",
        "plan",
        "--model_name_or_path",
        str(tmp_path),
        "--bf16",
        "--measure_peak",
    ]
    done = subprocess.run([*command, "--nodes", "2", "--json"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shipped = sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json"))
    uncounted = ["zero2_autocast", "zero3_nvme", "zero3_zeropp"]
    assert [row["config"] for row in found["configs"]] == [name for name in shipped if name not in uncounted]
    assert min(found["peak_flops"].values()) > 1e8
    assert found["recommended"] in found["why"]
    size = found["model"]["parameters"]
    assert found["swap_bytes"] == (16 + 2) * size // 2  # of one node of two, parameters in bfloat16


def test_a_step_takes_as_long_as_its_matrix_products_at_the_peak() -> None:
    """Kaplan et al. 2020: 6 operations for each weight and token; 12 for each pair of tokens, layer and channel."""
    weights = 2 * (4 * 256**2 + 2 * 256 * 1024) + 2 * 256
    work = step_work(RunOptions(per_gpu_train_batch_size=4, max_seq_length=100), CONFIG)
    assert work == 4 * (6 * weights * 100 + 12 * 2 * 256 * 100**2)
    (line, _) = peak_lines({"float32": 2e9}, 1e9)
    assert line.startswith("measured matrix throughput of this device in float32: 2 GFLOP/s")
    assert line.endswith("a micro-batch of 1 GFLOP takes at least 0.5 s")


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_table_of_several_nodes_has_what_leaves_one(nodes: int) -> None:
    machines = Machines(nodes, 4, 80 * 2**30, 2**40)
    model, rows = estimate_configs(RunOptions(), CONFIG, machines)
    lines = table(RunOptions(), model, machines, rows, "why")
    (head,) = (line for line in lines if line.startswith("config"))
    assert ("between nodes" in head) == (nodes > 1)
    assert [row.need.spanning for row in rows] == [row.need.sent for row in rows]
    assert len({len(line.split()) for line in lines if line.startswith("zero")}) == 1
