"""Options, weights, data and resumption of a training: the right result, or one sentence before any work."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from empcause.checkpoints import load_whole
from empcause.data import EMPATHETIC_DIALOGUES, Dialogue, split_words
from empcause.data.loading import EMBEDDED, PAPERS
from empcause.data.sequences import encode_dialogue
from empcause.errors import UserError
from empcause.extractor import extract, load_extractor
from empcause.generator import GENERATORS, CauseCache, add_separator, load_generator, response_nll
from empcause.training import settings
from empcause.training.common import StageTrainer
from empcause.training.extractor import (
    ExtractorTrainer,
    ExtractorTrainingArguments,
    build_encoder,
    check_tokenizer,
    train_extractor,
)
from empcause.training.generator import GeneratorTrainer, GeneratorTrainingArguments
from faults.kinds import Guard, fault
from faults.small_training import ITEMS, SmallTrainer, arguments, collate, train, weights

COMMON = "empcause/training/common.py"
GENERATOR = "empcause/training/generator.py"
CHECKPOINTS = "empcause/checkpoints.py"
CAUSES = "empcause/generator/causes.py"
TEXTS = ["My dog died last week.", "We won!", "Somebody stole my bicycle."]


class Killed(Exception):
    pass


class KilledAt(TrainerCallback):
    """Ends a training before a step, or between the batches of a step."""

    def __init__(self, step: int, between: bool = False) -> None:
        self.step, self.between = step, between

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.between:
            raise Killed

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.between:
            raise Killed


class Saved(TrainerCallback):
    """Ends a training once a checkpoint is saved: at the training's end, nothing is left to do then."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def history(folder, kind="loss"):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[kind]) for entry in log if kind in entry]


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2_dir):
    return AutoTokenizer.from_pretrained(tiny_gpt2_dir)


@pytest.fixture(scope="module")
def generator_dir(tiny_gpt2_dir, tmp_path_factory):
    """A finished generator with random roles, untrained."""
    config_class, model_class = GENERATORS["gpt2"]
    config = config_class.from_pretrained(tiny_gpt2_dir)
    model = load_whole(model_class, tiny_gpt2_dir, ("role_embedding",), config=config, attn_implementation="empcause")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    add_separator(model, tokenizer)
    folder = tmp_path_factory.mktemp("generator")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def extractor_options(model, folder, **options):
    return ExtractorTrainingArguments(
        output_dir=str(folder), data="sample", model_name_or_path=str(model), **({"disable_tqdm": True} | options)
    )


def generator_options(model, folder, **options):
    return GeneratorTrainingArguments(
        output_dir=str(folder),
        data="sample",
        model_name_or_path=str(model),
        **({"gamma": 0.0, "disable_tqdm": True} | options),
    )


# Options


def _other(field: dataclasses.Field) -> object:
    """A value that is not the option's default."""
    return {bool: not field.default, type(None): "other"}.get(type(field.default), "other")


