"""MemoryPanel without a browser: what it shows, keeps, refuses and measures."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from stand_ins import StandIn, click

from gemma_qat_kit.catalog import KNOWN_FORMATS, SIZES, catalog
from gemma_qat_kit.errors import BadSettingError, NotPublishedError, UnknownNameError
from gemma_qat_kit.loading_note import EndedKernel
from gemma_qat_kit.memory.budgets import KNOWN, Budget
from gemma_qat_kit.memory.measure import MemoryUse
from gemma_qat_kit.memory.parts import KEY_VALUES, PARTS, TABLE, TEXT_LAYERS, Part
from gemma_qat_kit.memory.plan import plan_memory
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets import MemoryPanel, memory_panel
from gemma_qat_kit.widgets.memory_bars import PART_COLOURS, Bar, axis_end, draw_bar

HERE = Budget("This machine", 0, 0, 8 * 2**30, 2**40)


@pytest.fixture(autouse=True)
def kernel(tmp_path, monkeypatch):
    """A kernel that has shown no panel yet, on a machine of 8 GiB."""
    monkeypatch.setenv("GEMMA_QAT_KIT_HOME", str(tmp_path))
    monkeypatch.setattr(memory_panel, "_kept", memory_panel._Kept())
    monkeypatch.setattr(memory_panel, "this_machine", lambda: HERE)


def choose(panel, **values):
    for name, value in values.items():
        panel._controls[name].value = value


def headings(panel):
    """The row headings of the picture: machine, what it has, verdict."""
    drawn = ElementTree.fromstring(panel.picture().svg)
    return ["".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", KNOWN_FORMATS)
def test_every_published_format_is_planned_and_every_other_says_why(size, format):
    rows = catalog(size=size, format=format, role="chat")
    if not rows:
        with pytest.raises((UnknownNameError, NotPublishedError)):
            MemoryPanel(size, format)
        return
    panel = MemoryPanel(size, format)
    if rows[0].is_available:
        assert panel.plan.parts == plan_memory(size, format).parts
        assert readable_bytes(panel.plan.total_bytes) in panel.picture()._repr_html_()
        assert {*panel.plan.parts} <= {*headings(panel)}, "the picture alone names every colour"
        ElementTree.fromstring(panel.picture()._repr_svg_())
    else:
        assert isinstance(panel.error, NotPublishedError)
        assert panel._status.value.count("<p>") == 3


def test_every_machine_is_a_row_with_its_verdict():
    panel = MemoryPanel("12B", "bf16")
    shown = " ".join(headings(panel))
    for found in panel.rooms:
        assert found.budget.name in shown
    assert [found.budget for found in panel.rooms] == [HERE, *KNOWN]
    assert "✓ fits" in shown
    assert "✗ lacks" in shown
    assert "not spread over two" in panel._figure_box.value


def test_a_longer_context_and_a_larger_batch_grow_the_cache():
    panel = MemoryPanel("E2B", "q4_0")
    before, picture = panel.plan, panel._figure_box.value
    choose(panel, context=65536)
    longer = panel.plan
    assert longer.settings.context_length == 65536
    assert longer.parts[KEY_VALUES] > before.parts[KEY_VALUES]
    assert panel._figure_box.value != picture
    choose(panel, batch=4)
    assert panel.plan.parts[KEY_VALUES] == 4 * longer.parts[KEY_VALUES]
    assert panel._controls["context"].continuous_update


def test_every_choice_is_a_setting_of_the_plan():
    panel = MemoryPanel("E4B", "bf16")
    choose(panel, text_only=False, drafter=True, per_layer_table="cpu", device="cpu")
    settings = panel.plan.settings
    assert (settings.text_only, settings.drafter, settings.per_layer_table) == (False, True, "cpu")
    assert {found.device for found in panel.rooms} == {"cpu"}
    choose(panel, device="cuda")
    assert panel.rooms[0].words.startswith("needs a GPU")


def test_training_has_a_sequence_length_of_its_own():
    panel = MemoryPanel("E2B", "q4_0-unquantized")
    choose(panel, context=16384, task="finetune")
    assert panel._controls["context"].description == "Sequence"
    assert panel.plan.settings.sequence_length == 1024
    choose(panel, context=2048)
    assert (panel.plan.settings.sequence_length, panel.plan.settings.context_length) == (2048, 4096)
    choose(panel, task="chat")
    assert panel._controls["context"].description == "Context"


def test_the_slider_ends_where_the_model_does():
    panel = MemoryPanel("12B", "q4_0")
    for size, longest in (("12B", 262144), ("E2B", 131072), ("smollm2-135m", 8192)):
        choose(panel, size=size)
        assert [value for _, value in panel._controls["context"].options][-1] == longest
        assert panel.error is None
    lengths = [value for _, value in panel._controls["context"].options]
    assert lengths == [512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]


def test_what_cannot_be_is_said_in_three_parts_and_the_rest_stays():
    panel = MemoryPanel("E2B", "bf16")
    picture = panel._figure_html
    choose(panel, kv_format="q8_0")
    assert isinstance(panel.error, BadSettingError)
    assert panel._status.value.count("<p>") == 3
    assert picture in panel._figure_box.value
    for ask in (lambda: panel.plan, lambda: panel.rooms, panel.picture):
        with pytest.raises(BadSettingError, match="q8_0"):
            ask()
    choose(panel, kv_format="bf16")
    assert panel.error is None
    assert panel._figure_box.value == picture


def test_a_context_beyond_the_models_is_refused_in_place(monkeypatch):
    panel = MemoryPanel("E2B", "q4_0")
    panel._controls["context"].options = [("200,000", 200_000)]
    assert "131,072" in panel.error.allowed
    assert "200000" in panel._status.value


def test_a_wrong_name_is_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        MemoryPanel("E2BB")
    with pytest.raises(UnknownNameError, match="Did you mean 'mobile'"):
        MemoryPanel("E2B", "mobil")


def test_the_choice_survives_running_the_cell_again_and_a_changed_cell_starts_anew():
    choose(MemoryPanel("E2B", "q4_0"), size="E4B", format="mobile", context=8192, batch=2, drafter=True)
    again = MemoryPanel("E2B", "q4_0")
    settings = again.plan.settings
    assert (settings.size, settings.format, settings.context_length) == ("E4B", "mobile", 8192)
    assert (settings.batch_size, settings.drafter) == (2, True)
    assert MemoryPanel("12B", "q4_0").plan.settings.size == "12B"
    assert MemoryPanel("E2B", "q4_0").plan.settings.size == "E2B"


def test_memory_that_cannot_be_read_is_said(monkeypatch):
    monkeypatch.setattr(memory_panel, "this_machine", lambda: replace(HERE, ram_bytes=None))
    panel = MemoryPanel("E2B", "q4_0")
    assert "not known" in panel._status.value
    assert "RAM unknown" in panel._figure_box.value


def test_a_kernel_that_ended_while_it_loaded_is_told_of(monkeypatch):
    settings = plan_memory("E4B", "bf16").settings
    ended = EndedKernel(settings, 2**34, ())
    monkeypatch.setattr(memory_panel, "last_failure", lambda: ended)
    assert "ended while it loaded E4B bf16, which needs 16.0 GiB" in MemoryPanel()._status.value


class Loaded(StandIn):
    """A loaded E2B whose text layers take 10 % more than planned."""

    size, format, engine, context_length, runner = "E2B", "q4_0", "llama_cpp", 8192, None

    def memory(self):
        plan = plan_memory("E2B", "q4_0", context_length=8192)
        grow = {TEXT_LAYERS: 1.1}
        return MemoryUse(tuple(replace(p, nbytes=round(p.nbytes * grow.get(p.name, 1))) for p in plan.placed))


def test_a_loaded_model_stands_beside_its_plan_with_the_error_of_each_part():
    panel = MemoryPanel()
    assert panel._compared.value == ""
    panel.model = Loaded("<b>E2B</b>")
    shown = panel._compared.value
    plan = plan_memory("E2B", "q4_0", context_length=8192).parts[TEXT_LAYERS]
    assert readable_bytes(plan) in shown
    assert f"−{readable_bytes(round(plan * 1.1) - plan)}<br>" in shown
    assert "−9.1%" in shown
    assert "RAM, predicted" in shown
    assert "RAM, measured" in shown
    assert "<b>E2B" not in shown
    assert MemoryPanel(model=Loaded()).plan.settings.size == "E2B"


def test_what_the_loaded_model_holds_counts_as_free_for_another():
    panel = MemoryPanel(model=Loaded())
    assert panel.rooms[0].budget.ram_bytes == HERE.ram_bytes + Loaded().memory().in_place("ram")


def test_what_is_not_there_before_the_first_answer_is_no_error():
    model = Loaded()
    held = tuple(part for part in model.memory().placed if part.name != KEY_VALUES)
    model.memory = lambda: MemoryUse(held)
    panel = MemoryPanel(model=model)
    assert "Not there before the first answer: key/value cache." in panel._compared.value
    assert "−100.0%" not in panel._compared.value
    del model.memory
    assert panel._again.layout.display == ""
    click(panel._again)
    assert "Not there" not in panel._compared.value
    panel.model = None
    assert (panel._compared.value, panel._again.layout.display) == ("", "none")


def test_a_model_without_a_plan_is_measured_without_breaking_the_panel():
    model = Loaded()
    model.size = "custom"
    panel = MemoryPanel(model=model)
    assert panel._compared.value.count("<p>") >= 2
    assert panel.error is None


def test_parts_have_colours_of_their_own():
    assert set(PART_COLOURS) == set(PARTS)
    assert len(set(PART_COLOURS.values())) == len(PARTS)


def test_a_bar_ends_within_the_axis_and_marks_what_is_beyond_the_limit():
    parts = (Part(TEXT_LAYERS, 3 * 2**30, "gpu"), Part(TABLE, 2**30, "mapped", True))
    bar = Bar("GPU", parts, 2 * 2**30)
    assert axis_end([bar]) == 6 * 2**30
    assert "--jp-error-color1" in draw_bar(bar, 0, 6 * 2**30)
    spare_alone = replace(bar, limit_bytes=7 * 2**29)
    assert "--jp-error-color1" not in draw_bar(spare_alone, 0, 6 * 2**30), "spare pages need no room"
    assert axis_end([]) > 0
