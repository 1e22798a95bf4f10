"""`finetune`: adapters on packed weights, trained on the assistant's turns of conversations."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from gemma_qat_kit import out_of_memory
from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.engines.allocator import keeping_freed_memory
from gemma_qat_kit.engines.packed import holding_values
from gemma_qat_kit.errors import unknown_name
from gemma_qat_kit.finetune.adapted import adapt, fingerprint, kind_for
from gemma_qat_kit.finetune.conversations import read_conversations
from gemma_qat_kit.finetune.examples import IGNORED, Batch, Examples, make_batch, make_examples
from gemma_qat_kit.finetune.fitting import fitting_settings, has_room, memory_settings
from gemma_qat_kit.finetune.lora import adapters
from gemma_qat_kit.finetune.losses import chunked_cross_entropy
from gemma_qat_kit.finetune.run import FinetuneRun, Sample, TuneEvaluation
from gemma_qat_kit.finetune.settings import FinetuneSettings
from gemma_qat_kit.load import load
from gemma_qat_kit.model import Model
from gemma_qat_kit.progress import Report
from gemma_qat_kit.qat.run import Step
from gemma_qat_kit.qat.state import trained
from gemma_qat_kit.qat.training import Training, ignore, shown_report, training_mode
from gemma_qat_kit.quality.post_training import module_of
from gemma_qat_kit.quality.scoring import evaluating
from gemma_qat_kit.recording import train_receipt

QAT_CHOICES = ("q4_0", None)
Watch = Callable[[Step | TuneEvaluation | Sample], None]
_ANSWER_TOKENS = 60
_WIDTH = 1024  # of the network that `FinetuneSettings.learning_rate` is said for


def finetune(
    model: Model | str | Path,
    dataset: object,
    *,
    qat: str | None = "q4_0",
    settings: FinetuneSettings | None = None,
    folder: str | Path | None = None,
    samples: Sequence[str] = (),
    watch: Watch | None = None,
    report: Report | None = None,
) -> FinetuneRun:
    """Teach a model to answer as the assistant in some conversations does, by adapters (LoRA) beside frozen weights.

    The weights are held in Q4_0 blocks, those of a QAT checkpoint value for value. With `qat` the adapted weight goes
    through its grid in training, so `export_gguf` writes exactly what was trained.

    Args:
        model: A model of `gqk.load` that runs in transformers, adapted in place; or a size, a .gguf file or a folder
            with 16-bit weights, which is loaded in Q4_0 blocks (`load(…, "q4_0", engine="transformers")`).
        dataset: Conversations: a list, a .jsonl or .csv file, or "owner/name" of the hub; see `read_conversations`.
        qat: "q4_0", or None for plain LoRA on the weights as they are, which an export rounds afterwards.
        settings: None for the defaults, four conversations at once where they fit the free memory.
        folder: For checkpoints. A run that was killed goes on exactly from the last one, once the model is loaded.
        samples: Questions that are asked before, during and after.
        watch: Called with each update, evaluation and answer; may block to pause, or raise CancelledError to stop.
        report: Called with the progress; raise CancelledError in it to stop. None draws a bar, in the first process.

    Returns:
        What happened. Ctrl-C and CancelledError end a run early, and it still keeps its best point.

    Raises:
        BadSettingError: The dataset has a malformed row (with its line) or nothing to learn, the model cannot be
            adapted, or the folder holds a checkpoint of another run.
        BadOutputError: The loss became NaN; the adapters are at their best point before that.
        NotEnoughDiskError: A checkpoint cannot be written; the adapters are at their best point.
    """
    if qat not in QAT_CHOICES:
        raise unknown_name("qat", qat, ("q4_0",))
    conversations = read_conversations(dataset)
    with ExitStack() as stack:
        shown = shown_report(report, stack)
        model = loaded_for_tuning(model, shown) if isinstance(model, str | Path) else model
        module, tokenizer = module_of(model), model.hf[1]
        examples = make_examples(conversations, tokenizer, (settings or FinetuneSettings()).sequence_length)
        settings = settings or fitting_settings(model, qat, examples.longest)
        planned = memory_settings(model, settings, qat, examples.longest)
        if planned is not None:
            stack.enter_context(out_of_memory.help(planned))
        adapt(model, kind_for(module, settings, qat), settings.seed, shown)
        stack.enter_context(training_mode(module, settings))
        if has_room(module, planned):
            stack.enter_context(keeping_freed_memory())
        training = _Tuning(model, module, tokenizer, examples, settings, qat, folder, samples, watch or ignore, shown)
        stack.enter_context(train_receipt(model, planned, training.optimizer_bytes))
        return training.result(model.name, training.train())


def loaded_for_tuning(source: str | Path, report: Report) -> Model:
    """Load a size or a path as `finetune` has it: in Q4_0 blocks, the built-in model in floats, which are packed."""
    if str(source).lower() == BUILT_IN_SIZE:
        return load(BUILT_IN_SIZE, "float32", report=report)
    return load(source, "q4_0", engine="transformers", report=report)


class WithLoss(nn.Module):
    """A causal language model whose output is its mean surprise at what a batch asks for."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        # Several processes hold the same blocks; torch would send all of them around before each step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._softcap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss over the words that are learnt, as the batch's share of the mean of its step; a scalar."""
        hidden = self.module.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)[0]
        targets = batch.labels[:, 1:]
        is_asked = targets != IGNORED
        head = self.module.get_output_embeddings().weight
        total = chunked_cross_entropy(hidden[:, :-1][is_asked], head, targets[is_asked], self._softcap)
        return total / batch.num_learnt