@fault(
    Guard(COMMON, "if each.name in self.refused:", "if False:"),
    Guard(COMMON, "if each.name not in self.ranges.keys() | WORKING:", "if False:"),
    Guard(
        "empcause/training/extractor.py",
        'if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):',
        "if False:",
    ),
    cause="an option of transformers' Trainer that these models and losses would ignore or turn into something else",
    place="`empcause train`, each such option, and options that a newer transformers adds",
    promise="refused by name with the reason; every option of transformers is known to work or refused",
)
def test_options_without_effect(tmp_path, tiny_gpt2_dir, monkeypatch):
    tables = [set(settings.RANGES), set(settings.WORKING), set(settings.REFUSED)]
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert sorted(name for table in tables for name in table) == sorted(names)
    known = {field.name: field for field in dataclasses.fields(GeneratorTrainingArguments)}
    for name in settings.REFUSED:
        other = "sequential" if name == "train_sampling_strategy" else _other(known[name])
        with pytest.raises(UserError, match=f"^{name} cannot be used here: "):
            generator_options(tiny_gpt2_dir, tmp_path, **{name: other})
    with pytest.raises(UserError, match="label_smoothing_factor cannot be used here: the extractor's losses"):
        extractor_options(tiny_gpt2_dir, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="with use_reentrant the auxiliary loss would not reach the attention"):
        extractor_options(tiny_gpt2_dir, tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    monkeypatch.setattr("empcause.training.common.WORKING", settings.WORKING - {"use_cache"})
    with pytest.raises(UserError, match="use_cache is newer than this version"):
        generator_options(tiny_gpt2_dir, tmp_path, use_cache=True)


NONSENSE = [
    *((name, bad) for name in settings.RANGES for bad in (-1, math.nan)),
    ("max_steps", 0), ("max_steps", -2), ("eval_steps", 0), ("logging_steps", 0), ("save_steps", 0.0), ("num_train_epochs", 0),
    ("early_stopping_patience", -1), ("gradient_accumulation_steps", 0), ("per_device_eval_batch_size", 0),
    ("label_smoothing_factor", 1.0), ("optim", "lomo"), ("seed", 2**32),
    ("gamma", -0.5), ("gamma", math.inf), ("cause_threshold", 1.5), ("max_length", 3), ("max_train_samples", 0),
    ("max_train_samples", -1), ("max_eval_samples", 0), ("cause_scope", "all"),
    ("automatic_top_k", 0), ("automatic_label_start", -1), ("aux_weight", -1.0), ("emotion_weight", math.nan),
    ("cause_reduction", "max"), ("supervision", "none"),
]  # fmt: skip


@fault(
    Guard(COMMON, "check_values(self, self.ranges)", "pass"),
    Guard(COMMON, "if self.max_steps != -1 and self.max_steps < 1:", "if False:"),
    Guard(COMMON, "not in OPTIMIZERS:", "not in OptimizerNames:"),
    cause="a value that means nothing: negative, zero, NaN, too large, none of the choices",
    place="every option of both stages",
    promise="refused by name with what is expected",
)
def test_nonsense_values(tmp_path, tiny_gpt2_dir):
    fields = {field.name for field in dataclasses.fields(GeneratorTrainingArguments)}
    for name, value in NONSENSE:
        options = generator_options if name in fields else extractor_options
        with pytest.raises(UserError, match=rf"^{name} is .*; (expected|those that work)"):
            options(tiny_gpt2_dir, tmp_path, **{name: value})


@fault(
    Guard(COMMON, "if figure not in self.figures:", "if False:"),
    Guard(COMMON, "if self.greater_is_better not in (None, self.higher_is_better):", "if False:"),
    Guard(COMMON, '{"mode": mode} | defaults | given', "given"),
    Guard(COMMON, 'if given.get("mode", mode) != mode:', "if False:"),
    cause="a figure to watch that is not measured, or watched in the wrong direction",
    place="metric_for_best_model, greater_is_better, lr_scheduler_kwargs",
    promise="refused before the first step; the plateau scheduler watches in the figure's direction whatever else it is told",
)
def test_watched_figure(tmp_path, tiny_encoder_dir):
    for wrong, message in [
        ({"metric_for_best_model": "f1"}, "metric_for_best_model is 'f1'; expected one of accuracy, top1_recall"),
        ({"greater_is_better": False}, "a higher top5_recall is better"),
        ({"lr_scheduler_kwargs": {"mode": "min"}}, "top5_recall needs 'max'"),
    ]:
        with pytest.raises(UserError, match=message):
            extractor_options(tiny_encoder_dir, tmp_path, **wrong)
    options = extractor_options(tiny_encoder_dir, tmp_path, lr_scheduler_kwargs={"factor": 0.1})
    assert options.lr_scheduler_kwargs == {"mode": "max", "factor": 0.1, "patience": 1}
    assert (
        generator_options(tiny_encoder_dir, tmp_path, metric_for_best_model="eval_perplexity").greater_is_better
        is False
    )


@fault(
    Guard(COMMON, "if kind in WITHOUT_WARMUP and self.warmup_steps:", "if False:"),
    Guard(COMMON, "if kind in WITHOUT_OPTIONS and given:", "if False:"),
    Guard(COMMON, "except (TypeError, ValueError) as error:", "except ZeroDivisionError as error:"),
    Guard(COMMON, 'if strategies == ("epoch", "steps"):', "if False:"),
    Guard(COMMON, "and self.eval_steps != self.save_steps:", "and False:"),
    Guard(COMMON, 'if self.fp16 and self.device.type == "cpu":', "if False:"),
    Guard(COMMON, "if self.n_gpu > 1:", "if False:"),
    cause="options that contradict each other: a schedule without warm-up is given one, the best state is not saved",
    place="schedules, evaluation and saving, several GPUs in one process",
    promise="refused, with what would work",
)
def test_contradictions(tmp_path, tiny_gpt2_dir, monkeypatch):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}
    for wrong, message in [
        ({"warmup_steps": 3}, "reduce_lr_on_plateau has no warm-up"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"factor": 0.5}}, "takes no lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "do not fit lr_scheduler_type cosine"),
        ({"save_strategy": "steps", "load_best_model_at_end": False}, "give save_strategy epoch"),
        (steps | {"save_steps": 4}, "save_steps is 4 and eval_steps 2"),
    ]:
        with pytest.raises(UserError, match=message):
            generator_options(tiny_gpt2_dir, tmp_path, **wrong)
    assert generator_options(tiny_gpt2_dir, tmp_path, **steps, save_steps=2).save_steps == 2
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        generator_options(tiny_gpt2_dir, tmp_path, fp16=True, use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="start the command with torchrun"):
        generator_options(tiny_gpt2_dir, tmp_path)


