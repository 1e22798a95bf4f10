"""The banner, in text and HTML, and the description of this very machine."""

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from machines import A100, COLAB, COMPLETE, GIB, T4, made_up

from gemma_qat_kit import machine
from gemma_qat_kit.catalog import KNOWN_FORMATS, find_checkpoint
from gemma_qat_kit.environment import PLACES, Gpu, environment


def test_banner_is_short_and_starts_with_the_place():
    for place, name in PLACES.items():
        assert str(made_up(place=place)).startswith(f"{name}, Python 3.13.15, 2 CPU cores, RAM 11.4 GiB free of 12.7")
    lines = str(made_up()).splitlines()
    assert 6 <= len(lines) <= 13
    assert max(len(line) for line in str(made_up(libraries=COLAB, gpus=(T4, A100))).splitlines()) <= 100
    assert [line.split()[0] for line in lines[2:11]] == list(KNOWN_FORMATS)
    assert repr(made_up()) == str(made_up())


def test_readiness_says_in_a_few_lines_that_all_is_here():
    said = made_up(place="jupyter", gpus=()).readiness()
    assert said.splitlines()[0].startswith("Jupyter, Python 3.13.15")
    assert "Ready: gemma_qat_kit 0.1.0, xllamacpp 2026.10.11549" in said
    assert "image" not in said
    assert len(said.splitlines()) <= 5


def test_readiness_on_an_old_image_says_what_works_until_then_and_replaces_nothing():
    said = " ".join(made_up(libraries=COMPLETE | {"transformers": "5.0.0"}).readiness().split())
    assert "lacks transformers>=5.15 (here: 5.0.0), and replacing it here breaks things. Until then GGUF files" in said
    assert "pip install 'transformers" not in said
    assert "Ready" not in said
    assert "transformers 5.0.0, accelerate 1.14.0 (the last three as the image has them)" in said


@pytest.mark.parametrize(("place", "menu"), [("colab", "Change runtime type"), ("kaggle", "Accelerator")])
def test_readiness_without_a_gpu_says_where_to_choose_one(place, menu):
    said = " ".join(made_up(place=place, gpus=()).readiness().split())
    assert "no GPU: GGUF files answer on its CPU" in said
    assert menu in said
    assert "no GPU:" not in made_up(place="binder", gpus=()).readiness()


def test_readiness_with_a_full_disk_names_the_smallest_download():
    said = " ".join(made_up(disk_free_bytes=GIB).readiness().split())
    assert "The disk has 1.00 GiB free, and the smallest download (E2B mobile) takes 2.29 GiB." in said
    assert "HF_HOME" in said


@pytest.mark.parametrize(
    ("devices", "words"),
    [(("CUDA0",), "Ready"), ((), "the CPU build here"), (None, "xllamacpp is installed but does not load")],
)
def test_readiness_says_whether_llama_cpp_sees_the_gpu(devices, words, monkeypatch):
    monkeypatch.setattr(machine, "read_llama_cpp_devices", lambda: devices)
    said = made_up().readiness()
    assert words in said
    commands = [line for line in said.splitlines() if "pip install" in line]
    assert len(commands) == (devices != ("CUDA0",))
    assert all(line.startswith("  %pip install -q --no-deps --force-reinstall ") for line in commands)
    assert all(line.endswith(" xllamacpp") for line in commands)


class Tags(HTMLParser):
    """Collect tags and text, and check that each opened tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_banner_says_what_the_text_says_and_escapes_it():
    here = made_up(gpus=(Gpu("<b>Evil & Co</b>", 2**34, 2**34, (9, 0)),), libraries=COLAB)
    tags = Tags()
    tags.feed(here._repr_html_())
    assert tags.open == []
    assert "<b>Evil & Co</b>" in tags.text
    assert "b" not in tags.names
    assert not set(tags.names) & {"script", "img", "link", "iframe"}
    for found in here.formats:
        assert found.reason in tags.text
    assert "Google Colab, Python 3.13.15" in tags.text


def test_environment_describes_this_machine(monkeypatch, tmp_path):
    row = find_checkpoint("E2B", "bf16")
    whole = tmp_path / "models--google--gemma-4-E2B-it" / "snapshots" / "abc"
    partial = tmp_path / "models--google--gemma-4-31B-it" / "snapshots" / "abc"
    for folder, name in ((whole, "model.safetensors"), (partial, "model-00001-of-00002.safetensors")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"")
    monkeypatch.setattr(machine, "hub_cache_folder", lambda: tmp_path)
    here = environment()
    assert here.downloaded == {row.repo_id}
    assert here.place in PLACES
    assert here.cpu_count >= 1
    assert here.ram_available_bytes <= here.ram_total_bytes
    assert here.disk_free_bytes > 0
    assert here.libraries["transformers"]
    assert len(here.formats) == len(KNOWN_FORMATS)


def test_environment_loads_no_torch():
    code = "import sys; from gemma_qat_kit.environment import environment; str(environment()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "ipywidgets", "xllamacpp", "bitsandbytes"} & set(loaded)
