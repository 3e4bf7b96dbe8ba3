"""Small models of every family the compiler must read, each with a loss and one batch.

`MODELS` maps a name to a factory; `MODELS["resnet"]()` is an `Example`. Nothing is downloaded: weights and
batches are random, from a fixed seed, in float32. Dropout is zero throughout, so a second run reproduces
the first.
"""

from . import attention, convolution, dense, experts, pretrained, pretrained_variety, sequence, vision
from .example import Example, Factory, Inputs, LossFunction, loss, to

MODELS: dict[str, Factory] = {
    **dense.MODELS,
    **vision.MODELS,
    **convolution.MODELS,
    **attention.MODELS,
    **experts.MODELS,
    **sequence.MODELS,
    **pretrained.MODELS,
    **pretrained_variety.MODELS,
}

__all__ = ["MODELS", "Example", "Factory", "Inputs", "LossFunction", "loss", "to"]
