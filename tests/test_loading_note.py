"""The note of a load: gone when the load is over, told of once when its kernel died, left alone while that lives."""

import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import asdict, replace

import psutil
import pytest

from gemma_qat_kit.loading_note import last_failure, note_loading
from gemma_qat_kit.memory.plan import MemoryPlan, plan_for, plan_memory
from gemma_qat_kit.units import readable_bytes

SETTINGS = plan_memory("E4B", "bf16").settings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder for notes; and cheaper settings that are a shorter context."""

    def cheaper(plan):
        return [("a context of 512 tokens", plan_for(replace(plan.settings, context_length=512)))]

    monkeypatch.setattr(MemoryPlan, "cheaper", cheaper, raising=False)
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "kit"))
    return tmp_path / "kit"


def test_a_note_lies_there_while_a_model_is_loaded(home):
    with note_loading(SETTINGS):
        (path,) = home.glob("loading-*.json")
        assert path.name == f"loading-{os.getpid()}.json"
        assert json.loads(path.read_text())["needed_bytes"] == plan_for(SETTINGS).needed_bytes
        assert last_failure() is None, "its process lives"
        assert path.exists()
    assert list(home.iterdir()) == []


def test_the_note_goes_also_when_the_load_fails(home):
    with pytest.raises(RuntimeError), note_loading(SETTINGS):
        raise RuntimeError("x")
    assert list(home.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "file"))
    with note_loading(SETTINGS):
        pass
    assert last_failure() is None


def test_a_user_without_a_home_costs_nothing(monkeypatch):
    monkeypatch.delenv("GEMMA_QAT_KIT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    with note_loading(SETTINGS):
        pass
    assert last_failure() is None


def test_a_kernel_that_was_killed_while_it_loaded_is_told_of_once(home):
    code = (
        "import dataclasses, os, signal, sys; from gemma_qat_kit.loading_note import note_loading\n"
        "from gemma_qat_kit.memory.plan import plan_memory\n"
        "with note_loading(plan_memory('E4B', 'bf16').settings): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode != 0
    assert len(list(home.iterdir())) == 1
    needs = readable_bytes(plan_for(SETTINGS).needed_bytes)
    said = f"ended while it loaded E4B bf16, which needs {needs}. Cheaper: a context"
    with pytest.warns(UserWarning, match=said), note_loading(SETTINGS):
        pass
    assert list(home.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with note_loading(SETTINGS):
            pass


def write_note(home, **changes):
    home.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    note = {"pid": me.pid, "started": me.create_time(), "host": socket.gethostname(),
            "needed_bytes": 2**30, "settings": asdict(SETTINGS)} | changes  # fmt: skip
    path = home / f"loading-{note['pid']}.json"
    path.write_text(json.dumps(note))
    return path


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_dead_one(home):
    path = write_note(home, started=1.0)
    assert last_failure().settings == SETTINGS
    assert not path.exists()


def test_a_note_of_another_machine_with_the_same_home_is_left_alone(home):
    path = write_note(home, host="elsewhere", started=1.0)
    assert last_failure() is None
    assert path.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_note_that_cannot_be_read_is_removed_without_a_word(home, text):
    home.mkdir()
    (home / "loading-1.json").write_text(text)
    assert last_failure() is None
    assert list(home.iterdir()) == []


def test_a_note_of_another_version_of_the_kit_is_removed_without_a_word(home):
    path = write_note(home, started=1.0, settings={"size": "E9Z", "lora_targets": []})
    assert last_failure() is None
    assert not path.exists()
