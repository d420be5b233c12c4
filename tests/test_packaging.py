"""What is shipped, and what an import costs: no top-level `kernels`, and nothing heavy before it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def python(program: str, cwd: Path = ROOT, **environment: str) -> str:
    """The last line that a fresh interpreter prints; it starts in `cwd`, which is on its path."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source") / "entropy_fast"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "demo-report", "*.whl")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_has_everything_and_no_top_level_kernels(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"entropy_fast"}
    assert {f"entropy_fast/kernels/{module}.py" for module in MODULES} <= names
    assert "entropy_fast/kernels/__init__.py" not in names
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "entropy_fast").rglob("*.py")
        if "kernels" not in path.relative_to(ROOT).parts
    }
    assert modules <= names
    assert {"entropy_fast/py.typed", "entropy_fast/data/glossary.txt"} <= names


def test_the_sdist_has_tests_benchmarks_and_documentation(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "docs/rollouts.md"}
    assert expected <= names
    assert "tests/test_packaging.py" in names
    assert {f"kernels/{module}.py" for module in MODULES} <= names
    assert [name for name in names if name.startswith("bench/")]


def test_the_installed_wheel_works_away_from_the_repository(distributions, tmp_path):
    zipfile.ZipFile(distributions[1]).extractall(tmp_path / "site")
    program = (
        "import entropy_fast, importlib, pathlib; from entropy_fast.demo import glossary; "
        "from importlib.util import find_spec; "
        f"assert all(find_spec('entropy_fast.kernels.' + m) for m in {MODULES}); "
        "print(len(glossary()), pathlib.Path(entropy_fast.__file__).parent)"
    )
    out = python(program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out == f"354 {tmp_path / 'site' / 'entropy_fast'}"


@pytest.mark.parametrize("first", ["kernels", "entropy_fast.kernels", "transformers"])
def test_hugging_faces_kernels_stays_importable_from_the_root(first):
    """Whichever comes first, from the repository's root, where the folder `kernels/` is on the path."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    program = (
        f"import sys, {first}, kernels, transformers, entropy_fast.kernels; "
        "assert sys.path[0] == ''; assert hasattr(kernels, 'get_kernel'); print(kernels.__file__)"
    )
    assert "site-packages" in python(program)


def test_transformers_works_from_the_root_without_hugging_faces_kernels():
    """Then `import kernels` finds our folder as a namespace, which transformers must not take for the package."""
    program = """
import importlib.machinery, importlib.metadata, sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "kernels":
            return importlib.machinery.PathFinder.find_spec(name, [""]) if name == "kernels" else None
sys.meta_path.insert(0, Hidden)
version = importlib.metadata.version
def hidden_version(name):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden_version
from entropy_fast.demo import make_model
import torch
print(make_model(0)(input_ids=torch.tensor([[1, 2]])).logits.shape[-1])
"""
    assert python(program) == "512"


def test_the_import_is_light():
    heavy = [
        "transformers",
        "triton",
        "matplotlib",
        "numpy.f2py",
        "pandas",
        "pyarrow",
        "peft",
        "scipy",
        "rich",
        "typer",
    ]
    program = (
        "import sys, torch; before = set(sys.modules); import entropy_fast; "
        "from entropy_fast import Rollouts, token_stats, linear_token_stats, score; "
        "from entropy_fast import ImportanceSampler, ProbeComponents; "
        f"print(sorted(set({heavy}) & (set(sys.modules) - before)))"
    )
    assert python(program) == "[]"


def test_the_package_itself_is_lazy():
    assert python("import sys, entropy_fast; print('torch' in sys.modules)") == "False"


def test_every_public_name_exists():
    import entropy_fast

    for name in entropy_fast.__all__:
        assert getattr(entropy_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'entropy'"):
        _ = entropy_fast.entropy


def test_every_package_folder_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "entropy_fast").rglob("*.py")
        if "kernels" not in path.relative_to(ROOT).parts
    }
    assert folders | {"entropy_fast.kernels"} == set(settings["packages"])
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "entropy_fast" / "kernels").resolve() == ROOT / "kernels"
