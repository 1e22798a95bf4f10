"""What a loaded model says that it holds: every byte of its process once, under the name of its component."""

import io
import mmap
import subprocess
import sys

import numpy as np
import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.engines.llama_cpp_buffers import Buffer, buffer_parts, find_buffers
from gemma_qat_kit.engines.llama_cpp_process import first_error
from gemma_qat_kit.engines.resident import FilePages, file_pages
from gemma_qat_kit.gguf.header import read_gguf_header
from gemma_qat_kit.layouts import bf16_tensors, is_text
from gemma_qat_kit.memory.measure_process import process_memory
from gemma_qat_kit.memory.parts import (
    ACTIVATIONS,
    EMBEDDINGS,
    ENGINE,
    KEY_VALUES,
    LOGITS,
    REPACKED,
    TABLE,
    TEXT_LAYERS,
    Part,
)

MIB = 2**20
SLACK = 4 * MIB  # what an interpreter takes between two looks

CUDA_LOG = """
load_tensors: offloaded 36/36 layers to GPU
load_tensors:        CUDA0 model buffer size =  2048.00 MiB
load_tensors:   CPU_Mapped model buffer size =   512.50 MiB
load_tensors:   CPU_REPACK model buffer size =   128.00 MiB
llama_context:  CUDA_Host  output buffer size =     1.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    12.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB
sched_reserve:      CUDA0 compute buffer size =   300.00 MiB
sched_reserve:      CUDA0 compute buffer size =   310.00 MiB
sched_reserve:  CUDA_Host compute buffer size =     9.00 MiB
"""


