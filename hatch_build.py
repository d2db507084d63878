"""Build hook: compile the C++ kernels when a wheel is built, so that the first start need not.

A machine without a compiler still gets a wheel: the package then tries again on first use, and computes in plain torch
if there is none then either. Editable installs and source distributions carry no library.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOM = "src/internlm2/kernels"


class KernelsBuildHook(BuildHookInterface):
    """Adds the shared library to the wheel, which then belongs to one platform, but to every Python 3."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        if self.target_name != "wheel" or version == "editable":
            return
        build = _load(Path(self.root) / ROOM / "build.py")
        compiler = build.find_compiler()
        if compiler is None:
            self.app.display_warning(
                "No C++ compiler: the kernels are left out, and built on first use if possible."
            )
            return
        target = Path(self.directory) / build.packaged_library().name
        try:
            build.compile_library(target, compiler)
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"The kernels are left out: {error}.")
            return
        build_data["force_include"][str(target)] = f"internlm2/kernels/{target.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    from packaging.tags import sys_tags

    return next(iter(sys_tags())).platform


def _load(path: Path) -> ModuleType:
    """Import one file without its package, whose dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_build"] = module
    spec.loader.exec_module(module)
    return module
