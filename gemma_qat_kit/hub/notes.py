"""What the kit remembers of a repository between two calls: one small JSON file each, in `GEMMA_QAT_KIT_HOME`.

revisions   name -> the commit it meant when it was last asked for; "main" is the pin
listings    commit -> [[file name, bytes, digest], ...], so that a cached copy can be judged without a network
verified    path -> [bytes, mtime in ns] of each file whose digest was checked
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

_KEYS = ("revisions", "listings", "verified")


def recall(repo_id: str) -> dict[str, dict]:
    """Read the notes about a repository; a file that cannot be read as notes is put aside under another name."""
    path = _notes_path(repo_id)
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(notes, dict) or not all(isinstance(notes.get(key), dict) for key in _KEYS):
            raise ValueError("not notes of the kit")
    except OSError:
        notes = {}
    except ValueError:
        notes = {}
        _put_aside(path)
    return {key: notes.get(key, {}) for key in _KEYS}


def remember(repo_id: str, **news: dict) -> None:
    """Add to the notes about a repository, in one step; where they cannot be written, only speed is lost."""
    notes = recall(repo_id)
    for key, entries in news.items():
        notes[key].update(entries)
    path = _notes_path(repo_id)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(notes, indent=1), encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)


def _notes_path(repo_id: str) -> Path:
    home = Path(os.environ.get("GEMMA_QAT_KIT_HOME") or "~/.cache/gemma_qat_kit").expanduser()
    return home / "repositories" / f"{repo_id.replace('/', '--')}.json"


def _put_aside(path: Path) -> None:
    with suppress(OSError):  # read-only: it stays, and is overwritten by nobody
        os.replace(path, path.with_name(f"{path.name}.corrupt-{time.time_ns()}"))
