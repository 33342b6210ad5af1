"""A soft subspace: how hard each direction is drawn back to where it began. numpy only.

A direction q_j of a layer's inputs carries the energy c_j = q_j^T E[x x^T] q_j. What an update D does to what passed
through the layer costs about c_j |D q_j|^2 per direction, so D q_j is drawn back harder where c_j is large. Over a
whole course the strengths are

    s_j = pull * sqrt(c_j / mean(c))

and each step takes its share of them: after a step at p_t of the peak learning rate D q_j is divided by
1 + p_t s_j / (p_1 + ... + p_T). How long the course is drops out: of an update that is the same at every step
(1 - exp(-s_j)) / s_j is left in the end, a fifth at s_j = 5, after 48 steps as after 4,800.

This is the proximal step of the penalty p_t s_j / (2 (p_1 + ... + p_T)) |D q_j|^2, decoupled from the gradient as
AdamW decouples weight decay (L2-SP, arXiv 1802.01483; RecAdam, arXiv 2004.12651), in the directions of GPM (arXiv
2103.09762). The root is there because the gradient of D q_j grows as sqrt(c_j), and an optimizer like Adam has divided
the step by it already.
"""

import numpy as np

from fisherkit.floats import Floats


def pull_strengths(pull: float, energies: Floats, size: int) -> Floats:
    """Return s_j of the module.

    Args:
        pull: of a direction with the mean energy, over a whole course.
        energies: c_j [..., k], not negative, of the directions that are held.
        size: channels, of which k are held; the energy of the others counts as none in the mean.

    Returns:
        float32 [..., k]; zeros where there is no energy at all.
    """
    mean = energies.sum(axis=-1, keepdims=True, dtype=np.float64) / max(size, 1)
    relative = np.divide(energies, mean, out=np.zeros(energies.shape, np.float64), where=mean > 0)
    return np.asarray(pull * np.sqrt(relative), np.float32)


def pulled_share(strengths: Floats) -> Floats:
    """Return the share of a constant update that a whole course takes out of D q_j: 1 - (1 - exp(-s_j)) / s_j."""
    wide = strengths.astype(np.float64)
    left = np.divide(-np.expm1(-wide), wide, out=np.ones(wide.shape), where=wide > 0)
    return np.asarray(1 - left, strengths.dtype)
