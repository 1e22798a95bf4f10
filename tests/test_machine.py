"""What is read of a machine: places by variables, control groups as folders of files, nvidia-smi by its answers."""

import subprocess
from datetime import date
from types import SimpleNamespace

import pytest

from gemma_qat_kit import machine

GIB = 2**30


@pytest.mark.parametrize(
    ("environ", "has_colab_module", "is_kernel", "place"),
    [
        ({"COLAB_RELEASE_TAG": "release-colab_20260819"}, True, True, "colab"),
        ({}, True, True, "colab"),
        # Kaggle's image is built on Colab's: the tag is set there too (Kaggle/kagglehub#230).
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "x"}, True, True, "kaggle"),
        ({"BINDER_SERVICE_HOST": "10.0.0.1", "JUPYTERHUB_USER": "jovyan"}, False, True, "binder"),
        ({"BINDER_LAUNCH_HOST": "https://mybinder.org/"}, False, True, "binder"),
        ({"JUPYTERHUB_USER": "ada"}, False, True, "jupyterhub"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, False, False, "jupyterhub"),
        ({"VSCODE_PID": "1234"}, False, True, "vscode"),
        ({"VSCODE_PID": "1234"}, False, False, "python"),
        ({}, False, True, "jupyter"),
        ({}, False, False, "python"),
    ],
)
def test_place_is_known_by_its_variables(environ, has_colab_module, is_kernel, place):
    assert machine.find_place(environ, has_colab_module=has_colab_module, is_kernel=is_kernel) == place


def test_place_of_this_process_is_one_of_them(monkeypatch):
    monkeypatch.setattr(machine.os, "environ", {"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert machine.read_place() == "kaggle"


def test_missing_google_package_is_no_colab(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'google'")

    monkeypatch.setattr(machine.os, "environ", {})
    monkeypatch.setattr("importlib.util.find_spec", fail)
    assert machine.read_place() in ("python", "jupyter")


@pytest.fixture
def host(monkeypatch):
    """A host with 64 GiB, 60 of them free, as psutil sees it from inside a container."""
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def process_file(tmp_path, text):
    path = tmp_path / "process"
    path.write_text(text)
    return path


def test_cgroup_v2_limit_counts_and_its_file_cache_is_free(tmp_path, host):
    write(
        tmp_path / "cgroup", memory__max=2 * GIB, memory__current=GIB, memory__stat=f"anon 1\ninactive_file {GIB // 2}"
    )
    process = process_file(tmp_path, "0::/\n")
    assert machine.read_memory(tmp_path / "cgroup", process) == (2 * GIB, 2 * GIB - GIB // 2)


def test_cgroup_v1_limit_counts_and_its_file_cache_is_free(tmp_path, host):
    write(
        tmp_path / "cgroup" / "memory" / "docker" / "abc",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"inactive_file 0\ntotal_inactive_file {2 * GIB}",
    )
    process = process_file(tmp_path, "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    assert machine.read_memory(tmp_path / "cgroup", process) == (4 * GIB, 3 * GIB)


def test_cgroup_of_a_container_that_is_its_own_mount_point_counts(tmp_path, host):
    # Docker shows the host's path in /proc/self/cgroup but mounts the container's own group.
    write(tmp_path / "cgroup" / "memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB // 4)
    process = process_file(tmp_path, "4:memory:/docker/abc\n")
    assert machine.read_memory(tmp_path / "cgroup", process) == (GIB, GIB - GIB // 4)


def test_the_tightest_group_of_the_parents_counts(tmp_path, host):
    write(tmp_path / "cgroup" / "a", memory__max=8 * GIB, memory__current=6 * GIB)
    write(tmp_path / "cgroup" / "a" / "b", memory__max="max", memory__current=GIB)
    assert machine.read_memory(tmp_path / "cgroup", process_file(tmp_path, "0::/a/b\n")) == (8 * GIB, 2 * GIB)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), "", "nonsense"])
def test_no_limit_leaves_the_host(tmp_path, host, limit):
    write(tmp_path / "cgroup", memory__max=limit, memory__current=GIB)
    assert machine.read_memory(tmp_path / "cgroup", process_file(tmp_path, "0::/\n")) == (64 * GIB, 60 * GIB)


def test_use_above_the_limit_leaves_nothing(tmp_path, host):
    write(tmp_path / "cgroup", memory__max=GIB, memory__current=2 * GIB)
    assert machine.read_memory(tmp_path / "cgroup", process_file(tmp_path, "0::/\n")) == (GIB, 0)


def test_unreadable_memory_is_none(tmp_path, monkeypatch):
    import psutil

    def fail():
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert machine.read_memory(tmp_path / "none", tmp_path / "none") == (None, None)


def test_garbled_process_file_is_ignored(tmp_path, host):
    process = tmp_path / "process"
    process.write_bytes(b"\xff\xfe")
    assert machine.read_memory(tmp_path, process) == (64 * GIB, 60 * GIB)
    assert machine.read_memory(tmp_path, process_file(tmp_path, "nonsense\n")) == (64 * GIB, 60 * GIB)


@pytest.mark.parametrize(
    ("files", "process", "cores"),
    [
        ({"cpu__max": "150000 100000"}, "0::/\n", 2),
        ({"cpu__max": "10000 100000"}, "0::/\n", 1),
        ({"cpu__max": "max 100000"}, "0::/\n", 8),
        ({}, "0::/\n", 8),
        ({"cpu/cpu__cfs_quota_us": "100000", "cpu/cpu__cfs_period_us": "100000"}, "2:cpu:/\n", 1),
        ({"cpu/cpu__cfs_quota_us": "-1", "cpu/cpu__cfs_period_us": "100000"}, "2:cpu:/\n", 8),
    ],
)
def test_cpu_quota_counts(tmp_path, monkeypatch, files, process, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    write(tmp_path, **files)
    assert machine.read_cpu_count(tmp_path, process_file(tmp_path, process)) == cores


ANSWER = """0, GPU-aaaa-1, Tesla T4, 15360, 15101, 7.5
1, GPU-bbbb-2, NVIDIA A100-SXM4-40GB, 40960, 40500, 8.0
"""


def test_gpus_are_read_from_the_drivers_answer():
    t4, a100 = machine.parse_gpus(ANSWER)
    assert (t4.name, t4.total_bytes, t4.free_bytes, t4.compute_capability) == (
        "Tesla T4", 15360 * 2**20, 15101 * 2**20, (7, 5))  # fmt: skip
    assert (t4.has_bf16, t4.has_flash_attention_2, t4.is_usable) == (False, False, True)
    assert (a100.has_bf16, a100.has_flash_attention_2, a100.is_usable) == (True, True, True)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["Tesla T4", "NVIDIA A100-SXM4-40GB"]),
        ("1", ["NVIDIA A100-SXM4-40GB"]),
        ("0, 1", ["Tesla T4", "NVIDIA A100-SXM4-40GB"]),
        ("GPU-aaaa", ["Tesla T4"]),
        ("MIG-1234", ["Tesla T4", "NVIDIA A100-SXM4-40GB"]),
        ("", []),
        ("-1", []),
    ],
)
def test_hidden_gpus_are_not_seen(visible, names):
    assert [gpu.name for gpu in machine.parse_gpus(ANSWER, visible)] == names


def test_strange_answers_are_left_out_or_unknown():
    assert machine.parse_gpus("No devices were found\n\n0, GPU-a, X, [N/A], [N/A], 9.0\n") == ()
    (gpu,) = machine.parse_gpus("0, GPU-a, X, 1024, 512, [N/A]")
    assert gpu.compute_capability is None
    assert (gpu.has_bf16, gpu.is_usable) == (False, True)
    (p100,) = machine.parse_gpus("0, GPU-a, Tesla P100-PCIE-16GB, 16384, 16000, 6.0")
    assert not p100.is_usable


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 5), subprocess.CalledProcessError(9, "nvidia-smi")],
)
def test_silent_driver_means_no_gpu(monkeypatch, error):
    def fail(command, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.read_gpus() == ()


def test_the_driver_is_asked_with_a_list_and_a_timeout(monkeypatch):
    asked = {}

    def answer(command, **options):
        asked.update(command=command, **options)
        return SimpleNamespace(stdout=ANSWER)

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.name for gpu in machine.read_gpus()] == ["Tesla T4"]
    assert asked["command"][0] == "nvidia-smi"
    assert asked["timeout"] == 5
    assert not asked.get("shell")


