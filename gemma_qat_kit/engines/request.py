"""What `load` was asked for, and what of it is refused before anything is downloaded or read."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_qat_kit.catalog import BUILT_IN_SIZE, KNOWN_FORMATS
from gemma_qat_kit.engines.serving import Serving
from gemma_qat_kit.errors import BadSettingError, NotEnoughMemoryError, unknown_name
from gemma_qat_kit.memory.plan import MemoryPlan, plan_memory
from gemma_qat_kit.memory.settings import ENGINES, KV_FORMATS, TABLE_PLACES, MemorySettings, check_name
from gemma_qat_kit.progress import Report
from gemma_qat_kit.units import readable_bytes

# Reported for E2B (gemmaclaw/gemmaclaw#314); 31B keeps 86 % of its top tokens in q4_0 and 95 % in q8_0 (#380).
_KV_IN_Q4_0 = 'kv_format="q4_0" ruins the answers of QAT checkpoints, those of E2B most; "q8_0" loses almost nothing.'
_CHEAPER = (("E4B", "q4_0"), ("E2B", "q4_0"), ("E2B", "mobile"), (BUILT_IN_SIZE, None))


@dataclass(frozen=True)
class Request:
    """The arguments of `load`."""

    source: str
    format: str | None
    text_only: bool
    context_length: int
    drafter: bool
    device: str
    per_layer_table: str
    kv_format: str
    engine: str | None
    adapter: Path | None
    revision: str | None
    token: str | None
    report: Report | None
    serving: Serving | None = None

    @property
    def batch_size(self) -> int:
        """Conversations at once."""
        return self.serving.num_chats if self.serving else 1

    def check_names(self) -> None:
        """Refuse names that nobody knows.

        Raises:
            UnknownNameError: The message names the nearest one.
            BadSettingError: Unknown device.
        """
        if self.format is not None and self.format not in KNOWN_FORMATS:
            raise unknown_name("format", self.format, KNOWN_FORMATS)
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise BadSettingError(f"Unknown device {self.device!r}.", "Known: auto, cpu, cuda.", 'Try device="auto".')
        check_name("per_layer_table", self.per_layer_table, TABLE_PLACES)
        check_name("kv_format", self.kv_format, KV_FORMATS)
        if self.kv_format == "q4_0":
            warnings.warn(_KV_IN_Q4_0, stacklevel=3)
        if self.engine is not None:
            check_name("engine", self.engine, ENGINES)

    def chosen_engine(self, name: str, format: str, usual: str) -> str:
        """Return what runs a format, and refuse what that engine cannot do, rather than leave it out silently.

        Args:
            name: What to call the model.
            format: Of the catalog.
            usual: What the format is for.

        Raises:
            BadSettingError: The message says what can.
        """
        engine = self.engine or usual
        if engine != usual and (engine, format) not in (("transformers", "q4_0"), ("transformers", "mobile")):
            raise BadSettingError(
                f"{name} {format} does not run in {engine}.",
                "transformers runs q4_0 and mobile besides its own formats; llama.cpp runs GGUF files, which "
                "export_gguf writes.",
                f'Leave engine="{usual}".',
            )
        self._check_engine(name, engine)
        if format == "q4_0" and engine != usual and not self.text_only:
            raise BadSettingError(
                f"{name} in Q4_0 blocks is a text model.",
                "transformers has towers for 16-bit weights; llama.cpp reads those of a q4_0 from its projector.",
                'Leave out the engine, or take format="q4_0-unquantized".',
            )
        return engine

    def _check_engine(self, name: str, engine: str) -> None:
        if self.serving and engine != "llama_cpp":
            raise BadSettingError(
                f"{name} runs in transformers, which answers one chat at a time.",
                "llama.cpp serves q4_0, mobile and GGUF files; vLLM serves the same model's w4a16.",
                'Take format="q4_0", or start vLLM and load("http://…/v1").',
            )
        if engine == "llama_cpp" and self.per_layer_table != "disk":
            raise BadSettingError(
                f"per_layer_table={self.per_layer_table!r} cannot be used: {name} runs in llama.cpp.",
                "llama.cpp looks the per-layer embeddings up in the file by itself; the formats that run in "
                "transformers leave the choice.",
                'Leave per_layer_table="disk".',
            )
        if self.adapter is not None and not self.adapter.is_file():
            raise BadSettingError(
                f"{self.adapter} is no file.",
                "An adapter for llama.cpp is a .gguf file.",
                "Write one with export_adapter(model, path).",
            )
        if engine == "transformers" and self.adapter is not None:
            raise BadSettingError(
                f"{name} runs in transformers, where an adapter is put into the loaded model.",
                "llama.cpp computes one beside the weights of a GGUF.",
                "Leave adapter out, and call load_adapter(model, folder).",
            )
        if engine == "transformers" and self.kv_format != "bf16":
            raise BadSettingError(
                f"kv_format={self.kv_format!r} cannot be used: {name} runs in transformers.",
                "q4_0 and mobile have it in llama.cpp.",
                'Leave kv_format="bf16", or take one of them with no engine named.',
            )

    def check_memory(self, name: str, size: str | None, format: str, engine: str, weights: int | None = None) -> None:
        """Refuse what cannot fit; what cannot be read refuses nothing.

        Args:
            name: What to call it.
            size: A size of the catalog, None where it is none.
            format: Of the catalog.
            engine: That runs it.
            weights: Bytes of the weights, to go by where there is no such checkpoint in the catalog.

        Raises:
            NotEnoughMemoryError: The message says what fits.
            BadSettingError: A context that the model does not take.
        """
        from gemma_qat_kit.environment import free_memory

        ram, gpu = free_memory()
        # PyPI's llama.cpp has no GPU code, so a GGUF needs RAM wherever it runs.
        gpu = None if self.device == "cpu" or engine == "llama_cpp" else gpu
        available = gpu.free_bytes if gpu else ram
        needed = self._needed(size, format, engine, "cuda" if gpu else "cpu", weights)
        if available is None or needed <= available:
            return
        kind = "GPU memory" if gpu else "memory"
        raise NotEnoughMemoryError(
            f"{name} needs {readable_bytes(needed)} of {kind}; {readable_bytes(available)} are free.",
            "Weights, key/value cache and the engine's buffers must fit.",
            self._fewer_chats(size, format, engine, available)
            or f"Close other models, or load what fits: {self._what_fits(name.split()[0], available)}.",
        )

    def memory_settings(self, size: str | None, format: str, engine: str) -> MemorySettings | None:
        """Return what a plan of this load is made for, None where no plan can be made."""
        from gemma_qat_kit.environment import free_memory

        may_be_on_gpu = self.device != "cpu" and engine == "transformers"
        is_on_gpu = may_be_on_gpu and free_memory()[1] is not None
        try:
            return self._plan(size, format, "cuda" if is_on_gpu else "cpu", engine).settings
        except ValueError:
            return None

    def _needed(self, size: str | None, format: str, engine: str, device: str, weights: int | None) -> int:
        """Return the bytes that a plan needs on the device, or those of the weights where no plan can be made."""
        try:
            plan = self._plan(size, format, device, engine)
        except ValueError:
            if weights is None:
                raise
            return weights
        return plan.in_place("gpu") if device == "cuda" else plan.needed_bytes

    def _plan(self, size: str | None, format: str | None, device: str | None, engine: str | None = None) -> MemoryPlan:
        return plan_memory(
            size,
            format,
            device=device,
            engine=engine,
            context_length=self.context_length,
            text_only=self.text_only,
            per_layer_table=self.per_layer_table,
            kv_format=self.kv_format,
            drafter=self.drafter,
            batch_size=self.batch_size,
        )

    def _fewer_chats(self, size: str | None, format: str, engine: str, available: int) -> str:
        """Return the advice to serve as many chats as fit, "" where that does not help."""
        for num_chats in range(self.batch_size - 1, 0, -1):
            fewer = replace(self, serving=replace(self.serving, num_chats=num_chats))
            try:
                if fewer._plan(size, format, "cpu", engine).needed_bytes <= available:
                    return f"Serve fewer chats at once (num_chats={num_chats} fits; the others wait), or shorter ones."
            except ValueError:  # no plan can be made
                return ""
        return ""

    def _what_fits(self, size: str, available: int) -> str:
        """Return the call for the largest QAT checkpoint that fits, the size that was asked for first."""
        small = replace(self, context_length=2048, text_only=True, drafter=False, per_layer_table="disk",
                        kv_format="bf16", serving=None)  # fmt: skip
        for other, format in ((size, "q4_0"), *_CHEAPER):
            try:
                if small._plan(other, format, "cpu").needed_bytes <= available:
                    return f'gqk.load("{other}"' + (f', "{format}")' if format else ")")
            except ValueError:
                continue  # a path, or no such checkpoint
        return f'gqk.load("{BUILT_IN_SIZE}")'
