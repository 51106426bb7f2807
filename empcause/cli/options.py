"""Options of a command: one dataclass, filled from a YAML recipe and from the command line, which overrides it."""

import dataclasses
import difflib
import json
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from empcause.errors import UserError
from empcause.text import one_line

Options = TypeVar("Options")

# The settings of transformers' TrainingArguments that `--help` shows; the others are accepted as well.
COMMON_TRAINING_ARGUMENTS = frozenset(
    "output_dir resume_from_checkpoint num_train_epochs max_steps learning_rate weight_decay warmup_steps "
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing "
    "max_grad_norm bf16 seed data_seed logging_steps eval_strategy eval_steps save_strategy save_steps "
    "save_total_limit metric_for_best_model report_to torch_compile use_cpu".split()
)


# Greatest size of a recipe in bytes. Those of this package have a few hundred.
_LONGEST_RECIPE = 2**20


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option (`--learning_rate`, though `--learning-rate` works too) and its kind of value."""

    def _format_action_invocation(self, action: Action) -> str:
        name = action.option_strings[0]
        if action.nargs == 0:
            return name
        if action.choices:
            return f"{name} {{{','.join(map(str, action.choices))}}}"
        kind = "true|false" if action.nargs == "?" else action.metavar or getattr(action.type, "__name__", "value")
        return f"{name} {kind}"


class OptionParser(HfArgumentParser):
    """Command-line parser of one dataclass of options, which raises a `UserError` for wrong arguments."""

    def __init__(self, options_type: type, prog: str, description: str, show_all: bool = False) -> None:
        super().__init__(
            options_type,
            prog=prog,
            usage=f"{prog} [--config RECIPE] [--option value ...]",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config", metavar="RECIPE", help="YAML file with any of these options; the command line overrides it"
        )
        if issubclass(options_type, TrainingArguments):
            self.add_argument("--help_all", action="help", help="show every option of transformers' Trainer too")
            self._split_help(show_all)
        for action in self._actions:
            if isinstance(action.const, bool) and action.nargs == 0:
                action.help = SUPPRESS  # --no_x, the complement of --x

    def _split_help(self, show_all: bool) -> None:
        """Show the stage's own options first, then the Trainer's common ones; hide the Trainer's others unless `show_all`."""
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        trainer = self.add_argument_group("training (transformers' TrainingArguments)")
        for action in self._actions:
            if action.dest in inherited:
                self._optionals._group_actions.remove(action)
                trainer._group_actions.append(action)
                if action.dest not in COMMON_TRAINING_ARGUMENTS and not show_all:
                    action.help = SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")

    def option_names(self) -> list[str]:
        """Names of all options without their dashes, in the order of the dataclass."""
        return [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]


def parse_options(options_type: type[Options], arguments: Sequence[str], *, prog: str, description: str) -> Options:
    """Make an `options_type` of `arguments` (`--config recipe.yaml --key value ...`).

    The recipe overrides the dataclass' defaults, and the command line overrides the recipe.

    Args:
        options_type: a dataclass whose fields carry `metadata={"help": ...}`.
        arguments: the words after the command's name.
        prog: the command as the user types it, for `--help`.
        description: what the command does, for `--help`.

    Raises:
        UserError: an unknown key (the nearest valid name is given), a value of the wrong type, an unreadable recipe,
            or a combination that the dataclass itself refuses.
    """
    arguments = list(arguments)
    parser = OptionParser(options_type, prog, description, show_all="--help_all" in arguments)
    recipe = _config_path(arguments)
    if recipe is not None:
        hints = get_type_hints(options_type)
        optional = {name for name, hint in hints.items() if NoneType in get_args(hint)}
        arguments = _recipe_arguments(Path(recipe), parser, optional) + arguments
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0]
        if not name.startswith("--"):
            raise UserError(f"{prog} does not know what to do with {name!r}; options are written --name value.")
        raise UserError(f"{prog} has no option {name}{_nearest(name[2:].split('=')[0], parser.option_names(), '--')}")
    values = {key: value for key, value in vars(namespace).items() if key != "config"}
    try:
        return options_type(**values)
    except (ValueError, ImportError) as error:
        raise UserError(f"{prog}: {error}") from error


def _config_path(arguments: Sequence[str]) -> str | None:
    for position, word in enumerate(arguments):
        if word == "--config":
            if position + 1 == len(arguments):
                raise UserError("--config needs the path of a YAML recipe.")
            return arguments[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def _recipe_arguments(path: Path, parser: OptionParser, optional: Collection[str]) -> list[str]:
    """Turn the recipe's keys and values into command-line words, so that both are parsed by the same rules.

    A value counts as it is written: `no` is the word, not False. An empty value (null) is None, for options that may be None.
    """
    nodes, construct = _read_recipe(path)
    known = parser.option_names()
    words: list[str] = []
    seen = set()
    for key_node, node in nodes:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key not in known or key == "config":
            raise UserError(f"The recipe {path} has an unknown key {key!r}{_nearest(str(key), known)}")
        if key in seen:
            raise UserError(f"The recipe {path} has the key {key!r} twice; give it once.")
        seen.add(key)
        if isinstance(node, yaml.MappingNode):
            words.append(f"--{key}={json.dumps(construct(node, deep=True), default=str)}")
        elif isinstance(node, yaml.SequenceNode):
            if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
                raise UserError(f"The recipe {path}: {key} is a list of lists; a list of plain values is expected.")
            words += [f"--{key}", *(item.value for item in node.value)]
        elif not node.tag.endswith(":null"):
            words.append(f"--{key}={node.value}")
        elif key in optional:
            parser.set_defaults(**{key: None})
        else:
            raise UserError(f"The recipe {path}: {key} has no value; give one, or leave the line out.")
    return words


def _read_recipe(path: Path) -> tuple[list[tuple[yaml.Node, yaml.Node]], Callable[..., Any]]:
    """Read a recipe: nodes of its keys and values as they are written, and the function that makes Python objects of them."""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_RECIPE + 1)
        if len(content) > _LONGEST_RECIPE:
            raise UserError(f"The recipe {path} has more than {_LONGEST_RECIPE:,} bytes, so that it is no recipe.")
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"The recipe {path} is not valid YAML: {one_line(error)}.") from error
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null")):
        return [], loader.construct_object
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        raise UserError(f"The recipe {path} must be a list of `key: value` lines, not {found}.")
    return root.value, loader.construct_object


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else "."
