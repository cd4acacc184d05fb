"""What pyproject.toml cannot say: three import packages that live in folders of other names.

There is no package directly in `kernels/` or `train/`: transformers looks for a package called
`kernels` and would take a folder of ours for it. The metadata is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).parent / "mara_fast" / "__init__.py"


def read_version() -> str:
    """The `__version__` of mara_fast, read as text: a build must not import the package."""
    match = re.search(r'^__version__ = "([^"]+)"', INIT.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f'{INIT} has no line `__version__ = "..."`; add one')
    return match[1]


setup(
    version=read_version(),
    # Here and not in pyproject.toml: its SPDX string needs setuptools 77, its table is deprecated.
    license="Apache-2.0",
    package_dir={
        "mara_fast": "mara_fast",
        "mara_kernels": "kernels/mara_kernels",
        "mara_train": "train/mara_train",
    },
    packages=[
        *find_packages(include=["mara_fast", "mara_fast.*"]),
        *find_packages("kernels"),
        *find_packages("train"),
    ],
    package_data={
        "mara_fast": [
            "py.typed",
            "evaluation/report.css",
            "inspection/*.css",
            "inspection/*.html",
            "inspection/*.js",
            "tiny/assets/**",
        ],
        "mara_kernels": ["py.typed"],
        "mara_train": ["py.typed", "recipes/*.yaml"],
    },
    include_package_data=False,
)
