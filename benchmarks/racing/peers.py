"""The peers, each in an environment of its own under one folder: pinned versions, built or installed once."""

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = Path.home() / ".cache" / "internlm2" / "race"
LLAMA_SDIST = "llama-cpp-python==0.3.36"  # carries the sources of llama.cpp
LLAMA_BINARIES = ("llama-server", "llama-quantize", "llama-perplexity", "llama-bench", "llama-batched-bench")
# optimum-intel and nncf only write the files; what runs is openvino-genai. torch writes CTranslate2's files.
PINS = {
    "openvino": (
        "torch==2.13.0",
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
    ),
    "ctranslate2": ("torch==2.13.0", "ctranslate2==4.8.5", "transformers==5.23.0"),
    "transformers": ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"),
}
NAMES = ("llama.cpp", *PINS)
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_WEBUI=OFF",
)  # fmt: skip
_PEAK_SOURCE = Path(__file__).parent / "peak.c"


@dataclass(frozen=True)
class Peers:
    """Where the environments lie."""

    root: Path

    def python(self, name: str) -> Path:
        """The interpreter of a peer's environment."""
        return self.root / f"venv-{name}" / "bin" / "python"

    def llama_binary(self, name: str) -> Path:
        """A program of llama.cpp."""
        return self._llama_source / "build" / "bin" / name

    @property
    def peak_library(self) -> Path:
        """The instruction-rate probe."""
        return self.root / "peak.so"

    @property
    def _llama_source(self) -> Path:
        folder = LLAMA_SDIST.replace("-", "_").replace("==", "-")
        return self.root / "src" / folder / "vendor" / "llama.cpp"

    def is_ready(self, name: str) -> bool:
        """Whether `setup` has finished with a peer."""
        if name == "llama.cpp":
            return all(self.llama_binary(binary).exists() for binary in LLAMA_BINARIES)
        return self._stamp(name).exists() and self._stamp(name).read_text() == "\n".join(PINS[name])

    def _stamp(self, name: str) -> Path:
        return self.root / f"venv-{name}" / "pins.txt"

    def setup(self, names: tuple[str, ...] = NAMES) -> None:
        """Build and install what is missing, and the probe. When a command fails, the program ends with its words."""
        self.root.mkdir(parents=True, exist_ok=True)
        build_peak(self.peak_library)
        for name in names:
            if self.is_ready(name):
                continue
            print(f"{name}: setting up", flush=True)
            if name == "llama.cpp":
                self._build_llama()
            else:
                self._install(name)

    def _install(self, name: str) -> None:
        python = self.python(name)
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(python.parent.parent)])
        pip = [str(python), "-m", "pip"]
        _run([*pip, "install", "--quiet", *PINS[name]])
        # NOTE: optimum brings a torchvision for GPUs, which does not go with a torch for CPUs and is not needed.
        _run([*pip, "uninstall", "--quiet", "--yes", "torchvision"])
        self._stamp(name).write_text("\n".join(PINS[name]))

    def _build_llama(self) -> None:
        folder = self.root / "src"
        folder.mkdir(exist_ok=True)
        if not self._llama_source.exists():
            # NOTE: this also asks the package for its metadata, in an environment that pip makes and throws away.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
            _run([*command, "--no-binary", LLAMA_SDIST.partition("==")[0], LLAMA_SDIST])
            for archive in folder.glob("llama_cpp_python-*.tar.gz"):
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
                archive.unlink()
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(
                    f"{tool} is missing, and llama.cpp is built with it. Install it: `apt install {tool}`."
                )
        build = self._llama_source / "build"
        _run(["cmake", "-B", str(build), "-S", str(self._llama_source), "-G", "Ninja", *_CMAKE_OPTIONS])
        _run(["ninja", "-C", str(build), "-j", str(os.cpu_count() or 1), *LLAMA_BINARIES])


def build_peak(target: Path) -> bool:
    """Compile the instruction-rate probe. False where this processor or machine cannot have it; it is left out then."""
    if target.exists() and target.stat().st_mtime >= _PEAK_SOURCE.stat().st_mtime:
        return True
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(_PEAK_SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0


def _run(command: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
