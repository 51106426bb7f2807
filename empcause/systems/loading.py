"""Loading a system from its folder by the type of the model that is in it."""

import os
from collections.abc import Callable

from empcause.checkpoints import read_config
from empcause.errors import UserError
from empcause.extractor import CauseExtractorConfig
from empcause.generator import GENERATORS
from empcause.systems.empdg import EmpDGConfig, EmpDGRanking, EmpDGSystem
from empcause.systems.gee import GEEConfig, GEESystem
from empcause.systems.own import ExtractorSystem, GeneratorSystem
from empcause.systems.protocol import System
from empcause.systems.recec import RecECConfig, RecECGreedy, RecECSystem

Folder = str | os.PathLike[str]

# By the `model_type` in a folder's config.json: what makes the system from this folder and the folder of an extractor.
SYSTEMS: dict[str, Callable[[Folder, Folder], System]] = {
    CauseExtractorConfig.model_type: lambda folder, _: ExtractorSystem(folder),
    EmpDGConfig.model_type: lambda folder, _: EmpDGSystem(folder),
    EmpDGRanking.model_type: lambda folder, _: EmpDGRanking(folder),
    **{config.model_type: GeneratorSystem for config, _ in GENERATORS.values()},
    RecECConfig.model_type: RecECSystem,
    RecECGreedy.model_type: RecECGreedy,
    GEEConfig.model_type: lambda folder, _: GEESystem(folder),
}


def load_system(folder: Folder, extractor: Folder = "") -> System:
    """Load the system that is in a folder.

    Args:
        folder: the folder of a finished model.
        extractor: the folder of the extractor that finds the causes, for systems that need one.

    Raises:
        UserError: there is no model, it is damaged, or its type is that of no system.
    """
    found = str(read_config(folder, "model", "empcause train").get("model_type"))
    if found not in SYSTEMS:
        raise UserError(f"{folder} holds a model of type {found!r}, not a system to evaluate ({', '.join(SYSTEMS)}).")
    return SYSTEMS[found](folder, extractor)
