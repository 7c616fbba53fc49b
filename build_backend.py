"""The PEP 517 backend: setuptools', plus the torch of the environment it installs into.

A C++ extension of torch works only with the torch it was built for, and a build runs in an
isolated environment that has none. So every hook first puts the packages of the outer environment
behind those of the build's own on sys.path, and asks for torch as a build requirement only when
there is none outside. The compile itself is in setup.py.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that need no torch)
    build_sdist,
    get_requires_for_build_sdist,
)

TORCH = "torch>=2.11"


def _see_the_environments_torch() -> bool:
    """Makes the outer environment's torch importable; says whether there is a torch to build with.

    pip isolates a build by a PYTHONPATH and runs it with the outer environment's own interpreter:
    the same interpreter without PYTHONPATH reports what the outer environment would import.
    """
    if find_spec("torch") is None:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")
        }
        outer = subprocess.run(
            [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"],
            env=environment,
            cwd=os.path.dirname(os.path.abspath(__file__)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        sys.path.extend(path for path in outer if path not in sys.path)
    return find_spec("torch") is not None


def get_requires_for_build_wheel(config_settings=None):
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if _see_the_environments_torch() else [*requires, TORCH]


def get_requires_for_build_editable(config_settings=None):
    requires = build_meta.get_requires_for_build_editable(config_settings)
    return requires if _see_the_environments_torch() else [*requires, TORCH]


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _see_the_environments_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _see_the_environments_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _see_the_environments_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _see_the_environments_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
