"""Datasets: reading, few-shot sampling, images, preparing."""

from coop.data.dataset import Dataset, Split
from coop.data.few_shot import VALIDATIONS, Shots, check_validation, few_shot, few_shot_notes, few_shot_sample
from coop.data.images import check_images, open_rgb, read_error
from coop.data.layouts import read_dataset
from coop.data.spec import DatasetSpec, dataset_descriptions, describe_folder, load_description, parse_description
from coop.data.splits import load_split_file, read_sample_file, write_sample_file

__all__ = [
    "VALIDATIONS",
    "Dataset",
    "DatasetSpec",
    "Shots",
    "Split",
    "check_images",
    "check_validation",
    "dataset_descriptions",
    "describe_folder",
    "few_shot",
    "few_shot_notes",
    "few_shot_sample",
    "load_description",
    "load_split_file",
    "open_rgb",
    "parse_description",
    "read_dataset",
    "read_error",
    "read_sample_file",
    "write_sample_file",
]
