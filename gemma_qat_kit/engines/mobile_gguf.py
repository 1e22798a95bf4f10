"""The GGUF that a mobile checkpoint runs as: its own codes in llama.cpp's groups, written once and kept.

It lies beside the download, so that a cache that a class shares has it for everybody, or in the kit's own folder where
nothing can be written there. Its name says which weights, config and tokenizer it was made of, so a file of others is
never taken for it. A child process writes it, so that torch and its memory are gone when the model is loaded.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from gemma_qat_kit import errors
from gemma_qat_kit.checkpoint import read_config, weight_files
from gemma_qat_kit.engines import llama_cpp_process as process
from gemma_qat_kit.errors import BrokenCheckpointError, ExportError, KitError, NotEnoughDiskError
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.hub.cache import DIGEST, free_bytes
from gemma_qat_kit.layouts import reblocked_tensors
from gemma_qat_kit.progress import Progress, Report
from gemma_qat_kit.units import readable_bytes

_PACKAGE = Path(__file__).parent.parent
_SCRIPT = _PACKAGE / "export" / "reblock_process.py"
_LAYOUT = "1"  # of the file; another number makes every file anew
_DESCRIBED_BY = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja")  # fmt: skip
_STALE_SECONDS = 600  # nobody has written to a draft for so long: its process was killed


def mobile_gguf(folder: Path, report: Report | None = None, *, device: str = "cpu") -> Path:
    """Return the GGUF of a mobile checkpoint, which is written if there is none yet or it is damaged.

    Args:
        folder: The checkpoint.
        report: Called with the progress; raise CancelledError in it to stop, and nothing is left.
        device: What llama.cpp will compute on, "cpu" or "cuda": 2-bit codes are of another type there.

    Raises:
        MissingLibraryError: It must be written, and xllamacpp to run it or torch to write it is not installed.
        NotEnoughDiskError: It does not fit on the disk; said before it is begun.
        BrokenCheckpointError: The folder is incomplete or damaged.
        ExportError: It cannot be written.
    """
    process.require_xllamacpp()
    label, places = _label_and_places(folder)
    label = f"{label}-{device}"
    name = f"{label}-{_fingerprint(folder)}.gguf"
    found = next((place / name for place in places if _is_whole(place / name)), None)
    if found is not None:
        return found
    target = _writable(places) / name
    _check_room(folder, target, device)
    _clear(target.parent, label)
    _write(folder, target, report, device)
    return target


def _label_and_places(folder: Path) -> tuple[str, tuple[Path, ...]]:
    """Return how the file's name starts, the same for every version of a checkpoint, and the folders to look in."""
    real = folder.resolve()
    home = Path(os.environ.get("GEMMA_QAT_KIT_HOME") or "~/.cache/gemma_qat_kit").expanduser() / "reblocked"
    if real.parent.name == "snapshots":  # <cache>/models--owner--name/snapshots/<commit>
        repo = real.parent.parent
        return f"{repo.name}-{real.name[:8]}", (repo / "reblocked", home)
    return f"{real.name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}", (home,)


def _fingerprint(folder: Path) -> str:
    """Return what changes with any file that the GGUF is made of, without reading the weights."""
    described = [folder / name for name in _DESCRIBED_BY if (folder / name).exists()]
    lines = [_LAYOUT]
    for path in (*weight_files(folder), *described):
        real = path.resolve()
        about = real.stat()
        # The hub's cache names a file by its digest, which is the same on every machine.
        version = real.name if DIGEST.fullmatch(real.name) else about.st_mtime_ns
        lines.append(f"{path.name} {about.st_size} {version}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    try:
        return path.is_file() and bool(read_gguf_header(path).tensors)
    except (BrokenCheckpointError, OSError, ValueError):  # ValueError: an empty file
        return False


def _writable(places: tuple[Path, ...]) -> Path:
    """Return the first folder that can be written to, made if need be."""
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise ExportError(
        f"{places[-1]} cannot be written.",
        "The GGUF that llama.cpp runs is written once for a mobile checkpoint.",
        'Set GEMMA_QAT_KIT_HOME to a folder of yours, or pass engine="transformers".',
    )


def _check_room(folder: Path, target: Path, device: str) -> None:
    """Refuse what does not fit, by the config, before torch is started."""
    try:
        needed = sum(tensor.nbytes for tensor in reblocked_tensors(read_config(folder), device))
    except (LookupError, TypeError, AttributeError):
        return  # no config of a Gemma 4, which the export says in full
    free = free_bytes(target.parent)
    if needed > free:
        raise NotEnoughDiskError(
            f"The GGUF of {folder.name} takes {readable_bytes(needed)}; {readable_bytes(free)} are free in "
            f"{target.parent}.",
            "A mobile checkpoint is re-blocked for llama.cpp once, beside the download.",
            'Free some space, set GEMMA_QAT_KIT_HOME to a bigger disk, or pass engine="transformers".',
        )


def _clear(place: Path, label: str) -> None:
    """Delete files made of other versions of this checkpoint, and what a killed process has left."""
    drafts = [path for path in place.glob(f".{label}-*.part") if time.time() - path.stat().st_mtime > _STALE_SECONDS]
    for path in (*place.glob(f"{label}-*.gguf"), *drafts):
        with contextlib.suppress(OSError):
            path.unlink()


def _write(folder: Path, target: Path, report: Report | None, device: str) -> None:
    """Have the child write the file; whatever ends this call ends the child."""
    paths = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    child, log = process.start(_SCRIPT, PYTHONPATH=paths)
    try:
        with contextlib.suppress(OSError):  # it has ended already
            order = {"source": str(folder), "target": str(target), "device": device}
            child.stdin.write(json.dumps(order).encode() + b"\n")
        for line in child.stdout:
            said = json.loads(line)
            if "error" in said:
                raise getattr(errors, said["kind"], KitError)(*said["error"])
            if report and "stage" in said:
                report(Progress(said["stage"], said["done"], said["total"]))
            if "nbytes" in said:
                return
        child.wait()
        raise _ended(folder, process.read_log(log), child.returncode)
    finally:
        with contextlib.suppress(OSError, process.subprocess.TimeoutExpired):
            child.stdin.close()  # it deletes its draft
            child.wait(timeout=5)
        process.end(child, log)


def _ended(folder: Path, log: str, code: int) -> KitError:
    last = (log.strip().splitlines() or ["it said nothing"])[-1]
    if code in (-9, 137):
        return errors.NotEnoughMemoryError(
            f"The memory was too small while {folder.name} was re-blocked for llama.cpp.",
            "That takes about a gigabyte, once.",
            "Close other models and load it again, on a machine with more memory if need be.",
        )
    return ExportError(
        f"{folder.name} could not be re-blocked for llama.cpp (code {code}): {last[:200]}.",
        "A whole mobile checkpoint, torch and some memory are needed, once.",
        'Load it again, or pass engine="transformers".',
    )
