"""The package as it is installed: everything it reads at run time is inside, and the pins fit the ranges."""

import ast
import configparser
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

import qa_deepspeed
from tests.paths import REPOSITORY

SHIPPED = ("qa_deepspeed", "ds_configs", "setup.cfg", "pyproject.toml", "LICENSE", "README.md")


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines_of(text):
    return [line.strip() for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no build folder is left in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():  # a README is not needed to build
            shutil.copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (file,) = target.glob("*.whl")
    return file


def test_every_folder_of_code_is_listed():
    listed = lines_of(setup_cfg()["options"]["packages"])
    folders = {file.parent for file in (REPOSITORY / "qa_deepspeed").rglob("*.py")}
    found = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert sorted(listed) == sorted({*found, "qa_deepspeed.ds_configs"})


def test_the_wheel_carries_all_code_all_configs_and_the_sample_text(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = REPOSITORY / "qa_deepspeed"
    wanted = {
        str(file.relative_to(REPOSITORY))
        for suffix in ("py", "yaml", "j2", "css", "js")
        for file in package.rglob(f"*.{suffix}")
    }
    wanted |= {f"qa_deepspeed/ds_configs/{file.name}" for file in (REPOSITORY / "ds_configs").glob("*.json")}
    assert len(wanted) > 10
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("qa_deepspeed") for name in names)


def test_an_installed_wheel_works_away_from_the_sources(wheel, tmp_path):
    """Unpacked, which is all that installing a wheel of plain files does, it runs the command and finds its configs."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import json, qa_deepspeed, qa_deepspeed.cli.data.sample as s; from qa_deepspeed.engine import ds_config as d; "
        "print(json.dumps([qa_deepspeed.__file__, len(s.read_material().kinds), d.load('zero2')]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    file, kinds, config = json.loads(printed.splitlines()[-1])
    assert file.startswith(str(site))
    assert kinds > 1
    assert config == json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    (entry,) = importlib.metadata.PathDistribution(next(site.glob("*.dist-info"))).entry_points
    assert (entry.name, entry.value) == ("qa-deepspeed", "qa_deepspeed.cli.main:main")


def test_the_pins_fit_the_ranges_and_cover_every_dependency():
    pins = {}
    for line in lines_of((REPOSITORY / "launch" / "constraints.txt").read_text()):
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "=="
            pins[pin.name.lower()] = only.version
    parser = setup_cfg()
    extras = [line for text in parser["options.extras_require"].values() for line in lines_of(text)]
    for line in lines_of(parser["options"]["install_requires"]) + extras:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line
    for name, version in (("torch", "2.13.0"), ("transformers", "5.23.0"), ("deepspeed", "0.19.8")):
        assert pins[name] == version


def test_the_quickstart_configuration_names_known_options():
    """launch/quickstart.yaml is read as the command line reads it, and trains ranks of one or two alike."""
    import yaml

    from qa_deepspeed.config.batch_plan import plan_batches
    from qa_deepspeed.config.run_options import RunOptions

    options = yaml.safe_load((REPOSITORY / "launch" / "quickstart.yaml").read_text())
    assert set(options) <= set(RunOptions.__dataclass_fields__)
    plans = [plan_batches(options["per_gpu_train_batch_size"], None, options["global_batch_size"], n) for n in (1, 2)]
    assert plans[0].global_batch_size == plans[1].global_batch_size


def in_a_new_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Seconds of this process's own CPU time: others may compute meanwhile."""
    code = (
        "import sys, time; began = time.process_time(); import qa_deepspeed; "
        "taken = time.process_time() - began; qa_deepspeed.__version__, dir(qa_deepspeed), qa_deepspeed.RunOptions; "
        "print(taken, [name for name in ('torch', 'transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    seconds, heavy = in_a_new_process(code).split(maxsplit=1)
    assert float(seconds) < 0.5 and heavy == "[]"


def test_each_name_is_listed_loads_and_is_known_to_type_checkers() -> None:
    tree = ast.parse((REPOSITORY / "qa_deepspeed/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert for_checkers == set(qa_deepspeed.__all__) and sorted(qa_deepspeed.__all__) == qa_deepspeed.__all__
    assert {*qa_deepspeed.__all__, "__version__"} <= set(dir(qa_deepspeed))
    for name in qa_deepspeed.__all__:
        assert getattr(qa_deepspeed, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        qa_deepspeed.trian  # noqa: B018


def test_the_version_has_one_owner(wheel) -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: qa_deepspeed.__version__"
    assert wheel.name.split("-")[1] == qa_deepspeed.__version__
