"""The tables of the paper as data: which systems stand in which row, how these are trained at each size, what is printed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import empcause
from empcause.evaluation.tables import (
    CAUSE_COLUMNS,
    PUBLISHED_CAUSES,
    PUBLISHED_EMOTION_ACCURACY,
    PUBLISHED_RESPONSES,
    RESPONSE_COLUMNS,
)

Options = Mapping[str, Any]

# In option values: folders of tiny models that a smoke run makes for itself (`empcause.reproduction.pretrained`).
TINY_ENCODER, TINY_DECODER = "{encoder}", "{decoder}"
# Number of replies over which the paper's Distinct was computed, as far as it is known (from EmpDG's published replies).
REPLIES = 2713


@dataclass(frozen=True)
class Size:
    """How large a reproduction is.

    Attributes:
        data: what `--data` is if it is not given; None: $EMPCAUSE_DATA_DIR.
        responses: options of `empcause evaluate generator` at this size.
    """

    data: str | None
    responses: Options


SIZES = {
    # Every row in seconds, on the embedded sample.
    "smoke": Size(
        data="sample",
        responses={
            "max_samples": 40,
            "max_generated": 24,
            "max_new_tokens": 12,
            "bertscore_model": TINY_ENCODER,
            "bertscore_layer": 2,
        },
    ),
    # Every row on two CPU cores, over small pretrained models.
    "small": Size(
        data=None,
        responses={
            "max_generated": REPLIES,
            "bertscore_model": "sentence-transformers/all-MiniLM-L6-v2",
            "bertscore_layer": 5,
        },
    ),
    # The paper's models and schedules.
    "full": Size(data=None, responses={"max_generated": REPLIES, "bertscore_model": "roberta-large"}),
}


@dataclass(frozen=True)
class Training:
    """How a system is trained at one size.

    Attributes:
        recipe: name of the recipe, without its ending.
        options: options that override the recipe's.
    """

    recipe: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedSystem:
    """A system of the tables.

    Attributes:
        stage: what `empcause train` calls it.
        full, small, smoke: its training at each size. What is not in the full one's options is not the paper's.
        extractor: the system that finds its causes, for one that needs it beside itself.
        own_words: whether its vocabulary is one of words that are counted in the training data.
        lexicon: whether the words that it ranks come from a lexicon of emotion words.
    """

    stage: str
    full: Training
    small: Training
    smoke: Training
    extractor: str | None = None
    own_words: bool = False
    lexicon: bool = False


_MINILM = {"model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2", "learning_rate": 1e-4, "num_train_epochs": 3}
_TINY_EXTRACTOR = {
    "model_name_or_path": TINY_ENCODER,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
}
_TINY_GENERATOR = {
    "model_name_or_path": TINY_DECODER,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 4,
    "max_eval_samples": 40,
}


def _extractor(recipe: str, **small: Any) -> TrainedSystem:
    return TrainedSystem(
        stage="extractor",
        full=Training(recipe),
        small=Training(recipe, _MINILM | small),
        smoke=Training(recipe, _TINY_EXTRACTOR),
    )


def _generator(recipe: str, gamma: float) -> TrainedSystem:
    return TrainedSystem(
        stage="generator",
        full=Training(recipe),
        small=Training("generator-smollm2", {"gamma": gamma}),
        smoke=Training(recipe, _TINY_GENERATOR),
        extractor="ece",
    )


# By the name that the folder of the trained model has. A new system is one more entry here, and a row below.
SYSTEMS = {
    "ece": _extractor("extractor"),
    "unsupervised": _extractor("extractor-unsupervised"),
    "supervised": _extractor("extractor-supervised", num_train_epochs=6),
    "supervised-published": _extractor("extractor-supervised-published", num_train_epochs=6),
    "no-aux": _extractor("extractor-no-aux"),
    "attention": _extractor("extractor-attention"),
    "gpt2": _generator("generator-gpt2", gamma=0.0),
    "ecg": _generator("generator", gamma=1.0),
    "empdg": TrainedSystem(
        stage="empdg",
        full=Training("empdg"),
        small=Training("empdg"),
        smoke=Training(
            "empdg",
            {
                "hidden_size": 32,
                "attention_size": 8,
                "filter_size": 16,
                "warmup_steps": 10,
                "max_steps": 40,
                "eval_steps": 20,
                "save_steps": 20,
                "eval_delay": 0,
                "learning_rate": 5e-3,
                "max_eval_samples": 40,
            },
        ),
        own_words=True,
        lexicon=True,
    ),
    "recec": TrainedSystem(
        stage="recec",
        full=Training("recec"),
        small=Training("recec-small"),
        smoke=Training(
            "recec-small",
            {
                "hidden_size": 32,
                "attention_size": 32,
                "ffn_size": 64,
                "learning_rate": 5e-3,
                "reasoner_learning_rate": 5e-3,
                "num_train_epochs": 2,
                "reasoner_epochs": 2,
                "max_eval_samples": 40,
            },
        ),
        own_words=True,
    ),
    "gee": TrainedSystem(
        stage="gee",
        full=Training("gee"),
        small=Training("gee-smollm2"),
        smoke=Training(
            "gee-smollm2",
            {"model_name_or_path": TINY_DECODER, "learning_rate": 1e-3, "per_device_train_batch_size": 16},
        ),
    ),
}


def recipe_path(name: str) -> Path:
    """Path of a recipe by its name without the ending: in the installed package, or in the clone that it is imported from."""
    package = Path(empcause.__file__).parent
    inside = package / "recipes" / f"{name}.yaml"
    return inside if inside.exists() else package.parent / "recipes" / f"{name}.yaml"


def training_of(system: str, size: str) -> Training:
    """How a system is trained at a size."""
    return {"full": SYSTEMS[system].full, "small": SYSTEMS[system].small, "smoke": SYSTEMS[system].smoke}[size]


def effective_options(training: Training) -> dict[str, Any]:
    """The options of a training: those of its recipe, overridden by those of the size."""
    with recipe_path(training.recipe).open(encoding="utf-8") as file:
        return {"recipe": training.recipe} | (yaml.safe_load(file) or {}) | dict(training.options)


@dataclass(frozen=True)
class Row:
    """A row of a table: a trained system, or a ranking of words that needs none.

    Attributes:
        title: what the row is called.
        printed: name of the paper's row among the published figures; empty for a row that the paper does not have.
        system: the trained system; empty for a ranking without one.
        ours: whether it is the method's own row, and not one to compare it with.
        selected_on_test: whether its model was selected on the test split, so that it is no baseline.
        views: the config.json of folders made by hand, which name the system's folder under the system's name and say what is
            otherwise; the row's figures are means over them. Empty: the system as it was trained.
        without: columns in which it has no figure of its own, because another system beside it finds the emotions, or because
            they are those of another row.
    """

    title: str
    printed: str = ""
    system: str = ""
    ours: bool = False
    selected_on_test: bool = False
    views: tuple[Options, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it shows.
        task: whose evaluation measures it, "extractor" or "generator".
        rows: its rows, by the name that options and files have for them.
        columns: names of its figures; those that the paper prints come first, in its order.
    """

    title: str
    task: str
    rows: Mapping[str, Row]
    columns: tuple[str, ...]

    def printed(self, row: Row) -> dict[str, float]:
        """The figures that the paper prints in a row, by column."""
        if not row.printed:
            return {}
        if self.task == "extractor":
            found = dict(zip(CAUSE_COLUMNS, PUBLISHED_CAUSES["EmoCause"][row.printed], strict=True))
        else:
            figures = PUBLISHED_RESPONSES["EmpatheticDialogues"][row.printed]
            found = dict(zip(RESPONSE_COLUMNS, figures, strict=True))
            found["emotion_accuracy"] = PUBLISHED_EMOTION_ACCURACY[row.printed]
        return {name: value for name, value in found.items() if value is not None}