@fault(
    Guard(GENERATOR, "if self.padding_free and (why := self._needs_rows()):", "if False:"),
    Guard(GENERATOR, "        if not self.padding_free:\n", "        if False:\n"),
    Guard(GENERATOR, "if self.per_device_train_batch_size != default or self.dataloader_drop_last:", "if False:"),
    Guard(GENERATOR, "if self.tokens_per_step % batches:", "if False:"),
    Guard(GENERATOR, "if max(lengths) > args.tokens_per_batch:", "if False:"),
    cause="packed batches, or a budget of tokens per step, beside options that they would turn into something else or ignore",
    place="training the generator",
    promise="refused, with what would work",
)
def test_options_that_packing_contradicts(tmp_path, generator_dir):
    packed, budget = {"padding_free": True}, {"tokens_per_step": 64}
    for wrong, message in [
        (
            packed | {"neftune_noise_alpha": 5.0},
            "neftune_noise_alpha scales .*; leave it out, or give padding_free false",
        ),
        (budget | {"include_num_input_tokens_seen": "non_padding"}, "takes end tokens of packed dialogues for padding"),
        (budget | {"padding_free": False}, "tokens_per_step packs dialogues; leave out padding_free"),
        (budget | {"per_device_train_batch_size": 4}, "leave out per_device_train_batch_size and dataloader_drop_last"),
        (budget | {"dataloader_drop_last": True}, "leave out per_device_train_batch_size and dataloader_drop_last"),
        (budget | {"gradient_accumulation_steps": 3}, "tokens_per_step is 64; expected a multiple of 3"),
    ]:
        with pytest.raises(UserError, match=message):
            generator_options(generator_dir, tmp_path, **wrong)
    assert not generator_options(generator_dir, tmp_path, neftune_noise_alpha=5.0).padding_free
    model, tokenizer = load_generator(generator_dir)
    item = encode_dialogue(tokenizer, Dialogue(("My dog died. " * 9,), (0,), "I'm sorry."), 60).item
    with pytest.raises(
        UserError, match="tokens_per_step is 64, 32 in a batch, but a dialogue has 60 tokens; give more"
    ):
        GeneratorTrainer(
            model=model, args=generator_options(generator_dir, tmp_path, **budget), train_dataset=[item], eval_dataset=[item],
            processing_class=tokenizer, made_from={},
        )  # fmt: skip


