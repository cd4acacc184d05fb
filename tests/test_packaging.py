"""One distribution, three import packages: what is imported, what is shipped, what is installed."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mara_fast": ROOT / "mara_fast",
    "mara_kernels": ROOT / "kernels" / "mara_kernels",
    "mara_train": ROOT / "train" / "mara_train",
}
# Imports go one way: what the files of a package must not import.
FORBIDDEN = {
    "mara_kernels": {"transformers", "mara_fast", "mara_train"},
    "mara_fast": {"mara_train"},
    "mara_train": set(),
}
HEAVY = ("torch", "transformers", "triton")


def run_python(
    code: str, *, python: str | Path = sys.executable, cwd: Path = ROOT, path: bool = True
) -> str:
    """What `python -c code` prints; with `path`, the packages come from this tree."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    command = [str(python), "-c", code]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


# --- importing -------------------------------------------------------------------------------


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, mara_fast; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_import_takes_under_300_ms() -> None:
    def best_seconds(code: str, repeats: int = 5) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run_python(code)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    assert best_seconds("import mara_fast") - best_seconds("pass") < 0.3


def test_transformers_imports_in_the_root() -> None:
    """Beside our folder `kernels`, as the current directory and on the path as pytest has it."""
    code = "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.__name__)"
    assert run_python(code).strip() == "AutoModelForCausalLM"


@pytest.mark.parametrize("folder", ["kernels", "train", "tests", "tests/kernels", "tests/train"])
def test_no_package_is_called_kernels_or_train(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def imported(source: str) -> set[str]:
    """The top-level names of every absolute import in `source`, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_imported_sees_every_form() -> None:
    source = """
        import a, b.c as d
        from e.f import g
        from . import h
        from .i import j
        def later():
            import k
    """
    assert imported("if True:" + source) == {"a", "b", "e", "k"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert sources(package)
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in sources(package)
        if (found := imported(file.read_text(encoding="utf-8")) & FORBIDDEN[package])
    }
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_short_captions(package: str) -> None:
    for file in sources(package):
        if file.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            caption = re.split(r"(?<=[.!?])\s|\n\n", docstring, maxsplit=1)[0]
            assert 0 < len(caption) <= 60, f"{file.relative_to(ROOT)}: {caption!r}"


# --- metadata --------------------------------------------------------------------------------


def test_cpu_constraints_satisfy_the_requirements() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = [
            requirements.Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]
        ]
    lines = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    pins = [requirements.Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name for pin in pins} == {"torch", "triton", "transformers"}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        (requirement,) = [one for one in wanted if one.name == pin.name]
        assert requirement.specifier.contains(specifier.version)


# --- building and installing -----------------------------------------------------------------


class Distributions(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distributions]:
    """The sdist of a copy of this tree, and the wheel built from that sdist."""
    for module in ("build", "setuptools", "wheel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building needs {module}: pip install -e '.[dev]'")
    base = tmp_path_factory.mktemp("built")
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results")
    shutil.copytree(ROOT, base / "tree", ignore=skip)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(base / "dist")]
    result = subprocess.run(
        [*command, str(base / "tree")], cwd=base, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (wheel,) = (base / "dist").glob("*.whl")
    (sdist,) = (base / "dist").glob("*.tar.gz")
    yield Distributions(wheel, sdist)
    shutil.rmtree(base)


def shipped_files() -> set[str]:
    """What a wheel must hold of the packages: code, type markers, pages, assets, recipes."""
    files = set()
    for package, folder in PACKAGES.items():
        assets = folder / "tiny" / "assets"
        kept = [*folder.rglob("*.py"), folder / "py.typed", *folder.glob("recipes/*.yaml")]
        kept += [path for path in assets.rglob("*") if path.is_file()]
        kept += [path for kind in ("css", "html", "js") for path in folder.rglob(f"*.{kind}")]
        files |= {f"{package}/{path.relative_to(folder).as_posix()}" for path in kept}
    return files


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A throw-away virtual environment with the wheel; libraries come from the running one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, system_site_packages=True, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    command += ["--no-index", "--ignore-installed", "--quiet", str(built.wheel)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # The environment sees the base's packages; these are the ones of the running environment. A
    # plain path in a .pth file: the .pth files found there (an editable install) stay unread.
    site_packages = run_python(
        "import sysconfig; print(sysconfig.get_path('purelib'))", python=python, path=False
    )
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    Path(site_packages.strip(), "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


def test_the_wheel_holds_the_packages_and_no_tests(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == shipped_files()
    assert any(name.endswith("/LICENSE") for name in info)
    assert any(name.endswith("/entry_points.txt") for name in info)


def test_the_sdist_can_test_itself(built: Distributions) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = {package: folder.relative_to(ROOT) for package, folder in PACKAGES.items()}
    for name in shipped_files():
        package, _, rest = name.partition("/")
        assert (folders[package] / rest).as_posix() in names
    wanted = {"LICENSE", "Makefile", "README.md", "requirements/cpu.txt", "tests/conftest.py"}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_imports_elsewhere(installed: Path, tmp_path: Path) -> None:
    code = "import mara_fast, mara_kernels, mara_train as t; print(mara_fast.__file__, t.__file__)"
    printed = run_python(code, python=installed, cwd=tmp_path, path=False).split()
    for file in printed:
        assert installed.parent.parent in Path(file).parents, f"{file} is not the installed one"


def test_the_wheel_has_its_command(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for arguments, wanted in ((["--help"], "generate"), (["train", "--help"], "--train-data")):
        command = [str(installed.with_name("mara-fast")), *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert wanted in result.stdout