class _Conversations:
    """The order of a dataset: shuffled by the seed and the epoch, so that a resumed run goes on with it."""

    def __init__(self, examples: Examples, settings: FinetuneSettings, pad: int):
        self._examples, self._settings, self._pad = examples.train, settings, pad

    def parts(self, step: int, accelerator) -> list[tuple[Batch, float]]:
        """Return this process's conversations of an update, `batch_size` at a time, each with its share of the loss:
        every token counts the same, whichever conversation, batch or process it is in."""
        rows = self._settings.rows
        chosen = [self._example(step * rows + i) for i in range(rows)]
        total = sum(example.num_learnt for example in chosen)
        own, size = chosen[accelerator.process_index :: accelerator.num_processes], self._settings.batch_size
        parts = [make_batch(own[i : i + size], self._pad, accelerator.device) for i in range(0, len(own), size)]
        return [(part, part.num_learnt * accelerator.num_processes / total) for part in parts]

    def _example(self, index: int):
        epoch, place = divmod(index, len(self._examples))
        generator = torch.Generator().manual_seed(hash((self._settings.seed, epoch)) % 2**63)
        return self._examples[torch.randperm(len(self._examples), generator=generator)[place]]


class _TheAnswers:
    """The objective: the assistant's own words."""

    def loss(self, model, batch: Batch) -> torch.Tensor:
        """Return the mean surprise at them."""
        return model(batch)


class _Tuning(Training):
    """A run of `finetune` under way."""

    evaluation_type = TuneEvaluation

    def __init__(self, model, module, tokenizer, examples: Examples, settings, qat, folder, questions, watch, report):
        first = torch.tensor(examples.train[0].ids)
        super().__init__(module, settings, mark=fingerprint(module), asked={"data": examples.digest, "qat": qat},
                         window=first, folder=folder, watch=watch, report=report)  # fmt: skip
        self._model, self._examples, self._qat, self._questions = model, examples, qat, questions
        self._pad = tokenizer.pad_token_id or 0
        self._with_loss = WithLoss(module)
        self.objective, self.batches = _TheAnswers(), _Conversations(examples, settings, self._pad)
        width = module.config.get_text_config().hidden_size
        rate = settings.learning_rate * math.sqrt(_WIDTH / width)
        group = {"params": list(trained(module).values()), "full_rate": rate}
        self.optimizer = torch.optim.AdamW([group], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.samples: list[Sample] = []

    def trained_module(self) -> nn.Module:
        """Return the model with its loss, so that several processes meet in its forward pass."""
        return self._with_loss

    def measure_lines(self) -> None:
        """There is nothing to know beforehand."""

    def measure(self, step: int) -> TuneEvaluation:
        """Measure the held-out conversations, of a small dataset the first ones that are learnt; and ask."""
        measured, total, count = self._examples.held_out or self._examples.train[:8], 0.0, 0
        with torch.no_grad(), evaluating(self.module), self.autocast(), holding_values(self.module):
            for example in measured:
                batch = make_batch([example], self._pad, self.module.device)
                total, count = total + self._with_loss(batch).item() * batch.num_learnt, count + batch.num_learnt
        for question in self._questions:
            self._ask(step, question)
        return TuneEvaluation(step, total / count)

    def score(self, evaluation: TuneEvaluation) -> float:
        """The least surprised one is best."""
        return evaluation.nats

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return the adapters."""
        return {name: p.detach().cpu().clone() for name, p in trained(self.module).items()}

    @torch.no_grad()
    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Put adapters back."""
        for name, parameter in trained(self.module).items():
            parameter.copy_(kept[name])

    def result(self, name: str, ended: str) -> FinetuneRun:
        """Return what happened."""
        return FinetuneRun(name, self.settings, self._qat, str(self.dtype).removeprefix("torch."), str(self._examples),
                           len(adapters(self.module)), sum(p.numel() for p in trained(self.module).values()),
                           tuple(self.steps), tuple(self.evaluations), self.best, tuple(self.samples), ended,
                           self.seconds)  # fmt: skip

    def _ask(self, step: int, question: str) -> None:
        with evaluating(self.module):
            reply = self._model.chat(question, temperature=0, max_new_tokens=_ANSWER_TOKENS)
        self.samples.append(Sample(step, question, reply.text))
        self.watch(self.samples[-1])