def trainer(folder, **options):
    """A small trainer that has not begun."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
    return SmallTrainer(
        model=GPT2LMHeadModel(config), args=arguments(folder, **options), train_dataset=ITEMS, eval_dataset=ITEMS[:4],
        data_collator=collate, made_from={},
    )  # fmt: skip


@fault(
    Guard("empcause/data/batching.py", "or not self.drop_last", "or True"),
    Guard(COMMON, "persistent_workers=args.dataloader_persistent_workers,", ""),
    Guard(COMMON, "prefetch_factor=args.dataloader_prefetch_factor,", ""),
    Guard(COMMON, "if not len(self.batches):", "if False:"),
    Guard(COMMON, "args.seed if args.data_seed is None else args.data_seed,", "args.data_seed or args.seed,"),
    Guard(COMMON, "generator=torch.Generator(),", ""),
    cause="options of the data loader, and data_seed 0",
    place="`empcause train`",
    promise="each does what it says; workers change neither batches nor dropout",
)
def test_data_loader(tmp_path):
    def batches(**options):
        return [batch["input_ids"].tolist() for batch in trainer(tmp_path, **options).get_train_dataloader()]

    plain = batches(per_device_train_batch_size=5)
    assert [len(batch) for batch in plain] != [5, 5]
    dropped = batches(per_device_train_batch_size=5, dataloader_drop_last=True)
    assert [len(batch) for batch in dropped] == [5, 5]
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    assert batches(per_device_train_batch_size=5, **workers) == plain
    loader = trainer(tmp_path, **workers).get_train_dataloader()
    assert (loader.persistent_workers, loader.prefetch_factor) == (True, 3)
    before = torch.random.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert batches(data_seed=0) == batches(seed=0) != batches()
    with pytest.raises(UserError, match="There is no batch to train on: 12 texts"):
        trainer(tmp_path, per_device_train_batch_size=13, dataloader_drop_last=True)


@fault(
    Guard("empcause/training/generator.py", "self.label_smoother: Any = None", "pass"),
    Guard("empcause/generator/modeling.py", "label_smoothing=smoothing)", "label_smoothing=0.0)"),
    cause="label_smoothing_factor, which the Trainer applies to each token's own logits instead of the next token's",
    place="training the generator",
    promise="the loss is (1 - e) NLL + e / V times the sum over the vocabulary, of the next token",
)
def test_label_smoothing(tmp_path, generator_dir):
    model, tokenizer = load_generator(generator_dir)
    item = encode_dialogue(tokenizer, Dialogue(("My dog died.",), (0,), "I'm sorry."), 60).item
    trainer = GeneratorTrainer(
        model=model, args=generator_options(generator_dir, tmp_path, label_smoothing_factor=0.1), train_dataset=[item],
        eval_dataset=[item], processing_class=tokenizer, made_from={},
    )  # fmt: skip
    batch = {name: torch.from_numpy(value)[None] for name, value in item.items()}
    labels = batch["labels"][0, 1:]
    counted = labels != -100
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=counted.sum())
        logits = model(batch["input_ids"], token_type_ids=batch["token_type_ids"]).logits[0, :-1].double()
    logs = logits.log_softmax(-1)[counted]
    nll = -logs.gather(1, labels[counted, None])[:, 0]
    expected = (0.9 * nll - 0.1 * logs.mean(1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@fault(
    Guard(
        "empcause/training/extractor.py",
        "if (self.state.epoch or 0.0) < self.args.automatic_label_start:",
        "if self.args.automatic_label_start:",
    ),
    cause="a run is resumed, or its workers go on, past the epoch in which automatic labels begin",
    place="training the extractor",
    promise="automatic labels are made from that epoch on, and not before",
)
def test_warm_up_of_automatic_labels(tmp_path, small_extractor):
    model, tokenizer = load_extractor(small_extractor)
    ids = tokenizer("My dog died.")["input_ids"]
    options = extractor_options(small_extractor, tmp_path, automatic_label_start=1)
    trainer = ExtractorTrainer(
        model=model,
        args=options,
        train_dataset=[{"input_ids": ids}],
        eval_dataset=[0],
        processing_class=tokenizer,
        made_from={},
    )
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "special_tokens_mask": torch.tensor([[1] + [0] * (len(ids) - 2) + [1]]),
        "word_ids": torch.tensor([[-1] + [0] * (len(ids) - 2) + [-1]]),
        "emotion_labels": torch.tensor([3]),
        "automatic": torch.tensor([True]),
    }
    for epoch, made in [(0.0, False), (0.9, False), (1.0, True), (1.5, True)]:
        trainer.state.epoch = epoch
        _, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
        assert (output.cause_loss is not None) == made, epoch


@fault(
    Guard("empcause/training/extractor.py", "    if without := ", "    if False and "),
    Guard(
        "empcause/training/extractor.py", "    except Missing as error:\n", "    except ZeroDivisionError as error:\n"
    ),
    cause="dialogues without a situation, or no annotated causes",
    place="training the extractor",
    promise="refused before the first step: what is missing, what it is needed for, and what would work without it",
)
def test_data_an_extractor_cannot_learn_from(tmp_path, tiny_encoder_dir, monkeypatch):
    own = PAPERS.dialogues
    bare = dataclasses.replace(
        own, parse=lambda *given: [dataclasses.replace(each, situation=" ") for each in own.parse(*given)]
    )
    sample = dataclasses.replace(EMBEDDED, dialogues=bare)
    monkeypatch.setattr("empcause.data.loading.EMBEDDED", sample)
    for supervision in ("semi-supervised", "unsupervised", "emotion"):
        with pytest.raises(
            UserError, match=r"\d+ of \d+ dialogues of .* \(split train\) have no situation, which is the text"
        ):
            train_extractor(extractor_options(tiny_encoder_dir, tmp_path, supervision=supervision))
    only_annotated = extractor_options(tiny_encoder_dir, tmp_path / "annotated", supervision="supervised", max_steps=1)
    assert train_extractor(only_annotated)["accuracy"] >= 0
    needed = r"\(an extractor is validated on annotated causes, whatever its supervision\)\.$"
    monkeypatch.setattr("empcause.data.loading.EMBEDDED", dataclasses.replace(sample, annotations=None))
    with pytest.raises(UserError, match=rf"EmpatheticDialogues has no annotated causes.* {needed}"):
        train_extractor(extractor_options(tiny_encoder_dir, tmp_path, supervision="unsupervised"))
    (tmp_path / "train.csv").touch()
    emotion_alone = extractor_options(tiny_encoder_dir, tmp_path, supervision="emotion")
    emotion_alone.data = str(tmp_path)
    with pytest.raises(UserError, match=rf"has no emocause/valid\.json .* {needed}"):
        train_extractor(emotion_alone)


@fault(
    Guard(
        "empcause/generator/modeling.py",
        "            if list(values.shape) != shape:\n",
        "            if False:\n",
    ),
    Guard("empcause/generator/modeling.py", "            if not known.all():\n", "            if False:\n"),
    cause="labels or roles of another shape than the tokens, a role that is none, a label beyond the vocabulary",
    place="a generator's forward (values: on the CPU; on a GPU torch's kernels check them)",
    promise="refused by name with what is expected, before anything is computed",
)
def test_labels_and_roles_that_do_not_fit(generator_dir, monkeypatch):
    model, _ = load_generator(generator_dir)
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    rows = model.config.vocab_size
    computed = []
    model.get_input_embeddings().register_forward_hook(lambda *_: computed.append(1))
    for wrong, message in [
        ({"labels": ids[:, :2]}, r"labels has shape \[2, 2\]; expected \[2, 3\], one per token"),
        ({"labels": ids[0]}, r"labels has shape \[3\]; expected \[2, 3\]"),
        ({"labels": ids + rows}, rf"labels has {rows + 5}; expected 0 to {rows - 1}, or -100"),
        ({"labels": ids - 8}, "labels has -3; expected 0 to"),
        ({"token_type_ids": ids[:, :2]}, r"token_type_ids has shape \[2, 2\]; expected \[2, 3\]"),
        ({"token_type_ids": ids}, "token_type_ids has 5; expected 0 to 1"),
        ({"token_type_ids": -(ids > 5).long()}, "token_type_ids has -1; expected 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, **wrong)
    assert not computed
    assert model(ids, token_type_ids=(ids > 5).long(), labels=ids.masked_fill(ids == 6, -100)).loss > 0


# Weights


def damaged(folder, into, change):
    """A copy of a model's folder with changed weights."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@fault(
    Guard(CHECKPOINTS, 'for key in found["missing_keys"] if', "for key in () if"),
    Guard(CHECKPOINTS, 'for key, *_ in found["mismatched_keys"]', "for key, *_ in ()"),
    Guard(CHECKPOINTS, 'for key in found["unexpected_keys"]', "for key in ()"),
    cause="weights are missing, of another shape, or more than the model has",
    place="loading an extractor, a generator, or the model that a training starts from",
    promise="refused with the name of a weight; nothing answers or trains with random numbers",
)
def test_weights_of_another_model(tmp_path, generator_dir, small_extractor, tiny_encoder_dir):
    head, layer = "cause_head.weight", "transformer.h.1.mlp.c_fc.weight"
    for name, folder, load, change, message in [
        ("a", small_extractor, load_extractor, lambda t: t.pop(head), f"missing: {head}"),
        ("b", generator_dir, load_generator, lambda t: t.pop(layer), f"missing: {layer}"),
        ("c", generator_dir, load_generator, lambda t: t.update({layer: torch.ones(3)}), f"of another shape: {layer}"),
        (
            "d",
            small_extractor,
            load_extractor,
            lambda t: t.update({"more": torch.ones(3)}),
            "unknown to the model: more",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            load(damaged(folder, tmp_path / name, change))
    encoder = "encoder.layer.1.attention.self.query.weight"
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    for name, change, message in [
        ("e", lambda t: t.pop(encoder), f"missing: {encoder}"),
        ("f", lambda t: t.update({encoder.replace("1", "2"): torch.ones(3)}), "unknown to the model: encoder.layer.2"),
        ("g", lambda t: t.update({"lm_head.bias": torch.ones(3)}), None),
    ]:
        options = extractor_options(damaged(tiny_encoder_dir, tmp_path / name, change), tmp_path)
        if message is None:
            loaded = build_encoder(options, tokenizer, EMPATHETIC_DIALOGUES.emotions)[1].state_dict()
            assert torch.equal(loaded[encoder], load_file(tiny_encoder_dir / "model.safetensors")[encoder])
        else:
            with pytest.raises(UserError, match=message):
                build_encoder(options, tokenizer, EMPATHETIC_DIALOGUES.emotions)


@fault(
    Guard(CHECKPOINTS, "if not value.isfinite().all()", "if False"),
    Guard("empcause/extractor/inference.py", "if not (np.isfinite(emotion_probs).all() and", "if not (True or"),
    Guard("empcause/generator/inference.py", "if not np.isfinite(totals).all():", "if False:"),
    cause="weights that are not numbers, or so large that probabilities are not",
    place="loading a model, finding causes",
    promise="refused; a model of NaN gets no scores and no model card",
)  # fmt: skip
def test_models_of_nan(tmp_path, small_extractor, generator_dir):
    def spoil(tensors):
        tensors[min(tensors)].view(-1)[-1] = math.nan

    for folder, load in ((small_extractor, load_extractor), (generator_dir, load_generator)):
        with pytest.raises(UserError, match="not finite: "):
            load(damaged(folder, tmp_path / folder.name, spoil))
    model, tokenizer = load_extractor(small_extractor)
    with torch.no_grad():
        model.cause_head.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"The extractor's probabilities are not numbers \(NaN\)"):
        extract(model, tokenizer, TEXTS)
    generator, tokenizer = load_generator(generator_dir)
    with torch.no_grad():
        generator.transformer.ln_f.weight.fill_(3e38)
    encoded = encode_dialogue(tokenizer, Dialogue(("My dog died.",), (0,), "I'm sorry."), 60)
    with pytest.raises(UserError, match=r"The generator's probabilities are not numbers \(NaN\)"):
        response_nll(generator, tokenizer, [encoded])


@fault(
    Guard("empcause/extractor/configuration.py", "check_values(self, weights |", "dict(weights |"),
    Guard("empcause/generator/configuration.py", "check_values(self, ", "dict(x="),
    cause="a damaged or foreign config.json: NaN, negative numbers, unknown words, no encoder",
    place="loading an extractor or a generator",
    promise="one sentence that names the value",
)
def test_damaged_configurations(tmp_path, small_extractor, generator_dir):
    for number, (folder, load, name, value) in enumerate([
        (generator_dir, load_generator, "gamma", math.nan), (generator_dir, load_generator, "gamma", None),
        (generator_dir, load_generator, "cause_scope", "everything"), (generator_dir, load_generator, "cause_threshold", 7),
        (small_extractor, load_extractor, "automatic_top_k", -3), (small_extractor, load_extractor, "cause_from", "tail"),
        (small_extractor, load_extractor, "max_length", "long"),
    ]):  # fmt: skip
        copy = shutil.copytree(folder, tmp_path / str(number))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=rf"cannot be loaded: {name} is .*; expected "):
            load(copy)


