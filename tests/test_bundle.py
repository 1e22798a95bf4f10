"""A bundle is whole or says what is not, fetches only what is missing, and is enough with no network at all."""

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_repo import FILES, REPO, WEIGHTS, quiet

from gemma_qat_kit.classroom import __main__ as command
from gemma_qat_kit.classroom import bundle as module
from gemma_qat_kit.classroom import start, wheels
from gemma_qat_kit.classroom.bundle import bundle
from gemma_qat_kit.download import download
from gemma_qat_kit.errors import BadSettingError, DownloadError, NotEnoughDiskError, UnknownNameError

NAME = f"models/models--{REPO.replace('/', '--')}/snapshots"
NO_NETWORK = ["unshare", "--map-root-user", "--net"]
DONE = subprocess.CompletedProcess([], 0)
CAN_CUT = shutil.which("unshare") and subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode == 0
# A new network has not even loopback, which kernels and llama.cpp's server talk over: this brings it up, and no more.
ALONE = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))
try:
    socket.create_connection(("192.0.2.1", 80), 2)
except OSError as err:
    print("cut off:", err)
import gemma_qat_kit as gqk
with gqk.load("owner/small", report=lambda progress: None) as model:
    print(model.chat("What is gravity?", max_new_tokens=30, temperature=0).text)
