"""Datasets: reading, few-shot sampling, images, preparing."""

from coop.data.dataset import Dataset, Split
from coop.data.description import dataset_descriptions, load_description
from coop.data.few_shot import VALIDATIONS, Shots, check_validation, few_shot, few_shot_notes, few_shot_sample
from coop.data.images import check_images, open_rgb, read_error
from coop.data.reading import read_dataset
from coop.data.sample_file import read_sample_file, write_sample_file
from coop.data.split_file import load_split_file

__all__ = [
    "VALIDATIONS",
    "Dataset",
    "Shots",
    "Split",
    "check_images",
    "check_validation",
    "dataset_descriptions",
    "few_shot",
    "few_shot_notes",
    "few_shot_sample",
    "load_description",
    "load_split_file",
    "open_rgb",
    "read_dataset",
    "read_error",
    "read_sample_file",
    "write_sample_file",
]