# Rankings of words that need no system; table 5 shows what a system has to be better than, and the best that is possible.
RANDOM_WORDS, FIRST_WORDS, CEILING = "random-words", "first-words", "ceiling"

# Mean number of words that a system ranks in a situation, which says nothing about how good they are.
PREDICTED_WORDS = "predicted_words"

# Random orders of the words that a trained system ranks; one order alone would move the recalls by chance.
ORDERS = range(5)


def _orders(**ranking: Any) -> tuple[Options, ...]:
    """Views of EmpDG that rank words at random, one for each order."""
    ranking = {"model_type": "empdg_ranking", "ranking": "random"} | ranking
    return tuple(ranking | {"ranking_seed": seed} for seed in ORDERS)


TABLES = {
    "table5": Table(
        title="emotions and causes of situations, of all systems",
        task="extractor",
        rows={
            "empdg": Row("EmpDG, emotion words at random", "EmpDG (paper)", "empdg", views=_orders()),
            "empdg-filled": Row(
                "EmpDG, then other content words at random",
                "EmpDG (paper)",
                "empdg",
                views=_orders(fill=True),
            ),
            "empdg-attention": Row(
                "EmpDG, content words by attention",
                "EmpDG (paper)",
                "empdg",
                views=({"model_type": "empdg_ranking", "ranking": "context"},),
            ),
            "attention": Row("RoBERTa_Att", "RoBERTa_Att (paper)", "attention"),
            "gee": Row("GEE", "GEE (paper)", "gee"),
            "ece": Row("ECE (ours)", "ECE, RoBERTa-base (paper)", "ece", ours=True),
            RANDOM_WORDS: Row("random content words"),
            FIRST_WORDS: Row("first content words"),
            CEILING: Row("perfect ranking"),
        },
        columns=(*CAUSE_COLUMNS, PREDICTED_WORDS),
    ),
    "table6": Table(
        title="the extractor and its ablations",
        task="extractor",
        rows={
            "unsupervised": Row("ECE, unsupervised", "ECE, unsupervised (paper)", "unsupervised"),
            "supervised": Row("ECE, supervised", "ECE, supervised (paper)", "supervised"),
            "supervised-published": Row(
                "ECE, supervised, selected on test",
                "ECE, supervised (paper)",
                "supervised-published",
                selected_on_test=True,
            ),
            "no-aux": Row("ECE, without L_aux", "ECE, without L_aux (paper)", "no-aux"),
            "ece": Row("ECE, semi-supervised (ours)", "ECE, RoBERTa-base (paper)", "ece", ours=True),
        },
        columns=CAUSE_COLUMNS,
    ),
    "table7": Table(
        title="scores of responses and replies, of all systems",
        task="generator",
        rows={
            "empdg": Row("EmpDG", "EmpDG (paper)", "empdg"),
            "recec": Row("RecEC", "RecEC (paper)", "recec"),
            "recec-greedy": Row(
                "RecEC, greedy replies",
                system="recec",
                views=({"model_type": "recec_greedy"},),
                without=("perplexity", "bits_per_byte", "emotion_accuracy"),
            ),
            "gpt2": Row("GPT2", "GPT2 (paper)", "gpt2", without=("emotion_accuracy",)),
            "ecg": Row("ECG (ours)", "ECG (paper)", "ecg", ours=True),
        },
        columns=(*RESPONSE_COLUMNS, "emotion_accuracy", "bits_per_byte"),
    ),
}

# Figures of which a lower one is better.
LOWER_IS_BETTER = ("perplexity", "bits_per_byte")