"""


@pytest.fixture
def make(hub, tmp_path):
    """Make or repair a bundle without wheels."""
    return functools.partial(bundle, tmp_path / "bundle", with_wheels=False, report=quiet)


def _weights(made):
    return next((made.folder / NAME).glob("*/model.safetensors"))


def test_a_bundle_lists_every_file_and_has_no_links(make, hub, capsys):
    made = make([REPO])
    assert made.checkpoints == (REPO,)
    assert "To fetch: 0 bytes in 0 wheels" in capsys.readouterr().out
    files = start.read_manifest(made.folder)["files"]
    assert start.damaged(made.folder) == []
    assert {"start.py", "texts/python-manual.txt", "recordings/receipts_at_full_size.jsonl",
            "notebooks/00_start_here.ipynb", "docs/start_here.png"} <= set(files)  # fmt: skip
    found = [path for path in made.folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    assert {path.relative_to(made.folder).as_posix() for path in found} - {"manifest.json"} == set(files)
    assert not [path for path in made.folder.rglob("*") if path.is_symlink()]
    assert made.nbytes == sum(path.stat().st_size for path in found) - (made.folder / "manifest.json").stat().st_size
    assert _weights(made).read_bytes() == WEIGHTS
    assert "python start.py" in str(made)
    assert 'role="status"' in made._repr_html_()


def test_a_download_finds_everything_in_the_bundle_and_asks_nobody(make, hub, tmp_path, monkeypatch):
    made = make([REPO])
    hub.asked.clear()
    for name, value in start.offline_settings(made.folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path / "student"))
    assert (download(REPO, report=quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.asked == []


def test_damage_is_named_and_only_that_file_is_fetched_again(make, hub, capsys):
    made = make([REPO])
    names = [_weights(made).relative_to(made.folder).as_posix(), "notebooks/00_start_here.ipynb"]
    data = bytearray(WEIGHTS)
    data[1000] ^= 1
    _weights(made).write_bytes(data)
    (made.folder / names[1]).unlink()
    assert sorted(start.damaged(made.folder)) == sorted(names)
    told = subprocess.run([sys.executable, made.folder / "start.py", "verify"], capture_output=True, text=True)
    assert told.returncode == 1
    assert all(f"{name} is damaged or missing" in told.stdout for name in names)
    hub.asked.clear()
    again = make()
    assert sorted(again.repaired) == sorted(names)
    assert f"{names[0]} is damaged or missing" in capsys.readouterr().out
    assert again.checkpoints == (REPO,)
    fetched = {asked.path.rsplit("/", 1)[-1] for asked in hub.asked
               if asked.method == "GET" and "/api/" not in asked.path}  # fmt: skip
    assert fetched == {"model.safetensors"}
    assert start.damaged(made.folder) == []


def test_a_bundle_that_stopped_half_way_goes_on_there(make, hub):
    with pytest.raises(DownloadError, match="owner/second"):
        make([REPO, "owner/second"])
    hub.commit("owner/second", FILES)
    hub.asked.clear()
    made = make([REPO, "owner/second"])
    assert made.checkpoints == (REPO, "owner/second")
    assert not [asked for asked in hub.asked if REPO in asked.path]


def test_what_does_not_fit_is_said_before_the_first_byte(make, hub, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 10**9)
    with pytest.raises(NotEnoughDiskError, match=r"needs 3\.12 GiB more .* 954 MiB free.*to spare.*fewer"):
        make(["E2B q4_0"])
    assert hub.asked == []


def test_what_cannot_be_bundled_is_refused(make, tmp_path, monkeypatch):
    with pytest.raises(BadSettingError, match=r"smollm2-135m q4_1 has no repository.*comes with the wheels"):
        make(["smollm2-135m"])
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        make(["E2"])
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(BadSettingError, match=r"holds no notebooks.*from a clone.*make lab"):
        make()


@pytest.mark.parametrize("text", ["{half", "[]", '{"files": []}', '{"files": {"a": 3}}',
                                  '{"files": {"../a": {"bytes": 1, "sha256": ""}}}',
                                  '{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}'])  # fmt: skip
def test_a_damaged_list_is_said_and_made_again(make, text):
    made = make()
    (made.folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be read as the list of a bundle's files"):
        start.damaged(made.folder)
    assert make().repaired == ("manifest.json",)
    assert start.damaged(made.folder) == []


@pytest.mark.skipif(not CAN_CUT, reason="this system does not let a process leave the network")
def test_the_kit_answers_from_a_bundle_with_no_network_at_all(make, hub, built_in, tmp_path):
    hub.commit("owner/small", {"small.gguf": built_in.read_bytes()})
    made = make(["owner/small"])
    environment = os.environ | start.offline_settings(made.folder) | {"GEMMA_QAT_KIT_HOME": str(tmp_path / "student")}
    environment["PYTHONPATH"] = os.pathsep.join([str(module.ROOT), environment.get("PYTHONPATH", "")])
    environment.pop("HF_ENDPOINT")
    said = subprocess.run([*NO_NETWORK, sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert said.stdout.startswith("cut off: "), said.stderr
    assert "gravity" in said.stdout.lower() or "force" in said.stdout.lower(), said.stdout + said.stderr


# Wheels: the real pip, on an index of two small wheels


def _wheel(folder, name, needs=""):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{f'Requires-Dist: {needs}' if needs else ''}\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}-1.0.dist-info/METADATA", about)
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")
        file.writestr(f"{name}.py", "answer = 42\n")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    paths = [_wheel(folder, "gqk_small_b"), _wheel(folder, "gqk_small_a", "gqk_small_b")]
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return paths


def test_wheels_are_resolved_sized_fetched_once_and_mended(index, tmp_path, monkeypatch):
    found = wheels.with_sizes(wheels.resolved(["gqk-small-a"]))
    assert sorted(wheel.name for wheel in found) == sorted(path.name for path in index)
    assert {wheel.name: wheel.nbytes for wheel in found} == {path.name: path.stat().st_size for path in index}
    assert {wheel.sha256 for wheel in found} == set(map(start.file_digest, index))
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheels.fetch(found, folder)
    assert all(wheel.is_in(folder) for wheel in found)
    (folder / index[0].name).write_bytes(b"damaged")
    missing = [wheel for wheel in found if not wheel.is_in(folder)]
    assert [wheel.name for wheel in missing] == [index[0].name]
    wheels.fetch(missing, folder)
    assert all(wheel.is_in(folder) for wheel in found)
    monkeypatch.setattr(wheels, "_pip", pytest.fail)
    wheels.fetch([], folder)
    assert wheels.requirements(found).count("--hash=sha256:") == 2


def test_what_pip_says_is_passed_on(index):
    with pytest.raises(DownloadError, match=r"pip could not install .*gqk-none.*network.*what is there is kept"):
        wheels.resolved(["gqk-none"])


def test_a_server_that_tells_no_size_leaves_it_unknown():
    (wheel,) = wheels.with_sizes([wheels.Wheel("a==1", "http://127.0.0.1:9/a-1-py3-none-any.whl", "0")])
    assert wheel.nbytes is None


def test_the_starter_installs_from_the_bundle_only_and_once(make, monkeypatch, tmp_path):
    made = make()
    calls, into = [], tmp_path / "student"
    monkeypatch.setattr(start, "__file__", str(made.folder / "start.py"))
    monkeypatch.setattr(start.venv, "create", lambda folder, **how: (folder / "bin").mkdir(parents=True))
    monkeypatch.setattr(subprocess, "run", lambda line, **how: calls.append((list(map(str, line)), how["env"])) or DONE)
    assert start.main(["--into", str(into)]) == 1, "there are no wheels for this machine"
    (made.folder / f"requirements-{start.machine_kind()}.txt").write_text("a==1 --hash=sha256:0\n")
    assert start.main(["--into", str(into)]) == 0
    (install, clean), (lab, settings) = calls
    assert {"--no-index", "--require-hashes", "--no-deps", str(made.folder / "wheels")} <= set(install)
    assert clean["PIP_CONFIG_FILE"] == os.devnull
    assert lab[1:3] == ["-m", "jupyterlab"]
    assert settings["HF_HUB_OFFLINE"] == "1"
    assert settings["HF_HUB_CACHE"] == str(made.folder / "models")
    (into / ".venv" / "bin" / "python").write_text("")
    (into / "notebooks" / "00_start_here.ipynb").write_text("my own work")
    assert start.main(["--into", str(into), "python", "-c", "pass"]) == 0
    assert len(calls) == 3
    assert calls[2][0][1:] == ["-c", "pass"]
    assert (into / "notebooks" / "00_start_here.ipynb").read_text() == "my own work"


def test_the_starter_needs_nothing_but_python():
    lines = Path(module.ROOT / "gemma_qat_kit" / "classroom" / "start.py").read_text().splitlines()
    names = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert names <= sys.stdlib_module_names


def test_nothing_is_installed_from_a_damaged_bundle(make, monkeypatch, tmp_path, capsys):
    made = make()
    (made.folder / f"requirements-{start.machine_kind()}.txt").write_text("")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    manifest["files"]["wheels/a.whl"] = {"bytes": 3, "sha256": "0"}
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(start, "__file__", str(made.folder / "start.py"))
    monkeypatch.setattr(start.venv, "create", pytest.fail)
    assert start.main(["--into", str(tmp_path / "student")]) == 1
    assert "wheels/a.whl is damaged or missing" in capsys.readouterr().out


def test_the_command_makes_verifies_and_explains(make, capsys, monkeypatch):
    made = make()
    assert command.main(["verify", str(made.folder)]) == 0
    (made.folder / "start.py").write_text("")
    assert command.main(["verify", str(made.folder)]) == 1
    assert "start.py is damaged" in capsys.readouterr().out
    assert command.main(["verify", str(made.folder / "nowhere")]) == 1
    monkeypatch.setattr(module, "bundle", lambda folder, checkpoints: (folder, checkpoints))
    assert command.main(["bundle", "a", "E2B q4_0"]) == 0
    assert "('a', ['E2B q4_0'])" in capsys.readouterr().out
    assert command.main([]) == 2
    assert command.main(["bundle"]) == 2
    monkeypatch.setattr(module, "bundle", lambda folder, checkpoints: module._row(*checkpoints))
    assert command.main(["bundle", "a", "E2"]) == 1
