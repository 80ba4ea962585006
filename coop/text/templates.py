"""Hand-written prompts: one template, or an ensemble of them."""

from open_clip import OPENAI_IMAGENET_TEMPLATES

from coop.errors import CoopError

# The seven that OpenAI chose by forward selection over the eighty (CLIP, notebooks/Prompt_Engineering_for_ImageNet).
IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
IMAGENET_80 = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
ENSEMBLES = {"imagenet7": IMAGENET_7, "imagenet80": IMAGENET_80}


def expand_template(template: str | None, dataset_template: str, dataset: str = "") -> tuple[str, ...]:
    """Return the templates that `template` stands for.

    `None` is the dataset's own; `imagenet7` and `imagenet80` are ensembles, to which the dataset's own is added for
    every dataset but ImageNet (as ZeroshotCLIP2 does); anything else is a template with `{}` for the class name.
    """
    if template is None:
        return (dataset_template,)
    if template in ENSEMBLES:
        own = () if dataset == "imagenet" else (dataset_template,)
        return ENSEMBLES[template] + own
    if "{}" not in template:
        raise CoopError(
            f"template={template!r}: give a text with {{}} where the class name goes, or one of {', '.join(ENSEMBLES)}"
        )
    return (template,)
