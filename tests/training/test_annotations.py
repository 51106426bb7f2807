"""Which annotated situations an extractor learns from, and on which it is validated."""

import pytest

from empcause.data import load_annotations
from empcause.errors import UserError
from empcause.training.extractor import ExtractorTrainingArguments, split_annotations


def names(annotations):
    return {each.conv_id for each in annotations}


@pytest.fixture
def arguments(tiny_encoder_dir, tmp_path):
    def make(**options):
        return ExtractorTrainingArguments(
            output_dir=str(tmp_path), model_name_or_path=str(tiny_encoder_dir), supervision="supervised", **options
        )

    return make


def test_as_published_nothing_is_held_out(arguments):
    labelled, validation = split_annotations(arguments(data="sample", annotations="published"))
    assert names(labelled) == {
        name for split in ("train", "valid") for name in names(load_annotations(split, "sample"))
    }
    assert names(validation) == names(load_annotations("test", "sample"))
    labelled, validation = split_annotations(arguments(data="sample"))
    assert names(labelled) == names(load_annotations("train", "sample"))
    assert names(validation) == names(load_annotations("valid", "sample"))


def test_the_papers_number_of_situations(arguments, real_data):
    labelled, validation = split_annotations(arguments(data=str(real_data), annotations="published"))
    assert (len(labelled), len(validation)) == (2247, 2366)
    labelled, validation = split_annotations(arguments(data=str(real_data)))
    assert (len(labelled), len(validation)) == (1123, 1124)


def test_halves_of_what_is_not_halved(arguments):
    with pytest.raises(UserError, match="stratified_split halves the validation split"):
        arguments(data="sample", annotations="published", stratified_split=True)
