"""Is this still QAT? Counted on tiny checkpoints: weights on a grid, moved off it, and never on one."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_q4_0_grid import on_grid

import gemma_qat_kit as gqk
from gemma_qat_kit.architectures import GEMMA_SIZES
from gemma_qat_kit.errors import BadSettingError, BadTensorError, CancelledError
from gemma_qat_kit.layouts import gguf_name, gguf_tensors
from gemma_qat_kit.testing import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def qat_folder(tmp_path_factory):
    """A tiny E2B whose matrices lie on grids with peak levels of 3 to 8, as a QAT checkpoint's do."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("qat"), "E2B", "q4_0-unquantized")
    state = load_file(folder / "model.safetensors")
    for index, name in enumerate(_matrices("E2B", state)):
        num_groups = state[name].numel() // 32
        _, _, weight = on_grid(3 + index % 6, step_dtype=torch.bfloat16, num_groups=num_groups, seed=index)
        state[name] = weight.reshape(state[name].shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _matrices(size, names):
    """Names of the matrices that the published Q4_0 file holds in Q4_0."""
    in_q4_0 = {tensor.name for tensor in gguf_tensors(tiny_config(size)) if tensor.dtype == "Q4_0"}
    text = [name for name in names if ".language_model." in name]
    return [name for name in text if gguf_name(name) in in_q4_0]


@pytest.mark.parametrize("size", GEMMA_SIZES)
def test_it_looks_at_what_the_published_file_holds_in_q4_0(tiny, size):
    folder = tiny(size, "q4_0-unquantized")
    report = gqk.grid_report(folder)
    assert set(report.fits) == set(_matrices(size, load_file(folder / "model.safetensors")))
    assert not report.is_on_grid
    assert report.total.groups_on_grid == 0
    assert "is not on a grid: 0.0% of the groups" in report.verdict


def test_qat_weights_are_seen_to_be_such(qat_folder):
    report = gqk.grid_report(qat_folder)
    assert report.is_on_grid
    assert report.total.share_on_grid == 1
    assert report.total.groups_exact == report.total.num_groups
    assert report.total.naive_share_exact < 0.5
    assert sum(report.total.peak_levels[:2]) == 0
    assert "still QAT: 100.0%" in str(report)
    assert str(report).count("%") > 3 * len(report.fits)


def test_a_folder_a_model_a_module_and_its_state_say_the_same(qat_folder):
    expected = gqk.grid_report(qat_folder).total
    with gqk.load(qat_folder) as model:
        module = model.hf[0]
        assert gqk.grid_report(model).total == expected
        assert gqk.grid_report(module).total == expected
        assert gqk.grid_report(module.state_dict()).total == expected
        # Widened to float32 they still lie on the grid; one further training step takes them off it.
        assert gqk.grid_report(module.float()).total == expected
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        moved = gqk.grid_report(module)
        assert not moved.is_on_grid
        assert moved.total.share_on_grid < 0.05


def test_weights_that_are_partly_moved_are_told_apart_layer_by_layer(qat_folder):
    state = load_file(qat_folder / "model.safetensors")
    moved = [name for name in _matrices("E2B", state) if ".layers.7." in name]
    for name in moved:
        state[name] = state[name] + 0.01 * torch.randn(state[name].shape).to(torch.bfloat16)
    report = gqk.grid_report(state)
    off = {name for name, fit in report.fits.items() if fit.share_on_grid < 0.5}
    assert off == set(moved)
    assert report.is_on_grid


def test_the_picture_has_a_cell_for_every_matrix_and_names_its_share(qat_folder):
    report = gqk.grid_report(qat_folder)
    html = report._repr_html_()
    assert html.count("<title>") == len(report.fits)
    assert "q_proj, layer 0: 100.00% of the groups on a grid" in html
    assert 'role="img"' in html
    assert re.search(r'aria-label="[^"]*still QAT', html)


def test_a_hostile_folder_name_stays_text(tmp_path, qat_folder):
    folder = tmp_path / "<script>alert(1)"
    folder.symlink_to(qat_folder)
    assert "<script>" not in gqk.grid_report(folder)._repr_html_()


def test_progress_is_told_and_can_stop_it(qat_folder):
    seen = []
    gqk.grid_report(qat_folder, report=seen.append)
    assert seen[-1].fraction == 1

    def stop(progress):
        raise CancelledError("Stopped.", "", "")

    with pytest.raises(CancelledError):
        gqk.grid_report(qat_folder, report=stop)


def test_what_has_no_such_weights_is_refused(tiny, tmp_path):
    with pytest.raises(BadTensorError, match=r"no 16-bit matrices of layers.*q4_0-unquantized"):
        gqk.grid_report({"model.norm.weight": torch.ones(32)})
    with pytest.raises(BadTensorError, match="no 16-bit matrices"):
        gqk.grid_report(tiny("E2B", "mobile"))
    with pytest.raises(BadSettingError, match="int holds no weights"):
        gqk.grid_report(3)
    broken = {"model.layers.0.self_attn.q_proj.weight": torch.full((2, 32), torch.nan)}
    with pytest.raises(BadTensorError, match=r"q_proj.weight\[0, 0\] is nan"):
        gqk.grid_report(broken)
