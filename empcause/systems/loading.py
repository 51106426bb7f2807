"""A system from its folder, by the type of model that is in it."""

import os
from collections.abc import Callable

from empcause.checkpoints import read_config
from empcause.errors import UserError
from empcause.extractor import CauseExtractorConfig
from empcause.generator import GENERATORS
from empcause.systems.own import ExtractorSystem, GeneratorSystem
from empcause.systems.protocol import System

Folder = str | os.PathLike[str]

# By `model_type` of a folder's config.json: what loads the system, from the folder and the one of the extractor beside it.
SYSTEMS: dict[str, Callable[[Folder, Folder], System]] = {
    CauseExtractorConfig.model_type: lambda folder, _: ExtractorSystem(folder),
    **{config.model_type: GeneratorSystem for config, _ in GENERATORS.values()},
}


def load_system(folder: Folder, extractor: Folder = "") -> System:
    """The system in a folder.

    Args:
        folder: of a finished training.
        extractor: folder of the extractor that finds the causes, for systems that need one.

    Raises:
        UserError: there is none, it is damaged, or no system is made of such a model.
    """
    found = str(read_config(folder, "model", "empcause train").get("model_type"))
    if found not in SYSTEMS:
        raise UserError(f"{folder} holds a model of type {found!r}, not a system to evaluate ({', '.join(SYSTEMS)}).")
    return SYSTEMS[found](folder, extractor)