def test_missing_library_is_none():
    versions = machine.read_libraries(["pytest", "no-such-library-anywhere"])
    assert versions == {"pytest": pytest.__version__, "no-such-library-anywhere": None}


def test_disk_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path):
    assert machine.read_disk_free(tmp_path / "a" / "b") > 0


def test_unreadable_disk_is_none(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(path)

    monkeypatch.setattr(machine.shutil, "disk_usage", fail)
    assert machine.read_disk_free(tmp_path) is None


def test_downloads_go_where_the_hub_client_puts_them():
    from huggingface_hub.constants import HF_HUB_CACHE

    assert str(machine.hub_cache_folder()) == HF_HUB_CACHE


def test_llama_cpp_says_itself_whether_it_has_a_gpu(monkeypatch, tmp_path):
    assert machine.read_llama_cpp_devices() == (), "PyPI's is the CPU build"
    devices = "get_device_info = lambda: [{'name': 'CUDA0'}, {'name': 'CPU'}]"
    for code, found in ((devices, ("CUDA0",)), ("raise ImportError('libcudart.so.12: cannot open')", None)):
        (tmp_path / "xllamacpp.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert machine.read_llama_cpp_devices() == found


def test_a_recording_is_marked_with_the_machine_and_the_date(monkeypatch):
    monkeypatch.setattr(machine, "read_cpu_count", lambda: 2)
    monkeypatch.setattr(machine, "read_memory", lambda: (None, None))
    monkeypatch.setattr(machine, "read_gpus", tuple)
    assert machine.where_and_when() == f"2 CPU cores, {date.today().isoformat()}"
    monkeypatch.setattr(machine, "read_memory", lambda: (12 * GIB, GIB))
    monkeypatch.setattr(machine, "read_gpus", lambda: (machine.Gpu("Tesla T4", 0, 0, (7, 5)),) * 2)
    assert machine.where_and_when().startswith("Tesla T4, 2 CPU cores, 12.0 GiB of memory, ")
