"""Zero-shot classification by meaning: a text goes to the label whose description and examples lie nearest to it.

Prototypes are means of sentence vectors (Snell et al., "Prototypical Networks", 2017), computed by an encoder that was
never trained on the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quern.inference.protocol import Label

#: Cosines of sentence encoders lie close together; this spreads them into shares that mean something.
TEMPERATURE = 0.05


def label_texts(label: Label) -> list[str]:
    """The texts that stand for a label: its name with what it means, and each example."""
    return [f"{label.name}: {label.description}" if label.description else label.name, *label.examples]


def shares(text: NDArray[np.float32], labels: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Each label's share of the belief; they add up to 1.

    Args:
        text: the text's vector (dimensions), of length 1.
        labels: for each label the vectors of its texts (texts × dimensions), of length 1.
    """
    prototypes = np.stack([vectors.mean(axis=0, dtype=np.float64) for vectors in labels])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    logits = prototypes @ text.astype(np.float64) / TEMPERATURE
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), np.float64)
