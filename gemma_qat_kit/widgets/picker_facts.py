"""What a choice costs on this machine, as the list of facts that Picker shows."""

from gemma_qat_kit.catalog import FORMAT_COLOURS, Checkpoint
from gemma_qat_kit.environment import Environment
from gemma_qat_kit.memory.plan import MemoryPlan, plan_memory
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import escape

# One click selects the whole call; Ctrl+C copies it.
_SELECTABLE = 'class="gqk-call" tabindex="0" style="user-select: all; -webkit-user-select: all"'


def facts_html(row: Checkpoint, machine: Environment) -> str:
    """List the download, the memory against what the machine has, what stands in the way, and the call.

    Args:
        row: The chosen row of the catalog, published or not.
        machine: What `environment()` found.
    """
    facts = [("Missing", _missing(row))] if row.unavailable else _costs(row, machine)
    call = f'gqk.load("{row.size}", "{row.alternative if row.unavailable else row.format}")'
    facts.append(("Instead" if row.unavailable else "Call", f"<code {_SELECTABLE}>{escape(call)}</code>"))
    # Plain boxes: notebooks have their own ideas about <dl> and <table>.
    items = "".join(f'<div class="gqk-quiet">{name}</div><div>{value}</div>' for name, value in facts)
    return f'<div class="gqk-text gqk-facts">{items}</div>'


def _missing(row: Checkpoint) -> str:
    reason = row.unavailable[0].upper() + row.unavailable[1:]
    return f"{escape(reason)}. Take <code>{escape(row.alternative)}</code>."


def _costs(row: Checkpoint, machine: Environment) -> list[tuple[str, str]]:
    plan = plan_memory(row.size, row.format)
    facts = [("Download", _download(row, plan, machine)), ("Memory", _memory(row, plan, machine))]
    verdict = next((v for v in machine.formats if v.format == row.format), None)
    if verdict is not None and not verdict.works:
        facts.append(("Not here", escape(verdict.reason)))
    return facts


def _download(row: Checkpoint, plan: MemoryPlan, machine: Environment) -> str:
    if row.repo_id is None:
        return "nothing: this model is built in"
    if row.repo_id in machine.downloaded:
        return f"nothing: {escape(row.repo_id)} is here already"
    num_bytes = "unknown bytes" if plan.download_bytes is None else readable_bytes(plan.download_bytes)
    made = f", made {escape(row.format)} while loading" if row.made_from else ""
    if plan.written_bytes:
        made = f", {readable_bytes(plan.written_bytes)} more on disk: re-blocked for llama.cpp once"
    return f"{num_bytes} from {escape(row.repo_id)} ({escape(row.license)}){made}"


def _memory(row: Checkpoint, plan: MemoryPlan, machine: Environment) -> str:
    """Draw the planned bytes as a share of what is free, with the same in words."""
    needed = f"about {readable_bytes(plan.needed_bytes)} (planned)"
    if plan.total_bytes > plan.needed_bytes:
        needed += f", {readable_bytes(plan.total_bytes - plan.needed_bytes)} more stay on disk"
    # transformers puts a model on the GPU where there is one; llama.cpp's wheels from the package index use the CPU.
    on_gpu = row.engine == "transformers" and machine.gpu is not None
    free_bytes = machine.gpu.free_bytes if on_gpu else machine.ram_available_bytes
    if free_bytes is None:
        return f"{needed}; what is free here could not be read"
    free = f"{readable_bytes(free_bytes)} free on {escape(machine.gpu.name) if on_gpu else 'this machine'}"
    if plan.fits(free_bytes):
        return f"{_bar(row, plan.needed_bytes / free_bytes)}{needed}; {free}: fits"
    return f"{_bar(row, 1.0)}<strong>Will not fit:</strong> {needed}; {free}"


def _bar(row: Checkpoint, share: float) -> str:
    """Draw a share in the format's colour, striped: a planned number never looks like a measured one."""
    colour = FORMAT_COLOURS[row.format]
    stripes = f"repeating-linear-gradient(45deg, {colour} 0 5px, {colour}66 5px 9px)"
    bar = f'<div style="width: {max(share, 0.01):.1%}; background: {stripes}"></div>'
    return f'<div class="gqk-bar" aria-hidden="true">{bar}</div>'