@fault(
    Guard("empcause/generator/modeling.py", "values[new] = values[trained].mean(0)", "pass"),
    Guard(
        "empcause/generator/modeling.py", "token for token in trained if token < rows", "token for token in range(rows)"
    ),
    cause="the embedding has rows to spare, so that [SEP] has one without growing it",
    place="a generator's start from a pretrained model",
    promise="[SEP] starts at the mean of the tokens' rows, in embedding, head and its bias; spare rows do not count",
)
@pytest.mark.parametrize("spare", [0, 7])
def test_separator_starts_at_the_mean(tiny_llama_dir, spare):
    config_class, model_class = GENERATORS["llama"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.sep_token = None
    number = len(tokenizer)
    torch.manual_seed(0)
    model = model_class(
        config_class.from_pretrained(tiny_llama_dir, vocab_size=number + spare, tie_word_embeddings=False)
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[number:] = 100.0
    add_separator(model, tokenizer)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        expected = layer.weight[:number].mean(0)
        torch.testing.assert_close(layer.weight[tokenizer.sep_token_id], expected)


@fault(
    Guard("empcause/training/extractor.py", "if len(tokenizer) > rows:", "if False:"),
    Guard(
        "empcause/training/extractor.py",
        'if tokenizer("a", return_special_tokens_mask=True)',
        "if False and tokenizer()",
    ),
    cause="a tokenizer that is not the encoder's",
    place="training the extractor",
    promise="refused before the first step: too many tokens, or no class token to read the emotion from",
)
def test_tokenizer_of_another_model(tokenizer, small_extractor):
    model, own = load_extractor(small_extractor)
    check_tokenizer(own, model)
    with pytest.raises(UserError, match="writes no class token"):
        check_tokenizer(tokenizer, model)
    own.add_tokens(["Eigenwort"])
    with pytest.raises(UserError, match="has 401 tokens, the encoder 400"):
        check_tokenizer(own, model)


@fault(
    Guard("empcause/extractor/inference.py", "    if cut:\n", "    if False:\n"),
    Guard("empcause/data/sequences.py", "cut_turn = True", "pass"),
    cause="a text, a turn or a response is longer than the model reads",
    place="finding causes, encoding dialogues",
    promise="it is cut, which is said; words beyond have probability 0",
)
def test_texts_that_are_too_long(tokenizer, small_extractor, caplog, monkeypatch):
    said = []
    monkeypatch.setattr("empcause.extractor.inference.logger.warning", said.append)
    model, own = load_extractor(small_extractor)
    long = "My dog died and the house is silent now. " * 20
    found = extract(model, own, [long, "We won!"])
    assert said == ["1 of 2 texts have more than 128 tokens; no causes are found in the rest."]
    assert len(found[0].word_probs) == len(split_words(long))
    assert found[0].word_probs[0] > 0
    assert not found[0].word_probs[-20:].any()
    separated = AutoTokenizer.from_pretrained(tokenizer.name_or_path, sep_token="</s>")
    for response, cut in [("Oh.", False), (long, True)]:
        encoded = encode_dialogue(separated, Dialogue((long,), (0,), response), 40)
        assert (encoded.cut_turn, encoded.cut_response) == (True, cut)
        assert len(encoded.input_ids) == 40
    whole = encode_dialogue(separated, Dialogue(("Hi.",), (0,), "Oh."), 40)
    assert (whole.cut_turn, whole.cut_response) == (False, False)


# Kept causes


@pytest.fixture
def causes(small_extractor):
    model, tokenizer = load_extractor(small_extractor)
    return [found.causes.probs for found in extract(model, tokenizer, TEXTS)]


def same(found, expected):
    return all(np.allclose(one.probs, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


@fault(
    Guard(CAUSES, "digest.update(self.tokenizer.backend_tokenizer.to_str().encode())", "pass"),
    Guard(CAUSES, "digest.update(str(longest_input(self.model, self.tokenizer)).encode())", "pass"),
    cause="the extractor's tokenizer has changed since causes were kept",
    place="the cache of causes",
    promise="its causes are found anew",
)
def test_kept_causes_of_another_tokenizer(tmp_path, small_extractor):
    first = CauseCache(small_extractor, tmp_path)
    for number, change in enumerate(
        [lambda t: setattr(t.backend_tokenizer, "normalizer", Lowercase()), lambda t: setattr(t, "model_max_length", 9)]
    ):
        folder = shutil.copytree(small_extractor, tmp_path / str(number))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        assert CauseCache(folder, tmp_path).path != first.path
    assert CauseCache(shutil.copytree(small_extractor, tmp_path / "same"), tmp_path).path == first.path


@fault(
    Guard(CAUSES, "except Exception as error:", "except ZeroDivisionError as error:"),
    cause="a byte of the kept causes is flipped, or the file is cut",
    place="the cache of causes",
    promise="causes are found anew, with the right values",
)
def test_kept_causes_that_are_damaged(tmp_path, small_extractor, causes):
    cache = CauseCache(small_extractor, tmp_path)
    assert same(cache.get(TEXTS), causes)
    whole = cache.path.read_bytes()
    random = np.random.default_rng(0)
    for place in [*random.integers(0, len(whole), 12), len(whole) - 10]:
        content = bytearray(whole)
        content[place] ^= 0x41
        cache.path.write_bytes(content)
        assert same(CauseCache(small_extractor, tmp_path).get(TEXTS), causes)
    cache.path.write_bytes(whole[: len(whole) // 2])
    assert same(CauseCache(small_extractor, tmp_path).get(TEXTS), causes)


@fault(
    Guard(CAUSES, "except OSError as error:", "except ZeroDivisionError as error:"),
    cause="the cache folder cannot be written, or the disk is full",
    place="the cache of causes",
    promise="the work goes on without it and says so; the values are right",
)
def test_kept_causes_that_cannot_be_written(tmp_path, small_extractor, causes, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert same(CauseCache(small_extractor, tmp_path / "file").get(TEXTS), causes)
    said = []
    monkeypatch.setattr("empcause.generator.causes.logger.warning", said.append)
    monkeypatch.setattr(
        "empcause.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert same(CauseCache(small_extractor, tmp_path).get(TEXTS), causes)
    assert "No space left on device" in said[0]


@fault(
    Guard(CAUSES, "known = self._load() | self._known", "known = self._known"),
    cause="two runs find causes at the same time",
    place="the cache of causes",
    promise="what both found is kept",
)
def test_kept_causes_of_two_runs(tmp_path, small_extractor, monkeypatch):
    first, second = CauseCache(small_extractor, tmp_path), CauseCache(small_extractor, tmp_path)
    first.get(TEXTS[:2])
    second.get(TEXTS[2:])
    monkeypatch.setattr("empcause.generator.causes.extract", lambda *_, **__: pytest.fail("found again"))
    assert len(CauseCache(small_extractor, tmp_path).get(TEXTS)) == 3


# Divergence and resumption


@fault(
    Guard(COMMON, "return None if finite else step", "return None"),
    Guard(COMMON, "if not all(weights.isfinite().all() for weights in self.model.parameters()):", "if False:"),
    cause="a training diverges: its loss, or its weights, are not finite any more",
    place="`empcause train`",
    promise="it stops with the step and what to lower; the last checkpoint is finite and can be resumed from",
)
def test_divergence(tmp_path, monkeypatch):
    original = StageTrainer.compute_loss

    def exploding(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.inf if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", exploding)
        with pytest.raises(UserError, match=r"the loss is not finite at step 3\. Give a lower learning_rate"):
            train(arguments(tmp_path / "loss"))
    assert sorted(path.name for path in (tmp_path / "loss").glob("checkpoint-*")) == ["checkpoint-2"]

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                next(model.parameters()).data.fill_(math.nan)

    with pytest.raises(UserError, match="a weight is not finite at step 4"):
        train(arguments(tmp_path / "weights"), Spoil())
    assert sorted(path.name for path in (tmp_path / "weights").glob("checkpoint-*")) == ["checkpoint-2"]
    train(arguments(tmp_path / "weights", resume_from_checkpoint="true"))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "weights" / "model.safetensors").values())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A training that nothing disturbs, with an epoch of five batches in three steps."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(arguments(folder, **BATCHES))
    return folder


BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}


@fault(
    Guard(COMMON, "self.batches.set_epoch(int(state.epoch or 0))", "pass"),
    Guard("empcause/data/batching.py", "np.random.default_rng((self.seed, self.epoch))", "np.random.default_rng()"),
    cause="a training is ended at any step, between the batches of a step, or again and again",
    place="`empcause train --resume_from_checkpoint true`",
    promise="weights, optimizer, learning rate and losses are those of an unbroken run, bit for bit",
)
def test_resumed_is_unbroken(tmp_path, unbroken):
    assert max(history(unbroken))[0] == 9
    several = trainer(tmp_path)  # over several processes, batches are wrapped so that the Trainer does not reach them
    several.state.epoch = 1.5
    several.callback_handler.on_epoch_begin(several.args, several.state, several.control)
    assert several.batches.epoch == 1
    for kills in [
        [KilledAt(3)],
        [KilledAt(7)],
        [KilledAt(4, between=True)],
        [KilledAt(2), KilledAt(5), KilledAt(6, between=True), KilledAt(8)],
    ]:
        folder = tmp_path / "-".join(f"{kill.step}{'b' if kill.between else ''}" for kill in kills)
        for kill in kills:
            with pytest.raises(Killed):
                train(arguments(folder, resume_from_checkpoint="true" if folder.exists() else None, **BATCHES), kill)
        train(arguments(folder, resume_from_checkpoint="true", **BATCHES))
        assert weights(folder) == weights(unbroken)
        assert history(folder) == history(unbroken)
        assert history(folder, "eval_loss") == history(unbroken, "eval_loss")
        assert history(folder, "learning_rate") == history(unbroken, "learning_rate")
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            ends = [(each / "checkpoint-9" / file).read_bytes() for each in (folder, unbroken)]
            assert ends[0] == ends[1], file


@fault(
    Guard(COMMON, "if state.global_step < max_steps and", "if True or"),
    cause="a run is killed after its last checkpoint, or resumed after its end",
    place="`empcause train --resume_from_checkpoint true`",
    promise="it trains no further: weights, figures and number of steps are those of the run that ended",
)
def test_resumed_after_the_end(tmp_path):
    for number, options in enumerate([{"max_steps": 4}, {}, STOPPING]):
        folder = tmp_path / str(number)
        train(arguments(folder, **options))
        ended = weights(folder), history(folder), history(folder, "eval_loss")
        train(arguments(folder, resume_from_checkpoint="true", **options))
        assert (weights(folder), history(folder), history(folder, "eval_loss")) == ended
        shutil.rmtree(folder)
        with pytest.raises(Killed):
            train(arguments(folder, **options), Saved(ended[1][-1][0]))
        train(arguments(folder, resume_from_checkpoint="true", **options))
        assert (weights(folder), history(folder)) == ended[:2]


# Nothing gets better: after the second evaluation without a better figure, at step 6, the training stops.
STOPPING = {"learning_rate": 0.0, "num_train_epochs": 9, "early_stopping_patience": 2}


@fault(
    Guard(COMMON, 'default=True, metadata={"help": "a resumed run remembers', 'default=False, metadata={"help": "a'),
    cause="a run that has seen no better figure for a while is resumed",
    place="early stopping",
    promise="it stops when the unbroken run does",
)
def test_early_stopping_remembers(tmp_path):
    train(arguments(tmp_path / "whole", **STOPPING))
    with pytest.raises(Killed):
        train(arguments(tmp_path / "broken", **STOPPING), KilledAt(5))
    train(arguments(tmp_path / "broken", resume_from_checkpoint="true", **STOPPING))
    assert [max(history(tmp_path / name))[0] for name in ("whole", "broken")] == [6, 6]


@fault(
    Guard(COMMON, "check_same(resume_from_checkpoint, record.about if record else {}, self.about)", "pass"),
    Guard(COMMON, "if state.global_step > max_steps:", "if False:"),
    Guard(COMMON, "and Path(str(state.best_model_checkpoint)).name != best", "and False"),
    cause="a run is resumed with other options, other data, another model or version, or a smaller end",
    place="`empcause train --resume_from_checkpoint true`",
    promise="refused by name with the old and the new value; the checkpoints are untouched",
)
def test_resumed_as_another_training(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(arguments(folder), KilledAt(5))
    saved = weights(folder / "checkpoint-4")
    for other, message in [
        ({"seed": 4}, "was trained with seed 5, this run has 4"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size 4, this run has 3"),
        ({"learning_rate": 0.04}, "learning_rate 0.6, this run has 0.04"),
        ({"lr_scheduler_kwargs": {"patience": 3}}, "lr_scheduler_kwargs"),
        ({"max_steps": 3}, "beyond the end of this run, step 3"),
    ]:
        with pytest.raises(UserError, match=message):
            train(arguments(folder, resume_from_checkpoint="true", **other))
    with pytest.raises(Killed):
        train(arguments(tmp_path / "rare", load_best_model_at_end=False, save_steps=3), KilledAt(5))
    with pytest.raises(UserError, match="best model until then was not saved as checkpoint-2"):
        train(arguments(tmp_path / "rare", resume_from_checkpoint="true"))
    with pytest.raises(UserError, match="the model's n_embd 8, this run has 16"):
        train(arguments(folder, resume_from_checkpoint="true"), width=16)
    with monkeypatch.context() as patch:
        patch.setattr("faults.small_training.ITEMS", ITEMS[::-1])
        with pytest.raises(UserError, match="was trained with another set of training data"):
            train(arguments(folder, resume_from_checkpoint="true"))
    with monkeypatch.context() as patch:
        patch.setattr("empcause.training.fingerprint.version", lambda _: "9")
        with pytest.raises(UserError, match=r"version of empcause .*, this run has 9"):
            train(arguments(folder, resume_from_checkpoint="true"))
    assert weights(folder / "checkpoint-4") == saved


@fault(
    Guard(COMMON, "state.compute_steps(args, state.max_steps)", "pass"),
    Guard(COMMON, "self.args.eval_on_start = False", "pass"),
    Guard("empcause/training/fingerprint.py", 'free |= {"num_train_epochs", "max_steps"}', "pass"),
    cause="a run is resumed to train longer, log more often or work with more workers",
    place="`empcause train --resume_from_checkpoint true`",
    promise="it does so, and its weights are those of a run that had been told at once",
)
def test_resumed_with_harmless_changes(tmp_path, monkeypatch):
    train(arguments(tmp_path / "long", num_train_epochs=4, logging_steps=3, eval_on_start=True))
    with pytest.raises(Killed):
        train(arguments(tmp_path / "short", logging_steps=2, eval_on_start=True), KilledAt(5))
    options = {"num_train_epochs": 4, "logging_steps": 3, "dataloader_num_workers": 1, "eval_on_start": True}
    train(arguments(tmp_path / "short", resume_from_checkpoint="true", **options))
    assert weights(tmp_path / "short") == weights(tmp_path / "long")
    assert [step for step, _ in history(tmp_path / "short")] == [2, 4, 6, 9, 12]
    assert history(tmp_path / "short", "eval_loss") == history(tmp_path / "long", "eval_loss")