def test_buffers_of_a_gpu_are_told_from_those_in_ram():
    assert find_buffers(CUDA_LOG)[0] == Buffer("load_tensors", "CUDA0", "model", 2048 * MIB)
    assert set(buffer_parts(CUDA_LOG)) == {
        Part(TEXT_LAYERS, 2048 * MIB, "gpu"),
        Part(TEXT_LAYERS, 512 * MIB + MIB // 2, "mapped"),
        Part(REPACKED, 128 * MIB, "ram"),
        Part(LOGITS, MIB, "ram"),
        Part(KEY_VALUES, 20 * MIB, "gpu"),
        Part(ACTIVATIONS, 310 * MIB, "gpu"),  # the second time replaces the first
        Part(ACTIVATIONS, 9 * MIB, "ram"),
    }


def test_an_error_is_told_from_what_the_log_quotes_of_a_file():
    log = io.BytesIO(
        b"0.00.050.844 I llama_model_loader: - kv 20: tokenizer.chat_template str = {{ raise('error') }}\n"
        b"0.00.050.845 E llama_model_load: error loading model: tensor 'a' not found\n"
    )
    assert first_error(log) == "tensor 'a' not found"


def test_a_log_without_buffers_has_no_parts():
    assert buffer_parts("llama_kv_cache: size = 45.00 MiB\n") == ()


@pytest.mark.parametrize(("kv_format", "bytes_per_value"), [("bf16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)])
@pytest.mark.filterwarnings("ignore:kv_format")
def test_llama_cpp_counts_every_byte_of_its_process_once(built_in, kv_format, bytes_per_value):
    with gqk.load("smollm2-135m", context_length=2048, kv_format=kv_format) as model:
        assert "Paris" in model.generate("The capital of France is", max_new_tokens=4, temperature=0).text
        use, child = model.memory(), process_memory(model.runner._child.pid, children=False)
        log = model.runner._log.seek(0, 2)
        model.generate("The capital of Italy is", max_new_tokens=4)
        assert model.runner._log.seek(0, 2) == log  # requests leave nothing in the log
    assert use.in_place("ram") == pytest.approx(child.ram, abs=SLACK)
    assert use.in_place("mapped") == pytest.approx(child.mapped, abs=SLACK)
    expected = 30 * 3 * 64 * 2 * 2048 * bytes_per_value  # layers, heads, head_dim, keys and values, tokens
    assert use.parts[KEY_VALUES] == pytest.approx(expected, abs=0.01 * MIB)  # the log rounds to so much
    tensors = read_gguf_header(built_in).tensors
    assert use.parts[EMBEDDINGS] == sum(t.nbytes for t in tensors if t.name == "token_embd.weight")
    assert use.parts[TEXT_LAYERS] == sum(t.nbytes for t in tensors if t.name != "token_embd.weight")
    assert {ACTIVATIONS, LOGITS, ENGINE} <= use.parts.keys()


def test_llama_cpp_copies_its_q4_0_matrices(tiny):
    with gqk.load(tiny("E2B", "q4_0"), context_length=256) as model:
        use = model.memory()
        log = model.runner._log
        log.seek(0)
        repacked = [b for b in find_buffers(log.read().decode()) if b.device.endswith("REPACK")]
    assert use.parts.get(REPACKED, 0) == sum(b.nbytes for b in repacked)


# A fresh process, so that nothing else comes and goes; it prints what the parts say and what Linux says, in bytes.
SUMS = """
import sys
import gemma_qat_kit as gqk
from gemma_qat_kit.memory.measure_process import process_memory
table = {"per_layer_table": sys.argv[3], "report": lambda progress: None}
with gqk.load(sys.argv[1], sys.argv[2], engine="transformers", **table) as model:
    model.generate("the sky", max_new_tokens=2, temperature=0)
    use, held = model.memory(), process_memory(children=False)
    rows = {(part.name, part.place): part.nbytes for part in use.placed}
    print([use.in_place("ram"), held.ram, use.in_place("mapped"), held.mapped, rows])
"""


def sums(source, format, table="disk"):
    command = [sys.executable, "-c", SUMS, str(source), format, table]
    return eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("format", ["bf16", "mobile"])
def test_transformers_counts_every_byte_of_its_process_once(tiny, format):
    ram, held_ram, mapped, held_mapped, rows = sums(tiny("E2B", format), format)
    assert ram == pytest.approx(held_ram, abs=SLACK)
    assert mapped == pytest.approx(held_mapped, abs=SLACK)
    assert rows[TEXT_LAYERS, "mapped"] > 0.9 * sum(n for (name, _), n in rows.items() if name == TEXT_LAYERS)
    assert rows[ENGINE, "ram"] > 100 * MIB


def test_the_parts_of_the_weights_are_those_of_the_file(tiny):
    tensors = [t for t in bf16_tensors(testing.tiny_config("E2B"), has_shared_kv=False) if is_text(t.name)]
    table = sum(t.nbytes for t in tensors if "per_layer.weight" in t.name)
    *_, left = sums(tiny("E2B", "bf16"), "bf16")
    *_, copied = sums(tiny("E2B", "bf16"), "bf16", "cpu")
    assert left[TABLE, "disk"] == copied[TABLE, "ram"] == table
    assert (TABLE, "disk") not in copied
    embeddings = sum(t.nbytes for t in tensors if t.name.endswith("embed_tokens.weight"))
    assert left[EMBEDDINGS, "mapped"] == pytest.approx(embeddings, rel=0.05)  # rows that no token needed may be unread


def test_pages_of_a_file_are_resident_once_they_are_touched(tmp_path):
    path, size = tmp_path / "file", 64 * mmap.PAGESIZE
    path.write_bytes(bytes(size))
    values = np.memmap(path, np.uint8, "r")
    pages, start = file_pages(), values.ctypes.data
    assert [m.path for m in pages.of(str(path))] == [str(path)]
    assert pages.at(start).offset == 0
    assert pages.at(np.zeros(2**20).ctypes.data) is None
    assert pages.resident_bytes([(start, size)]) == [0]
    values.sum()
    assert pages.resident_bytes([(start, size), (start + 5, 1), (start + 100, 2 * mmap.PAGESIZE)]) == [
        size,
        1,
        2 * mmap.PAGESIZE,
    ]
    assert pages.resident_bytes([(start, 0)]) == [0]


def test_where_nothing_tells_everything_counts():
    assert file_pages(2**30) == FilePages(2**30, ())
    assert FilePages(2**30, ()).resident_bytes([(0, 7)]) == [7]
